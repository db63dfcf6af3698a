"""Masks -> COCO's compressed run lengths, from the pixels inside each object's box.

Equal, character for character, to pycocotools' `encode` of the whole image's mask; an
object that covers a fiftieth of its image costs about a fiftieth of the time. The way
back is in `data/masks.py`.
"""

import numpy as np


def encode_masks(masks: np.ndarray, boxes: np.ndarray) -> list[str]:
    """Returns the compressed run lengths ("counts") of every mask.

    Args:
      masks: bool [n, H, W].
      boxes: (x0, y0, x1, y1) [n, 4], x1 and y1 exclusive, around all of the mask.
    """
    size = masks.shape[1:]
    runs = []
    for i, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        x0, y0 = np.maximum(np.floor(box[:2]), 0).astype(int).tolist()
        x1, y1 = np.ceil(box[2:]).astype(int).tolist()
        found = runs_of_crop(mask[y0:y1, x0:x1], y0, x0, size)
        if found[1::2].sum() != np.count_nonzero(mask):
            raise ValueError(
                f"detection {i}: its mask has pixels outside of its box {box.tolist()} "
                "(x0, y0, x1, y1); boxes must hold the whole mask"
            )
        runs.append(found)
    return compress_runs(runs)


def runs_of_crop(
    crop: np.ndarray, top: int, left: int, size: tuple[int, ...]
) -> np.ndarray:
    """Returns the run lengths of a mask, zeros first, column by column, int64 [r].

    Args:
      crop: bool [h, w], the part of the image outside of which the mask is zero.
      top, left: where the part lies in the image.
      size: (height, width) of the image.
    """
    h, w = crop.shape
    height, width = size
    # A row of zeros ends every column, so that no run goes on into the next one.
    columns = np.zeros((w, h + 1), np.int8)
    columns[:, :h] = crop.T
    flat = columns.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat.size and flat[0]:
        changes = np.concatenate([[0], changes])
    column, row = np.divmod(changes, h + 1)
    place = (left + column) * height + top + row
    if h == height:
        # A run that ends where the next begins goes on from column to column.
        joined = np.flatnonzero(place[1:-1:2] == place[2::2]) * 2 + 1
        place = np.delete(place, np.concatenate([joined, joined + 1]))
    if not len(place) or place[-1] != height * width:
        place = np.append(place, height * width)
    return np.diff(place, prepend=0)


def compress_runs(runs: list[np.ndarray]) -> list[str]:
    """Returns COCO's string of each list of run lengths.

    Five bits and a continuation flag per character, lowest bits first, sign-extended;
    from the fourth run on, a run is stored as the difference to the one two before it.
    Source: pycocotools maskApi.c, rleToString.
    """
    if not runs:
        return []
    lengths = np.array([len(r) for r in runs])
    ends = np.cumsum(lengths)
    values = np.concatenate(runs)
    place = np.arange(len(values)) - np.repeat(ends - lengths, lengths)
    later = np.flatnonzero(place > 2)
    stored = values.copy()
    stored[later] -= values[later - 2]
    digits, counts = [], np.ones(len(stored), np.int64)
    rest = stored
    while True:
        digit = rest & 0x1F
        rest = rest >> 5
        more = rest != np.where(digit & 0x10, -1, 0)
        digits.append(digit + np.where(more, 0x20, 0) + 48)
        if not more.any():
            break
        # A finished value's later digits have no `more` either: 0 or 31 all along.
        counts += more
    table = np.stack(digits, axis=1).astype(np.uint8)
    text = table[np.arange(len(digits)) < counts[:, None]].tobytes().decode("ascii")
    stops = np.cumsum(counts)[ends - 1].tolist()
    return [text[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]
