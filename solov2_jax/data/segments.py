"""A COCO segmentation of any form as one form: compressed run lengths."""

from typing import Any

from pycocotools import mask as coco_mask


def to_runs(segmentation: Any, size: tuple[int, int]) -> str:
    """Returns polygons or run lengths as COCO's string; "" without a usable outline.

    Args:
      size: (height, width) of the image.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, str):
            return counts
        whole: Any = segmentation
        runs: Any = coco_mask.frPyObjects(whole, *size)
        return runs["counts"].decode()
    polygons: Any = [p for p in segmentation or () if len(p) >= 6 and len(p) % 2 == 0]
    if not polygons:
        return ""
    runs = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    return runs["counts"].decode()
