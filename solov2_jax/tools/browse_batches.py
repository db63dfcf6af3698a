"""Pictures of training batches as the network gets them: what `solov2 view` draws."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from solov2_jax.config_schema import AUTO
from solov2_jax.data.build import build_train_batches, last_joining_step, pixel_format
from solov2_jax.data.coco import CocoDataset
from solov2_jax.inference.draw import distinct_colors, draw_objects
from solov2_jax.io import make_folder, unmade_if_empty, without_controls
from solov2_jax.tools.grid_assignment import (
    Collisions,
    GridAssignment,
    assign_grid,
    count_collisions,
)
from solov2_jax.tools.predict.gallery import caption, tile_panels

WIDTH = 560  # of a panel, pixels
COLUMNS = 3
AUTO_SHOWN = 4  # images of a batch whose size is "auto"
_DARK = 0.45  # brightness of the picture behind a grid
_FILL = 0.65  # opacity of a positive cell


def browse(config: Any, dataset: CocoDataset, folder: str, step: int, num_steps: int) -> list[str]:
    """Returns the paths of the pictures, one per image of `num_steps` batches.

    Args:
      step: of training, from which on.
    """
    config = config.copy_and_resolve_references()
    join_steps = last_joining_step(config)
    config.train.steps = step + num_steps
    if config.train.batch_size == AUTO:  # found out when a training starts
        with config.ignore_type():
            config.train.batch_size = AUTO_SHOWN
    config.data.num_workers = 0
    names = dict(zip(dataset.image_ids.tolist(), dataset.file_names, strict=True))
    batches = build_train_batches(config, dataset, step, join_steps=join_steps)
    paths = []
    with unmade_if_empty(folder):
        make_folder(folder)
        for i, batch in enumerate(batches):
            for row in range(len(batch["image"])):
                fields = {key: value[row] for key, value in batch.items()}
                image_id = int(fields["image_id"])
                picture = draw_sample(fields, config, dataset.class_names)
                title = f"step {step + i}, {names[image_id]} (image {image_id})"
                path = os.path.join(folder, f"step_{step + i:06d}_{row}_{image_id}.jpg")
                Image.fromarray(caption(picture, title)).save(path, quality=90)
                print(without_controls(list_objects(fields, config, dataset.class_names, title)))
                paths.append(path)
    return paths


def targets_of(fields: dict[str, np.ndarray], config: Any) -> tuple[GridAssignment, Collisions]:
    """Returns the cells of a sample's valid objects, and who shares them."""
    valid = fields["valid"]
    grids = tuple(config.model.ins_head.num_grids)
    cells = assign_grid(
        fields["boxes"][valid],
        fields["centers"][valid],
        fields["image"].shape[:2],
        num_grids=grids,
        scale_ranges=tuple(tuple(r) for r in config.targets.scale_ranges),
        sigma=config.targets.sigma,
    )
    return cells, count_collisions(cells, grids)


def draw_sample(fields: dict[str, np.ndarray], config: Any, names: Sequence[str]) -> np.ndarray:
    """Returns the input and its levels side by side, uint8 [h, w, 3]."""
    image, pixels = fields["image"], pixel_format(config)
    if config.input.channel_order == "BGR" and pixels.channels == 3:
        image = image[..., ::-1]
    image = pixels.to_rgb(image)
    cells, sharing = targets_of(fields, config)
    labels = fields["labels"][fields["valid"]].tolist()
    height, width = image.shape[:2]
    panel = (round(WIDTH * height / width), WIDTH)
    masks = fields["masks"][fields["valid"]]
    panels = [_objects(image, masks, fields, panel, [names[int(k)] for k in labels])]
    ranges = config.targets.scale_ranges
    for level, grid in enumerate(config.model.ins_head.num_grids):
        low, high = ranges[level]
        count = sharing.count[level]
        title = (
            f"level {level + 1}: {grid} x {grid}, box side {low} to {high}: "
            f"{int(cells.hit[level].sum())} objects, {int((count > 0).sum())} cells, "
            f"{int((count > 1).sum())} of several objects"
        )
        owner = sharing.owner[level]
        panels.append(caption(_grid(image, owner, count, panel), title))
    return tile_panels(panels, COLUMNS)


def _objects(
    image: np.ndarray,
    masks: np.ndarray,
    fields: dict[str, np.ndarray],
    size: tuple[int, int],
    names: Sequence[str],
) -> np.ndarray:
    """Returns the input with the masks that training gets, boxes and mass centres."""
    whole = slice(0, image.shape[0]), slice(0, image.shape[1])
    crops = [(whole, m.repeat(4, 0).repeat(4, 1) > 0) for m in masks]
    colors = distinct_colors(len(crops))
    painted = draw_objects(np.ascontiguousarray(image), crops, colors)
    canvas = Image.fromarray(painted).resize((size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    scale = size[1] / image.shape[1]
    boxes = fields["boxes"][fields["valid"]] * scale
    centers = fields["centers"][fields["valid"]] * scale
    for i, (box, (x, y)) in enumerate(zip(boxes.tolist(), centers.tolist(), strict=True)):
        draw.rectangle(box, outline=tuple(colors[i].tolist()))
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill="white", outline="black")
    h, w = (fields["image_size"] * scale).tolist()
    draw.rectangle((0, 0, w - 1, h - 1), outline=(150, 150, 150))
    kinds, count = np.unique(np.array(names, str), return_counts=True)
    listed = ", ".join(f"{n} {k}" for k, n in zip(kinds, count, strict=True))
    text = "input {} x {}: ".format(*image.shape[:2]) + (listed or "no object")
    text = text if len(text) <= 84 else f"{text[:80]} ..."
    return caption(np.asarray(canvas), text)


def _grid(
    image: np.ndarray, owner: np.ndarray, count: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Returns the darkened input under a level's grid."""
    small = Image.fromarray(np.ascontiguousarray(image)).resize((size[1], size[0]))
    canvas = np.asarray(small) * _DARK
    rows, columns = (np.arange(s) * len(owner) // s for s in size)
    cell = owner[rows][:, columns]
    tint = distinct_colors(int(owner.max(initial=-1)) + 1)
    inside = cell >= 0
    if inside.any():
        canvas[inside] = canvas[inside] * (1 - _FILL) + tint[cell[inside]] * _FILL
    edges = [np.flatnonzero(np.diff(axis)) + 1 for axis in (rows, columns)]
    canvas[edges[0]] = canvas[edges[0]] * 0.7 + 50
    canvas[:, edges[1]] = canvas[:, edges[1]] * 0.7 + 50
    picture = Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    starts = [np.concatenate([[0], e, [s]]) for e, s in zip(edges, size, strict=True)]
    for y, x in np.argwhere(count > 1).tolist():
        corner = starts[1][x], starts[0][y]
        draw.rectangle((*corner, starts[1][x + 1] - 1, starts[0][y + 1] - 1), outline="white")
    return np.asarray(picture)


def list_objects(
    fields: dict[str, np.ndarray], config: Any, names: Sequence[str], title: str
) -> str:
    """Returns a line per object: class, box side, levels, cells of its own."""
    cells, sharing = targets_of(fields, config)
    boxes = fields["boxes"][fields["valid"]]
    lines = [title]
    for i, (box, label) in enumerate(zip(boxes, fields["labels"][fields["valid"]], strict=True)):
        side = float(np.sqrt((box[2] - box[0]) * (box[3] - box[1])))
        levels = (np.flatnonzero(cells.hit[:, i]) + 1).tolist()
        own = sum(int((owner == i).sum()) for owner in sharing.owner)
        note = "" if own else ": NOT TRAINED, no level or no cell of its own"
        lines.append(
            f"  {names[label]}, box side {side:.0f} px, levels {levels}, {own} cells{note}"
        )
    return "\n".join(lines)
