"""Key points of the generated shapes: the middle and the outermost corners."""

from typing import Any

import numpy as np

NAMES = ("middle", "top", "right", "bottom", "left")
# Of a category in a json, and of an annotation without points.
CATEGORY = {"keypoints": list(NAMES), "skeleton": [[1, 2], [1, 3], [1, 4], [1, 5]]}
NO_POINTS = {"keypoints": [0] * 3 * len(NAMES), "num_keypoints": 0}
MOST_CORNERS = 10  # an outline of more points is round


def object_points(outline: np.ndarray, full: np.ndarray, visible: np.ndarray) -> dict[str, Any]:
    """Returns `keypoints` and `num_keypoints` of an object, as an annotation has them.

    A point behind another object is hidden (1), one outside of the picture is not annotated
    (0), and round shapes have their middle only.

    Args:
      outline: float [n, 2].
      full, visible: bool [h, w], its pixels as if nothing were in front, and those seen.
    """
    points = [outline.mean(axis=0)]
    if len(outline) <= MOST_CORNERS:
        x, y = outline.T
        points += [outline[i] for i in (y.argmin(), x.argmax(), y.argmax(), x.argmin())]
    (h, w), values = full.shape, np.zeros((len(NAMES), 3))
    for value, (x, y) in zip(values, points, strict=False):
        if 0 <= x < w and 0 <= y < h:
            near = np.s_[max(int(y) - 1, 0) : int(y) + 2, max(int(x) - 1, 0) : int(x) + 2]
            hidden = full[near].any() and not visible[near].any()
            value[:] = x - 0.5, y - 0.5, 1 if hidden else 2
    return {
        "keypoints": values.round(2).ravel().tolist(),
        "num_keypoints": int((values[:, 2] > 0).sum()),
    }
