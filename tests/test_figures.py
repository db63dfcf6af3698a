"""The fast figures against pycocotools, on cases made to find a difference."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as rle

from solov2_jax.evaluation.coco_accumulate import FIGURES, score_fast, score_pycocotools
from solov2_jax.evaluation.coco_tables import make_detections, make_objects
from solov2_jax.evaluation.ground_truth import read_ground_truth


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


def both(content, results, kind, image_ids=None):
    """Returns the fast score and pycocotools'."""
    truth = read_ground_truth(content)
    ids = sorted(truth.images) if image_ids is None else image_ids
    categories = sorted(truth.categories)
    objects = make_objects(truth.annotations, ids, categories)
    found = make_detections(results, ids, categories)
    fast = score_fast(objects, found, kind, len(categories))
    return fast, score_pycocotools(truth, results, kind, ids, categories)


@hypothesis.given(st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=40)
def test_every_digit_of_every_array(seed):
    content, results = random_case(seed)
    for kind in ("segm", "bbox"):
        fast, plain = both(content, results, kind)
        assert fast.figures == plain.figures
        np.testing.assert_array_equal(fast.precision, plain.precision)
        np.testing.assert_array_equal(fast.recall, plain.recall)
        np.testing.assert_array_equal(fast.class_precision(), plain.class_precision())


def test_the_cases_are_not_trivial():
    scores = [both(*random_case(seed), "segm")[0].figures for seed in range(12)]
    for name in FIGURES:
        values = {s[name] for s in scores}
        assert len(values) > 2 and max(values) > 0, name


@pytest.mark.parametrize("images", [[], [3]])
def test_part_of_the_images_or_none(images):
    content, results = random_case(6)
    content["images"].append({"id": 3, "height": 24, "width": 24})
    fast, plain = both(content, results, "segm", images)
    assert fast.figures == plain.figures == dict.fromkeys(FIGURES, -1.0)
