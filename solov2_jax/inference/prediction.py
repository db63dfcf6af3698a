"""What inference hands to people: plain numpy at the original image's size.

Masks of a large image are held as the run lengths of their rectangles: a bool [n, H, W]
of 1000 objects in 20,000 x 20,000 pixels would take 400 GB, `MaskCrops` take a few bytes
for each column of an object. No JAX.
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.io import InputError, atomic_path
from solov2_jax.rle import (
    mask_to_rle,
    rle_decode,
    rle_encode,
    rle_from_string,
    rle_of_crop,
    rle_to_strings,
)

# (y0, x0, y1, x1) in pixels, the last two exclusive.
Rectangle = tuple[int, int, int, int]
Window = tuple[slice, slice]


@dataclass(frozen=True)
class PackedMask:
    """A mask's tight rectangle in an image, run-length encoded."""

    rectangle: Rectangle
    counts: bytes  # COCO's compressed run lengths of the rectangle
    area: int

    def unpack(self) -> np.ndarray:
        """Returns the pixels of the rectangle, bool [h, w]."""
        y0, x0, y1, x1 = self.rectangle
        crop = rle_decode(rle_from_string(self.counts), (y1 - y0, x1 - x0))
        assert crop is not None, "a packed mask has a pixel"
        return crop.pixels.view(bool)

    def within(self, window: Rectangle) -> np.ndarray:
        """Returns the pixels of any rectangle of the image, bool."""
        y0, x0, y1, x1 = window
        out = np.zeros((max(y1 - y0, 0), max(x1 - x0, 0)), bool)
        common = intersect(self.rectangle, window)
        if common is not None:
            own = self.unpack()[slices(common, self.rectangle)]
            out[slices(common, window)] = own
        return out


def pack(mask: np.ndarray, top: int = 0, left: int = 0) -> PackedMask | None:
    """Returns a bool [h, w] mask at a place in the image; None without a pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    tight = mask[y0:y1, x0:x1]
    rectangle = (int(y0) + top, int(x0) + left, int(y1) + top, int(x1) + left)
    return PackedMask(rectangle, mask_to_rle(tight)["counts"], int(tight.sum(dtype=np.int64)))


def intersect(a: Rectangle, b: Rectangle) -> Rectangle | None:
    """Returns the pixels that two rectangles have in common, None if there are none."""
    y0, x0, y1, x1 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (y0, x0, y1, x1) if y0 < y1 and x0 < x1 else None


def slices(part: Rectangle, whole: Rectangle) -> Window:
    """Returns where a rectangle lies within another one's pixels."""
    y, x = whole[:2]
    return slice(part[0] - y, part[2] - y), slice(part[1] - x, part[3] - x)


class MaskCrops:
    """Masks that read like bool [n, H, W], but are made when they are asked for.

    `masks[i]` is one mask of the image's size, `masks[keep]` (bool or int [k], or a
    slice) some of them, `np.asarray(masks)` all: that one is large.

    Args:
      size: (height, width) of the image.
    """

    def __init__(self, packed: Sequence[PackedMask], size: tuple[int, int]):
        self.packed = tuple(packed)
        self.shape = (len(self.packed), int(size[0]), int(size[1]))

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._whole(mask) for mask in self.packed)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            return self._whole(self.packed[index])
        chosen = np.arange(len(self))[index]
        return MaskCrops([self.packed[i] for i in chosen.tolist()], self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                "MaskCrops hold no dense array, so np.asarray(masks, copy=False) cannot work"
            )
        masks = np.zeros(self.shape, bool)
        for mask, packed in zip(masks, self.packed, strict=True):
            mask[slices(packed.rectangle, (0, 0, 0, 0))] = packed.unpack()
        return masks if dtype is None else masks.astype(dtype, copy=False)

    def crop(self, index: int) -> tuple[Window, np.ndarray]:
        """Returns the window (rows, columns) of an object and the mask inside it."""
        mask = self.packed[index]
        return slices(mask.rectangle, (0, 0, 0, 0)), mask.unpack()

    def boxes(self) -> np.ndarray:
        """Returns the tight boxes (x0, y0, x1, y1), float32 [n, 4]."""
        sides = np.array([m.rectangle for m in self.packed], np.float32).reshape(-1, 4)
        return sides[:, [1, 0, 3, 2]]

    def thinned(self, stride: int) -> np.ndarray:
        """Returns every `stride`-th row and column of all masks, bool [n, h, w]."""
        height, width = (-(-side // stride) for side in self.shape[1:])
        thin = np.zeros((len(self), height, width), bool)
        for mask, packed in zip(thin, self.packed, strict=True):
            y, x = packed.rectangle[:2]
            part = packed.unpack()[-y % stride :: stride, -x % stride :: stride]
            y, x = -(-y // stride), -(-x // stride)
            mask[y : y + part.shape[0], x : x + part.shape[1]] = part
        return thin

    def encode(self) -> list[str]:
        """Returns COCO's run lengths of the whole image's masks, unmade."""
        size = self.shape[1:]
        runs = [rle_of_crop(m.unpack(), *m.rectangle[:2], size) for m in self.packed]
        return rle_to_strings(runs)

    def _whole(self, packed: PackedMask) -> np.ndarray:
        mask = np.zeros(self.shape[1:], bool)
        mask[slices(packed.rectangle, (0, 0, 0, 0))] = packed.unpack()
        return mask


def overlapping_pairs(rectangles: np.ndarray) -> np.ndarray:
    """Returns the pairs (i, j), i < j, whose rectangles share a pixel, int [p, 2].

    Args:
      rectangles: (y0, x0, y1, x1), int [n, 4].
    """
    order = np.argsort(rectangles[:, 0], kind="stable")
    y0, x0, y1, x1 = rectangles[order].T
    # In order of their tops, those that begin before this one ends stand together.
    last = np.searchsorted(y0, y1)
    pairs = [np.zeros((0, 2), np.int64)]
    for i in range(len(order)):
        others = np.arange(i + 1, last[i])
        meets = (x0[others] < x1[i]) & (x1[others] > x0[i])
        partners = order[others[meets]]
        pairs.append(np.stack([np.full(len(partners), order[i]), partners], axis=1))
    ordered = np.sort(np.concatenate(pairs), axis=1)
    return ordered[np.lexsort((ordered[:, 1], ordered[:, 0]))]


@dataclass(frozen=True)
class Prediction:
    """Detections of one image, best first, in its original frame.

    Shapes: n detections (at most `test.max_per_image`), H W the original image.
    """

    # bool [n, H, W], none of them empty; of a tiled or a very large image they are held
    # packed, and made when they are asked for.
    masks: np.ndarray | MaskCrops
    boxes: np.ndarray  # float32 [n, 4], tight (x0, y0, x1, y1), x1 and y1 exclusive
    scores: np.ndarray  # float32 [n], descending
    labels: np.ndarray  # int [n], 0..K-1
    image_id: int
    class_names: tuple[str, ...] = ()  # of all labels; (): not known
    # int [n], the same number for the same object in a video's frames; None: not asked.
    tracks: np.ndarray | None = None
    # float32 [n, J, 3], x, y in pixels (0.5 is the first one's middle) and a score, where the
    # network has learned key points; pairs of them, from 1, that belong together.
    keypoints: np.ndarray | None = None
    skeleton: tuple[tuple[int, int], ...] = ()

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float | np.ndarray) -> "Prediction":
        """Returns the detections whose score is at least `score`, one for all or of each class."""
        return self.take(np.flatnonzero(reaches(self.scores, self.labels, score)))

    def take(self, chosen: np.ndarray) -> "Prediction":
        """Returns some of the detections, int [k]."""
        return replace(
            self,
            masks=self.masks[chosen],
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            tracks=None if self.tracks is None else self.tracks[chosen],
            keypoints=None if self.keypoints is None else self.keypoints[chosen],
        )

    def crop(self, index: int) -> tuple[Window, np.ndarray]:
        """Returns the window (rows, columns) of an object and the mask inside it."""
        if isinstance(self.masks, MaskCrops):
            return self.masks.crop(index)
        x0, y0, x1, y1 = self.boxes[index].astype(int).tolist()
        window = slice(y0, y1), slice(x0, x1)
        return window, self.masks[index][window]

    def thinned(self, stride: int) -> np.ndarray:
        """Returns every `stride`-th row and column of the masks, bool [n, h, w]."""
        if isinstance(self.masks, MaskCrops):
            return self.masks.thinned(stride)
        return self.masks[:, ::stride, ::stride]

    def encode(self) -> list[str]:
        """Returns the masks as COCO's compressed run lengths of the whole image."""
        if isinstance(self.masks, MaskCrops):
            return self.masks.encode()
        return rle_encode(self.masks, self.boxes)

    def to_supervision(self) -> Any:
        """Returns the detections as `supervision.Detections`, masks of the image's size.

        Boxes are (x0, y0, x1, y1), x1 and y1 exclusive; `data["class_name"]` has the names,
        where they are known, `tracker_id` the tracks, where objects were followed.

        Raises:
          InputError: if the package supervision is not installed.
        """
        supervision = _optional("supervision", "to_supervision")
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=np.asarray(self.masks, bool),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            tracker_id=None if self.tracks is None else self.tracks.astype(int),
            data={"class_name": np.array(self.names, str)} if self.class_names else {},
        )

    def to_fiftyone(self) -> Any:
        """Returns the detections as `fiftyone.Detections`, each mask that of its box.

        Labels are the class names, or the numbers where they are not known; `index` has
        the tracks, where objects were followed. No database is needed for it.

        Raises:
          InputError: if the package fiftyone is not installed.
        """
        fiftyone = _optional("fiftyone", "to_fiftyone")
        height, width = self.masks.shape[1:]
        names = self.names if self.class_names else [str(i) for i in self.labels.tolist()]
        detections = []
        for i, name in enumerate(names):
            (rows, columns), mask = self.crop(i)
            detections.append(
                fiftyone.Detection(
                    label=name,
                    bounding_box=[
                        columns.start / width,
                        rows.start / height,
                        mask.shape[1] / width,
                        mask.shape[0] / height,
                    ],
                    mask=mask,
                    confidence=float(self.scores[i]),
                    index=None if self.tracks is None else int(self.tracks[i]),
                )
            )
        return fiftyone.Detections(detections=detections)


def reaches(scores: np.ndarray, labels: np.ndarray, least: float | np.ndarray) -> np.ndarray:
    """Returns which of n detections have a score of at least `least`, bool [n].

    Args:
      least: one score, or that of each class, [K].
    """
    return scores >= (least if np.ndim(least) == 0 else np.asarray(least)[labels])


def _optional(package: str, user: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{user} needs {error.name}, which is not installed: pip install {package}"
        ) from error


def to_coco_results(prediction: Prediction, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the prediction in COCO's results format: RLE mask, box as x, y, w, h.

    With `track_id` besides, where objects were followed, and with `keypoints`, x, y and score
    of each, where the network has learned them.
    """
    results = []
    size = list(prediction.masks.shape[1:])
    for i, counts in enumerate(prediction.encode()):
        x0, y0, x1, y1 = (float(v) for v in prediction.boxes[i])
        results.append(
            {
                "image_id": int(prediction.image_id),
                "category_id": int(category_ids[int(prediction.labels[i])]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(prediction.scores[i]),
                "segmentation": {"size": size, "counts": counts},
            }
        )
        if prediction.tracks is not None:
            results[-1]["track_id"] = int(prediction.tracks[i])
        if prediction.keypoints is not None:
            # In json a place is a pixel's index, as COCO's annotations have it.
            points = prediction.keypoints[i].astype(float) - [0.5, 0.5, 0.0]
            results[-1]["keypoints"] = points.round(4).ravel().tolist()
    return results


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes COCO results, one per line, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for i, result in enumerate(results):
            file.write(",\n" if i else "\n")
            file.write(json.dumps(result))  # much faster than json.dump
        file.write("\n]\n")
