"""PyTorch's side of gpu.py: the same network in plain torch, autocast, channels last.

A job is "train:bfloat16:16:eager", "infer:tf32:1:compile" and so on; see `gpu_jobs.py`.
torch.compile gets the network; the loss stays eager, as its shapes depend on the data.
"""

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_jobs
import numpy as np
import torch
import torch_plain
import torch_train


class Side:
    """The jobs, and what they share."""

    def __init__(self, case: Path, args: Any):
        self.args, self.device = args, torch.get_default_device()
        self.config = json.loads((case / "config.json").read_text())
        with np.load(case / "arrays.npz") as arrays:
            self.arrays = dict(arrays)
        with np.load(case / "weights.npz") as weights:
            self.weights = dict(weights)

    def do(self, job: str) -> dict[str, Any]:
        """Returns the figures of a job."""
        kind, precision, batch, form = job.split(":")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = getattr(self, kind)(int(batch), form, self.cast(precision))
        if self.device.type == "cuda":
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return found

    def cast(self, precision: str) -> Callable[[], Any]:
        """Returns what makes the context that a step computes in."""
        if precision == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
            return contextlib.nullcontext
        return lambda: torch.autocast(self.device.type, torch.bfloat16)

    def train(self, batch: int, form: str, cast: Callable) -> dict[str, Any]:
        """Forward, loss of given targets, backward, update."""
        network, state, image = self.network(batch, form)
        freeze_at = self.config["model"]["backbone"]["freeze_at"]
        named = torch_train.trainable(state, freeze_at)
        for value in named.values():
            value.requires_grad_()
        sgd = torch_train.optimizer(named, self.config)
        names = ("cate", "pair_cell", "pair_instance", "pair_weight", "num_cells")
        targets = {n: self.put(self.arrays[f"target_{n}"][:batch]) for n in names}
        targets["masks"] = self.put(self.arrays["masks"][:batch]).float()

        losses = []

        def run() -> None:
            with cast():
                outputs = network(image())
            outputs = tuple(x.float() for x in outputs)
            dice, focal = torch_plain.solov2_loss(outputs, targets, self.config)
            sgd.zero_grad(set_to_none=True)
            (dice + focal).backward()
            sgd.step()
            self.wait()
            if not losses:
                losses.append((dice + focal).item())

        found = self.timed(run, batch)
        return {"first_loss": losses[0], **found}

    def infer(self, batch: int, form: str, cast: Callable) -> dict[str, Any]:
        """The network alone: there is no post-processing on this side."""
        network, _, image = self.network(batch, form)

        def run() -> None:
            with torch.inference_mode(), cast():
                network(image())
            self.wait()

        return self.timed(run, batch)

    def network(self, batch: int, form: str) -> tuple[Callable, dict, Callable]:
        """Returns (network, its weights, a function that makes its input)."""
        state = {name: self.put(value) for name, value in self.weights.items()}
        for name, value in state.items():
            if value.ndim == 4:
                state[name] = value.contiguous(memory_format=torch.channels_last)
        network = torch_plain.Network(self.config, state)
        fields = ("image", "image_size")
        arrays = {name: self.arrays[name][:batch] for name in fields}
        config, layout = self.config, torch.channels_last
        image = torch_train.prepare(config, arrays, layout)
        if self.device.type != "cpu":  # `prepare` reads from the host's memory
            pixels = image().to(self.device)
            image = lambda: pixels  # noqa: E731
        call = torch.compile(network.__call__) if form == "compile" else network
        return call, state, image

    def timed(self, run: Callable[[], None], batch: int) -> dict[str, Any]:
        """Returns seconds and images a second; the first call is apart."""
        first = gpu_jobs.once(run)
        seconds = gpu_jobs.repeat(run, self.args.seconds)
        rate = batch / seconds["median"]
        return {"first_call_s": first, "seconds": seconds, "images_per_s": rate}

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Returns a copy on the device."""
        return torch.from_numpy(array.copy()).to(self.device)

    def wait(self) -> None:
        """Returns when the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Does the jobs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="without a GPU, for tests")
    args = gpu_jobs.parse(parser)
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device")
    torch.set_default_device("cpu" if args.cpu else "cuda")
    torch.backends.cudnn.benchmark = True
    device = "CPU" if args.cpu else torch.cuda.get_device_name()
    about = {"torch": torch.__version__, "device": device}
    print(json.dumps({"about": about}), flush=True)
    gpu_jobs.work(Side(args.case, args).do, args)


if __name__ == "__main__":
    main()
