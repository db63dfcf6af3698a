"""Masks of objects against the reference's, bit for bit."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plain_masks import plain_center, plain_stride4, spans_of, stride4_of
from pycocotools import mask as coco_mask
from tiny_coco import whole

from solov2_jax import rle
from solov2_jax.data import outlines, rasterize
from solov2_jax.data.outlines import Segmentations
from solov2_jax.data.transforms import Affine
from solov2_jax.io import InputError


def resizing(old, new, flip=False) -> Affine:
    """Returns the map of a resize, maybe mirrored."""
    affine = Affine(old, old, np.eye(2, 3)).resized(new)
    return affine.flipped() if flip else affine


def draw(segmentations, index, old, new, flip=False):
    """Returns one object's mask after a resize, as pixels; None if empty."""
    affine = resizing(old, new, flip)
    return rasterize.spans_to_crop(rasterize.draw_spans(segmentations, [index], affine))


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


def joined(parts: list[Segmentations]) -> Segmentations:
    """Returns the objects of several data sets of one object each, in one."""

    def starts(name):
        return np.cumsum([0] + [int(getattr(p, name)[-1]) for p in parts])

    shift = np.cumsum([0] + [len(p.points) for p in parts])[:-1]
    edges = [p.point_start[:-1] + s for p, s in zip(parts, shift, strict=True)]
    return Segmentations(
        np.concatenate([p.points for p in parts]),
        np.concatenate([*edges, [sum(len(p.points) for p in parts)]]).astype(int),
        starts("part_start"),
        np.concatenate([p.runs for p in parts]),
        starts("run_start"),
    )


def random_objects(rng: np.random.Generator, size: tuple[int, int]):
    """Returns up to five objects, one by one: polygons of one or more parts, which may
    leave the image or cross themselves, and run lengths of anything."""
    found = []
    for _ in range(rng.integers(0, 6)):
        if rng.random() < 0.3:
            mask = rng.random(size) < rng.choice([0, 0.2, 0.9, 1.1])
            found.append(of_mask(mask.astype(np.uint8)))
            continue
        extent = np.array(size[::-1]) * rng.choice([0.1, 0.5, 1.5])
        corner = rng.uniform(-0.2, 0.8, 2) * size[::-1]
        parts = [
            (corner + rng.random((rng.integers(3, 12), 2)) * extent).ravel()
            for _ in range(rng.integers(1, 4))
        ]
        found.append(of_polygons([np.round(p, rng.integers(0, 3)) for p in parts]))
    return found


def plain_mask(one: Segmentations, old, new, flip) -> np.ndarray:
    """Returns an object's mask as pycocotools and PIL make it, uint8 [h, w]."""
    parts = one.polygons(0)
    if not parts:
        counts = one.run_lengths(0)
        pixels = coco_mask.decode({"size": list(old), "counts": counts})
        image = Image.fromarray(pixels).resize(new[::-1], Image.Resampling.NEAREST)
        return np.asarray(image)[:, ::-1] if flip else np.asarray(image)
    scaled = []
    for part in parts:
        x, y = part[0::2] * (new[1] / old[1]), part[1::2] * (new[0] / old[0])
        scaled.append(np.stack([new[1] - x if flip else x, y], axis=-1).ravel())
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(scaled, *new)))


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
        mask = whole(rasterize.draw_object(of_polygons(parts), 0, size), size)
        expected = np.unpackbits(arrays[f"poly_{name}"], axis=-1)[:, : size[1]]
        np.testing.assert_array_equal(mask, expected, err_msg=name)
        assert mask.sum() == areas[name]


@pytest.mark.parametrize("size", ["256x320", "250x310", "243x333", "61x59"])
def test_stride_4_equals_opencv(golden, size):
    arrays = golden("data")

    def read(name):
        shape = arrays[f"{name}_shape"]
        return np.unpackbits(arrays[name])[: shape.prod()].reshape(shape)

    full, small = read(f"imrescale_in_{size}"), read(f"imrescale_out_{size}")
    full, small = full.transpose(2, 0, 1), small.transpose(2, 0, 1)
    out = stride4_of(spans_of(full), len(full), full.shape[1:])
    np.testing.assert_array_equal(out, small)
    for mask, expected in zip(full, small, strict=True):
        np.testing.assert_array_equal(plain_stride4(mask), expected)


@given(
    st.tuples(*[st.integers(1, 70)] * 4),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=200)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_objects_together_are_the_plain_masks(sizes, seed, flip, multiples):
    """Drawn, scaled to a quarter and averaged, all objects of an image at once."""
    old, new = sizes[:2], sizes[2:]
    if multiples:  # of 4, where the weights are equal
        new = new[0] * 4, new[1] * 4
    objects = random_objects(np.random.default_rng(seed), old)
    number = len(objects)
    every = joined(objects) if objects else of_mask(np.zeros((1, 1), np.uint8))
    found = rasterize.draw_spans(every, range(number), resizing(old, new, flip))
    centers, present = rasterize.mass_centers(found, number)
    small = stride4_of(found, number, new)
    for i, one in enumerate(objects):
        expected = plain_mask(one, old, new, flip)
        crop = draw(every, i, old, new, flip)
        np.testing.assert_array_equal(whole(crop, new), expected)
        assert present[i] == (crop is not None) == expected.any()
        np.testing.assert_array_equal(small[i], plain_stride4(expected))
        if present[i]:
            np.testing.assert_array_equal(centers[i], plain_center(expected))


def test_mass_centre(golden):
    arrays = golden("data")
    shape = arrays["com_shape"]
    full = np.unpackbits(arrays["com_masks"], axis=-1)[..., : shape[2]]
    centers, present = rasterize.mass_centers(spans_of(full), len(full))
    np.testing.assert_array_equal(present, full.any(axis=(1, 2)))
    # An empty mask's centre is 0; the reference skips it later.
    np.testing.assert_array_equal(centers[:, 0], arrays["com_x"])
    np.testing.assert_array_equal(centers[:, 1], arrays["com_y"])


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
    crop = draw(of_mask(mask), 0, old, new, flip)
    np.testing.assert_array_equal(whole(crop, new), expected)
    assert (crop is None) == (not expected.any())


@given(st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=40), max_size=4))
def test_runs_are_parsed_as_pycocotools_writes_them(several):
    several = [counts for counts in several if sum(counts)]
    packed = []
    for counts in several:
        size = [sum(counts), 1]
        record = {"size": size, "counts": counts}
        packed.append(coco_mask.frPyObjects(record, *size)["counts"])
        np.testing.assert_array_equal(rle.rle_from_string(packed[-1]), counts)
    values, lengths = rle.rle_from_strings(packed)
    assert lengths.tolist() == [len(counts) for counts in several]
    np.testing.assert_array_equal(values, [v for counts in several for v in counts])


DAMAGED = [b"`", b"0", b"\x01", b"PPPPPPPPPPPPP0", b""]


@pytest.mark.parametrize("counts", DAMAGED)
def test_damaged_runs_are_an_error(counts):
    with pytest.raises(ValueError, match="damaged"):
        rle.rle_decode(rle.rle_from_string(counts), (40, 50))
    with pytest.raises(ValueError, match="damaged"):
        rasterize.spans_from_rle([counts], (40, 50))


@pytest.mark.parametrize("counts", DAMAGED)
def test_the_damaged_object_is_named(counts):
    sound = of_mask(np.ones((40, 50), np.uint8))
    none = np.zeros(2, np.int64)
    runs = np.frombuffer(counts, np.uint8)
    bad = Segmentations(np.zeros(0), none[:1], none, runs, np.array([0, len(runs)]))
    every = joined([sound, sound, bad, sound])
    texts = [every.run_lengths(i) for i in range(4)]
    with pytest.raises(InputError, match="object 2: `segmentation` has damaged run lengths"):
        outlines.rle_areas(texts, [2000] * 4, lambda i: f"object {i}")
    assert outlines.rle_areas(texts[:2], [2000] * 2, str).tolist() == [2000, 2000]


def test_polygons_are_flipped_before_they_are_drawn():
    half = of_polygons([[2.5, 2.5, 8.5, 2.5, 8.5, 6.5]])
    flipped = whole(draw(half, 0, (20, 20), (20, 20), True), (20, 20))
    other = of_polygons([[17.5, 2.5, 11.5, 2.5, 11.5, 6.5]])
    plain = whole(draw(other, 0, (20, 20), (20, 20), False), (20, 20))
    np.testing.assert_array_equal(flipped, plain)
