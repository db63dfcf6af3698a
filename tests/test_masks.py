"""Masks of single objects against the reference's, bit for bit."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_coco import whole

from solov2_jax.data import masks
from solov2_jax.data.annotations import Segmentations


def crop_of(mask: np.ndarray) -> masks.Crop | None:
    """Returns the crop of a whole mask."""
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"]
    return masks.decode_runs(masks.parse_runs(counts), mask.shape)


def of_polygons(polygons) -> Segmentations:
    """Returns one object of these polygons."""
    lengths = [len(p) for p in polygons]
    return Segmentations(
        points=np.concatenate(polygons).astype(np.float64),
        point_start=np.concatenate([[0], np.cumsum(lengths)]),
        part_start=np.array([0, len(polygons)]),
        runs=np.zeros(0, np.uint8),
        run_start=np.zeros(2, np.int64),
    )


def of_mask(mask: np.ndarray) -> Segmentations:
    """Returns one object of run lengths."""
    runs = np.frombuffer(coco_mask.encode(np.asfortranarray(mask))["counts"], np.uint8)
    none = np.zeros(2, np.int64)
    return Segmentations(np.zeros(0), none[:1], none, runs, np.array([0, len(runs)]))


def test_polygons_are_drawn_as_pycocotools_does(golden):
    arrays = golden("data")
    areas = json.loads(str(arrays["json_polygon_areas"]))
    polygons = json.loads(str(arrays["json_polygons"]))
    size = tuple(polygons["hw"])
    for name, parts in polygons["polys"].items():
        mask = whole(masks.rasterize(of_polygons(parts), 0, size, size, False), size)
        expected = np.unpackbits(arrays[f"poly_{name}"], axis=-1)[:, : size[1]]
        np.testing.assert_array_equal(mask, expected, err_msg=name)
        assert mask.sum() == areas[name]


@pytest.mark.parametrize("size", ["256x320", "250x310", "243x333", "61x59"])
def test_quarter_equals_opencv(golden, size):
    arrays = golden("data")

    def read(name):
        shape = arrays[f"{name}_shape"]
        return np.unpackbits(arrays[name])[: shape.prod()].reshape(shape)

    full, small = read(f"imrescale_in_{size}"), read(f"imrescale_out_{size}")
    for i in range(full.shape[-1]):
        crop = crop_of(full[..., i])
        assert crop is not None
        out = whole(masks.quarter(crop, full.shape[:2]), small.shape[:2])
        np.testing.assert_array_equal(out, small[..., i])


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32))
def test_quarter_of_a_crop_is_the_crop_of_the_quarter(h, w, seed):
    rng = np.random.default_rng(seed)
    y, x = np.sort(rng.integers(0, h + 1, 2)), np.sort(rng.integers(0, w + 1, 2))
    mask = np.zeros((h, w), np.uint8)
    mask[y[0] : y[1], x[0] : x[1]] = rng.random((y[1] - y[0], x[1] - x[0])) < 0.6
    crop = crop_of(mask)
    np.testing.assert_array_equal(whole(crop, (h, w)), mask)
    small = (int(h * 0.25 + 0.5), int(w * 0.25 + 0.5))
    if crop is not None:
        everything = masks.quarter(masks.Crop(mask, 0, 0), (h, w))
        out = whole(masks.quarter(crop, (h, w)), small)
        np.testing.assert_array_equal(out, whole(everything, small))


def test_mass_centre(golden):
    arrays = golden("data")
    shape = arrays["com_shape"]
    full = np.unpackbits(arrays["com_masks"], axis=-1)[..., : shape[2]]
    for mask, x, y in zip(full, arrays["com_x"], arrays["com_y"], strict=True):
        crop = crop_of(mask)
        if crop is None:  # an empty mask; the reference gives 0 and skips it later
            assert x == y == 0
        else:
            np.testing.assert_array_equal(masks.mass_center(crop), [x, y])


@given(
    st.tuples(*[st.integers(1, 60)] * 4),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_run_lengths_are_resized_as_pil_does(sizes, seed, flip):
    old, new = sizes[:2], sizes[2:]
    mask = (np.random.default_rng(seed).random(old) < 0.3).astype(np.uint8)
    image = Image.fromarray(mask).resize(new[::-1], Image.Resampling.NEAREST)
    expected = np.asarray(image)[:, ::-1] if flip else np.asarray(image)
    crop = masks.rasterize(of_mask(mask), 0, old, new, flip)
    np.testing.assert_array_equal(whole(crop, new), expected)
    assert (crop is None) == (not expected.any())


@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=40))
def test_runs_are_parsed_as_pycocotools_writes_them(counts):
    size = [sum(counts), 1]
    if size[0] == 0:
        return
    packed = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"]
    np.testing.assert_array_equal(masks.parse_runs(packed), counts)


@pytest.mark.parametrize("counts", [b"`", b"0", b"\x01", b"PPPPPPPPPPPPP0", b""])
def test_damaged_runs_are_an_error(counts):
    with pytest.raises(ValueError, match="damaged"):
        masks.decode_runs(masks.parse_runs(counts), (40, 50))


def test_polygons_are_flipped_before_they_are_drawn():
    half = of_polygons([[2.5, 2.5, 8.5, 2.5, 8.5, 6.5]])
    flipped = whole(masks.rasterize(half, 0, (20, 20), (20, 20), True), (20, 20))
    other = of_polygons([[17.5, 2.5, 11.5, 2.5, 11.5, 6.5]])
    plain = whole(masks.rasterize(other, 0, (20, 20), (20, 20), False), (20, 20))
    np.testing.assert_array_equal(flipped, plain)
