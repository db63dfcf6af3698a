"""Mask IoU of every detection with every object of its image, whatever the class."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from solov2_jax.evaluation.tables import Detections, Objects, rle


@dataclass(frozen=True)
class ImageOverlap:
    """One image's detections, best score first, and objects, as places in columns."""

    image: int
    found: np.ndarray  # int64 [D]
    objects: np.ndarray  # int64 [G]
    # float64 [D, G]; with a crowd, the share of the detection that lies in it.
    iou: np.ndarray


def image_overlaps(objects: Objects, found: Detections) -> Iterator[ImageOverlap]:
    """Yields every image that has a detection or an object, in order."""
    of_objects = _by_image(objects.image, np.arange(len(objects)))
    of_found = _by_image(found.image, -found.score)
    nothing = np.zeros(0, np.int64)
    for image in sorted(of_objects.keys() | of_found.keys()):
        g, d = of_objects.get(image, nothing), of_found.get(image, nothing)
        iou = np.zeros((len(d), len(g)))
        if iou.size:
            theirs = [found.masks[i] for i in d.tolist()]
            ours = [objects.masks[i] for i in g.tolist()]
            crowd = objects.crowd[g].astype(int).tolist()
            iou = np.asarray(rle.iou(theirs, ours, crowd))
        yield ImageOverlap(image, d, g, iou)


def _by_image(image: np.ndarray, key: np.ndarray) -> dict[int, np.ndarray]:
    """Returns the places of each image's entries, sorted by `key`."""
    order = np.lexsort((key, image))
    images, starts = np.unique(image[order], return_index=True)
    parts = np.split(order, starts[1:])
    return dict(zip(images.tolist(), parts, strict=bool(len(images))))
