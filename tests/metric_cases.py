"""Small random cases of each metric, and what the public implementations say of them.

    python tests/metric_cases.py --boundary BOUNDARY_IOU_API --fcis FCIS

writes tests/golden/metrics.json anew. It needs, beside requirements-dev.txt, what no test
needs: `pip install --no-deps lvis cityscapesscripts pyquaternion` and opencv, and the sources of
github.com/bowenc0221/boundary-iou-api and github.com/msracver/FCIS. Both are older than
numpy 2 and Python 3: what they miss is put back here, their arithmetic stays theirs.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SEEDS = range(50)
GOLDEN = Path(__file__).resolve().parent / "golden" / "metrics.json"


def encode(mask):
    """Returns the RLE of a mask as json has it."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def blob(rng, side):
    """Returns a mask: a rectangle, an ellipse, or with holes; it may touch the image's edge."""
    y, x = np.mgrid[:side, :side]
    cy, cx, ry, rx = *rng.uniform(0, side, 2), *rng.uniform(2, side / 2, 2)
    distance = np.abs(y - cy) / ry, np.abs(x - cx) / rx
    mask = np.maximum(*distance) <= 1 if rng.random() < 0.5 else np.hypot(*distance) <= 1
    if rng.random() < 0.3:
        mask &= rng.random(mask.shape) < 0.97
    if not mask.any():
        mask[0, 0] = True
    return mask


def shifted(rng, mask):
    """Returns a mask like another one, moved a little."""
    step = max(1, len(mask) // 12)
    return np.roll(mask, rng.integers(-step, step + 1, 2), (0, 1))


def objects_and_results(rng, images, categories, side, *, crowds, most):
    """Returns annotations and results with ties, hits, near misses and duplicates."""
    annotations, results = [], []
    for image in images:
        shapes = [blob(rng, side) for _ in range(rng.integers(0, 6))]
        labels = rng.choice(categories, len(shapes)).tolist()
        for mask, label in zip(shapes, labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "segmentation": (rle := encode(mask)),
                    "area": int(rng.choice([mask.sum(), mask.sum(), 32**2])),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "iscrowd": int(crowds and rng.random() < 0.2),
                }
            )
        for _ in range(rng.integers(0, most)):
            hit = bool(shapes) and rng.random() < 0.7
            n = int(rng.integers(len(shapes))) if hit else 0
            mask = shifted(rng, shapes[n]) if hit else blob(rng, side)
            if not mask.any():
                continue
            label = labels[n] if hit and rng.random() < 0.8 else int(rng.choice(categories))
            score = float(rng.choice([0.25, 0.5, rng.random(), rng.random()]))
            results.append(
                {
                    "image_id": image,
                    "category_id": label,
                    "segmentation": (rle := encode(mask)),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "score": score,
                }
            )
    return annotations, results


def instances_case(seed, *, crowds=False, most=14, distinct=False):
    """Returns an instances json and results.

    Args:
      distinct: no two equal scores.
    """
    rng = np.random.default_rng(seed)
    side = int(rng.choice([24, 48, 120]))
    categories = sorted(rng.permutation(20)[: rng.integers(1, 4)].tolist())
    images = sorted((1 + rng.permutation(30)[: rng.integers(1, 5)]).tolist())
    annotations, results = objects_and_results(
        rng, images, categories, side, crowds=crowds, most=most
    )
    if distinct:
        for n, place in enumerate(rng.permutation(len(results)).tolist()):
            results[place]["score"] = (n + 1) / (len(results) + 1)
    content = {
        "images": [{"id": i, "height": side, "width": side} for i in images],
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
        "annotations": annotations,
    }
    return content, results


def lvis_case(seed):
    """Returns an LVIS json and results; some images have more than 300."""
    content, results = instances_case(seed, most=14 if seed % 10 else 330)
    rng = np.random.default_rng([seed, 1])
    ids = [c["id"] for c in content["categories"]]
    for category in content["categories"]:
        category["frequency"] = str(rng.choice(["r", "c", "f"]))
    for image in content["images"]:
        own = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        image["neg_category_ids"] = [i for i in ids if i not in own and rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [i for i in ids if i in own and rng.random() < 0.4]
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['id']:012}.jpg"
    if not results:  # the lvis package takes no empty list
        (size,) = {i["height"] for i in content["images"]}
        rle = encode(np.eye(size, dtype=bool))
        first = {"image_id": content["images"][0]["id"], "category_id": ids[0], "score": 0.5}
        results = [{**first, "segmentation": rle, "bbox": coco_mask.toBbox(rle).tolist()}]
    return content, results


def write_cityscapes_case(seed, folder):
    """Writes gtFine/val and results in Cityscapes' format below a folder.

    Small objects, groups, void and masks without a pixel are among them.
    """
    rng = np.random.default_rng([seed, 2])
    truth, results = Path(folder) / "gtFine" / "val", Path(folder) / "results"
    for path in (truth / "aachen", results):
        path.mkdir(parents=True)
    labels = [24, 26, 33]
    for number in range(int(rng.integers(1, 4))):
        stem = f"aachen_{number:06}_000019"
        ids = np.full((48, 64), 7, np.int32)
        for n in range(int(rng.integers(0, 9))):
            mask = blob(rng, 64)[:48]
            kind, label = rng.random(), int(rng.choice(labels))
            ids[mask] = 4 if kind < 0.15 else label if kind < 0.35 else label * 1000 + n
        Image.fromarray(ids.astype(np.uint16)).save(
            truth / "aachen" / f"{stem}_gtFine_instanceIds.png"
        )
        lines = []
        for value in rng.permutation(np.unique(ids)).tolist() * 2 + [0, 0, 0]:
            hit = ids == value if rng.random() < 0.7 else blob(rng, 64)[:48]
            mask = np.roll(hit, rng.integers(-2, 3, 2), (0, 1))
            label = value // 1000 if value >= 1000 and rng.random() < 0.8 else rng.choice(labels)
            name = f"{stem}_{len(lines)}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(results / name)
            score = rng.choice([0.25, 0.5, *rng.random(3)])
            lines.append(f"{name} {int(label)} {float(score)!r}\n")
        (results / f"{stem}.txt").write_text("".join(lines))
    return truth, results


def searched_for(content):
    """Returns an LVIS json of an instances json, without crowds.

    An image was searched for the classes that it shows, of which a fifth are not annotated
    exhaustively, and for half of the others.
    """
    rng, ids = np.random.default_rng(0), [c["id"] for c in content["categories"]]
    records = [a for a in content["annotations"] if not a.get("iscrowd")]
    shown = {(a["image_id"], a["category_id"]) for a in records}
    images = []
    for image in content["images"]:
        own = [c for c in ids if (image["id"], c) in shown]
        negative = [c for c in ids if c not in own and rng.random() < 0.5]
        vague = [c for c in own if rng.random() < 0.2]
        lists = {"neg_category_ids": negative, "not_exhaustive_category_ids": vague}
        images.append({**image, **lists, "coco_url": f"http://x/val2017/{image['id']}.jpg"})
    count = {c: len({i for i, other in shown if other == c}) for c in ids}
    letters = {c: "r" if n < 10 else "c" if n < 100 else "f" for c, n in count.items()}
    categories = [{**c, "frequency": letters[c["id"]]} for c in content["categories"]]
    return {"images": images, "annotations": records, "categories": categories}


def write_as_cityscapes(content, results, folder):
    """Returns folders of instance ids and of results of an instances json in Cityscapes' form.

    Of its classes those that Cityscapes has; small objects are drawn over large ones.
    """
    from solov2_jax.data.cityscapes import CLASSES, INSTANCE_IDS
    from solov2_jax.evaluation.coco_score import read_ground_truth
    from solov2_jax.rle import crop_of

    def pixels(record, size):
        mask = np.zeros(size, bool)
        if crop := crop_of(record["segmentation"]):
            h, w = crop.pixels.shape
            mask[crop.top : crop.top + h, crop.left : crop.left + w] = crop.pixels
        return mask

    truth, found = Path(folder) / "gtFine" / "val", Path(folder) / "results"
    for path in (truth / "coco", found):
        path.mkdir(parents=True)
    numbers = {name: number for number, name in CLASSES.items()}
    label = {c["id"]: numbers.get(c["name"]) for c in content["categories"]}
    annotations = read_ground_truth(content).annotations
    for n, image in enumerate(content["images"]):
        stem, size = f"coco_{n:06}_000019", (image["height"], image["width"])
        ids = np.full(size, 7, np.uint16)
        own = [a for a in annotations if a["image_id"] == image["id"] and label[a["category_id"]]]
        for number, record in enumerate(sorted(own, key=lambda a: -a["area"])):
            kind = label[record["category_id"]]
            ids[pixels(record, size)] = kind if record["iscrowd"] else kind * 1000 + number
        Image.fromarray(ids).save(truth / "coco" / f"{stem}{INSTANCE_IDS}")
        lines = []
        for result in (r for r in results if r["image_id"] == image["id"]):
            if kind := label[result["category_id"]]:
                name = f"{stem}_{len(lines)}.png"
                Image.fromarray(pixels(result, size)).convert("L").save(found / name)
                lines.append(f"{name} {kind} {result['score']!r}\n")
        (found / f"{stem}.txt").write_text("".join(lines))
    return truth, found


def copied(content):
    """Returns an instances json whose annotations may be changed, as evaluation does."""
    return {**content, "annotations": [dict(a) for a in content["annotations"]]}


def indexed(content):
    """Returns pycocotools' COCO of an instances json."""
    coco = COCO()
    coco.dataset = copied(content)
    coco.createIndex()
    return coco


# --- The public implementations --------------------------------------------------------


def coco_metrics(content, results):
    """Returns COCO's twelve numbers of masks by pycocotools; -1 where one is undefined."""
    coco = indexed(content)
    plain = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    evaluation = COCOeval(coco, coco.loadRes(plain), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def lvis_metrics(content, results):
    """Returns {"segm/AP": ..., "bbox/AP": ...} by lvis-api; -1 where one is undefined."""
    from lvis import LVIS, LVISEval, LVISResults

    vars(np)["float"] = float
    metrics = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "lvis.json")
        Path(path).write_text(json.dumps(content))
        for kind in ("segm", "bbox"):
            shape = "segmentation" if kind == "segm" else "bbox"
            keys = ("image_id", "category_id", "score", shape)
            plain = [{k: r[k] for k in keys} for r in results]
            truth = LVIS(path)
            evaluation = LVISEval(truth, LVISResults(truth, plain), kind)
            evaluation.run()
            metrics |= {f"{kind}/{k}": float(v) for k, v in evaluation.get_results().items()}
    return metrics


def boundary_metrics(content, results):
    """Returns COCO's twelve numbers by boundary_iou_api; -1 where one is undefined."""
    from boundary_iou.coco_instance_api.coco import COCO
    from boundary_iou.coco_instance_api.cocoeval import COCOeval

    vars(np)["float"] = float
    coco = COCO(get_boundary=False)
    coco.dataset = copied(content)
    coco.createIndex()
    plain = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    loaded = coco.loadRes(plain)
    for each in (coco, loaded):
        each.get_boundary = False
    evaluation = COCOeval(coco, loaded, "boundary")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def cityscapes_metrics(truth, results):
    """Returns {"AP", "AP50", a class's name: its AP} by cityscapesscripts; None: undefined.

    Args:
      truth, results: folders.
    """
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as program

    vars(np)["in1d"] = lambda a, b: np.isin(np.asarray(a).ravel(), b)
    program.writeDict2JSON = lambda *args: None  # its json takes no numbers of numpy 2
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        args = program.args
        args.predictionPath, args.predictionWalk = str(results), None
        args.gtInstancesFile = os.path.join(folder, "gtInstances.json")
        args.quiet, args.JSONOutput = True, False
        pictures = sorted(map(str, truth.rglob("*_instanceIds.png")))
        predictions = [program.getPrediction(p, args) for p in pictures]
        averages = program.evaluateImgLists(predictions, pictures, args)["averages"]
    classes = {name: float(value["ap"]) for name, value in averages["classes"].items()}
    values = {"AP": float(averages["allAp"]), "AP50": float(averages["allAp50%"]), **classes}
    return {name: None if np.isnan(v) else v for name, v in values.items()}


def cityscapes_of(seed):
    """Returns the metrics of a case, which is written for that."""
    with tempfile.TemporaryDirectory() as folder:
        return cityscapes_metrics(*write_cityscapes_case(seed, folder))


def voc_metrics(seed, fcis):
    """Returns [AP50, AP70] of each class by FCIS's voc_eval_sds; None: undefined."""
    lib = Path(fcis) / "lib"
    functions = {"dataset/pascal_voc_eval.py": ("voc_ap", "voc_eval_sds")}
    functions["mask/mask_transform.py"] = ("mask_overlap",)
    parts = ["import numpy as np"]
    for file, names in functions.items():
        text = (lib / file).read_text().replace("xrange", "range").replace("iteritems", "items")
        for name in names:
            parts.append(text[text.index(f"def {name}(") :].partition("\ndef ")[0])
    module = types.ModuleType("pascal_voc_eval")
    exec("\n".join(parts), module.__dict__)
    content, results = instances_case(seed, distinct=True)
    side = content["images"][0]["height"]
    whole = [0, 0, side - 1, side - 1]
    names = [str(i["id"]) for i in content["images"]]

    def of(records, category, image):
        both = category["id"], int(image)
        return [r for r in records if (r["category_id"], r["image_id"]) == both]

    def decoded(record):
        return coco_mask.decode(record["segmentation"])

    values = []
    for category in content["categories"]:
        found = [of(results, category, i) for i in names]
        boxes = [[[*whole, r["score"]] for r in image] for image in found]
        masks = [[decoded(r) for r in image] for image in found]
        pair = []
        for threshold in (0.5, 0.7):
            truth = {
                i: [
                    {"mask": decoded(a), "mask_bound": np.array(whole), "already_detect": False}
                    for a in of(content["annotations"], category, i)
                ]
                for i in names
            }
            truth = {i: objects for i, objects in truth.items() if objects}
            loads = iter([truth, boxes, masks])
            module.cPickle = types.SimpleNamespace(load=lambda file, loads=loads: next(loads))
            module.open = lambda *args: io.StringIO("\n".join(names))
            module.check_voc_sds_cache = lambda *args: None
            count = sum(len(of(content["annotations"], category, i)) for i in names)
            ap = module.voc_eval_sds(
                "",
                "",
                "",
                "",
                str(category["id"]),
                "",
                [],
                mask_size=side,
                binary_thresh=0.5,
                ov_thresh=threshold,
            )
            pair.append(float(ap) if count else None)
        values.append(pair)
    return values


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--boundary", required=True)
    parser.add_argument("--fcis", required=True)
    flags = parser.parse_args()
    sys.path.append(flags.boundary)
    logging.disable(logging.WARNING)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, np.errstate(all="ignore"):
        golden = {
            "lvis": [lvis_metrics(*lvis_case(seed)) for seed in SEEDS],
            "boundary": [boundary_metrics(*instances_case(s, crowds=True)) for s in SEEDS],
            "cityscapes": [cityscapes_of(seed) for seed in SEEDS],
            "voc": [voc_metrics(seed, flags.fcis) for seed in SEEDS],
        }
    GOLDEN.write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
    main()
