"""The embedded data set "shapes": textured scenes with exact masks, from a seed.

Up to five classes that differ in outline, and in hue if wanted; texture, size, rotation
and number vary, objects hide each other, and some are cut by the border. It is written
as an ordinary COCO folder, so that every later step is the one for real data.
"""

import colorsys
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data.rasterize import spans_to_masks
from solov2_jax.rle import mask_to_rle, polygons_to_rle, rle_from_string, spans_from_rle
from solov2_jax.tools.synthetic.shape_points import CATEGORY, NO_POINTS, object_points

log = logging.getLogger(__name__)

_VERSION = 2  # of the drawing: raise it when the same settings give other pictures
# As in COCO, ids are neither contiguous nor start at 1.
CATEGORIES = {2: "ellipse", 3: "rectangle", 5: "triangle", 7: "star", 11: "ring"}


@dataclasses.dataclass(frozen=True)
class ShapesSettings:
    """What the data set depends on; each combination has a folder of its own."""

    num_train: int = 400
    num_val: int = 64
    height: int = 128
    width: int = 128
    seed: int = 0
    classes: tuple[str, ...] = tuple(CATEGORIES.values())
    color_cue: float = 0.0  # share of objects whose hue tells their class
    max_objects: int = 6  # per image; at least 1 but for empty images
    min_radius: float = 0.09  # of an object, over the shorter side of the image
    max_radius: float = 0.30
    min_visible: float = 0.4  # an object hidden more than this is not placed
    empty_fraction: float = 0.04  # images without objects
    crowd_fraction: float = 0.04  # images with a crowd region
    keypoints: bool = False  # see `shape_points`

    @property
    def categories(self) -> dict[int, str]:
        """The category ids and names of `classes`."""
        return {k: name for k, name in CATEGORIES.items() if name in self.classes}


def write_shapes(root: str, settings: ShapesSettings) -> str:
    """Returns the folder of the data set below `root`, written if it is not there.

    It holds train/, val/, instances_train.json and instances_val.json. Other settings
    get another folder. The folder appears complete or not at all, also if the program
    is killed or several run at once.
    """
    _check(settings)
    values = dataclasses.asdict(settings) | {"version": _VERSION}
    if not settings.keypoints:  # older data sets have no such field, and stay
        del values["keypoints"]
    content = json.dumps(values, indent=1)
    digest = hashlib.sha256(content.encode()).hexdigest()[:10]
    final = os.path.join(root, f"{settings.height}x{settings.width}-{digest}")
    if os.path.isdir(final):
        return final
    os.makedirs(root, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=".writing-", dir=root)
    try:
        for number, split in enumerate(("train", "val")):
            _write_split(partial, split, number, settings)
        with open(os.path.join(partial, "settings.json"), "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(partial, 0o755)  # mkdtemp's is private
        os.rename(partial, final)
    except OSError:
        if not os.path.isdir(final):
            raise
        log.info("%s was written by another process meanwhile", final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if it was renamed
    return final


def data_files(config: Any) -> tuple[tuple[str, str], tuple[str, str]]:
    """Returns (image folder, json) of both splits of `config.data.generated`, written
    first if it is not there: the provider "shapes" of `data.name`."""
    generated = config.data.generated
    height, width = generated.image_size
    folder = write_shapes(
        generated.root,
        ShapesSettings(
            num_train=generated.num_train,
            num_val=generated.num_val,
            height=height,
            width=width,
            seed=generated.seed,
            classes=tuple(generated.classes),
            color_cue=generated.color_cue,
            max_objects=generated.max_objects,
            min_radius=generated.min_radius,
            max_radius=generated.max_radius,
            keypoints=generated.keypoints,
        ),
    )
    train, val = os.path.join(folder, "train"), os.path.join(folder, "val")
    jsons = [os.path.join(folder, f"instances_{split}.json") for split in ("train", "val")]
    return (train, jsons[0]), (val, jsons[1])


def _check(settings: ShapesSettings) -> None:
    if min(settings.num_train, settings.num_val) < 1:
        raise ValueError(
            f"data.generated: num_train {settings.num_train} and num_val "
            f"{settings.num_val} must be at least 1."
        )
    unknown = set(settings.classes) - set(CATEGORIES.values())
    if unknown or not settings.classes:
        raise ValueError(
            f"data.generated.classes {settings.classes}: choose one or more of "
            f"{tuple(CATEGORIES.values())}."
        )
    if min(settings.height, settings.width) < 32:
        raise ValueError(
            f"data.generated.image_size {(settings.height, settings.width)} must be "
            "at least 32 on both sides."
        )


def _write_split(folder: str, split: str, number: int, settings: ShapesSettings) -> None:
    """Writes one split's images and json."""
    os.makedirs(os.path.join(folder, split))
    images, annotations = [], []
    total = settings.num_train if split == "train" else settings.num_val
    for i in range(total):
        rng = np.random.default_rng([settings.seed, number, i])
        picture, objects = draw_scene(rng, settings)
        # Ids with gaps, in both splits; half of the pictures lossy.
        image_id = 1000 * number + 3 * i + 1
        name = f"{image_id:06d}.{'jpg' if i % 2 else 'png'}"
        options: dict[str, Any] = {"quality": 92} if i % 2 else {}
        Image.fromarray(picture).save(os.path.join(folder, split, name), **options)
        size = {"height": settings.height, "width": settings.width}
        images.append({"id": image_id, "file_name": name} | size)
        for obj in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id} | obj)
    content = {
        "info": {"description": f"solov2_jax shapes, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": v} for k, v in settings.categories.items()],
    }
    if settings.keypoints:
        content["categories"] = [c | CATEGORY for c in content["categories"]]
    with open(os.path.join(folder, f"instances_{split}.json"), "w", encoding="utf-8") as file:
        json.dump(content, file)


@dataclasses.dataclass
class _Object:
    category: int
    rings: list[np.ndarray]  # outline, and the hole's outline of a ring; [n, 2] each
    full: np.ndarray  # bool [h, w], as if nothing were in front
    visible: np.ndarray  # bool [h, w]


def draw_scene(
    rng: np.random.Generator, settings: ShapesSettings
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Returns a picture, uint8 [h, w, 3], and its annotations without ids."""
    h, w = settings.height, settings.width
    ground = rng.uniform(30, 225, 3)
    canvas = texture(rng, h, w, ground)
    kind = rng.random()
    annotations: list[dict[str, Any]] = []
    objects: list[_Object] = []
    if kind < settings.crowd_fraction:
        annotations.append(_draw_crowd(rng, canvas, ground, settings))
    if kind < 1 - settings.empty_fraction:
        for _ in range(int(rng.integers(1, settings.max_objects + 1))):
            _place(rng, canvas, ground, objects, settings)
    light = np.linspace(rng.uniform(-15, 15), rng.uniform(-15, 15), w)[None, :, None]
    canvas += light + rng.normal(0, 4, canvas.shape)
    picture = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    records = [_annotation(obj) for obj in objects]
    if settings.keypoints:
        places = [object_points(o.rings[0], o.full, o.visible) for o in objects]
        records = [record | points for record, points in zip(records, places, strict=True)]
        annotations = [crowd | NO_POINTS for crowd in annotations]
    return picture, records + annotations


def _place(
    rng: np.random.Generator,
    canvas: np.ndarray,
    ground: np.ndarray,
    objects: list[_Object],
    settings: ShapesSettings,
) -> None:
    """Draws one more object in front of the others, unless it would hide one."""
    h, w = settings.height, settings.width
    low, high = np.log(settings.min_radius), np.log(settings.max_radius)
    for _ in range(10):
        radius = min(h, w) * float(np.exp(rng.uniform(low, high)))
        center = rng.uniform([0, 0], [w, h])
        category = int(rng.choice(list(settings.categories)))
        rings = _outline(rng, category, center, radius)
        full = _draw(rings, h, w)
        # At least half of its outline's area lies inside of the picture.
        if full.sum() < 0.5 * _area(rings) or full.sum() < 12:
            continue
        rest = [o.visible & ~full for o in objects]
        if any(
            r.sum() < settings.min_visible * o.full.sum()
            for r, o in zip(rest, objects, strict=True)
        ):
            continue
        for o, r in zip(objects, rest, strict=True):
            o.visible = r
        objects.append(_Object(category, rings, full, full))
        color = _object_color(rng, ground, category, settings)
        canvas[full] = texture(rng, h, w, color)[full]
        return


def _object_color(
    rng: np.random.Generator, ground: np.ndarray, category: int, settings: ShapesSettings
) -> np.ndarray:
    """Returns a colour unlike the ground's, in the class's band of hues or any."""
    if rng.random() >= settings.color_cue:
        return _other_color(rng, ground)
    ids = list(settings.categories)
    while True:
        hue = (ids.index(category) + rng.uniform(-0.25, 0.25)) / len(ids)
        rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 1), rng.uniform(0.5, 0.95))
        color = 255 * np.array(rgb)
        if np.abs(color - ground).max() > 40:
            return color


def _draw_crowd(
    rng: np.random.Generator, canvas: np.ndarray, ground: np.ndarray, settings: ShapesSettings
) -> dict[str, Any]:
    """Draws many tiny objects and returns their one crowd annotation."""
    h, w = settings.height, settings.width
    category = int(rng.choice(list(settings.categories)))
    size = min(h, w)
    middle = rng.uniform(0.25, 0.75, 2) * [w, h]
    covered = np.zeros((h, w), bool)
    color = _other_color(rng, ground)
    for _ in range(12):
        center = np.clip(middle + rng.normal(0, 0.1 * size, 2), 4, [w - 4, h - 4])
        full = _draw(_outline(rng, category, center, 0.05 * size), h, w)
        canvas[full] = texture(rng, h, w, color)[full]
        covered |= full
    return _record(category, covered, _uncompressed(covered)) | {"iscrowd": 1}


def _outline(
    rng: np.random.Generator, category: int, center: np.ndarray, radius: float
) -> list[np.ndarray]:
    """Returns the outline, and for a ring the hole's, float64 [n, 2] each."""
    name = CATEGORIES[category]
    aspect = rng.uniform(0.55, 1.0)
    if name in ("ellipse", "ring"):
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        unit = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    elif name == "rectangle":
        unit = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.85
    elif name == "triangle":
        angle = np.pi * (np.array([0.5, 7 / 6, 11 / 6]) + rng.uniform(-0.08, 0.08, 3))
        unit = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * 1.15
    else:
        angle = np.arange(10) * np.pi / 5
        length = np.where(np.arange(10) % 2, rng.uniform(0.38, 0.5), 1.15)
        unit = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * length[:, None]
        aspect = rng.uniform(0.8, 1.0)
    scales = [1.0, rng.uniform(0.45, 0.65)] if name == "ring" else [1.0]
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = (unit * [1.0, aspect] * radius) @ rotation.T
    return [np.round(points * s + center, 2) for s in scales]


def _draw(rings: list[np.ndarray], h: int, w: int) -> np.ndarray:
    """Returns the pixels of an outline less its hole, bool [h, w]."""
    counts = [polygons_to_rle([ring.ravel()], (h, w))["counts"] for ring in rings]
    drawn = spans_to_masks(spans_from_rle(counts, (h, w)), len(rings), (h, w))
    return drawn[0] & ~drawn[1:].any(axis=0)


def _area(rings: list[np.ndarray]) -> float:
    """Returns the area of an outline less its hole."""
    areas = []
    for ring in rings:
        x, y = ring.T
        areas.append(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)
    return areas[0] - sum(areas[1:])


def _other_color(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """Returns a colour that can be told from the ground's."""
    while True:
        color = rng.uniform(20, 235, 3)
        if np.abs(color - ground).max() > 60:
            return color


def _annotation(obj: _Object) -> dict[str, Any]:
    """Returns polygons for an object in full view, else run lengths."""
    if len(obj.rings) == 1 and (obj.visible == obj.full).all():
        return _record(obj.category, obj.visible, [obj.rings[0].ravel().tolist()])
    if obj.visible.sum() % 2:
        return _record(obj.category, obj.visible, _uncompressed(obj.visible))
    runs = mask_to_rle(obj.visible)
    segmentation = {"size": list(runs["size"]), "counts": runs["counts"].decode()}
    return _record(obj.category, obj.visible, segmentation)


def _record(category: int, mask: np.ndarray, segmentation: Any) -> dict[str, Any]:
    """Returns the annotation of a mask, bool [h, w], that is not empty."""
    y, x = np.nonzero(mask)
    box = [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
    return {
        "category_id": category,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [float(v) for v in box],
        "segmentation": segmentation,
    }


def _uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Returns the run lengths as a list, column by column, zeros first."""
    counts = rle_from_string(mask_to_rle(mask)["counts"])
    return {"size": list(mask.shape), "counts": counts.tolist()}


# --- Surfaces ------------------------------------------------------------------------


def texture(rng: np.random.Generator, h: int, w: int, color: np.ndarray) -> np.ndarray:
    """Returns a random surface around a colour, float64 [h, w, 3] in 0..255.

    One of: plain, gradient, stripes, checks, soft blobs; always with fine noise.
    """
    contrast = rng.uniform(-45, 45, 3)
    patterns = (_plain, _gradient, _stripes, _checks, _blobs)
    pattern = patterns[rng.integers(len(patterns))](rng, h, w)
    noise = rng.normal(0, rng.uniform(1, 8), (h, w, 1))
    return np.clip(color + contrast * pattern[..., None] + noise, 0, 255)


def _plain(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Returns zeros; as every pattern, float64 [h, w] in about -1..1."""
    return np.zeros((h, w))


def _along(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Returns the coordinate along a random direction, in pixels."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:h, :w]
    return np.cos(angle) * x + np.sin(angle) * y


def _gradient(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    position = _along(rng, h, w)
    low, high = position.min(), position.max()
    return 2 * (position - low) / (high - low) - 1


def _stripes(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    period = rng.uniform(4, 16)
    return np.sin(2 * np.pi * _along(rng, h, w) / period)


def _checks(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    size = int(rng.integers(3, 9))
    y, x = np.mgrid[:h, :w]
    return 1.0 - 2.0 * ((y // size + x // size) % 2)


def _blobs(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Returns coarse noise, interpolated."""
    cell = int(rng.integers(6, 20))
    rows, columns = -(-h // cell) + 2, -(-w // cell) + 2
    coarse = rng.uniform(-1, 1, (rows, columns))
    y, x = np.arange(h) / cell, np.arange(w) / cell
    y0, x0 = y.astype(int), x.astype(int)
    fy, fx = (y - y0)[:, None], (x - x0)[None]
    top = coarse[y0][:, x0] * (1 - fx) + coarse[y0][:, x0 + 1] * fx
    below = coarse[y0 + 1][:, x0] * (1 - fx) + coarse[y0 + 1][:, x0 + 1] * fx
    return top * (1 - fy) + below * fy
