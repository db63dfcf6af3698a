"""The least score for each class at which F1 is largest on the validation data.

`thresholds.json` in a run's folder holds them by the step of the checkpoint:

    {"steps": {"900": {"data": "instances_val.json", "images": 64, "all": 0.412,
                       "classes": {"cat": {"score": 0.45, "f1": 0.81, "objects": 120}}}}}

A class of which no detection is right has no such score: it gets that of all classes
together, and where no detection of any class is right, 0.3; its "fallback" is then true.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.checkpoint import list_steps
from solov2_jax.evaluation.coco import CocoEvaluator, unique_names
from solov2_jax.evaluation.evaluate import FinishedEvaluation
from solov2_jax.io import InputError, read_json, reading, write_json
from solov2_jax.pretrained import THRESHOLDS
from solov2_jax.tools.report.analysis import curves
from solov2_jax.tools.report.outcomes import outcomes

log = logging.getLogger(__name__)

FILE = THRESHOLDS
SHOWN = 5  # classes, in a line of the log
NOTHING_RIGHT = 0.3  # as `--score` without thresholds


def write_thresholds(evaluation: FinishedEvaluation) -> None:
    """Writes the scores of a run's checkpoint; those of checkpoints that are gone are dropped.

    Nothing is written where the evaluation is not that of a run's checkpoint.
    """
    if evaluation.checkpoint is None:
        return
    workdir, step = evaluation.checkpoint
    path, steps = workdir / FILE, {}
    if path.is_file():
        try:
            steps = _read(path)
        except InputError as error:
            log.warning("%s; it is written anew", error)
    kept = {str(s) for s in list_steps(workdir)}
    steps = {s: values for s, values in steps.items() if s in kept}
    values = best_scores(evaluation.evaluator)
    values = {"data": os.path.basename(evaluation.dataset.annotation_file), **values}
    steps[str(step)] = values
    write_json({"steps": dict(sorted(steps.items(), key=lambda item: int(item[0])))}, path)
    log.info("%s: scores with the best F1 of step %d: %s", path, step, _shown(values))


def best_scores(evaluator: CocoEvaluator) -> dict[str, Any]:
    """Returns {"images", "all", "classes"} of what an evaluator has collected."""
    whole, each = curves(outcomes(evaluator), len(evaluator.category_ids))
    everything = whole.threshold if whole.f1.max(initial=0) > 0 else NOTHING_RIGHT
    classes = {}
    for name, curve in zip(evaluator.sorted_names(), each, strict=True):
        best = float(curve.f1.max(initial=0))
        score = curve.threshold if best > 0 else everything
        classes[name] = {"score": score, "f1": round(best, 4), "objects": curve.positives}
        if best == 0:
            classes[name]["fallback"] = True
    return {"images": len(evaluator.image_ids), "all": everything, "classes": classes}


def _shown(values: dict[str, Any]) -> str:
    classes = values["classes"]
    shown = describe_scores(list(classes), [c["score"] for c in classes.values()])
    fallback = sum("fallback" in c for c in classes.values())
    note = f"; {fallback} classes without a right detection have {values['all']:.3f}"
    return shown + note * (fallback > 0)


def describe_scores(names: Sequence[str], scores: Sequence[float] | np.ndarray) -> str:
    """Returns the scores of the first few classes as text."""
    shown = [f"{name} {score:.3f}" for name, score in zip(names, scores, strict=True)]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def read_thresholds(
    workdir: str | os.PathLike[str],
    step: int,
    class_names: Sequence[str],
    category_ids: Sequence[int],
) -> np.ndarray:
    """Returns the least score of each label, float64 [K].

    Raises:
      InputError: if there are none for the step, or they are damaged.
    """
    path = Path(workdir) / FILE
    fix = f"`solov2 evaluate --workdir {workdir} --checkpoint {step}` finds them"
    steps = _read(path) if path.is_file() else {}
    if str(step) not in steps:
        there = f"; it has those of {', '.join(steps)}" if steps else ""
        raise InputError(f"--score best: {path} has no thresholds of step {step}{there}. {fix}")
    with reading(path, "thresholds of a run", fix):
        classes = steps[str(step)]["classes"]
        names = unique_names(class_names, category_ids)
        scores = np.array([float(classes[name]["score"]) for name in names])
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("a score is not from 0 to 1")
    return scores


def has_thresholds(workdir: str | os.PathLike[str], step: int) -> bool:
    """Returns whether a run has the scores of a step."""
    path = Path(workdir) / FILE
    return path.is_file() and str(step) in _read(path)


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, "thresholds of a run")
    with reading(path, "thresholds of a run", "The next evaluation writes it anew"):
        return {str(int(step)): dict(values) for step, values in content["steps"].items()}


def carry_thresholds(workdir: str | os.PathLike[str], step: int, folder: Path) -> bool:
    """Copies the scores of one step beside a run's files elsewhere; returns if there are any."""
    known = has_thresholds(workdir, step)
    if known:
        steps = _read(Path(workdir) / FILE)
        write_json({"steps": {str(step): steps[str(step)]}}, folder / FILE)
    return known
