"""The network, ours beside others: forward, whole image, by stage, train step, post-processing.

    python benchmarks/network.py network --config configs/r50_3x.py --size 800 1333
    python benchmarks/network.py image --peers channels_last --allocator tuned
    python benchmarks/network.py stages --peers eager channels_last
    python benchmarks/network.py train --size 512 512 --batch 2 --peers channels_last
    python benchmarks/network.py postprocess --candidates 500

network: normalised pixels to raw outputs. image: uint8 pixels of the network's size to
masks of that size. stages: each part of it, a program of its own. train: forward, loss
with its targets, backward and update, all from the same weights and objects. postprocess:
from outputs with exactly so many candidates to the pasted masks. The peers need an
environment (README.md); `--peers` with no name measures ours alone, which goes through the
package's public functions as a user does. `--config.model.dtype=bfloat16` and the like as
in training.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cases
import harness
import jax
import jax.monitoring
import numpy as np
from flax import linen as nn
from harness import Stages, Work

from solov2_jax import ops
from solov2_jax.config import read_config, split_overrides
from solov2_jax.distributed import put_batch
from solov2_jax.inference.predictor import Predictor
from solov2_jax.inference.programs import DetectOptions
from solov2_jax.models import build_model
from solov2_jax.nms import point_nms
from solov2_jax.postprocess import detect
from solov2_jax.structs import Outputs

PEER_SCRIPT = harness.HERE / "torch_peer.py"
FIELDS = ("cate", "kernel", "mask_feat")
# A part of the network -> the parts whose outputs it needs.
PARTS = {"backbone": (), "fpn": ("backbone",), "ins_head": ("fpn",), "mask_head": ("fpn",)}
# Peer -> its name in results and the kinds of work that it does. mmdetection runs with the
# channels first ("eager") or last, with its batch norms folded, or compiled.
_ALL = ("network", "image", "stages", "train", "postprocess")
PEERS = {
    "eager": ("mmdetection", _ALL),
    "channels_last": ("mmdetection, channels last", _ALL),
    "fused": ("mmdetection, channels last, norms folded", _ALL[:3]),
    "compile": ("mmdetection, torch.compile", _ALL[:2]),
    "onnxruntime": ("ONNX Runtime", _ALL[:1]),
    "openvino": ("OpenVINO", _ALL[:1]),
}
# How far from ours what a program found may be: all do the same work.
_MASKS = {"detections": 0.0, "classes": 0.03, "mask_pixels": 0.01}
TOLERANCES: dict[str, dict[str, float]] = {
    "network": {"cate": 1e-3, "kernel": 1e-3, "mask_feat": 1e-3},
    "image": {"candidates": 0.01, **_MASKS},
    "stages": {},
    "train": {"loss_ins": 1e-3, "loss_cate": 1e-3, "num_pairs": 0.0},
    "postprocess": {"candidates": 0.0, **_MASKS},
}
RUNS = {"train": 6, "postprocess": 20}


def main(argv: list[str]) -> None:
    """Measures what the arguments ask for, or is our program."""
    args, config = parse(argv)
    if args.case:
        harness.serve(lambda: KINDS[args.what](Case(args.case)))
        return
    script, what = {
        "train": ("train_step", "step"),
        "postprocess": ("postprocess", f"{args.candidates} candidates"),
    }.get(args.what, ("infer", args.what))
    work = {"script": script, "what": what, "config": args.config, "overrides": args.overrides}
    work |= {"size": list(args.size), "batch": args.batch}
    work |= {"image": "given" if args.image else "made"}
    parts = {"train": ["train"], "postprocess": ["postprocess", str(args.candidates)]}
    h, w = args.size
    name = [*parts.get(args.what, ["infer", args.what]), Path(args.config).stem, f"{h}x{w}"]
    name += [f"b{args.batch}", args.allocator]
    tolerances = dict(TOLERANCES[args.what])
    if config.model.dtype != "float32":  # 8 bits instead of 24
        name.append(config.model.dtype)
        tolerances = {k: max(v, 0.02) for k, v in tolerances.items() if k.startswith("loss")}
    with tempfile.TemporaryDirectory() as folder:
        cases.write_case(Path(folder), config, make_arrays(args, config))
        command = [sys.executable, __file__, args.what, "--case", folder]
        programs = [harness.Program("ours", command)]
        programs += [peer_program(p, args.what, Path(folder), args.peer_dir) for p in args.peers]
        harness.measure("-".join(name), work, programs, args, tolerances)


def parse(argv: list[str]) -> tuple[Any, Any]:
    """Returns (arguments, config with the "--config.key=value" overrides)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=list(TOLERANCES))
    add("--candidates", type=int, default=500, help="of postprocess")
    add("--config", default="configs/r50_3x.py")
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1333))
    add("--batch", type=int, default=1)
    add("--image", help="a picture to use instead of the generated one")
    add("--peers", nargs="*", choices=list(PEERS), default=["channels_last"])
    add("--peer_dir", type=Path, default=harness.ROOT / ".cache" / "peer")
    add("--case", type=Path, help=argparse.SUPPRESS)
    harness.add_arguments(parser, runs=0)
    rest, overrides = split_overrides(argv)
    args = parser.parse_args(rest)
    args.overrides = overrides
    args.runs = args.runs or RUNS.get(args.what, 10)
    for peer in args.peers:
        if args.what not in PEERS[peer][1]:
            parser.error(f"--peers {peer}: it does not run {args.what}")
    if args.what in ("postprocess", "stages") and args.batch != 1:
        parser.error(f"--batch: {args.what} takes one image at a time")
    return args, cases.read_config(args.config, overrides)


def peer_program(peer: str, kind: str, case: Path, folder: Path) -> harness.Program:
    """Returns a peer's program; `folder` is that of its environment."""
    python = folder / "bin" / "python"
    if not python.exists():
        raise SystemExit(
            f"error: no peer environment in {folder}: make it as benchmarks/README.md says, or "
            "give --peers no name to measure ours alone"
        )
    command = [str(python), str(PEER_SCRIPT), kind, "--form", peer, "--case", str(case)]
    if peer in ("onnxruntime", "openvino") and not (case / "network.onnx").exists():
        export = [*command[:2], "export", "--case", str(case)]
        subprocess.run(export, check=True, stdout=sys.stderr)
    return harness.Program(PEERS[peer][0], command)


def make_arrays(args: Any, config: Any) -> dict[str, np.ndarray]:
    """Returns the arrays that all programs are given."""
    batch = cases.make_batch(config, tuple(args.size), args.batch, args.image)
    if args.what == "postprocess":
        return make_outputs(batch, args.candidates, config) | {"image_size": batch["image_size"]}
    if args.what == "train":
        batch |= cases.make_objects(config, tuple(args.size), args.batch)
    return batch


def make_outputs(
    batch: dict[str, np.ndarray], candidates: int, config: Any
) -> dict[str, np.ndarray]:
    """Returns the network's outputs for a picture with exactly so many candidates."""
    model = build_model(config, config.model.num_classes)
    predictor = Predictor.from_weights(cases.write_weights(config)["adelaidet"], config)
    mean, std = tuple(config.input.mean), tuple(config.input.std)
    pixels = ops.normalize_image(batch["image"], batch["image_size"], mean, std)
    outputs = jax.device_get(jax.jit(model.apply)(predictor.variables, pixels))
    # A constant added to all logits keeps the order and every local maximum.
    scores = np.asarray(jax.nn.sigmoid(outputs.cate[0].astype(np.float64)))
    peaks = np.asarray(point_nms(scores, tuple(config.model.ins_head.num_grids))) > 0
    logits = np.sort(outputs.cate[0][peaks].astype(np.float64))[::-1]
    if len(logits) <= candidates:
        raise SystemExit(f"error: --candidates: the image has only {len(logits)} peaks")
    middle = logits[candidates - 1 : candidates + 1].mean()
    threshold = config.test.score_threshold
    shift = np.float32(np.log(threshold / (1 - threshold)) - middle)
    return {"cate": outputs.cate + shift, "kernel": outputs.kernel, "mask_feat": outputs.mask_feat}


# --- Our program ---------------------------------------------------------------------


class CompileCounter:
    """Counts XLA compilations, also those that the persistent cache answers."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, name: str, seconds: float, **_: Any) -> None:
        self.count += name == "/jax/core/compile/backend_compile_duration"

    def __call__(self) -> int:
        return self.count


class Case:
    """A case's config, arrays and weights, and what every program of ours says."""

    def __init__(self, folder: Path):
        self.compiles = CompileCounter()
        self.config = read_config(folder / "config.json")
        with np.load(folder / "arrays.npz") as arrays:
            self.arrays: dict[str, Any] = dict(arrays)
        self.weights = json.loads((folder / "weights.json").read_text())["adelaidet"]
        self.model = build_model(self.config, self.config.model.num_classes)
        self.about = {
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "threads": len(os.sched_getaffinity(0)),
            "compilation_cache": bool(jax.config.values["jax_compilation_cache_dir"]),
        }

    def predictor(self) -> Predictor:
        return Predictor.from_weights(self.weights, self.config)

    def pixels(self) -> jax.Array:
        """Returns the network's input."""
        mean, std = tuple(self.config.input.mean), tuple(self.config.input.std)
        normalize = jax.jit(lambda x, size: ops.normalize_image(x, size, mean, std))
        return jax.block_until_ready(normalize(self.arrays["image"], self.arrays["image_size"]))

    def work(self, run: Any, describe: Any = lambda result: {}, **more: Any) -> Work:
        return Work(run, describe, about=self.about, compiles=self.compiles, **more)


def network(case: Case) -> Work:
    """The network alone, from normalised pixels to its raw outputs."""
    predictor, pixels = case.predictor(), case.pixels()
    apply = jax.jit(case.model.apply)

    def describe(outputs: Outputs) -> dict[str, float]:
        return {k: float(np.abs(np.asarray(getattr(outputs, k))).mean()) for k in FIELDS}

    return case.work(lambda: jax.block_until_ready(apply(predictor.placed, pixels)), describe)


def image(case: Case) -> Work:
    """From uint8 pixels of the network's size to masks of the image's size."""
    predictor = case.predictor()
    batch = {k: case.arrays[k] for k in ("image", "image_size", "image_id")}
    batch["original_size"] = batch["image_size"]

    def describe(predictions: Any) -> dict[str, Any]:
        # Predictions do not keep the number of candidates.
        detections = predictor._detect(predictor.placed, batch["image"], batch["image_size"])
        return describe_predictions(predictions, detections)

    return case.work(lambda: predictor.predict_batch(batch), describe)


def describe_predictions(predictions: Any, detections: Any) -> dict[str, Any]:
    """Returns what a prediction holds, to compare programs by."""
    return {
        "candidates": np.asarray(detections.num_candidates).tolist(),
        "detections": [len(p) for p in predictions],
        "classes": [sorted(int(label) for label in p.labels) for p in predictions],
        "mask_pixels": int(sum(p.masks.sum() for p in predictions)),
    }


def stages(case: Case) -> Work:
    """Backbone, FPN, heads, post-processing and pasting, each a program of its own."""
    predictor, pixels, size = case.predictor(), case.pixels(), case.arrays["image_size"]
    parts = {name: network_part(case.model, name) for name in PARTS}
    find, timed = detect_program(case.config), Stages()

    def run() -> None:
        outputs: dict[str, Any] = {}
        for name, program in parts.items():
            with timed(name):
                outputs[name] = jax.block_until_ready(program(predictor.placed, pixels, outputs))
        with timed("post-processing"):
            all_outputs = Outputs(*outputs["ins_head"], outputs["mask_head"])
            detections = jax.block_until_ready(find(all_outputs))
        with timed("pasting"):
            for i in range(len(size)):
                predictor.paste(detections, i, size[i], size[i], predictor.mask_threshold)

    return case.work(run, stages=timed)


def network_part(model: nn.Module, name: str) -> Any:
    """Returns the compiled (variables, image, outputs of parts) -> output of one part.

    A part is the whole network with the outputs of the parts before it given; what its
    own output does not need is dropped by the compiler. So nothing here knows how a part
    is built, only what the network calls it.
    """

    def run(variables, image, earlier):
        outputs = dict(earlier)

        def intercept(call, args, kwargs, context):
            path = context.module.path
            if context.method_name != "__call__" or len(path) != 1:
                return call(*args, **kwargs)
            if path[0] not in outputs:
                outputs[path[0]] = call(*args, **kwargs)
            return outputs[path[0]]

        with nn.intercept_methods(intercept):
            whole = model.apply(variables, image)
        heads = {"ins_head": (whole.cate, whole.kernel), "mask_head": whole.mask_feat}
        return (outputs | heads)[name]

    compiled = jax.jit(run)
    return lambda variables, image, outputs: compiled(
        variables, image, {k: outputs[k] for k in PARTS[name]}
    )


def detect_program(config: Any) -> Any:
    """Returns the compiled post-processing: Outputs -> Detections."""
    options = asdict(DetectOptions.from_config(config))
    return jax.jit(lambda outputs: detect(outputs, **options))


def postprocess(case: Case) -> Work:
    """Post-processing and pasting of given outputs."""
    find, timed = detect_program(case.config), Stages()
    outputs = jax.device_put(Outputs(*(case.arrays[k] for k in FIELDS)))
    size, threshold = case.arrays["image_size"][0], case.config.test.mask_threshold

    def run() -> Any:
        with timed("post-processing"):
            detections = jax.block_until_ready(find(outputs))
        with timed("pasting"):
            pasted = Predictor.paste(detections, 0, size, size, threshold)
        return detections, pasted

    def describe(result: Any) -> dict[str, Any]:
        return describe_predictions([result[1]], result[0])

    return case.work(run, describe, stages=timed)


def train(case: Case) -> Work:
    """Forward, loss with its targets, backward and update."""
    step, shapes, mesh = cases.build_step(case.config)
    batch = put_batch({k: v for k, v in case.arrays.items() if k != "full_masks"}, mesh)
    state, first = cases.start_state(shapes, case.predictor().variables), {}

    def run() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch))
        first.setdefault("metrics", metrics)

    def describe(_: None) -> dict[str, float]:
        return {k: float(first["metrics"][k]) for k in ("loss_ins", "loss_cate", "num_pairs")}

    return case.work(run, describe)


KINDS = {f.__name__: f for f in (network, image, stages, postprocess, train)}


if __name__ == "__main__":
    main(sys.argv[1:])
