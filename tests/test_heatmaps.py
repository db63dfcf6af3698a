"""Heatmaps equal a plain form of the reference's, and few exist at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solov2_jax.tools import fcpose as heatmaps

SIZE = (64, 96)


def plain(points: np.ndarray, size: tuple[int, int], stride: int, sigma: float):
    """Each value by its own distance, one after the other; the reference's numbers:
    a square of round(3 sigma) + 1 pixels around the point's pixel, float64 inside."""
    h, w = size[0] // stride, size[1] // stride
    reach = round(3 * sigma) + 1
    maps = np.zeros((len(points), h, w), np.float32)
    for j, (px, py, flag) in enumerate(points.tolist()):
        x, y = int(px / stride), int(py / stride)
        if flag <= 0 or not (0 <= x < w and 0 <= y < h):
            continue
        for row in range(max(0, y - reach), min(h, y + reach + 1)):
            for column in range(max(0, x - reach), min(w, x + reach + 1)):
                square = (row - y) ** 2 + (column - x) ** 2
                maps[j, row, column] = np.exp(-square / (2 * sigma**2))
    return maps


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """17 points: inside, on borders, outside, without flag."""
    rng = np.random.default_rng(0)
    values = rng.uniform(-6, 100, (17, 3)).astype(np.float32)
    values[:, 2] = rng.integers(0, 3, 17)
    values[:6] = [
        [0, 0, 2],
        [95.5, 63.5, 1],
        [96, 20, 2],
        [-0.5, 10, 2],  # truncation counts it as inside, as in the reference
        [-2.5, 10, 2],
        [40, 30, 0],
    ]
    return values


def test_three_sets_are_the_references(points):
    maps = jax.jit(lambda p: heatmaps.person_heatmaps(p, SIZE))(jnp.asarray(points))
    # Equal bit for bit: the gaussians come from one table, made in float64.
    np.testing.assert_array_equal(maps.keypoint, plain(points, SIZE, 2, 1.8))
    np.testing.assert_array_equal(maps.basis, plain(points, SIZE, 8, 0.9))
    np.testing.assert_array_equal(maps.head, plain(points, SIZE, 2, 0.01))
    assert maps.keypoint.shape == (17, 32, 48) and maps.basis.shape == (17, 8, 12)
    head = np.asarray(maps.head)
    assert set(np.unique(head)) == {0, 1} and head.sum(axis=(1, 2)).max() == 1
    assert not np.asarray(maps.keypoint)[[2, 4, 5]].any()


def test_persons_one_after_the_other(points):
    persons = jnp.asarray(np.stack([points, points[::-1], np.zeros_like(points)]))
    sums = heatmaps.map_persons(lambda m: m.keypoint.sum(), persons, SIZE, together=2)
    expected = [plain(np.asarray(p), SIZE, 2, 1.8).sum(dtype=np.float64) for p in persons]
    np.testing.assert_allclose(sums, expected, rtol=1e-6)  # the order of a float32 sum
    image = heatmaps.image_heatmap(persons, SIZE, 8, 0.9)
    each = [plain(np.asarray(p), SIZE, 8, 0.9) for p in persons]
    np.testing.assert_array_equal(image, np.max(each, axis=0))
    assert not np.asarray(heatmaps.image_heatmap(persons[:0], SIZE, 8, 0.9)).any()


def test_memory_does_not_grow_with_the_number_of_persons():
    size = (256, 256)

    def temporary(persons: int) -> int:
        def loss(p):
            return heatmaps.map_persons(lambda m: m.keypoint.sum(), p, size).sum()

        shape = jax.ShapeDtypeStruct((persons, 17, 3), jnp.float32)
        compiled = jax.jit(loss).lower(shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_map = 17 * 128 * 128 * 4
    assert temporary(64) < temporary(2) + one_map
