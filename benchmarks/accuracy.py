"""The same data and the same budget: this program's training beside mmdetection's own loop.

Both start from the same weights, those of the config's `init_from` and, for the rest, of the
seed, written for each under its names; schedule, sizes, flip, batch, images and number of steps
are the config's. Both predict the same validation images every `train.eval_every` steps, and
pycocotools compares both. Seconds are those of training, compilation and reading included and
evaluations left out. Published: AP at equal steps, and AP at equal time, that at which the
faster one had ended.

What is finished is kept in --scratch and in results/accuracy.json, from which
tables.py fills docs/results.md; the same command goes on.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

SIDES = ("solov2_jax", "mmdetection")
# What both can do: key and values.
_BOTH = (
    ("optim.name", ("sgd", "adamw")),
    ("optim.schedule", ("multistep",)),
    ("optim.ema_decay", (0.0,)),
    ("input.size_sampling", ("choice",)),
    ("model.backbone.name", ("resnet",)),
    ("model.backbone.norm", ("frozen_bn",)),
    ("augment.jitter_scale", ((),)),
    ("data.repeat_threshold", (0.0,)),
)


def main(argv: Sequence[str]) -> None:
    """Trains both as often as there are seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--name", help="of the data, in the table")
    add("--config", default="light_448_r18", help="config file or a shipped config's name")
    add("--seeds", type=int, default=3)
    add("--first", type=int, help="learn, and predict, so many training images by heart")
    add("--peer_dir", type=Path, help="the peer's environment; none: ours alone")
    add("--scratch", type=Path, default=harness.ROOT / ".cache" / "accuracy")
    add("--results", type=Path, default=harness.RESULTS)
    add("--train_case", type=Path, help="train a case in this process, as this script does")
    args, overrides = parser.parse_known_args(list(argv))
    if args.train_case:
        train_ours(args.train_case)
        return
    if not args.name:
        parser.error("--name is missing")
    if wrong := [o for o in overrides if not o.startswith("--config.")]:
        parser.error(f"unknown argument {wrong[0]}")
    content = {"rows": {}, **harness.read(args.results, "accuracy")}
    content |= harness.header("accuracy")
    rows = content["rows"].setdefault(args.name, {})
    for seed in range(args.seeds):
        case = (args.scratch / args.name / f"seed{seed}").absolute()
        config = write_case(case, args.config, [*overrides, f"--config.seed={seed}"], args.first)
        for side in SIDES if args.peer_dir else SIDES[:1]:
            done = rows.setdefault(side, {})
            if str(seed) not in done or done[str(seed)]["steps"] != config.train.steps:
                done[str(seed)] = measure(case, side, args.peer_dir, config.train.steps)
                harness.write(content, args.results)
                print(args.name, side, seed, done[str(seed)]["curve"][-1], flush=True)
    harness.write(content, args.results)
    print(accuracy_table(content))


def write_case(
    case: Path, config_file: str, overrides: Sequence[str], first: int | None = None
) -> Any:
    """Writes config, weights, data and classes of a training; returns the config.

    Args:
      first: of so many training images, which are then the validation images too.
    """
    from solov2_jax.config import flatten, load_config, save_config
    from solov2_jax.config_schema import as_steps
    from solov2_jax.data.build import data_files, load_datasets
    from solov2_jax.training.build import in_steps

    config = load_config(config_file, list(overrides))
    case.mkdir(parents=True, exist_ok=True)
    if first:
        annotations = write_first(config.data.train.annotations, first, case / "first.json")
        for part in (config.data.train, config.data.val):
            part.images, part.annotations = config.data.train.images, annotations
    flat = flatten(config)
    for key, values in _BOTH:
        if flat[key] not in values:
            choices = " or ".join(map(repr, values))
            raise SystemExit(f"error: {key} = {flat[key]!r}: both sides can do {choices} only")
    train, _ = load_datasets(config)
    config = in_steps(config, train)
    with config.unlocked():
        config.model.num_classes = len(train.class_names)
        config.eval.backend = "pycocotools"
        config.train.checkpoint_every = config.train.eval_every
        config.train.after_training = config.train.after_evaluation = ()
        config.train.writers = ()
        steps = config.train.steps
        config.optim.milestones = tuple(as_steps(m, steps) for m in config.optim.milestones)
        config.optim.warmup_steps = float(as_steps(config.optim.warmup_steps, steps))
    weights = write_weights(case, config, train.class_names)
    with config.unlocked():
        config.init_from = weights["ours"]
    save_config(config, case / "config.json")
    files = [[str(Path(path).absolute()) for path in pair] for pair in data_files(config)]
    names = list(train.class_names)
    for name, value in {"weights": weights, "data": files, "classes": names}.items():
        (case / f"{name}.json").write_text(json.dumps(value))
    return config


def write_first(annotations: str, number: int, file: Path) -> str:
    """Writes the first images of 1 to 8 objects, no crowd and none below 1 % of the image."""
    if not Path(annotations).is_file():
        raise SystemExit(f"error: --first: data.train.annotations is {annotations!r}, no json file")
    content = json.loads(Path(annotations).read_text())
    objects: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
    for record in content["annotations"]:
        objects[record["image_id"]].append(record)

    def is_clear(image: Any) -> bool:
        found, least = objects[image["id"]], 0.01 * image["height"] * image["width"]
        return 1 <= len(found) <= 8 and all(o["area"] >= least and not o["iscrowd"] for o in found)

    kept = sorted(filter(is_clear, content["images"]), key=lambda image: image["id"])[:number]
    if len(kept) < number:
        raise SystemExit(
            f"error: {annotations} has {len(kept)} such images, --first wants {number}"
        )
    content |= {"images": kept, "annotations": sum((objects[i["id"]] for i in kept), [])}
    file.write_text(json.dumps(content))
    return str(file)


def write_weights(case: Path, config: Any, class_names: Sequence[str]) -> dict[str, str]:
    """Returns {"ours": file, "mmdet": file} of the weights that a training begins with."""
    import cases
    import jax
    import numpy as np
    from flax.traverse_util import flatten_dict

    from solov2_jax.models import build_model
    from solov2_jax.training.restore import initial_weights
    from solov2_jax.weights.convert import save_weights
    from solov2_jax.weights.settings import settings_of_config
    from solov2_jax.weights.tables import to_mmdet

    weights = {"ours": str(case / "ours.safetensors"), "mmdet": str(case / "mmdet.npz")}
    if not all(Path(path).is_file() for path in weights.values()):
        model = build_model(config, config.model.num_classes)
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jax.numpy.float32)
        variables = dict(model.lazy_init(key, image))
        if config.init_from:
            names = {"/".join(path): leaf for path, leaf in flatten_dict(variables).items()}
            shapes = cases.variable_shapes(model)
            variables, _ = initial_weights(
                config, dict(shapes), lambda wanted: {name: names[name] for name in wanted}
            )
        leaves = {
            "/".join(path): jax.device_get(leaf) for path, leaf in flatten_dict(variables).items()
        }
        settings = {**settings_of_config(config), "class_names": list(class_names)}
        save_weights(weights["ours"], leaves, settings)
        np.savez(weights["mmdet"], **to_mmdet(leaves))
    return weights


def train_ours(case: Path) -> None:
    """Trains a case by this program, or goes on; writes curve.jsonl as the peer does."""
    from solov2_jax.config import load_config
    from solov2_jax.training.build import build_task
    from solov2_jax.training.loop import train

    start, output = time.perf_counter(), case / SIDES[0]
    config = load_config(str(case / "config.json"))
    curve = output / "curve.jsonl"
    lines = [json.loads(x) for x in curve.read_text().splitlines()] if curve.is_file() else []
    spent = lines[-1]["seconds"] if lines else 0.0

    def build(config: Any, workdir: Path) -> Any:
        task = build_task(config, workdir)

        def evaluate(variables: Any) -> Any:
            nonlocal start, spent
            spent += time.perf_counter() - start
            metrics = task.evaluate(variables)
            step = min((len(lines) + 1) * config.train.eval_every, config.train.steps)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            (output / "eval/predictions.json").rename(output / f"predictions_{step}.json")
            lines.append({"step": step, "seconds": spent, "memory_gb": memory})
            with open(curve, "a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            start = time.perf_counter()
            return metrics

        return dataclasses.replace(task, evaluate=evaluate)

    train(config, output, build)


def measure(case: Path, side: str, peer_dir: Path | None, steps: int) -> dict[str, Any]:
    """Returns {"steps", "curve": [{"step", "seconds", "memory_gb", "AP", "AP50"}, ...]}."""
    from solov2_jax.tools.cli.app import ALLOCATOR

    output, allocator = case / side, harness.ALLOCATORS["tuned"]
    if side == SIDES[0]:
        allocator = ALLOCATOR  # with which train.py starts itself
        command = [sys.executable, str(harness.HERE / "accuracy.py"), "--train_case", str(case)]
    else:
        assert peer_dir is not None
        command = [str(peer_dir / "bin" / "python"), str(harness.HERE / "torch_train.py")]
        command += ["--case", str(case), "--output", str(output)]
    curve = output / "curve.jsonl"
    if not curve.is_file() or f'"step": {steps},' not in curve.read_text():
        where: Any = {"cwd": harness.ROOT, "env": os.environ | allocator}
        with open(case / f"{side}.log", "a") as log:
            done = subprocess.run(command, stdout=log, stderr=log, check=False, **where)
        if done.returncode:
            tail = "\n".join((case / f"{side}.log").read_text().splitlines()[-20:])
            raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}:\n{tail}")
    lines = {line["step"]: line for line in map(json.loads, curve.read_text().splitlines())}
    truth = json.loads((case / "data.json").read_text())[1][1]
    points = [
        {**line, **average_precision(truth, output / f"predictions_{step}.json")}
        for step, line in sorted(lines.items())
    ]
    return {"steps": steps, "curve": points}


def average_precision(truth: str, predictions: Path) -> dict[str, float]:
    """Returns pycocotools' AP and AP50 of masks, 0 without a prediction."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = json.loads(predictions.read_text())
    if not found:
        return {"AP": 0.0, "AP50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        scored: Any = COCOeval(coco, coco.loadRes(found), "segm")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return {"AP": float(scored.stats[0]), "AP50": float(scored.stats[1])}


def at_time(curve: Sequence[Mapping[str, float]], seconds: float) -> float:
    """Returns the AP of the last evaluation until then, 0 before the first."""
    values = [point["AP"] for point in curve if point["seconds"] <= seconds]
    return values[-1] if values else 0.0


def accuracy_table(content: Mapping[str, Any]) -> str:
    """Returns Markdown: for each data set and side the means over the seeds, with spreads."""
    heads = "data | program | seeds | steps | AP at equal steps | AP50 | AP at equal time | minutes"
    lines = [f"| {heads} | GB |", "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, sides in content["rows"].items():
        seeds = set.intersection(*(set(runs) for runs in sides.values() if runs) or [set()])
        for side, runs in sides.items():
            curves = {s: runs[s]["curve"] for s in sorted(seeds, key=int)}
            if not curves:
                continue
            ends = {s: min(sides[x][s]["curve"][-1]["seconds"] for x in sides) for s in curves}
            last = [curve[-1] for curve in curves.values()]
            equal = [at_time(curve, ends[s]) for s, curve in curves.items()]
            cells = [name, side, str(len(curves)), str(last[0]["step"])]
            cells += [_mean([p[key] for p in last], 4) for key in ("AP", "AP50")]
            cells += [_mean(equal, 4) if len(sides) > 1 else ""]
            cells += [_mean([p["seconds"] / 60 for p in last], 1)]
            cells += [_mean([p["memory_gb"] for p in last], 2)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main(sys.argv[1:])
