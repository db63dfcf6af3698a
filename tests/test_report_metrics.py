"""The report under each metric: what counts in its parts is what counts in the metric."""

import csv
import json

import numpy as np
import pytest
from metric_cases import SEEDS, encode, instances_case, lvis_case, write_cityscapes_case
from test_metrics import evaluated

from solov2_jax.evaluation.boundary_eval import boundary, boundary_width
from solov2_jax.tools.report.analysis import curves, error_split, make_report_data
from solov2_jax.tools.report.outcomes import outcomes
from solov2_jax.tools.report.page import MAX_CLASSES, _most_confused
from solov2_jax.tools.report.results_file import evaluate_files

FEW = SEEDS[:20]


def report_of(evaluator, metrics):
    return make_report_data(evaluator, metrics, "title", {})


def test_lvis_leaves_out_what_nobody_looked_for():
    left_out = neither = 0
    for seed in FEW:
        content, results = lvis_case(seed)
        evaluator, metrics = evaluated(content, results, "lvis")
        outcome = outcomes(evaluator)
        images = {i["id"]: i for i in content["images"]}
        shown = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
        for record, right, ignored in zip(
            outcome.detections.records, outcome.right, outcome.ignored, strict=True
        ):
            image, category = images[record["image_id"]], record["category_id"]
            assert category in image["neg_category_ids"] or (image["id"], category) in shown
            listed = category in image["not_exhaustive_category_ids"]
            assert right or not listed or ignored
        left_out += len(results) - len(outcome.ignored)
        neither += int(outcome.ignored.sum())
        # AP50 of what is counted in the parts is LVIS's own.
        if not np.isnan(metrics["segm/AP50"]):
            assert error_split(outcome).ap50 == pytest.approx(metrics["segm/AP50"], abs=1e-9)
    assert left_out > 50 and neither > 50


def test_cityscapes_counts_right_and_wrong_as_its_metric_does(tmp_path):
    ignored = compared = 0
    for seed in FEW:
        truth, results = write_cityscapes_case(seed, tmp_path / str(seed))
        evaluator, _ = evaluated(str(truth), str(results), "auto")
        outcome = outcomes(evaluator)
        ids = sorted(evaluator.category_ids)
        matches = {c: [] for c in ids}
        for _, of_classes in evaluator._matches(evaluator.results):
            for category, match in of_classes.items():
                matches[category].append(match)
        # A crowd has a detection whose half lies in it, Cityscapes' groups want more.
        halves = {c for c in ids if any((m.ignored == 0.5).any() for m in matches[c])}
        for label, category in enumerate(ids):
            if category in halves:
                continue
            own = outcome.detections.label == label
            right = int((outcome.right & own).sum())
            wrong = int((~outcome.right & ~outcome.ignored & own).sum())
            objects = ~outcome.objects.crowd & (outcome.objects.label == label)
            assert (right, wrong, int(objects.sum())) == _counts(matches[category])
            compared += right + wrong
        ignored += int(outcome.ignored.sum())
    assert ignored > 50 and compared > 300


def _counts(images):
    """Returns right and wrong detections and objects by the rules of Cityscapes."""
    right = wrong = objects = 0
    for match in images:
        hits, counts = match.iou > 0.5, ~match.is_group & (match.size >= 100)
        found = hits[:, counts].sum(axis=0)
        right += int((found > 0).sum())
        wrong += int(np.maximum(found - 1, 0).sum())
        wrong += int((~hits.any(axis=1) & (match.ignored <= 0.5)).sum())
        objects += int(counts.sum())
    return right, wrong, objects


def test_voc_has_no_limit_of_detections():
    content, results = instances_case(0, most=14)
    many = [{**r, "score": r["score"] / 2} for r in results for _ in range(150)]
    evaluator, _ = evaluated(content, many, "voc")
    assert len(outcomes(evaluator).ignored) == len(many) > 1000
    assert len(outcomes(evaluated(content, many, "coco")[0]).ignored) < len(many)
    assert not any("counts at most" in line for line in evaluator.notes({"segm/AP": 1.0}))


def test_borders_of_what_is_found():
    full = np.zeros((100, 100), bool)
    full[20:80, 20:80] = True
    shifted = np.roll(full, 6, axis=1)
    content = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": encode(full), "iscrowd": 0}
        ],
    }
    box = [26, 20, 60, 60]
    results = [
        {
            "image_id": 1,
            "category_id": 1,
            "score": 0.9,
            "bbox": box,
            "segmentation": encode(shifted),
        }
    ]
    evaluator, metrics = evaluated(content, results, "boundary")
    width = boundary_width((100, 100))
    rings = [boundary(mask, width) for mask in (full, shifted)]
    expected = (rings[0] & rings[1]).sum() / (rings[0] | rings[1]).sum()
    (row,) = (r for r in report_of(evaluator, metrics).borders if r.found)
    assert row.border_iou == pytest.approx(expected) and row.mask_iou == pytest.approx(54 / 66)
    assert (row.name, row.found, row.fitting) == ("32–64", 1, int(expected >= 0.5))
    assert metrics["boundary/AP50"] == row.fitting
    assert not report_of(*evaluated(content, results, "coco")).borders


def keypoint_case():
    content, results = instances_case(1)
    content["categories"][0]["keypoints"] = ["a", "b"]
    for record in content["annotations"]:
        record["keypoints"] = [3, 4, 2, 5, 6, 2]
    return content, [{**r, "keypoints": [3, 4, 0.9, 5, 6, 0.9]} for r in results]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("lvis", ("LVIS&#39;s metrics", "No image was searched for all classes")),
        ("cityscapes", ("Cityscapes&#39; metrics", "lie to more than half in void")),
        ("voc", ("Pascal VOC&#39;s metrics", "AP70 is in the table only")),
        ("boundary", ("of their borders", "found by their borders too")),
        ("keypoints", ("keypoints/AP50", "OKS has no IoU below which")),
        ("coco", ("COCO&#39;s metrics",)),
        ("test_metrics:MeanScore", ("and your own", "mean_score")),
    ],
)
def test_the_page_says_what_its_metric_counts(tmp_path, metric, words):
    cases = {"lvis": lvis_case, "keypoints": lambda _: keypoint_case()}
    if metric == "cityscapes":
        annotations, predictions = map(str, write_cityscapes_case(3, tmp_path))
    else:
        content, results = cases.get(metric, instances_case)(1)
        annotations, predictions = str(tmp_path / "a.json"), str(tmp_path / "p.json")
        for path, value in ((annotations, content), (predictions, results)):
            with open(path, "w", encoding="utf-8") as file:
                json.dump(value, file)
    out = tmp_path / "out"
    metrics = evaluate_files(annotations, predictions, out_dir=str(out), report=True, metric=metric)
    page = (out / "report" / "report.html").read_text("utf-8")
    for word in words:
        assert word in page
    with (out / "report" / "tables" / "metrics.csv").open(encoding="utf-8") as file:
        assert {row[0] for row in csv.reader(file)} == {"metric", *metrics}
    assert ("How this metric counts" in page) == (metric != "coco")
    assert (out / "report" / "tables" / "borders.csv").exists() == (metric == "boundary")


def test_of_many_classes_the_most_confused_are_drawn():
    confusion = np.zeros((302, 302), np.int64)
    confusion[7, 200] = confusion[299, 301] = 5
    counts, names = _most_confused(confusion, [f"class {n}" for n in range(301)])
    assert counts.shape == (MAX_CLASSES + 1, MAX_CLASSES + 1) and counts.sum() == 10
    assert {"class 7", "class 200", "class 299"} <= set(names) and len(names) == MAX_CLASSES
    small = np.eye(3, dtype=np.int64)
    assert _most_confused(small, ["a", "b"])[0] is small


def test_curves_of_a_metric_without_limit_are_those_of_all_detections():
    content, results = instances_case(2)
    evaluator, _ = evaluated(content, results, "voc")
    whole, each = curves(outcomes(evaluator), len(evaluator.category_ids))
    assert len(whole.score) == sum(len(c.score) for c in each)
