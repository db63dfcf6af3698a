"""Target assignment against the reference, and where the reference crashes.

`golden/targets.npz`: ground truth of two images (`image0_`, `image1_`) and of the edge
cases (`edge_`), with the reference's class of every cell, its pairs in order and their
masks; and `cell_up{U}_g{G}`: the cell of 0, 0.5, 1, ... on a side of U pixels.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solov2_jax import targets
from solov2_jax.structs import Batch

H4, W4 = 64, 80
SETTINGS = dict(
    num_grids=(40, 36, 24, 16, 12),
    scale_ranges=((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)),
    sigma=0.2,
    num_classes=3,
)


@partial(jax.jit, static_argnames=("max_pairs",))
def assign(batch, seed=0, max_pairs=128):
    key = jax.random.key(seed)
    return targets.assign_targets(batch, **SETTINGS, max_pairs=max_pairs, key=key)


def make_batch(*images, size=8, h4=H4, w4=W4):
    """Pads dicts of boxes, labels, centers, valid, masks to `size` objects."""
    fields = {k: [] for k in ("boxes", "labels", "centers", "valid", "masks")}
    for image in images:
        missing = size - len(image["boxes"])
        for k, rows in fields.items():
            pad = [(0, missing)] + [(0, 0)] * (np.ndim(image[k]) - 1)
            rows.append(np.pad(image[k], pad))
    fields = {k: np.stack(rows) for k, rows in fields.items()}
    fields |= dict(
        image=np.zeros((len(images), 4 * h4, 4 * w4, 3), np.uint8),
        image_size=np.tile(np.int32([4 * h4, 4 * w4]), (len(images), 1)),
        image_id=np.arange(len(images), dtype=np.int32),
    )
    return Batch(**{k: jnp.asarray(v) for k, v in fields.items()})


def golden_image(arrays, name):
    image = {k: arrays[f"{name}_{k}"] for k in ("boxes", "labels", "centers", "valid")}
    image["masks"] = np.unpackbits(arrays[f"{name}_masks"], axis=-1)
    return image


def squares(*boxes, labels=None, h4=H4, w4=W4):
    """Objects that are their boxes; centres in the middle, masks left empty."""
    boxes = np.float32(boxes).reshape(-1, 4)
    return dict(
        boxes=boxes,
        labels=np.int32(np.zeros(len(boxes)) if labels is None else labels),
        centers=(boxes[:, :2] + boxes[:, 2:]) / 2,
        valid=np.ones(len(boxes), bool),
        masks=np.zeros((len(boxes), h4, w4), np.uint8),
    )


EMPTY = squares()


@pytest.mark.parametrize("side", [256, 320, 800, 1344])
@pytest.mark.parametrize("num_grid", [40, 36, 24, 16, 12])
def test_cell_is_the_references_float32_floor_division(golden, side, num_grid):
    want = golden("targets")[f"cell_up{side}_g{num_grid}"]
    edges = targets.cell_edges(side, num_grid)[None]
    x = np.arange(2 * side, dtype=np.float32) / 2
    got = jax.jit(lambda x: targets._find_cell(x, edges))(x)[0]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("side", [32, 352, 1333 * 4])
def test_cell_equals_numpys_floor_divide(side):
    x = np.random.default_rng(0).random(20_000).astype(np.float32) * side
    for num_grid in (1, 2, 7, 40, 72):
        want = np.floor_divide(x / np.float32(side), np.float32(1 / num_grid))
        edges = targets.cell_edges(side, num_grid)[None]
        np.testing.assert_array_equal(targets._find_cell(jnp.array(x), edges)[0], want)


@pytest.mark.parametrize(
    ("case", "images"),
    [
        ("one", ["image0"]),
        ("two", ["image0", "image1"]),
        ("empty_second", ["image0", None]),
        ("edge", ["edge"]),
    ],
)
def test_targets_equal_the_references(golden, case, images):
    arrays = golden("targets")
    images = [golden_image(arrays, name) if name else EMPTY for name in images]
    batch = make_batch(*images)
    got = assign(batch)
    for i in range(len(images)):
        cells, masks = arrays[f"{case}_{i}_cells"], arrays[f"{case}_{i}_pair_masks"]
        n = len(cells)
        np.testing.assert_array_equal(got.cate[i], arrays[f"{case}_{i}_cate"])
        assert got.num_pairs[i] == n and got.num_cells[i] == len(set(cells))
        np.testing.assert_array_equal(got.pair_cell[i, :n], cells)
        np.testing.assert_array_equal(got.pair_weight[i], np.arange(128) < n)
        paired = batch.masks[i][np.asarray(got.pair_instance[i, :n])]
        np.testing.assert_array_equal(np.packbits(paired, axis=-1), masks)
        # Padding slots point somewhere harmless.
        assert not got.pair_cell[i, n:].any() and not got.pair_instance[i, n:].any()


def test_region_is_rounded_as_the_reference_rounds():
    """A fused multiply-add would change 8 % of these borders in the last bit."""
    center, extent = np.random.default_rng(0).random((2, 50_000), np.float32) * 300
    want = center - extent * np.float32(0.1)
    got = jax.jit(lambda c, e: c - targets._rounded(0.5 * 0.2 * e))(center, extent)
    np.testing.assert_array_equal(got, want)


def test_equals_the_formula_on_many_objects():
    """Random boxes on an eighth of a pixel: half of the borders are hit exactly."""
    rng = np.random.default_rng(0)
    low, extent = rng.integers(0, 1200, (300, 2)), rng.integers(8, 800, (300, 2))
    image = squares(*np.concatenate([low, low + extent], 1) / 8)
    image["centers"] = np.abs(image["centers"] + rng.integers(-8, 9, (300, 2)) / 4)
    image["centers"] = image["centers"].astype(np.float32)
    got = assign(make_batch(image, size=300), max_pairs=300 * 45)
    want_cells, want_objects = formula(image)
    n = len(want_cells)
    assert got.num_pairs[0] == n
    np.testing.assert_array_equal(got.pair_cell[0, :n], want_cells)
    np.testing.assert_array_equal(got.pair_instance[0, :n], want_objects)


def formula(image):
    """solov2.py, get_ground_truth_single, one object after another in float32."""
    f32, cells, objects, start = np.float32, [], [], 0
    for (low, high), g in zip(SETTINGS["scale_ranges"], SETTINGS["num_grids"], strict=True):
        for i, (x0, y0, x1, y1) in enumerate(image["boxes"]):
            if not low <= np.sqrt((x1 - x0) * (y1 - y0)) <= high:
                continue
            ends = []
            for center, extent, size in (
                (image["centers"][i, 1], y1 - y0, 4 * H4),
                (image["centers"][i, 0], x1 - x0, 4 * W4),
            ):
                half = f32(0.5) * extent * f32(SETTINGS["sigma"])
                first, middle, last = (
                    int(np.floor_divide(x / f32(size), f32(1 / g)))
                    for x in (center - half, center, center + half)
                )
                first, last = max(0, first), min(g - 1, last)
                ends.append((max(first, middle - 1), min(last, middle + 1)))
            (top, down), (left, right) = ends
            for r in range(top, down + 1):
                for c in range(left, right + 1):
                    cells.append(start + r * g + c)
                    objects.append(i)
        start += g * g
    return np.array(cells), np.array(objects)


@pytest.mark.parametrize(
    ("width", "levels"),
    [(0.5, []), (1, [0]), (48, [0, 1]), (96, [0, 1, 2]), (96.01, [1, 2]), (2049, [])],
)
def test_ranges_include_both_ends(width, levels):
    image = squares((0, 0, width, width))
    image["centers"][:] = 50.0
    got = assign(make_batch(image))
    level = np.repeat(range(5), [g * g for g in SETTINGS["num_grids"]])
    assert sorted(set(level[np.asarray(got.cate[0]) < 3])) == levels


def test_invalid_objects_are_ignored():
    image = squares((8, 8, 88, 88), (100, 60, 200, 160), (16, 16, 90, 80))
    alone = {k: v[:1] for k, v in image.items()}
    image["valid"] = np.array([True, False, False])
    image["boxes"][1:] = np.nan
    image["centers"][1:] = np.nan
    got, want = assign(make_batch(image)), assign(make_batch(alone))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_later_object_takes_the_cell_and_both_pairs_stay():
    image = squares((40, 40, 80, 80), (42, 42, 82, 82), labels=[2, 1])
    got = assign(make_batch(image))
    cells, objects = np.asarray(got.pair_cell[0]), np.asarray(got.pair_instance[0])
    n = int(got.num_pairs[0])
    shared = set(cells[:n][objects[:n] == 0]) & set(cells[:n][objects[:n] == 1])
    assert shared and n > got.num_cells[0]
    np.testing.assert_array_equal(got.cate[0][np.array(sorted(shared))], 1)


def test_batch_without_objects():
    got = assign(make_batch(EMPTY, EMPTY))
    assert (got.cate == 3).all() and not got.num_pairs.any() and not got.num_cells.any()
    assert not got.pair_weight.any()


def test_more_pairs_than_slots():
    """The kept subset is ordered, differs per image and seed, and its mean is fair."""
    rng = np.random.default_rng(1)
    low = rng.random((40, 2)) * 150
    image = squares(*np.concatenate([low, low + 30 + 60 * rng.random((40, 2))], 1))
    batch = make_batch(image, image, size=40)
    full, slots = assign(batch, max_pairs=1024), 64
    n = int(full.num_pairs[0])
    assert n > 2 * slots
    pairs = list(zip(full.pair_cell[0, :n], full.pair_instance[0, :n], strict=True))
    position = {(int(c), int(i)): p for p, (c, i) in enumerate(pairs)}
    counts = np.zeros(n)
    for seed in range(50):
        got = assign(batch, seed=seed, max_pairs=slots)
        np.testing.assert_array_equal(got.cate, full.cate)
        np.testing.assert_allclose(got.pair_weight, n / slots, rtol=1e-6)
        kept = [
            [position[int(c), int(i)] for c, i in zip(*row, strict=True)]
            for row in zip(got.pair_cell, got.pair_instance, strict=True)
        ]
        assert kept[0] != kept[1] and kept[0] == sorted(set(kept[0]))
        for row in kept:
            counts[row] += 1
    # 100 draws with probability 64 / n each: five standard deviations around it.
    p = slots / n
    assert np.abs(counts / 100 - p).max() < 5 * np.sqrt(p * (1 - p) / 100)


def test_one_trace_for_different_contents():
    traces = []
    jitted = jax.jit(lambda batch: traces.append(1) or assign.__wrapped__(batch))
    for image in (EMPTY, squares((8, 8, 88, 88)), squares((0, 0, 300, 200))):
        jitted(make_batch(image))
    assert len(traces) == 1


def test_levels_must_match():
    settings = {**SETTINGS, "num_grids": (40, 36)}
    with pytest.raises(ValueError, match="one range per level"):
        targets.assign_targets(make_batch(EMPTY), **settings, max_pairs=8, key=jax.random.key(0))
