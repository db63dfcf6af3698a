"""Masks to COCO's figures: encoding, matching and AP, against plain pycocotools.

    python benchmarks/evaluate.py --images 5000 --runs 1 --warmups 0
    python benchmarks/evaluate.py --images 200

100 detections an image, half of them made from the image's objects by shifting and
fraying their masks, the others anywhere. The objects are those of `--annotations`, or
generated with COCO's number of classes and about its sizes. The masks of a few images
(`POOL`) are held in memory and used again under other image ids with other scores, so
that making them is not measured. The programs must agree in every figure and every run
length, else nothing is reported.
"""

import argparse
import hashlib
import json
import pathlib
import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import harness
import numpy as np
import worker
from pycocotools import mask as rle

from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.ground_truth import read_ground_truth
from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.report.pictures import from_records

POOL = 24  # images whose masks are held: 30 MB each at 480 x 640
DETECTIONS = 100  # an image
CLASSES = 80  # of generated objects
SIZE = (480, 640)  # of generated images
OBJECTS = 7.3  # an image, COCO's mean
BACKENDS = {"ours": "fast", "pycocotools": "pycocotools"}


@dataclass(frozen=True)
class Image:
    """An image's objects."""

    size: tuple[int, int]  # height, width
    masks: list[np.ndarray]  # bool [H, W]
    labels: list[int]
    crowd: list[int]


def main() -> None:
    """Measures both programs in turns, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--annotations", help="instances json; default: generated")
    parser.add_argument("--program", choices=BACKENDS, help=argparse.SUPPRESS)
    harness.add_arguments(parser, runs=3)
    args = parser.parse_args()
    if args.program:
        worker.serve(lambda: load(args))
        return
    command = [sys.executable, __file__, "--images", str(args.images)]
    if args.annotations:
        command += ["--annotations", args.annotations]
    programs = [harness.Program(n, [*command, "--program", n]) for n in BACKENDS]
    data = "objects of a file" if args.annotations else "generated objects"
    label = f"{args.images} images, {DETECTIONS} detections each, {data}"
    work = {"script": "evaluate", "what": "figures", "label": label}
    name = f"evaluate_{args.images}{'_file' if args.annotations else ''}"
    harness.measure(name, work, programs, args, {"digest": 0.0})


def load(args: argparse.Namespace) -> worker.Work:
    """Returns the work of one program."""
    rng = np.random.default_rng(0)
    pool = read_pool(args.annotations) if args.annotations else make_pool(rng)
    predictions = [make_prediction(rng, image) for image in pool]
    truth = read_ground_truth(repeat(pool, args.images))
    ids = sorted(truth.categories)
    names = [truth.categories[i] for i in ids]
    scores = np.sort(rng.random((args.images, DETECTIONS)))[:, ::-1].astype(np.float32)
    last: dict[str, Any] = {}

    def run() -> dict[str, float]:
        stages = worker.Stages()
        evaluator = CocoEvaluator(truth, ids, names, backend=BACKENDS[args.program])
        with stages("encode"):
            for number, row in enumerate(scores, start=1):
                p = predictions[(number - 1) % len(pool)]
                one = Prediction(p.masks, p.boxes, row[: len(p)], p.labels, number)
                if args.program == "ours":
                    evaluator.process(one)
                else:
                    evaluator._seen.add(number)
                    evaluator.results.extend(plain_results(one, ids))
        with stages("figures"):
            last["metrics"] = evaluator.evaluate()
        last["results"] = evaluator.results
        return stages.seconds

    def found() -> dict[str, Any]:
        text = json.dumps(last, sort_keys=True).encode()
        digest = int(hashlib.sha256(text).hexdigest()[:12], 16)
        return {"segm/AP": last["metrics"]["segm/AP"], "digest": digest}

    versions = {name: version(name) for name in ("hotcoco", "pycocotools", "numpy")}
    return worker.Work(run, {"versions": versions}, found=found)


def plain_results(prediction: Prediction, ids: list[int]) -> list[dict[str, Any]]:
    """Returns COCO results with each mask encoded whole, by pycocotools."""
    results = []
    for i in range(len(prediction)):
        x0, y0, x1, y1 = (float(v) for v in prediction.boxes[i])
        results.append(
            {
                "image_id": int(prediction.image_id),
                "category_id": ids[int(prediction.labels[i])],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(prediction.scores[i]),
                "segmentation": encode_mask(prediction.masks[i]),
            }
        )
    return results


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Returns a bool [H, W] mask as pycocotools encodes it, for json."""
    encoded: Any = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def make_pool(rng: np.random.Generator) -> list[Image]:
    """Returns generated images; a few classes are common, most are rare, as in COCO."""
    pool = []
    for _ in range(POOL):
        n = max(1, int(rng.poisson(OBJECTS)))
        masks = [blob(rng, SIZE) for _ in range(n)]
        crowd = (rng.random(n) < 0.01).astype(int)
        pool.append(Image(SIZE, masks, some_classes(rng, n).tolist(), crowd.tolist()))
    return pool


def some_classes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns labels 0..CLASSES-1 of which the low ones are common."""
    return (CLASSES * rng.random(n) ** 3).astype(int)


def blob(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Returns the mask of a wavy disc somewhere, bool [H, W]; its size as in COCO."""
    h, w = size
    radius = np.exp(rng.uniform(np.log(6), np.log(0.3 * h)))
    y, x = np.mgrid[:h, :w]
    y, x = y - rng.uniform(0, h), x - rng.uniform(0, w)
    angle, wave = np.arctan2(y, x), np.ones(size)
    for k in (2, 3, 5, 9):
        wave += rng.uniform(0, 0.5 / k) * np.sin(k * angle + rng.uniform(0, 6.3))
    return np.hypot(x, y) < radius * wave


def read_pool(path: str) -> list[Image]:
    """Returns the first images of an instances json that have objects."""
    truth = read_ground_truth(path)
    labels = {c: n for n, c in enumerate(sorted(truth.categories))}
    pool: dict[int, Image] = {}
    for a in truth.annotations:
        if a["image_id"] not in pool:
            if len(pool) == POOL:
                continue
            record = truth.images[a["image_id"]]
            pool[a["image_id"]] = Image((record["height"], record["width"]), [], [], [])
        image = pool[a["image_id"]]
        whole = from_records([a], {a["category_id"]: 0}, 0, image.size)
        image.masks.append(whole.masks[0])
        image.labels.append(labels[a["category_id"]])
        image.crowd.append(a["iscrowd"])
    return list(pool.values())


def make_prediction(rng: np.random.Generator, image: Image) -> Prediction:
    """Returns `DETECTIONS` masks: half made from the objects, half anywhere."""
    masks, labels = [], []
    while len(masks) < DETECTIONS:
        i = int(rng.integers(len(image.masks)))
        mask = image.masks[i] if len(masks) % 2 else blob(rng, image.size)
        label = image.labels[i] if rng.random() < 0.8 else some_classes(rng, 1)[0]
        frayed = fray(rng, mask)
        if frayed.any():
            masks.append(frayed)
            labels.append(label)
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return Prediction(
        np.array(masks),
        np.array(boxes, np.float32),
        np.ones(len(masks), np.float32),
        np.array(labels),
        0,
    )


def fray(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Returns the mask moved by a few pixels, without a frayed edge."""
    step = max(1, round(0.04 * np.sqrt(mask.sum())))
    moves = rng.integers(-step, step + 1, (3, 2)).tolist()
    moved = [np.roll(mask, move, (0, 1)) for move in moves]
    return moved[0] & (moved[1] | moved[2])


def repeat(pool: list[Image], images: int) -> dict[str, Any]:
    """Returns an instances json of the pool's images, one after the other, again."""
    labels = [label for image in pool for label in image.labels]
    content = {
        "categories": [
            {"id": i + 1, "name": f"class {i + 1}"} for i in range(max(CLASSES, max(labels) + 1))
        ],
        "images": [],
        "annotations": [],
    }
    encoded = [[encode_mask(mask) for mask in image.masks] for image in pool]
    for number in range(1, images + 1):
        place = (number - 1) % len(pool)
        image = pool[place]
        height, width = image.size
        record = {"id": number, "height": height, "width": width}
        content["images"].append(record)
        rows = zip(encoded[place], image.labels, image.crowd, strict=True)
        for mask, label, crowd in rows:
            entry = {
                "id": len(content["annotations"]) + 1,
                "image_id": number,
                "category_id": int(label) + 1,
                "segmentation": mask,
                "iscrowd": crowd,
            }
            content["annotations"].append(entry)
    return content


if __name__ == "__main__":
    main()
