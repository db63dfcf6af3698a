"""COCO's evaluation with boundary IoU: masks count as similar as their borders are.

A mask's border is what lies in it and within d pixels of its outside, where the outside of
the image counts too and d is 2 % of the image's diagonal. The similarity is the lower of
mask IoU and the borders' IoU, so that an object's inside is not forgotten; with a crowd it
is that of masks. Source: Cheng et al. 2021, Boundary IoU; boundary_iou_api's
utils/boundary_utils.py and coco_instance_api/cocoeval.py.
"""

from typing import Any

import numpy as np
from pycocotools import cocoeval
from pycocotools import mask as coco_mask

from solov2_jax.rle import crop_of, rle_of_crop, rle_to_strings

DILATION_RATIO = 0.02  # of the image's diagonal
_rle: Any = coco_mask  # its type stubs are narrower than what it takes


def boundary_width(size: tuple[int, int], ratio: float = DILATION_RATIO) -> int:
    """Returns d in pixels, at least 1, of an image of (height, width)."""
    return max(1, round(ratio * float(np.sqrt(size[0] ** 2 + size[1] ** 2))))


def boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """Returns the pixels of a bool [h, w] mask that are at most `width` from its outside.

    Distances are those of a square window. Beyond the array there is no mask.
    """
    return mask & ~_eroded(_eroded(mask, width).T, width).T


def _eroded(mask: np.ndarray, width: int) -> np.ndarray:
    """Returns which pixels have only the mask up to `width` rows above and below."""
    padded = np.pad(mask, ((width + 1, width), (0, 0)))
    total = np.cumsum(padded, axis=0, dtype=np.int32)
    return total[2 * width + 1 :] - total[: -2 * width - 1] == 2 * width + 1


def boundary_rle(segmentation: dict[str, Any], ratio: float = DILATION_RATIO) -> dict[str, Any]:
    """Returns the border of a mask, both as COCO's compressed run lengths."""
    height, width = (int(n) for n in segmentation["size"])
    if (crop := crop_of(segmentation)) is None:
        return segmentation
    border = boundary(crop.pixels.view(bool), boundary_width((height, width), ratio))
    (text,) = rle_to_strings([rle_of_crop(border, crop.top, crop.left, (height, width))])
    return {"size": [height, width], "counts": text}


class BoundaryEval(cocoeval.COCOeval):
    """pycocotools' COCOeval of "segm", but for the similarity of two masks."""

    def computeIoU(self, imgId: Any, catId: Any) -> Any:  # noqa: N802, N803
        """Returns the similarity of an image's best detections and objects, float64 [D, G]."""
        own: Any = self  # of attributes that its types leave out
        objects, detections = own._gts[imgId, catId], own._dts[imgId, catId]
        if not objects and not detections:
            return []
        order = np.argsort([-d["score"] for d in detections], kind="mergesort")
        best = [detections[i] for i in order[: self.params.maxDets[-1]]]
        crowd = np.array([o["iscrowd"] for o in objects], bool)

        def overlap(key: str) -> np.ndarray:
            masks = [[record[key] for record in records] for records in (best, objects)]
            return np.array(_rle.iou(*masks, crowd.astype(int).tolist()))

        iou = overlap("segmentation")
        if not objects or not best:
            return iou
        for record in (*best, *objects):
            record["boundary"] = boundary_rle(record["segmentation"])
        borders = overlap("boundary")
        return np.where(crowd, iou, np.minimum(iou, borders))
