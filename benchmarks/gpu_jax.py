"""Our side of gpu.py: does the jobs it is given and prints a json line for each.

A job is "matmul:bfloat16", "train:bfloat16:16", "infer:tf32:1", "post:bfloat16" or
"profile:bfloat16:16". Once the deadline leaves no time for one, it is skipped with a
line that says so.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_case
import gpu_jobs
import jax
import jax.numpy as jnp
import numpy as np
from profile_costs import profile
from step_case import StepCase, train_flops

from solov2_jax import ops
from solov2_jax.config import read_config
from solov2_jax.inference.programs import paste_detections
from solov2_jax.models import build_model
from solov2_jax.postprocess import detect
from solov2_jax.structs import Outputs

DTYPES = {"bfloat16": "bfloat16", "tf32": "float32"}


class Side:
    """The jobs, and what they share."""

    def __init__(self, case: Path, args: Any):
        self.config, self.args = read_config(case / "config.json"), args
        with np.load(case / "arrays.npz") as arrays:
            self.arrays = {k: v for k, v in arrays.items() if "target_" not in k}
        self.rates: dict[str, float] = {}
        self._last: tuple[Any, ...] = ()  # the latest train step, for its profile
        height, width = self.arrays["image"].shape[1:3]
        self.flops = train_flops(self.config, height, width)

    def do(self, job: str) -> dict[str, Any]:
        """Returns the figures of a job."""
        kind, precision, *batch = job.split(":")
        config = self.config.copy_and_resolve_references()
        config.model.dtype = DTYPES[precision]
        self.config_now, self.precision = config, precision
        with jax.default_matmul_precision("tensorfloat32"):
            return getattr(self, kind)(*map(int, batch))

    def matmul(self) -> dict[str, Any]:
        """The chip's rate, by products of large square matrices."""
        n = self.args.matmul
        x = jnp.ones((n, n), DTYPES[self.precision])
        multiply = jax.jit(lambda a, b: a @ b)
        seconds = gpu_jobs.repeat(lambda: jax.block_until_ready(multiply(x, x)), self.args.seconds)
        self.rates[self.precision] = 2 * n**3 / seconds["median"]
        return {"n": n, "seconds": seconds, "flops_per_s": self.rates[self.precision]}

    def train(self, batch: int) -> dict[str, Any]:
        """A train step: forward, loss with its targets, backward, update."""
        run, compiled, times = self._train(batch)
        loss = float(run()["loss"])
        seconds = gpu_jobs.repeat(run, self.args.seconds)
        found = self._figures(batch, self.flops["step"], seconds, compiled, times)
        return {"first_loss": loss, **found}

    def profile(self, batch: int) -> dict[str, Any]:
        """The three largest costs of a train step."""
        run, compiled, _ = self._train(batch)
        run()
        return profile(run, compiled.as_text())

    def infer(self, batch: int) -> dict[str, Any]:
        """The network with its post-processing, to soft masks on the device."""
        network, post, image = self._network(batch)
        run, compiled, times = ahead(lambda v, x: post(network(v, x)), self._variables(), image)
        seconds = gpu_jobs.repeat(run, self.args.seconds)
        return self._figures(batch, self.flops["forward"], seconds, compiled, times)

    def post(self) -> dict[str, Any]:
        """Post-processing alone, and pasting the kept masks on the host."""
        network, post, image = self._network(1)
        outputs = jax.jit(network)(self._variables(), image)
        run, _, times = ahead(post, outputs)
        detections = run()
        kept = np.flatnonzero(detections.valid[0])
        size = self.arrays["image_size"][0]
        threshold = self.config.test.mask_threshold

        def paste() -> None:
            soft = detections.soft_masks
            paste_detections(soft, 0, kept, size, size, threshold)

        return {
            "candidates": int(detections.num_candidates[0]),
            "kept": len(kept),
            "detect": gpu_jobs.repeat(run, self.args.seconds),
            "paste_to_host": gpu_jobs.repeat(paste, self.args.seconds),
            **times,
        }

    def _train(self, batch: int) -> tuple[Callable, Any, dict[str, float]]:
        if self._last[:2] == (self.precision, batch):
            return self._last[2:]
        self._last = ()  # frees its memory
        case = StepCase(self.config_now)
        fields = case.put({k: v[:batch] for k, v in self.arrays.items()})
        state = case.state_of(gpu_case.variables(case.model))
        start = time.perf_counter()
        lowered = case.step.lower(state, fields)
        traced = time.perf_counter()
        compiled = lowered.compile()
        times = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}

        def run() -> Any:
            nonlocal state
            state, metrics = jax.block_until_ready(compiled(state, fields, case.key))
            return metrics

        self._last = (self.precision, batch, run, compiled, times)
        return run, compiled, times

    def _network(self, batch: int) -> tuple[Callable, Callable, jax.Array]:
        config = self.config_now
        model = build_model(config, config.model.num_classes)
        sizes, input_ = self.arrays["image_size"][:batch], config.input
        mean, std = tuple(input_.mean), tuple(input_.std)
        # All of at least 100 candidates are kept, whatever the scores do.
        options = {**config.test, "update_threshold": 0.0}
        grids = tuple(config.model.ins_head.num_grids)

        def network(variables: Any, image: jax.Array) -> Outputs:
            return model.apply(variables, ops.normalize_image(image, sizes, mean, std))

        def post(outputs: Outputs) -> Any:
            return detect(outputs, num_grids=grids, **options)

        return network, post, jnp.asarray(self.arrays["image"][:batch])

    def _variables(self) -> Any:
        config = self.config_now
        model = build_model(config, config.model.num_classes)
        return jax.device_put(gpu_case.variables(model))

    def _figures(self, batch, flops, seconds, compiled, times) -> dict[str, Any]:
        rate = flops * batch / seconds["median"]
        share = rate / self.rates[self.precision] if self.precision in self.rates else 0
        memory = compiled.memory_analysis()
        used = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        used += memory.output_size_in_bytes - memory.alias_size_in_bytes
        stats = jax.devices()[0].memory_stats() or {}
        return {
            "seconds": seconds,
            "images_per_s": batch / seconds["median"],
            "flops_per_s": rate,
            "share_of_matmul": share or None,
            "program_gb": used / 1e9,
            "process_peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9 or None,
            **times,
        }


def ahead(fun: Callable, *args: Any) -> tuple[Callable, Any, dict[str, float]]:
    """Returns (call to the end, compiled program, seconds of tracing and compiling)."""
    start = time.perf_counter()
    lowered = jax.jit(fun).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    times = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
    return lambda: jax.block_until_ready(compiled(*args)), compiled, times


def main() -> None:
    """Does the jobs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = gpu_jobs.parse(parser)
    device = jax.devices()[0]
    about = {"jax": jax.__version__, "device": device.device_kind}
    print(json.dumps({"about": about | {"platform": device.platform}}), flush=True)
    gpu_jobs.work(Side(args.case, args).do, args)


if __name__ == "__main__":
    main()
