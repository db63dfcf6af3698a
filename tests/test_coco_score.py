"""The fast metrics against pycocotools, on cases made to find a difference."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solov2_jax.evaluation.coco import is_defined
from solov2_jax.evaluation.coco_score import METRICS, compute_ap, read_ground_truth


def encode(box, size, keep):
    """Returns the RLE of a box's pixels for which `keep` holds, and their number."""
    x0, y0, x1, y1 = box
    mask = np.zeros(size, np.uint8, order="F")
    mask[y0:y1, x0:x1] = keep[y0:y1, x0:x1]
    found = rle.encode(mask)
    return {"size": list(size), "counts": found["counts"].decode()}, int(mask.sum())


def random_case(seed):
    """Returns an instances json and results that share boxes, scores and areas.

    Crowds, equal scores, equal overlaps, areas on the edge of a size range, images
    without objects or detections, more than 100 detections, ids 0, a category without
    objects, results of unknown order.
    """
    rng = np.random.default_rng(seed)
    side = int(rng.choice([24, 60, 160]))
    size = (side, side)
    categories = rng.permutation(20)[: rng.integers(1, 4)].tolist()
    images = rng.permutation(50)[: rng.integers(1, 5)].tolist()

    def some_box():
        x, y = np.sort(rng.integers(0, side, (2, 2)), axis=1).tolist()
        return (x[0], y[0], x[1] + 1, y[1] + 1)

    boxes = [some_box() for _ in range(6)]

    def shape(repeat):
        box = boxes[rng.integers(6)] if rng.random() < repeat else some_box()
        keep = rng.random(size) < rng.choice([0.8, 1.0])
        mask, area = encode(box, size, keep)
        x0, y0, x1, y1 = box
        return {
            "category_id": int(rng.choice(categories)),
            "segmentation": mask,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }, area

    annotations, results = [], []
    number = int(rng.choice([0, 5, 40, 130]))
    for image in images:
        for _ in range(rng.integers(0, 8) if rng.random() < 0.8 else 0):
            entry, area = shape(0.5)
            area = int(rng.choice([area, 32**2, 96**2]))
            crowd = int(rng.random() < 0.25)
            entry |= {"id": len(annotations), "image_id": image}
            annotations.append({**entry, "area": area, "iscrowd": crowd})
        for _ in range(number if rng.random() < 0.9 else 0):
            score = float(rng.choice([0.1, 0.5, 0.9, rng.random()]))
            results.append({**shape(0.7)[0], "image_id": image, "score": score})
    rng.shuffle(results)
    content = {
        "images": [{"id": i, "height": side, "width": side} for i in images],
        "categories": [{"id": c, "name": str(c)} for c in categories],
        "annotations": annotations,
    }
    return content, results


def both(content, results, kind, image_ids=None, max_detections=100):
    """Returns the fast score and pycocotools'."""
    truth = read_ground_truth(content)
    scores = [
        compute_ap(
            truth,
            results,
            kind,
            image_ids=sorted(truth.images) if image_ids is None else image_ids,
            category_ids=sorted(truth.categories),
            max_detections=max_detections,
            backend=backend,
        )
        for backend in ("fast", "pycocotools")
    ]
    return scores


def summary_of_pycocotools(content, results, kind):
    """Returns the twelve numbers of pycocotools alone, from its own files' form."""
    key = "segmentation" if kind == "segm" else "bbox"
    plain = [{k: r[k] for k in ("image_id", "category_id", "score", key)} for r in results]
    coco = COCO()
    coco.dataset = {**content, "annotations": read_ground_truth(content).annotations}
    coco.createIndex()
    empty = COCO()
    empty.dataset = {**content, "annotations": []}
    empty.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(plain) if plain else empty, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([100, 110]))
@hypothesis.settings(max_examples=40)
def test_every_digit_of_every_array(seed, max_detections):
    content, results = random_case(seed)
    for kind in ("segm", "bbox"):
        fast, plain = both(content, results, kind, max_detections=max_detections)
        np.testing.assert_equal(fast.metrics, plain.metrics)
        np.testing.assert_array_equal(fast.precision, plain.precision)
        np.testing.assert_array_equal(fast.recall, plain.recall)
        np.testing.assert_array_equal(fast.class_ap(), plain.class_ap())


@pytest.mark.parametrize("seed", range(6))
def test_the_means_are_those_that_pycocotools_prints(seed):
    content, results = random_case(seed)
    for kind in ("segm", "bbox"):
        fast, _ = both(content, results, kind)
        values = [fast.metrics[name] for name in METRICS]
        expected = summary_of_pycocotools(content, results, kind)
        np.testing.assert_array_equal(np.nan_to_num(values, nan=-1), expected)


def test_the_cases_are_not_trivial():
    scores = [both(*random_case(seed), "segm")[0].metrics for seed in range(12)]
    for name in METRICS:
        values = {s[name] for s in scores if is_defined(s[name])}
        assert len(values) > 1 and max(values) > 0, name


def test_ids_of_any_size():
    content, results = random_case(2)
    expected = both(content, results, "segm")[0]

    def moved(record):
        return record | {k: record[k] + 2**70 for k in ("image_id", "category_id")}

    truth = read_ground_truth(content)
    truth = dataclasses.replace(
        truth,
        images={i + 2**70: r for i, r in truth.images.items()},
        categories={i + 2**70: n for i, n in truth.categories.items()},
        annotations=[moved(a) for a in truth.annotations],
    )
    score = compute_ap(
        truth,
        [moved(r) for r in results],
        "segm",
        image_ids=sorted(truth.images),
        category_ids=sorted(truth.categories),
    )
    np.testing.assert_equal(score.metrics, expected.metrics)


def test_images_without_objects():
    content, results = random_case(6)
    content["images"].append({"id": 3, "height": 24, "width": 24})
    for score in both(content, results, "segm", [3]):
        np.testing.assert_equal(score.metrics, dict.fromkeys(METRICS, np.nan))
