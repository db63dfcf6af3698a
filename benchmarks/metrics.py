"""Each metric beside its public program, on one file of a network's predictions.

    python evaluate.py --workdir RUN --output out
    python benchmarks/metrics.py --annotations instances.json --predictions out/predictions.json \\
        --boundary BOUNDARY_IOU_API

COCO's AP and boundary AP are of the files as they are; for LVIS and Cityscapes,
`tests/metric_cases.py` makes the lists of searched classes and the pictures of instance
ids, and says what else must be installed. Writes results/metrics.json; one run each.
"""

import argparse
import contextlib
import functools
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness
import numpy as np
from tables import metrics_table

from solov2_jax.data.cityscapes import CLASSES
from solov2_jax.evaluation.coco_score import METRICS, read_ground_truth
from solov2_jax.evaluation.evaluators import make_evaluator
from solov2_jax.tools.report.cityscapes_results import read_cityscapes_results
from solov2_jax.tools.report.results_file import read_results

sys.path.insert(0, str(harness.ROOT / "tests"))
import metric_cases as public

PUBLIC = {"coco": "pycocotools", "boundary": "boundary_iou_api", "cityscapes": "cityscapesscripts"}


def main(argv: list[str]) -> None:
    """Scores the predictions by every pair of programs and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("annotations", "predictions"):
        parser.add_argument(f"--{name}", required=True, help="COCO's json")
    parser.add_argument("--boundary", help="sources of boundary_iou_api; none: left out")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    args = parser.parse_args(argv)
    content = json.loads(Path(args.annotations).read_text())
    results = read_results(args.predictions, read_ground_truth(args.annotations))
    numbers = {"images": len(content["images"]), "objects": len(content["annotations"])}
    found = {**harness.header("metrics"), **numbers, "predictions": len(results), "rows": {}}
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as scratch, quiet, np.errstate(all="ignore"):
        for name, ours, theirs in pairs(content, results, args.boundary, Path(scratch)):
            found["rows"][name] = row(PUBLIC.get(name, name), ours, theirs)
    harness.write(found, args.results)
    print(metrics_table(found))


def row(program: str, ours: Callable[[], Mapping], theirs: Callable[[], Mapping]) -> dict[str, Any]:
    """Returns how far two programs' metrics of one name are apart, and their seconds."""
    times, values = [time.perf_counter()], []
    for compute in (ours, theirs):
        values.append(compute())
        times.append(time.perf_counter())
    apart = [difference(values[0][name], value) for name, value in values[1].items()]
    compared = {"compared": len(apart), "difference": max(apart)}
    seconds = {"ours_s": times[1] - times[0], "public_s": times[2] - times[1]}
    ap = float(values[0][next(iter(values[1]))])
    return {"program": program, "AP": ap, **compared, **seconds}


def difference(a: float, b: float | None) -> float:
    """Returns |a - b|; 0 where both are undefined, infinity where one is."""
    undefined = [x is None or np.isnan(x) or x == -1 for x in (a, b)]
    return float(abs(a - b)) if not any(undefined) else 0.0 if all(undefined) else float("inf")


def pairs(content: Any, results: Any, boundary: str | None, scratch: Path) -> Any:
    """Yields (metric, what computes ours, what computes the public program's)."""

    def twelve(kind: str, compute: Callable[..., list[float]]) -> Callable[[], Mapping]:
        names = [f"{kind}/{name}" for name in METRICS]
        return lambda: dict(zip(names, compute(content, results), strict=True))

    yield "coco", score(content, results, "coco"), twelve("segm", public.coco_metrics)
    if boundary:
        sys.path.append(boundary)
        theirs = twelve("boundary", public.boundary_metrics)
        yield "boundary", score(content, results, "boundary"), theirs
    searched = public.searched_for(content)
    theirs = functools.partial(public.lvis_metrics, searched, results)
    yield "lvis", score(searched, results, "lvis"), theirs
    truth, found = public.write_as_cityscapes(content, results, scratch)

    def of_cityscapes() -> Mapping[str, float]:
        values = public.cityscapes_metrics(truth, found).items()
        return {f"segm/{n}" if n in ("AP", "AP50") else f"segm/AP/{n}": v for n, v in values}

    yield "cityscapes", score(str(truth), str(found), "cityscapes"), of_cityscapes


def score(content: Any, results: Any, metric: str) -> Callable[[], Mapping]:
    """Returns what computes our metrics, those that the public program computes."""

    def compute() -> Mapping[str, float]:
        folder = metric == "cityscapes"
        names = CLASSES if folder else {c["id"]: c["name"] for c in content["categories"]}
        evaluator = make_evaluator(content, list(names), list(names.values()), metric=metric)
        if metric in ("coco", "boundary"):
            evaluator.kinds = ("boundary",) if metric == "boundary" else ("segm",)
        read = read_cityscapes_results if folder else lambda found, truth: found
        evaluator.add_results(read(results, evaluator.truth))
        return evaluator.compute()

    return compute


if __name__ == "__main__":
    main(sys.argv[1:])
