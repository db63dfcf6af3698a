"""Turns, scale, mosaic, mixup, and what makes a picture worse: invariants of each."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_augment import assert_together, maker_of, sample_of, scenes  # noqa: F401

from configs import base
from solov2_jax.config import load_config, save_config
from solov2_jax.data import build, degrade, join, pipeline, rasterize, transforms
from solov2_jax.data.augment import Augment, Outlines, Sample, shift_hue
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import load_coco
from solov2_jax.data.transforms import Affine, Keypoints
from solov2_jax.io import InputError
from solov2_jax.training.build import in_steps

LARGE = Affine((9, 9), (9, 9), np.eye(2, 3) * 2)  # tolerance: masks are at most doubled


def picture_of(seed, size=(37, 53)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


@given(st.integers(0, 99), st.integers(0, 7))
def test_four_turns_and_two_flips_are_nothing(seed, quarters):
    view = transforms.affine_image(picture_of(seed))
    once = view
    for _ in range(4):
        once = transforms.turn(once, quarters)
    np.testing.assert_array_equal(np.asarray(once.picture), np.asarray(view.picture))
    np.testing.assert_array_equal(once.affine.matrix, view.affine.matrix)
    assert once.affine.size == view.affine.size
    twice = view.affine.flipped().flipped()
    np.testing.assert_array_equal(twice.matrix, view.affine.matrix)
    assert not twice.mirrored
    turned = transforms.turn(view, quarters)
    expected = np.rot90(np.asarray(view.picture), quarters)
    np.testing.assert_array_equal(turned.pixels(), expected)
    # A pixel's middle is where the pixel is.
    y, x = 5, 7
    (where,) = turned.affine.points(np.array([[x + 0.5, y + 0.5]]))
    np.testing.assert_array_equal(
        expected[int(where[1]), int(where[0])], np.asarray(view.picture)[y, x]
    )


def dotted(tmp_path, dot=(30, 18), size=(48, 64)):
    """A data set of one image: a grey square with a white pixel block, and its key points:
    "left" is the block's middle, "right" nothing."""
    h, w = size
    image = np.full((h, w, 3), 40, np.uint8)
    image[10:40, 20:50] = 120
    x, y = dot
    image[y - 2 : y + 2, x - 2 : x + 2] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    square = [20, 10, 50, 10, 50, 40, 20, 40]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": h, "width": w}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [square],
             "bbox": [20, 10, 30, 30]}
        ],
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(content))
    data = load_coco(str(tmp_path), str(tmp_path / "x.json"))
    points = np.array([[[x, y, 2], [0, 0, 0]]], np.float32)
    return data, Keypoints(("left", "right"), np.array([1, 0]), points)


EACH = [
    {"turn_prob": 1.0},
    {"vflip_prob": 1.0},
    {"vflip_prob": 0.5, "turn_prob": 0.5},
    {"scale": (0.6, 1.8)},
    {"mosaic_prob": 1.0},
    {"mosaic_prob": 1.0, "turn_prob": 0.5, "scale": (0.5, 1.5)},
    {"mixup_prob": 1.0},
    {"paste_prob": 1.0, "mosaic_prob": 1.0, "mixup_prob": 1.0},
    {"jitter_scale": (0.5, 1.5), "jitter_size": (64, 64), "mosaic_prob": 1.0},
    {"cutout_prob": 1.0},
    {"noise": 5.0, "hue": 0.1},
]


@pytest.mark.parametrize("values", EACH, ids=lambda v: "+".join(v))
def test_boxes_and_key_points_follow_their_pixels(tmp_path, values):
    data, points = dotted(tmp_path)
    batches = pipeline.train_batches(
        data, seed=3, num_steps=12, batch_size=1, resize=Resize((96,), 160), flip_prob=0.5,
        keypoints=points, augment=Augment(**values),
    )  # fmt: skip
    seen = 0
    for batch in batches:
        image = batch["image"][0].astype(int)
        height, width = batch["image_size"][0]
        for i in np.flatnonzero(batch["valid"][0]):
            x0, y0, x1, y1 = batch["boxes"][0, i]
            mask = batch["masks"][0, i]
            if mask.any():
                # The stride-4 mask has the box's extent, to a cell.
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                extent = [columns[0] * 4, rows[0] * 4, columns[-1] * 4 + 4, rows[-1] * 4 + 4]
                np.testing.assert_allclose([x0, y0, x1, y1], extent, atol=4)
            for x, y, flag in batch["keypoints"][0, i]:
                if flag < 2 or not (2 < x < width - 2 and 2 < y < height - 2):
                    continue
                dot = image[int(y), int(x)].min()
                # Half as bright where another image lies over it.
                assert dot > (114 if values.get("mixup_prob") else 200)
                seen += 1
    assert seen > 3


def test_upside_down_changes_the_sides_of_key_points(tmp_path):
    data, points = dotted(tmp_path)
    options = {"seed": 0, "num_steps": 1, "batch_size": 1, "flip_prob": 0.0}
    for values, side in (({"vflip_prob": 1.0}, 1), ({"turn_prob": 1.0}, 0)):
        (batch,) = pipeline.train_batches(
            data, resize=Resize((48,), 64), keypoints=points, augment=Augment(**values), **options
        )
        assert batch["keypoints"][0, 0, side, 2] == 2
        assert batch["keypoints"][0, 0, 1 - side, 2] == 0
        if side:
            expected = np.asarray(Image.open(data.path(0)))[::-1]
            np.testing.assert_array_equal(batch["image"][0, :48, :64], expected)


@given(st.integers(0, 7), st.integers(0, 10_000))
@settings(max_examples=40)
def test_a_mosaic_is_full_and_its_masks_fit(scenes, index, epoch):  # noqa: F811
    maker = maker_of(scenes, mosaic_prob=1.0)
    sample = maker.mosaic(index, epoch, (96, 128), np.random.default_rng(epoch))
    assert sample.size == (96, 128) and sample.image.any(axis=-1).all()
    assert_together(sample, LARGE)
    assert (sample.masks.sum(axis=0) <= 1).all()
    expected = rasterize.bounding_boxes(sample.outlines(), len(sample.labels))
    np.testing.assert_array_equal(sample.boxes, expected)


def test_mixup_keeps_both(scenes):  # noqa: F811
    maker = maker_of(scenes, flip_prob=0.0)
    host, guest = (sample_of(maker, i, room=(96, 96))[0] for i in (3, 7))
    both = join.mixup(host, guest, np.random.default_rng(0))
    weight = np.random.default_rng(0).uniform(0.35, 0.65)
    n = len(host.labels)
    size = np.maximum(host.size, guest.size)
    assert both.size == tuple(size) and len(both.labels) == n + len(guest.labels)
    for masks, one in ((both.masks[:n], host), (both.masks[n:], guest)):
        np.testing.assert_array_equal(masks[:, : one.size[0], : one.size[1]], one.masks)
        assert masks.sum() == one.masks.sum()
    padded = [np.pad(s.image.astype(float), ((0, size[0] - s.size[0]), (0, size[1] - s.size[1]),
                                             (0, 0))) for s in (host, guest)]  # fmt: skip
    np.testing.assert_allclose(both.image, weight * padded[0] + (1 - weight) * padded[1], atol=0.51)


def plain_sample(size=(60, 80), seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, *size), bool)
    masks[0, 5:30, 10:40] = masks[1, 20:55, 45:75] = True
    return Sample(
        image=rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        masks=Outlines(rasterize.spans_from_masks(masks), 2, size),
        boxes=np.array([[10, 5, 40, 30], [45, 20, 75, 55]], np.float32),
        labels=np.array([0, 1], np.int32),
        keypoints=np.array([[[12.5, 6.5, 2], [39, 29, 1]], [[46, 21, 2], [0, 0, 0]]], np.float32),
        rng=rng,
    )


@given(st.integers(0, 10_000))
def test_a_cutout_is_in_picture_masks_boxes_and_points(seed):
    before, augment = plain_sample(), Augment(cutout_prob=1.0, cutout_size=(0.2, 0.6))
    after = degrade.cutout(plain_sample(), augment, np.random.default_rng(seed))
    hidden = (after.image != before.image).any(-1)
    assert 0 < hidden.mean() < 0.9
    # Where the picture is as it was, so are the masks; a colour may be hit by chance.
    changed = after.masks != before.masks
    assert not (changed & ~hidden).sum() > 3
    assert not (after.masks & ~before.masks).any()
    boxes = rasterize.bounding_boxes(after.outlines(), 2)
    np.testing.assert_array_equal(after.boxes, boxes)
    np.testing.assert_array_equal(after.keypoints[..., :2], before.keypoints[..., :2])
    covered = before.masks.any(0) & ~after.masks.any(0)
    assert after.keypoints[0, 0, 2] == (1 if covered[6, 12] else 2)
    assert after.keypoints[1, 1, 2] == 0


def test_blur_noise_jpeg_and_hue():
    image = np.asarray(picture_of(1, (64, 64)))
    for worse in (
        degrade.blur(image, 1.5),
        degrade.compress(image, 30),
        degrade.add_noise(image, 8.0, np.random.default_rng(0)),
        np.asarray(shift_hue(Image.fromarray(image), 0.3)),
    ):
        assert worse.shape == image.shape and worse.dtype == np.uint8
        assert (worse != image).any()
    # A blur keeps the mean, and is the same for planes of any number and type.
    five = np.concatenate([image, image[..., :2]], axis=-1).astype(np.float32)
    blurred = degrade.blur(five, 1.5)
    assert blurred.std() < image.std() / 2
    np.testing.assert_allclose(blurred.mean(), five.mean(), rtol=0.01)
    np.testing.assert_allclose(blurred[..., :3], degrade.blur(image, 1.5), atol=12)
    noisy = degrade.add_noise(
        np.full((200, 200, 5), 100, np.float32), 8.0, np.random.default_rng(0)
    )
    assert abs((noisy - 100).std() - 8) < 0.1
    # Red, a third of the circle on, is green; a whole turn is nothing.
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    np.testing.assert_allclose(np.asarray(shift_hue(red, 1 / 3))[0, 0], (0, 200, 0), atol=4)
    np.testing.assert_array_equal(np.asarray(shift_hue(red, 1.0)), np.asarray(red))


JOINED = {"mosaic_prob": 0.7, "mixup_prob": 0.4, "paste_prob": 0.4, "blur_prob": 0.3, "noise": 4.0}


def joined_batches(data, stop, **options):
    values = {"seed": 5, "num_steps": 8, "batch_size": 2, "flip_prob": 0.5} | options
    augment = Augment(**JOINED, turn_prob=0.5)
    resize = Resize((64,), 128)
    return pipeline.train_batches(data, augment=augment, resize=resize, join_steps=stop, **values)


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def test_joining_stops_at_its_step_also_resumed_and_in_a_worker(scenes):  # noqa: F811
    always, never = list(joined_batches(scenes, 99)), list(joined_batches(scenes, 0))
    stopped = list(joined_batches(scenes, 5))
    assert_equal(stopped[:5], always[:5])
    assert_equal(stopped[5:], never[5:])
    assert all((a["image"].shape != b["image"].shape or (a["image"] != b["image"]).any())
               for a, b in zip(always[5:], never[5:], strict=True))  # fmt: skip
    for start in (4, 5, 6):
        assert_equal(list(joined_batches(scenes, 5, start_step=start)), stopped[start:])
    reading = pipeline.Reading(num_workers=2, num_threads=1, prefetch=1)
    assert_equal(list(joined_batches(scenes, 5, start_step=2, reading=reading)), stopped[2:])


@pytest.mark.parametrize(
    ("steps", "stop", "last"),
    [(100, 0.1, 90), (100, 10, 90), (100, 0, 100), (7, 0.5, 3), (100, 1000, 0), (1, 0.3, 1)],
)
def test_when_joining_stops(steps, stop, last):
    config = base.get_config()
    config.train.steps, config.augment.stop_last = steps, float(stop)
    assert build.last_joining_step(config) == last


def test_epochs_of_stop_last_become_steps(scenes):  # noqa: F811
    config = base.get_config()
    config.train.epochs, config.train.batch_size = 10.0, 2
    config.augment.stop_last, config.augment.stop_last_epochs = 0.5, 2.0
    resolved = in_steps(config, scenes)
    assert (resolved.train.steps, resolved.augment.stop_last) == (40, 8)
    assert build.last_joining_step(resolved) == 32
    config.augment.stop_last_epochs = 0.0
    assert build.last_joining_step(in_steps(config, scenes)) == 20


def test_never_more_objects_than_slots(scenes, caplog):  # noqa: F811
    caplog.set_level(logging.WARNING)
    values = {"mosaic_prob": 1.0, "mixup_prob": 1.0, "paste_prob": 1.0}
    for most, slots in ((0, 8), (2, 2)):
        caplog.clear()
        batches = pipeline.train_batches(
            scenes, seed=0, num_steps=10, batch_size=2, resize=Resize((64,), 128), flip_prob=0.5,
            max_instances=most, augment=Augment(**values),
        )  # fmt: skip
        for batch in batches:
            assert batch["valid"].shape == (2, slots)
            assert (batch["masks"][~batch["valid"]] == 0).all()
        told = [r for r in caplog.records if "augment.mosaic_prob" in r.message]
        assert len(told) <= 1
        assert not told or "data.max_instances" in told[0].message
    assert told, "of the images with two slots"


def test_a_preset_sets_what_is_not_given(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--config.augment.preset=strong", "--config.augment.hue=0.0"]
    config = load_config("quickstart", flags)
    preset = base.PRESETS["strong"]
    assert config.augment.hue == 0 and config.augment.scale == preset["scale"]
    assert config.augment.stop_last == 0.1
    (line,) = [r.message for r in caplog.records if "augment.preset = strong sets" in r.message]
    assert "augment.mosaic_prob = 0.5" in line and "not set: augment.hue (given)" in line
    # A run's config.json says what was set, and is not set anew.
    save_config(config, tmp_path / "config.json")
    caplog.clear()
    again = load_config(str(tmp_path / "config.json"))
    assert again.augment == config.augment and not caplog.records
    other = load_config(str(tmp_path / "config.json"), ["--config.augment.preset=weak"])
    assert other.augment.brightness == 0.1 and other.augment.scale == (0.8, 1.25)
    # A user's own file: what it changes stays.
    own = tmp_path / "own.py"
    own.write_text(
        "from configs import quickstart\ndef get_config():\n"
        "    config = quickstart.get_config()\n    config.augment.brightness = 0.7\n"
        "    config.augment.preset = 'weak'\n    return config\n"
    )
    config = load_config(str(own))
    assert (config.augment.brightness, config.augment.contrast) == (0.7, 0.1)


@pytest.mark.parametrize("name", base.PRESETS)
def test_every_preset_is_possible(name):
    config = load_config("quickstart", [f"--config.augment.preset={name}"])
    augment = build._augment(config)
    assert augment.active
    deep = load_config(
        "quickstart", [f"--config.augment.preset={name}", "--config.data.channels=5"]
    )
    build.check_augment(deep)
    assert deep.augment.saturation == 0
    assert dataclasses.replace(augment, saturation=0.0, hue=0.0, jpeg_prob=0.0).active


def test_colours_are_refused_for_other_channels():
    flags = ["--config.data.channels=4", "--config.augment.hue=0.1"]
    with pytest.raises(InputError, match=r"augment.hue = 0.1 is for 8-bit RGB .* set it to 0"):
        build.check_augment(load_config("quickstart", flags))
