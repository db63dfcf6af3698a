"""Boundary AP: COCO's metrics where masks are as similar as their borders.

Source: Cheng et al. 2021, Boundary IoU; see `boundary_eval`.
"""

from solov2_jax.evaluation.coco import CocoEvaluator


class BoundaryEvaluator(CocoEvaluator):
    """Computes `boundary/AP`, ... beside COCO's metrics of masks and boxes.

    pycocotools matches the borders, whatever the backend.
    """

    kinds = ("segm", "boundary", "bbox")
