"""Our program of `network.py`: the network, the predictor, the stages or the train step.

    python benchmarks/ours.py network --case FOLDER

Everything goes through the package's public functions, so that what is measured is what
a user gets. `FOLDER` is written by `cases.py`.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
from flax import linen as nn
from harness import Stages, Work, serve

from solov2_jax import ops
from solov2_jax.config import read_config
from solov2_jax.distributed import put_batch
from solov2_jax.inference.predictor import Predictor
from solov2_jax.inference.programs import DetectOptions
from solov2_jax.models import build_model
from solov2_jax.postprocess import detect
from solov2_jax.structs import Outputs

FIELDS = ("cate", "kernel", "mask_feat")
# A part of the network -> the parts whose outputs it needs.
PARTS = {"backbone": (), "fpn": ("backbone",), "ins_head": ("fpn",), "mask_head": ("fpn",)}


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

    return case.work(lambda: jax.block_until_ready(apply(predictor._ready, pixels)), describe)


def image(case: Case) -> Work:
    """From uint8 pixels of the network's size to masks of the image's size."""
    predictor = case.predictor()
    batch = {k: case.arrays[k] for k in ("image", "image_size", "image_id")}
    batch["original_size"] = batch["image_size"]

    def describe(predictions: Any) -> dict[str, Any]:
        # Predictions do not keep the number of candidates.
        detections = predictor._detect(predictor._ready, batch["image"], batch["image_size"])
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
                outputs[name] = jax.block_until_ready(program(predictor._ready, pixels, outputs))
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
    grids = tuple(config.model.ins_head.num_grids)
    names = [n for n in DetectOptions.__dataclass_fields__ if n != "num_grids"]
    options = {name: getattr(config.test, name) for name in names}
    return jax.jit(lambda outputs: detect(outputs, num_grids=grids, **options))


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
    import cases

    step, shapes, mesh = cases.build_step(case.config)
    fields = {k: v for k, v in case.arrays.items() if not k.startswith(("full_", "target_"))}
    batch = put_batch(fields, mesh)
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--case", type=Path, required=True)
    arguments = parser.parse_args()
    serve(lambda: KINDS[arguments.kind](Case(arguments.case)))
