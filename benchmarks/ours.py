"""Worker of our side: the network, the predictor, the stages or the train step.

    python benchmarks/ours.py network --case FOLDER

Everything goes through the package's public functions, so that what is measured is what
a user gets. `FOLDER` is written by `cases.py`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax_side  # first: it puts the repository on the path
import worker


def load_network(case: Path) -> tuple[Any, Any, Any]:
    """Returns (config, model, predictor with the case's weights)."""
    from solov2_jax.config import read_config
    from solov2_jax.inference.predictor import Predictor
    from solov2_jax.models import build_model

    config = read_config(case / "config.json")
    model = build_model(config, config.model.num_classes)
    weights = json.loads((case / "weights.json").read_text())
    return config, model, Predictor.from_weights(weights["adelaidet"], config)


def load_arrays(case: Path) -> dict[str, Any]:
    """Returns the case's arrays."""
    import numpy as np

    with np.load(case / "arrays.npz") as arrays:
        return dict(arrays)


def normalize(config: Any, arrays: Any) -> Any:
    """Returns the network's input."""
    import jax

    from solov2_jax import ops

    mean, std = tuple(config.input.mean), tuple(config.input.std)
    prepare = jax.jit(lambda x, size: ops.normalize_image(x, size, mean, std))
    return jax.block_until_ready(prepare(arrays["image"], arrays["image_size"]))


def network(case: Path) -> worker.Work:
    """The network alone, from normalised pixels to its raw outputs."""
    import jax

    counter = jax_side.CompileCounter()
    config, model, predictor = load_network(case)
    image = normalize(config, load_arrays(case))
    apply = jax.jit(model.apply)
    last: list[Any] = []

    def run() -> None:
        last[:] = [jax.block_until_ready(apply(predictor._ready, image))]

    first = worker.first_call(run)

    def found() -> dict[str, Any]:
        return outputs_of(*(getattr(last[0], k) for k in FIELDS))

    return worker.Work(run, jax_side.about(counter, first), counter, found)


FIELDS = ("cate", "kernel", "mask_feat")


def outputs_of(*outputs: Any) -> dict[str, float]:
    """Returns the mean size of each output: equal work has equal outputs."""
    import numpy as np

    means = (float(np.abs(np.asarray(x)).mean()) for x in outputs)
    return dict(zip(FIELDS, means, strict=True))


def image(case: Path) -> worker.Work:
    """From uint8 pixels of the network's size to masks of the image's size."""
    import jax

    counter = jax_side.CompileCounter()
    _, _, predictor = load_network(case)
    arrays = load_arrays(case)
    batch = {k: arrays[k] for k in ("image", "image_size", "image_id")}
    batch["original_size"] = batch["image_size"]
    last: list[Any] = []

    def run() -> None:
        last[:] = [predictor.predict_batch(batch)]

    first = worker.first_call(run)
    # Outside of the timed runs: the predictions do not keep this number.
    detections = jax.device_get(
        predictor._detect(predictor._ready, batch["image"], batch["image_size"])
    )

    def found() -> dict[str, Any]:
        return {
            "candidates": detections.num_candidates.tolist(),
            "detections": [len(p) for p in last[0]],
            "classes": [classes_of(p.labels) for p in last[0]],
            "mask_pixels": int(sum(p.masks.sum() for p in last[0])),
        }

    return worker.Work(run, jax_side.about(counter, first), counter, found)


def classes_of(labels: Any) -> list[int]:
    """Returns the sorted labels, one number for each detection."""
    return sorted(int(label) for label in labels)


def stages(case: Path) -> worker.Work:
    """Backbone, FPN, heads, post-processing and pasting, each a program of its own."""
    import jax
    import stage_programs

    counter = jax_side.CompileCounter()
    config, model, predictor = load_network(case)
    arrays = load_arrays(case)
    programs = stage_programs.network_stages(model)
    detect = stage_programs.detect_stage(config)
    variables, pixels = predictor._ready, normalize(config, arrays)
    size = arrays["image_size"]

    def run() -> dict[str, float]:
        timed = worker.Stages()
        given: dict[str, Any] = {}
        for name, program in programs.items():
            with timed(name):
                given[name] = jax.block_until_ready(program(variables, pixels, given))
        outputs = stage_programs.as_outputs(given)
        with timed("post-processing"):
            detections = jax.block_until_ready(detect(outputs))
        with timed("pasting"):
            for i in range(len(size)):
                threshold = predictor.mask_threshold
                predictor.paste(detections, i, size[i], size[i], threshold)
        return timed.seconds

    first = worker.first_call(run)
    return worker.Work(run, jax_side.about(counter, first), counter)


def postprocess(case: Path) -> worker.Work:
    """Post-processing and pasting of given outputs."""
    import jax
    import stage_programs

    from solov2_jax.inference.predictor import Predictor
    from solov2_jax.structs import Outputs

    counter = jax_side.CompileCounter()
    from solov2_jax.config import read_config

    config, arrays = read_config(case / "config.json"), load_arrays(case)
    detect = stage_programs.detect_stage(config)
    outputs = jax.device_put(Outputs(*(arrays[k] for k in FIELDS)))
    size, threshold = arrays["image_size"], config.test.mask_threshold
    last: list[Any] = []

    def run() -> dict[str, float]:
        timed = worker.Stages()
        with timed("post-processing"):
            detections = jax.block_until_ready(detect(outputs))
        with timed("pasting"):
            pasted = Predictor.paste(detections, 0, size[0], size[0], threshold)
        last[:] = [detections, pasted]
        return timed.seconds

    first = worker.first_call(run)

    def found() -> dict[str, Any]:
        detections, pasted = last
        return {
            "candidates": detections.num_candidates.tolist(),
            "detections": [len(pasted)],
            "classes": [classes_of(pasted.labels)],
            "mask_pixels": int(pasted.masks.sum()),
        }

    return worker.Work(run, jax_side.about(counter, first), counter, found)


def train(case: Path) -> worker.Work:
    """Forward, loss with its targets, backward and update."""
    import jax

    from solov2_jax.training import sharding
    from solov2_jax.training.build import build_loss, build_optimizer
    from solov2_jax.training.optim import trainable_mask
    from solov2_jax.training.state import state_of
    from solov2_jax.training.step import TrainStep

    counter = jax_side.CompileCounter()
    config, model, predictor = load_network(case)
    mesh, backbone = sharding.make_mesh(), config.model.backbone
    variables = jax.device_put(predictor.variables)
    del predictor
    trainable = trainable_mask(variables["params"], backbone.freeze_at, backbone.norm)
    _, tx = build_optimizer(config, trainable)
    step = TrainStep(build_loss(config, model), tx, mesh, jax.random.key(0), trainable)
    fields = {k: v for k, v in load_arrays(case).items() if k != "full_masks"}
    fields = {k: v for k, v in fields.items() if not k.startswith("target_")}
    batch = sharding.put_batch(fields, mesh)
    # By one program, as a training makes its state: arrays placed in another way would
    # cost a second compilation of the step.
    make = jax.jit(lambda v: state_of(v, tx), out_shardings=sharding.replicated(mesh))
    state, losses = make(variables), []
    del variables

    def run() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch))
        losses.append(metrics)

    first = worker.first_call(run)

    def found() -> dict[str, Any]:
        metrics = {k: float(v) for k, v in losses[0].items()}
        names = ("loss_ins", "loss_cate", "num_pairs")
        return {name: metrics[name] for name in names}

    return worker.Work(run, jax_side.about(counter, first), counter, found)


KINDS = {f.__name__: f for f in (network, image, stages, postprocess, train)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--case", type=Path, required=True)
    arguments = parser.parse_args()
    worker.serve(lambda: KINDS[arguments.kind](arguments.case))
