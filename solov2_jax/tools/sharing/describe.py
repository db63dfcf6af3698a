"""What is known of a run that is handed on, from its folder: metrics, data, origin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import solov2_jax
from solov2_jax.data.annotations import read_instances
from solov2_jax.data.build import data_files
from solov2_jax.io import InputError, read_json, reading
from solov2_jax.training.metric_files import read_metrics
from solov2_jax.weights.hub import is_remote


def describe_run(
    workdir: Path, config: Any, *, step: int, checkpoint: str, dataset: str
) -> dict[str, Any]:
    """Returns what run.json and the model card say.

    Args:
      step, checkpoint: of the weights.
      dataset: what the data is called; "": not said.
    """
    return {
        "solov2_jax": solov2_jax.__version__,
        "jax": jax.__version__,
        "step": step,
        "steps": config.train.steps,
        "checkpoint": checkpoint,
        "metrics": metrics_at(workdir, step),
        "data": {"name": dataset, **_data(config)},
        "origin": origin_of(workdir, config),
    }


def metrics_at(workdir: Path, step: int) -> dict[str, float]:
    """Returns the last evaluation of a step that metrics.jsonl holds, {} without one."""
    found: dict[str, float] = {}
    for line in read_metrics(workdir / "metrics.jsonl"):
        if line["step"] == step:
            scores = {k: v for k, v in line.items() if k.startswith(("segm/", "bbox/"))}
            found = {k: float(v) for k, v in scores.items() if v is not None} or found
    return found


def _data(config: Any) -> dict[str, Any]:
    """Returns the numbers of images and objects of both parts, as far as the data is there."""
    counts: dict[str, Any] = {}
    try:
        places = data_files(config)
    except InputError:
        return counts
    for part, (_, annotations) in zip(("train", "val"), places, strict=True):
        if Path(annotations).is_file():
            table = read_instances(annotations)
            objects = int((~table.crowd).sum())
            counts[part] = {"images": len(table.image_ids), "objects": objects}
    return counts


def origin_of(workdir: Path, config: Any) -> dict[str, Any]:
    """Returns what the run started from: name, address, revision, licence, sha256, source.

    Names of files are kept, the folders they lay in are not; {} for random weights.
    """
    record = workdir / "init_from.json"
    if not record.is_file():
        return {}
    content = read_json(record, "the record of a run's first weights")
    with reading(record, "the record of a run's first weights"):
        origin: Mapping[str, Any] = content.get("origin") or {}
        name = str(origin.get("name") or content["path"])
        about = {key: str(origin.get(key) or "") for key in ("address", "revision", "licence")}
        sha256, source = str(content["sha256"]), str(content["source"])
    short = name if is_remote(name) else Path(name.partition(" (")[0]).name
    return {"name": short, **about, "sha256": sha256, "source": source}
