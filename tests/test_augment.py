"""Augmentations: picture, masks, boxes and points stay together, whatever is drawn."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from configs import base
from solov2_jax.data import augment as changes
from solov2_jax.data import build, join, pipeline, rasterize, sampler, transforms
from solov2_jax.data.augment import Augment
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import load_coco
from solov2_jax.io import InputError
from solov2_jax.tools import fcpose as pose

OFF = Augment(jitter_size=(96, 96))
SETTINGS = [
    {"rotate_prob": 1.0},
    {"crop_size": (0.5, 0.4)},
    {"crop_size": (0.4, 0.5), "crop_objects": False},
    {"jitter_scale": (0.3, 2.0)},
    {"rotate_prob": 0.5, "crop_size": (0.6, 0.6), "jitter_scale": (0.5, 1.5)},
    {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "crop_size": (0.7, 0.7)},
    {"turn_prob": 0.8, "vflip_prob": 0.5},
    {"scale": (0.5, 2.0), "vflip_prob": 0.5, "crop_size": (0.7, 0.7)},
    {"paste_prob": 1.0},
    {"paste_prob": 0.5, "jitter_scale": (0.5, 1.5), "rotate_prob": 0.5},
]
COLORS = {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255)}
SIZES = [(90, 120), (120, 80), (100, 100), (60, 150)]


def random_outline(rng, h, w):
    """Returns a convex polygon of an object somewhere, float [2 * n]."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9)) + np.linspace(0, 0.1, 9)
    radius = rng.uniform(0.12, 0.3) * min(h, w)
    center = rng.uniform(0.2, 0.8, 2) * (w, h)
    return (center + radius * np.stack([np.cos(angles), np.sin(angles)], -1)).ravel()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A data set whose pixels say which class they belong to, by pure colours.

    Every other object is given by run lengths.
    """
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": str(i)} for i in COLORS]
    for number, (h, w) in enumerate(SIZES * 2):
        picture = Image.new("RGB", (w, h), (128, 128, 128))
        free = np.ones((h, w), bool)
        for category in (1, 2, 3)[: number % 4]:
            outline = random_outline(rng, h, w)
            one = coco_mask.frPyObjects([outline], h, w)
            crop = rasterize.spans_to_crop(rasterize.spans_from_rle([one[0]["counts"]], (h, w)))
            mask = np.zeros((h, w), bool)
            if crop is not None:
                mask[crop.top :, crop.left :][: len(crop.pixels)][:, : crop.pixels.shape[1]] = (
                    crop.pixels
                )
            if (mask & ~free).any():
                continue
            free &= ~mask
            pixels = np.array(picture)
            pixels[mask] = COLORS[category]
            picture = Image.fromarray(pixels)
            runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            encoded = {"size": [h, w], "counts": runs["counts"].decode("ascii")}
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": category,
                    "segmentation": encoded if category == 2 else [outline.tolist()],
                    "bbox": coco_mask.toBbox(runs).tolist(),
                }
            )
        picture.save(folder / f"{number}.png")
        record = {"id": number, "file_name": f"{number}.png", "height": h, "width": w}
        content["images"].append(record)
    (folder / "x.json").write_text(json.dumps(content))
    return load_coco(str(folder), str(folder / "x.json"))


def maker_of(data, seed=0, flip_prob=0.5, shorts=(64, 80, 96), **values):
    batches = pipeline.train_batches(
        data,
        seed=seed,
        num_steps=30,
        batch_size=2,
        resize=Resize(shorts, 128),
        flip_prob=flip_prob,
        augment=dataclasses.replace(OFF, **values),
    )
    return batches.maker


def class_pixels(picture: np.ndarray, label: int, strict: bool) -> np.ndarray:
    """Returns where a picture has a class's colour, nearly or at least mostly."""
    values = picture.astype(int)
    own = values[..., label]
    others = np.delete(values, label, axis=-1).max(axis=-1)
    return own - others > (170 if strict else 40)


def sample_of(maker, index, epoch=0, room=(128, 128)):
    """Returns a sample, and the map that led to it."""
    rng = sampler.random_generator(maker.seed, sampler.LOOK, epoch, index)
    view = maker.view(index, rng, scale=epoch % 3, flip=epoch % 2 == 1, room=room)
    return maker.sample(view, index), view.affine


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    out = np.pad(mask, by)
    shifts = [(dy, dx) for dy in range(-by, by + 1) for dx in range(-by, by + 1)]
    return np.any([np.roll(out, s, (0, 1)) for s in shifts], axis=0)[by:-by, by:-by]


def assert_together(sample, *affines):
    """Masks and colours agree, but for a pixel of the original along the outlines."""
    picture, masks = sample.image, sample.masks
    by = 1 + int(np.ceil(max(np.linalg.norm(a.matrix[:, :2], 2) for a in affines)))
    for label in range(3):
        mask = masks[sample.labels == label].any(axis=0)
        inside = ~grown(~mask, by)
        edge = np.zeros_like(mask)
        edge[[0, -1]] = edge[:, [0, -1]] = True
        assert not (class_pixels(picture, label, True) & ~grown(mask, by)).any()
        assert not (inside & ~class_pixels(picture, label, False) & ~edge).any()


@pytest.mark.parametrize("values", SETTINGS, ids=lambda v: "+".join(v))
@given(st.integers(0, 7), st.integers(0, 10_000))
@settings(max_examples=15)
def test_picture_and_masks_move_together(scenes, values, index, epoch):
    maker = maker_of(scenes, **values)
    room = (96, 96) if values.get("jitter_scale") else (128, 128)
    sample, affine = sample_of(maker, index, epoch, room)
    assert sample.size[0] <= room[0] and sample.size[1] <= room[1]
    assert sample.masks.shape == (len(sample.labels), *sample.size)
    assert_together(sample, affine)
    other, guest = sample_of(maker, (index + 3) % 8, epoch + 1, None)
    both = join.copy_paste(sample, other, sample.size, np.random.default_rng(epoch))
    assert_together(both, affine, guest)
    assert (both.masks.sum(axis=0) <= 1).all()


@pytest.mark.parametrize("values", SETTINGS, ids=lambda v: "+".join(v))
def test_batches_are_a_function_of_seed_and_step(scenes, values):
    maker = maker_of(scenes, **values)
    again, other = maker_of(scenes, **values), maker_of(scenes, seed=1, **values)
    seen = set()
    for step in (11, 3):
        batch, same, different = maker(step), again(step), other(step)
        for key in batch:
            np.testing.assert_array_equal(batch[key], same[key])
        seen.add(bool((batch["image"].shape != different["image"].shape)
                      or (batch["image"] != different["image"]).any()))  # fmt: skip
        assert_tight(batch)
    assert True in seen


def assert_tight(batch):
    """Boxes and centres are those of the masks, at a quarter of the size."""
    b, h, w, _ = batch["image"].shape
    masks = iter(batch["masks"])
    for row in range(b):
        height, width = batch["image_size"][row]
        assert not batch["image"][row, height:].any()
        assert not batch["image"][row, :, width:].any()
        for box, center, valid in zip(
            batch["boxes"][row], batch["centers"][row], batch["valid"][row], strict=True
        ):
            if not valid:
                continue
            mask = next(masks)
            assert mask.shape == (h // 4, w // 4)
            assert (box[:2] >= 0).all() and (box[2:] <= (width, height)).all()
            assert (center >= box[:2]).all() and (center <= box[2:]).all()
            y, x = np.nonzero(mask)
            if len(y):
                assert x.min() * 4 >= box[0] - 4 and x.max() * 4 <= box[2] + 4
                assert y.min() * 4 >= box[1] - 4 and y.max() * 4 <= box[3] + 4
    assert next(masks, None) is None


@given(
    st.floats(-40, 40),
    st.tuples(st.integers(3, 90), st.integers(3, 90)),
    st.booleans(),
    st.integers(0, 99),
)
def test_points_move_with_the_picture(degrees, size, flip, seed):
    """The dot that a point marks is where the moved point is; keypoints rely on it."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(30, 50, 2)
    rows, columns = np.indices((80, 90)) + 0.5
    distance = (columns - xy[0]) ** 2 + (rows - xy[1]) ** 2
    dot = (255 * np.exp(-distance / 18)).astype(np.uint8)
    picture = Image.fromarray(dot).convert("RGB")
    view = transforms.rotate(transforms.affine_image(picture), degrees)
    view = transforms.crop(view, (2, 1, view.size[1] - 3, view.size[0] - 4))
    view = transforms.resize(view, (size[0] + 60, size[1] + 60))
    affine = view.affine.flipped() if flip else view.affine
    assert affine.mirrored == flip
    weight = transforms.AffineImage(view.picture, affine).pixels()[..., 0].astype(float)
    rows, columns = np.indices(weight.shape) + 0.5
    center = [(weight * v).sum() / weight.sum() for v in (columns, rows)]
    np.testing.assert_allclose(affine.points(xy[None])[0], center, atol=0.3)
    back = affine.inverse()
    np.testing.assert_allclose(back[:, :2] @ affine.points(xy) + back[:, 2], xy)


@given(st.integers(0, 2**32 - 1))
def test_polygons_end_at_the_border(seed):
    rng = np.random.default_rng(seed)
    outline = random_outline(rng, 40, 60).reshape(-1, 2) * 2 - 20
    found = rasterize.clip_polygon(outline, (40, 60))
    assert (found >= 0).all() and (found <= (60, 40)).all()
    frame = np.zeros((120, 160), np.uint8)
    for points in (outline, found):
        if len(points) > 2:
            runs = coco_mask.frPyObjects([((points + 40) * 1.0).ravel()], 120, 160)
            crop = rasterize.spans_to_crop(
                rasterize.spans_from_rle([runs[0]["counts"]], (120, 160))
            )
            if crop is not None:
                h, w = crop.pixels.shape
                frame[crop.top :, crop.left :][:h, :w] += crop.pixels
    # Drawn with a margin: twice inside, once outside, but for pixels on the outlines.
    inside = frame[41:79, 41:99]
    assert (inside == 1).mean() < 0.03
    outside = frame.copy()
    outside[39:81, 39:101] = 0
    assert (outside < 2).all()


@given(st.integers(0, 2**32 - 1))
def test_a_crop_holds_an_object_and_may_spare_all(seed):
    rng = np.random.default_rng(seed)
    view = transforms.affine_image(Image.new("RGB", (60, 40)))
    corner = rng.uniform(0, 0.8, (4, 2)) * (60, 40)
    boxes = np.concatenate(
        [corner, np.minimum(corner + rng.uniform(1, 20, (4, 2)), (60, 40))], axis=-1
    )
    for spare in (False, True):
        augment = dataclasses.replace(OFF, crop_size=(0.2, 0.3), crop_objects=not spare)
        found = changes.random_crop_with_instance(view, boxes, augment, np.random.default_rng(seed))
        moved = found.affine.points(boxes.reshape(-1, 2, 2)).reshape(-1, 4)
        h, w = found.size
        if not spare:
            assert h >= 8 and w >= 18
            center = (moved[:, :2] + moved[:, 2:]) / 2
            held = (center >= -1e-9).all(axis=1) & (center <= (w, h)).all(axis=1)
            assert held.any()
            continue
        seen = (moved[:, 2:] > 0).all(axis=1) & (moved[:, :2] < (w, h)).all(axis=1)
        whole = (moved[:, :2] >= -1e-9).all(axis=1)
        whole &= (moved[:, 2:] <= np.array([w, h]) + 1e-9).all(axis=1)
        np.testing.assert_array_equal(seen, whole)
        assert seen.any()


def test_large_scale_jitter_has_one_shape_and_the_whole_range(scenes):
    maker = maker_of(scenes, jitter_scale=(0.25, 2.0))
    assert maker.schedule.buckets == ((96, 96),)
    sizes = np.concatenate([maker(step)["image_size"] for step in range(30)])
    assert sizes.max() == 96 and sizes.min() < 30


def test_pasted_objects_hide_what_is_below(scenes):
    maker = maker_of(scenes, flip_prob=0.0, paste_prob=1.0)
    big, small = (sample_of(maker, index, room=room)[0] for index, room in PAIR)
    assert len(big.labels) == len(scenes.labels[scenes.start[3] : scenes.start[4]]) > 0
    paste = functools.partial(join.copy_paste, big, small, big.size)
    everything = paste(np.random.default_rng(0), share=1.1)
    number = len(big.labels)
    np.testing.assert_array_equal(everything.labels[:number], big.labels)
    np.testing.assert_array_equal(everything.labels[number:], small.labels)
    masks, before = everything.masks, big.masks
    above = masks[number:].any(axis=0)
    assert above.sum() == small.masks.any(axis=0).sum() > 0
    np.testing.assert_array_equal(masks[:number], before & ~above)
    np.testing.assert_array_equal(everything.image[~above], big.image[~above])
    nothing = paste(np.random.default_rng(0), share=0.0)
    np.testing.assert_array_equal(nothing.masks, before)
    np.testing.assert_array_equal(nothing.image, big.image)


PAIR = ((3, (128, 128)), (7, (64, 64)))


def test_pasted_objects_keep_their_scale(scenes):
    """A small host gets objects as large as they would be as hosts, in its padding too."""
    maker = maker_of(scenes, flip_prob=0.0, paste_prob=1.0, jitter_scale=(1.0, 1.0))
    host, _ = sample_of(maker, 3, room=(20, 20))
    guest, _ = sample_of(maker, 7, room=None)
    assert max(guest.size) == 96 and max(host.size) == 20
    sizes = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        both = join.copy_paste(host, guest, (96, 96), rng, share=1.1)
        pasted = both.masks[len(host.labels) :]
        assert pasted.sum() == guest.masks.sum() > 0
        assert_together(both, transforms.Affine((9, 9), (9, 9), np.eye(2, 3) * 2))
        sizes.add(both.size)
    assert max(h for h, _ in sizes) > 50 and all(h <= 96 and w <= 96 for h, w in sizes)
    # Where guests are larger than the canvas, they are cut off and not shrunk.
    cut = join.copy_paste(guest, host, guest.size, np.random.default_rng(0), share=0.0)
    large = dataclasses.replace(guest, rng=guest.rng)
    small = join.copy_paste(host, large, host.size, np.random.default_rng(1), share=1.1)
    assert cut.size == guest.size and small.size == host.size
    assert_together(small, transforms.Affine((9, 9), (9, 9), np.eye(2, 3) * 2))


@pytest.mark.parametrize("options", [{"max_images": 3}, {"keep_empty": False}])
def test_guests_are_training_images(scenes, options):
    """Copy-paste takes objects of no image that is left out."""
    batches = pipeline.train_batches(
        scenes,
        seed=0,
        num_steps=40,
        batch_size=2,
        resize=Resize((64,), 128),
        flip_prob=0.5,
        augment=dataclasses.replace(OFF, paste_prob=1.0),
        **options,
    )
    looked_at = set()
    read = type(batches.maker).read

    class Spy(type(batches.maker)):
        def read(self, index):
            looked_at.add(index)
            return read(self, index)

    maker = batches.maker
    spy = Spy(**{f.name: getattr(maker, f.name) for f in dataclasses.fields(maker)})
    for step in range(40):
        spy(step)
    allowed = np.arange(3) if "max_images" in options else np.flatnonzero(scenes.objects_per_image)
    assert looked_at == set(allowed.tolist())
    np.testing.assert_array_equal(maker.images, allowed)


def test_no_two_purposes_share_a_stream():
    first = {
        float(sampler.random_generator(5, purpose, 1, 2).random())
        for purpose in (sampler.LOOK, sampler.PASTE, sampler.GUEST, sampler.CUSTOM)
    }
    assert len(first) == 4


def test_colours_change_the_picture_only(scenes):
    values = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5}
    plain, vivid = maker_of(scenes, crop_size=(1.0, 1.0)), maker_of(scenes, **values)
    changed = 0
    for step in range(4):
        a, b = plain(step), vivid(step)
        changed += (a["image"] != b["image"]).any()
        for key in set(a) - {"image"}:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert changed == 4


def test_one_maker_with_and_without_augmentation(scenes):
    plain, moved = maker_of(scenes), maker_of(scenes, crop_size=(1.0, 1.0))
    # The same pictures, and masks but for run lengths that are moved in another way.
    for step in range(5):
        a, b = plain(step), moved(step)
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["labels"], b["labels"])
        np.testing.assert_allclose(a["boxes"], b["boxes"], atol=2)


def test_a_config_says_what_happens(scenes):
    config = base.get_config()
    config.train.steps, config.train.batch_size = 2, 2
    config.input.min_sizes_train, config.input.max_size_train = (64,), 128
    assert not build.build_train_batches(config, scenes).maker.augment.active
    config.augment.jitter_scale = (0.5, 1.5)
    config.augment.jitter_size = (90, 64)
    config.augment.paste_prob = 0.5
    config.data.num_workers = 0
    batches = build.build_train_batches(config, scenes)
    assert batches.buckets == ((96, 64),)
    assert [b["image"].shape for b in batches] == [(2, 96, 64, 3)] * 2
    assert batches.maker.slots == 8
    with pytest.raises(InputError, match="augment.custom do not reach basis_sem"):
        pose.build_pose_batches(config, scenes, None, basis="anywhere")
