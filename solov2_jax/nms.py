"""Non-maximum suppression: of scores on a grid, and of masks by their IoU.

Shapes: the legend of `structs.py`, and N masks sorted best first.
Source: AdelaiDet adet/modeling/solov2/utils.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@jax.named_scope("point_nms")
def point_nms(scores: Float[Array, "S K"], num_grids: Sequence[int]) -> Float[Array, "S K"]:
    """Returns the scores with 0 where a cell above, left or above-left has more.

    Source: utils.py, point_nms: a 2x2 max-pool padded by one whose
    last row and column are dropped. Equal neighbours all stay.
    """
    starts = np.cumsum([g * g for g in num_grids])[:-1]
    levels = []
    for x, g in zip(jnp.split(scores, starts), num_grids, strict=True):
        x = x.reshape(g, g, -1)
        padded = jnp.pad(x, ((1, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)
        above, left, corner = padded[:-1, 1:], padded[1:, :-1], padded[:-1, :-1]
        most = jnp.maximum(jnp.maximum(above, left), corner)
        levels.append(jnp.where(x >= most, x, 0.0).reshape(g * g, -1))
    return jnp.concatenate(levels)


@jax.named_scope("matrix_nms")
def matrix_nms(
    score: Float[Array, "N"],
    label: Int[Array, "N"],
    iou: Float[Array, "N N"],
    kernel: str,
    sigma: float,
) -> Float[Array, "N"]:
    """Returns the decayed scores of masks that are sorted best first.

    A mask decays by its IoU with each better one of its class, less so if that one is
    itself covered by a better one.

    Source: utils.py, matrix_nms. Its linear kernel divides 0 by 0
    at three equal masks. Here a mask whose better twin exists decays nothing, the limit
    for any other mask; the third twin still falls to 0 through the first.
    """
    iou = jnp.where(_better_same_class(label), iou, 0.0)
    covered = jnp.max(iou, axis=0)[:, None]  # of the row's mask, by a better one
    if kernel == "gaussian":
        decay = jnp.exp(-sigma * (jnp.square(iou) - jnp.square(covered)))
    elif kernel == "linear":
        twin = covered >= 1.0
        decay = jnp.where(twin, 1.0, (1.0 - iou) / jnp.where(twin, 1.0, 1.0 - covered))
    else:
        raise ValueError(f'nms_kernel is "{kernel}": give "gaussian" or "linear"')
    return score * jnp.min(decay, axis=0)


@jax.named_scope("mask_nms")
def mask_nms(
    label: Int[Array, "N"], iou: Float[Array, "N N"], threshold: float
) -> Bool[Array, "N"]:
    """Returns which masks, sorted best first, no better kept one of the class covers.

    Source: utils.py, mask_nms, which goes through the masks in
    turn. Here all are decided at once until nothing changes: the first k masks are
    right after k rounds, and few rounds are needed.
    """
    covers = _better_same_class(label) & (iou > threshold)

    def decide_again(state):
        kept, _ = state
        new = ~jnp.any(covers & kept[:, None], axis=0)
        return new, jnp.any(new != kept)

    start = jnp.ones(label.shape, bool), jnp.array(True)
    kept, _ = lax.while_loop(lambda state: state[1], decide_again, start)
    return kept


def _better_same_class(label: Int[Array, "N"]) -> Bool[Array, "N N"]:
    """Returns whether row comes before column in the same class."""
    return jnp.triu(label[:, None] == label[None], 1)
