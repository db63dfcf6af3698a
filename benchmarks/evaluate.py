"""Masks to COCO's metrics: encoding, matching and AP, against plain pycocotools.

    python benchmarks/evaluate.py --images 5000 --runs 1 --warmups 0
    python benchmarks/evaluate.py --images 200

100 detections an image, half of them made from the image's objects by shifting and
fraying their masks, the others anywhere. The objects have COCO's number of classes and
about its sizes. The masks of a few images (`POOL`) are held in memory and used again
under other image ids with other scores, so that making them is not measured. The
programs must agree in every metric and every run length, else nothing is reported.
"""

import argparse
import hashlib
import json
import sys
from importlib.metadata import version
from typing import Any, NamedTuple

import harness
import numpy as np
from harness import Stages, Work
from pycocotools import mask as coco_mask

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.coco_score import read_ground_truth
from solov2_jax.inference.prediction import Prediction

POOL = 24  # images whose masks are held: 30 MB each
DETECTIONS = 100  # an image
CLASSES = 80
SIZE = (480, 640)
OBJECTS = 7.3  # an image, COCO's mean
BACKENDS = {"ours": "fast", "pycocotools": "pycocotools"}


class Image(NamedTuple):
    """An image's objects."""

    masks: list[np.ndarray]  # bool [H, W]
    labels: list[int]


def main() -> None:
    """Measures both programs in turns, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--program", choices=BACKENDS, help=argparse.SUPPRESS)
    harness.add_arguments(parser, runs=3)
    args = parser.parse_args()
    if args.program:
        harness.serve(lambda: load(args.images, args.program))
        return
    command = [sys.executable, __file__, "--images", str(args.images), "--program"]
    programs = [harness.Program(name, [*command, name]) for name in BACKENDS]
    label = f"{args.images} images, {DETECTIONS} detections each, generated objects"
    work = {"script": "evaluate", "what": "figures", "label": label}
    harness.measure(f"evaluate_{args.images}", work, programs, args, {"digest": 0.0})


def load(images: int, program: str) -> Work:
    """Returns the work of one program."""
    rng = np.random.default_rng(0)
    pool = [make_image(rng) for _ in range(POOL)]
    predictions = [make_prediction(rng, image) for image in pool]
    truth = read_ground_truth(make_annotations(pool, images))
    ids = sorted(truth.categories)
    class_names = [truth.categories[i] for i in ids]
    scores = np.sort(rng.random((images, DETECTIONS)))[:, ::-1].astype(np.float32)
    stages = Stages()

    def run() -> dict[str, Any]:
        evaluator = CocoEvaluator(truth, ids, class_names, backend=BACKENDS[program])
        with stages("encode"):
            for image_id, of_image in enumerate(scores, start=1):
                masks, boxes, labels = predictions[(image_id - 1) % POOL]
                prediction = Prediction(masks, boxes, of_image, labels, image_id)
                if program == "ours":
                    evaluator.process(prediction)
                else:
                    evaluator._seen.add(image_id)
                    evaluator.results.extend(plain_results(prediction, ids))
        with stages("figures"):
            return {"metrics": evaluator.evaluate(), "results": evaluator.results}

    def describe(result: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(result, sort_keys=True).encode()
        digest = int(hashlib.sha256(text).hexdigest()[:12], 16)
        return {"segm/AP": result["metrics"]["segm/AP"], "digest": digest}

    about = {"versions": {name: version(name) for name in ("hotcoco", "pycocotools", "numpy")}}
    return Work(run, describe, about=about, stages=stages, first_call=False)


def plain_results(prediction: Prediction, ids: list[int]) -> list[dict[str, Any]]:
    """Returns COCO results with each mask encoded whole, by pycocotools."""
    results = []
    rows = zip(
        prediction.masks, prediction.boxes, prediction.scores, prediction.labels, strict=True
    )
    for mask, box, score, label in rows:
        x0, y0, x1, y1 = map(float, box)
        results.append(
            {
                "image_id": int(prediction.image_id),
                "category_id": ids[int(label)],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(score),
                "segmentation": encode(mask),
            }
        )
    return results


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Returns a bool [H, W] mask as pycocotools encodes it, for json."""
    rle: Any = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def make_image(rng: np.random.Generator) -> Image:
    """Returns objects; a few classes are common, most are rare, as in COCO."""
    count = max(1, int(rng.poisson(OBJECTS)))
    return Image([ellipse(rng) for _ in range(count)], some_classes(rng, count))


def some_classes(rng: np.random.Generator, count: int) -> list[int]:
    """Returns labels 0..CLASSES-1 of which the low ones are common."""
    return (CLASSES * rng.random(count) ** 3).astype(int).tolist()


def ellipse(rng: np.random.Generator) -> np.ndarray:
    """Returns the mask of an ellipse somewhere, bool [H, W]; its size as in COCO."""
    (cy, cx), (ry, rx) = rng.uniform(0, SIZE), np.exp(rng.uniform(1.8, np.log(0.3 * SIZE[0]), 2))
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1


def make_prediction(rng: np.random.Generator, image: Image) -> tuple[np.ndarray, ...]:
    """Returns masks, boxes and labels: half made from the objects, half anywhere."""
    masks, labels, boxes = [], [], []
    while len(masks) < DETECTIONS:
        i = int(rng.integers(len(image.masks)))
        mask = image.masks[i] if len(masks) % 2 else ellipse(rng)
        step = max(1, round(0.04 * np.sqrt(mask.sum())))  # moved and frayed by so many pixels
        moves = rng.integers(-step, step + 1, (3, 2)).tolist()
        first, second, third = (np.roll(mask, move, (0, 1)) for move in moves)
        mask = first & (second | third)
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            masks.append(mask)
            labels.append(image.labels[i] if rng.random() < 0.8 else some_classes(rng, 1)[0])
            boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return np.array(masks), np.array(boxes, np.float32), np.array(labels)


def make_annotations(pool: list[Image], images: int) -> dict[str, Any]:
    """Returns an instances json of the pool's images, one after the other, again."""
    rng, annotations = np.random.default_rng(1), []
    encoded = [[encode(mask) for mask in image.masks] for image in pool]
    for image_id in range(1, images + 1):
        image = pool[(image_id - 1) % len(pool)]
        for rle, label in zip(encoded[(image_id - 1) % len(pool)], image.labels, strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "segmentation": rle}
            crowd = int(rng.random() < 0.01)
            annotations.append(annotation | {"category_id": label + 1, "iscrowd": crowd})
    sizes = {"height": SIZE[0], "width": SIZE[1]}
    return {
        "categories": [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CLASSES)],
        "images": [{"id": i, **sizes} for i in range(1, images + 1)],
        "annotations": annotations,
    }


if __name__ == "__main__":
    main()
