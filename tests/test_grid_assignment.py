"""The numpy form of the target assignment equals the one that training uses."""

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

from solov2_jax.structs import Batch
from solov2_jax.targets import assign_targets
from solov2_jax.tools.grid_assignment import assign_grid, count_collisions

GRIDS = (10, 9, 6, 4, 3)
RANGES = ((1, 24), (12, 48), (24, 96), (48, 192), (96, 512))
H, W, G = 96, 160, 6


def trained(boxes: np.ndarray, centers: np.ndarray):
    number = len(boxes)
    pad = G - number
    fields = dict(
        image=np.zeros((1, H, W, 3), np.uint8),
        image_size=np.array([[H, W]], np.int32),
        boxes=np.pad(boxes, ((0, pad), (0, 0)))[None].astype(np.float32),
        labels=np.arange(G, dtype=np.int32)[None],
        centers=np.pad(centers, ((0, pad), (0, 0)))[None].astype(np.float32),
        masks=np.zeros((1, G, H // 4, W // 4), np.uint8),
        valid=(np.arange(G) < number)[None],
        image_id=np.zeros(1, np.int32),
    )
    batch = Batch(**jax.tree.map(jax.numpy.asarray, fields))
    return jax.jit(
        lambda b: assign_targets(
            b,
            num_grids=GRIDS,
            scale_ranges=RANGES,
            sigma=0.2,
            num_classes=G,
            max_pairs=512,
            key=jax.random.key(0),
        )
    )(batch)


@st.composite
def objects(draw):
    """Boxes and centres on quarters of a pixel, often on a cell's border."""
    number = draw(st.integers(1, G))
    side = st.sampled_from([1, 6, 12, 24, 48, 80])
    result = []
    for _ in range(number):
        w, h = draw(side), draw(side)
        x = draw(st.integers(0, 4 * (W - w))) / 4
        y = draw(st.integers(0, 4 * (H - h))) / 4
        cx = x + w * draw(st.sampled_from([0.25, 0.5, 0.6]))
        result.append([x, y, x + w, y + h, cx, y + h / 2])
    values = np.array(result, np.float32)
    return values[:, :4], values[:, 4:]


@hypothesis.given(objects())
@hypothesis.settings(max_examples=40)
def test_cells_are_those_of_training(found):
    boxes, centers = found
    cells = assign_grid(boxes, centers, (H, W), num_grids=GRIDS, scale_ranges=RANGES, sigma=0.2)
    sharing = count_collisions(cells, GRIDS)
    targets = trained(boxes, centers)
    owner = np.concatenate([level.ravel() for level in sharing.owner])
    np.testing.assert_array_equal(np.where(owner < 0, G, owner), targets.cate[0])
    count = np.concatenate([level.ravel() for level in sharing.count])
    assert count.sum() == targets.num_pairs[0]
    kept = np.asarray(targets.pair_weight[0]) > 0
    again = np.bincount(np.asarray(targets.pair_cell[0])[kept], minlength=len(count))
    np.testing.assert_array_equal(count, again)


def test_two_objects_in_one_cell():
    box = np.array([[3, 3, 13, 13], [4, 4, 12, 12], [120, 60, 130, 70]])
    center = np.array([[8.0, 8], [8, 8], [125, 65]])
    cells = assign_grid(box, center, (H, W), num_grids=GRIDS, scale_ranges=RANGES, sigma=0.2)
    sharing = count_collisions(cells, GRIDS)
    assert cells.hit[0].all() and not cells.hit[1:].any()
    assert sharing.shared[0].tolist() == [True, True, False]
    assert sharing.owns[0].tolist() == [False, True, True]
