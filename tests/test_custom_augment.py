"""A user's own augmentation: a function in a list, by import path from the config."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_coco import annotation, content, load, square, write

from configs import base
from solov2_jax.data import build, custom_augment, pipeline
from solov2_jax.data.augment import Augment, Sample
from solov2_jax.data.buckets import Resize
from solov2_jax.data.transforms import Keypoints
from solov2_jax.io import InputError
from solov2_jax.tools.cli import view

DOCS = Path(__file__).resolve().parent.parent / "docs" / "data.md"
FUNCTIONS = '''
"""Functions of a user, right and wrong ones."""
import dataclasses
import numpy as np

seen = []
constant = 3

def same(sample):
    seen.append(sample.rng.random())
    return sample

def darker(sample):
    return dataclasses.replace(sample, image=sample.image // 2)

def smaller(sample):
    sample.image, sample.masks = sample.image[:20, :24].copy(), sample.masks[:, :20, :24].copy()
    return sample

def larger(sample):
    sample.image = np.zeros((500, 400, 3), np.uint8)
    sample.masks = np.zeros((len(sample.labels), 500, 400), bool)
    return sample

def own_boxes(sample):
    sample.boxes = sample.boxes + np.float32(1)
    return sample

def double(sample):
    for name in ("masks", "boxes", "labels"):
        setattr(sample, name, np.concatenate([getattr(sample, name)] * 20))
    return sample

def spread(sample):
    assert sample.keypoints.shape[1:] == (2, 3)
    sample.keypoints[..., :2] += 1
    return sample

def nothing(sample): pass
def fails(sample): raise KeyError("a key")
def floats(sample): sample.image = sample.image / 255; return sample
def grey(sample): sample.image = sample.image[..., 0]; return sample
def listed(sample): sample.image = sample.image.tolist(); return sample
def fewer_masks(sample): sample.masks = sample.masks[1:]; return sample
def soft_masks(sample): sample.masks = sample.masks.astype(np.float32); return sample
def more_labels(sample): sample.labels = np.append(sample.labels, 0); return sample
def far_label(sample): sample.labels[:] = 2; return sample
def float_labels(sample): sample.labels = sample.labels.astype(float); return sample
def nan_boxes(sample): sample.boxes[0, 0] = np.nan; return sample
def flat_boxes(sample): sample.boxes = sample.boxes.ravel(); return sample
def turned_boxes(sample): sample.boxes = sample.boxes[:, [2, 3, 0, 1]]; return sample
def cropped_image(sample): sample.image = sample.image[:9, :9]; return sample
'''


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A package of the user on the path, with the documented example in it."""
    (code,) = re.findall(r"```python\n(# mypackage/aug\.py.*?)```", DOCS.read_text(), re.S)
    assert len([line for line in code.splitlines()[1:] if line]) <= 10
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "aug.py").write_text(code)
    (package / "more.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    custom_augment.custom_function.cache_clear()
    for name in [n for n in sys.modules if n.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


def objects(tmp_path):
    """Two objects in image 7, one in image 3, none in image 9."""
    values = content()
    values["annotations"] = [
        annotation(1, 7, 5),
        annotation(2, 7, 20, segmentation=square(40, 20, 16), bbox=[40, 20, 16, 16]),
        annotation(3, 3, 20),
    ]
    return load(tmp_path, values)


def batches_of(data, *functions, **options):
    values = {"seed": 1, "num_steps": 8, "batch_size": 2, "flip_prob": 0.5}
    values |= {"resize": Resize((48,), 64)} | options
    custom = Augment(custom=tuple(f"mypackage.{f}" for f in functions))
    return pipeline.train_batches(data, augment=custom, **values)


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def test_the_documented_example(user, tmp_path):
    """In this process, in a worker and resumed: the same squares, in picture and masks."""
    data = objects(tmp_path)
    plain = list(batches_of(data, "more:same"))
    cut = list(batches_of(data, "aug:cutout"))
    hidden = [(a["image"] != b["image"]).any(-1) for a, b in zip(cut, plain, strict=True)]
    assert sum(h.any() for h in hidden) == 8
    for a, b, hole in zip(cut, plain, hidden, strict=True):
        assert not a["image"][hole].any()
        fewer = b["masks"].sum((-1, -2)) > a["masks"].sum((-1, -2))
        assert (b["masks"] >= a["masks"]).all() or fewer.any()
    assert any(
        a["valid"].sum() < b["valid"].sum() or (a["boxes"] != b["boxes"]).any()
        for a, b in zip(cut, plain, strict=True)
    ), "boxes follow the masks"
    assert_equal(list(batches_of(data, "aug:cutout", start_step=5)), cut[5:])
    reading = pipeline.Reading(num_workers=1, num_threads=1, prefetch=1)
    assert_equal(list(batches_of(data, "aug:cutout", start_step=2, reading=reading)), cut[2:])


def test_functions_follow_each_other_and_may_return_another_sample(user, tmp_path):
    data = objects(tmp_path)
    plain, dark = batches_of(data, "more:same"), batches_of(data, "more:darker", "more:darker")
    for a, b in zip(plain, dark, strict=True):
        np.testing.assert_array_equal(a["image"] // 4, b["image"])
        np.testing.assert_array_equal(a["masks"], b["masks"])
    import mypackage.more as more  # pyright: ignore[reportMissingImports]

    assert len(set(more.seen)) == 16, "every image of every epoch has its own generator"


def test_a_smaller_image_is_padded_and_a_larger_one_refused(user, tmp_path):
    data = objects(tmp_path)
    for batch in batches_of(data, "more:smaller"):
        assert (batch["image_size"] == [20, 24]).all()
        assert not batch["image"][:, 20:].any() and not batch["image"][:, :, 24:].any()
        assert (batch["boxes"] <= 24).all()
    with pytest.raises(InputError, match=r"more:larger returned, for .*png, an image of 500 x 400"):
        list(batches_of(data, "more:larger"))


def test_boxes_that_were_set_stay(user, tmp_path):
    data = objects(tmp_path)
    for a, b in zip(batches_of(data, "more:same"), batches_of(data, "more:own_boxes"), strict=True):
        np.testing.assert_array_equal(a["boxes"][a["valid"]] + 1, b["boxes"][b["valid"]])


def test_objects_without_a_slot_are_told_once(user, tmp_path, caplog):
    list(batches_of(objects(tmp_path), "more:double"))
    (record,) = [r for r in caplog.records if "augment.custom add" in r.message]
    assert "Raise data.max_instances" in record.message and "= 8 objects" in record.message


def test_key_points_come_along(user, tmp_path):
    data = objects(tmp_path)
    values = np.tile(np.float32([12, 9, 2]), (len(data.labels), 2, 1))
    points = Keypoints(("left_eye", "right_eye"), np.array([1, 0]), values)
    still, moved = (
        batches_of(data, f, keypoints=points, flip_prob=0.0) for f in ("more:same", "more:spread")
    )
    for a, b in zip(still, moved, strict=True):
        valid = a["keypoints"][..., 2] > 0
        np.testing.assert_array_equal(valid.any(-1), a["valid"])
        np.testing.assert_array_equal(
            a["keypoints"][valid][:, :2] + 1, b["keypoints"][valid][:, :2]
        )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "a NoneType; return the Sample that it got, changed"),
        ("floats", r"`image` float64 .*; it must be uint8"),
        ("grey", r"`image` uint8 .*; it must be uint8 \[.*, 3\]"),
        ("listed", "`image` of type list; it must be a numpy array"),
        ("fewer_masks", r"`masks` bool .*; it must be bool \[2, "),
        ("soft_masks", "`masks` float32 .*; it must be bool"),
        ("more_labels", r"`masks` bool .* as there are 3 labels"),
        ("far_label", r"`labels` outside of 0\.\.1"),
        ("float_labels", "`labels` float64 .*; it must be int"),
        ("nan_boxes", "`boxes` with a value that is not finite"),
        ("flat_boxes", r"`boxes` float32 \[8\]; it must be float \[2, 4\]"),
        ("turned_boxes", "`boxes` whose x1 or y1 is less"),
        ("cropped_image", r"`masks` bool .* the image is \[9, 9\]"),
    ],
)
def test_a_wrong_return_names_the_function(user, tmp_path, function, message):
    maker = batches_of(objects(tmp_path), f"more:{function}", batch_size=1).maker
    index = maker.dataset.image_ids.tolist().index(7)
    step = maker.schedule.image.ravel().tolist().index(index)
    with pytest.raises(InputError, match=rf"mypackage.more:{function} returned, for .*{message}"):
        maker(step)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "mypackage.more:fails",
            r"more:fails failed for .*png \(KeyError: 'a key', more.py line 40\)",
        ),
        ("mypackage.more:constant", "mypackage.more:constant is of type int, not a function"),
        ("mypackage.more:absent", "'mypackage.more:absent' cannot be imported"),
        ("nowhere.aug:cutout", "'nowhere.aug:cutout' cannot be imported"),
        ("mypackage.more.same", "is no import path"),
    ],
)
def test_a_function_that_is_missing_or_fails(user, tmp_path, path, message):
    config = base.get_config()
    config.augment.custom = (path,)
    config.input.min_sizes_train, config.input.max_size_train = (48,), 64
    config.train.steps, config.train.batch_size = 2, 2
    config.data.num_workers = 0
    with pytest.raises(InputError, match=f"augment.custom: .*{message}"):
        list(build.build_train_batches(config, objects(tmp_path)))


def test_solov2_view_shows_it(user, tmp_path):
    images, path = write(tmp_path)
    flags = ["--config=configs/quickstart.py", "--config.data.name=", "--batches=1"]
    flags += [f"--config.data.train.images={images}", f"--config.data.train.annotations={path}"]
    sizes = {}
    for name, custom in (("plain", "()"), ("own", "('mypackage.more:darker',)")):
        out = tmp_path / name
        view.run(argv=[*flags, f"--output={out}", f"--config.augment.custom={custom}"])
        sizes[name] = [file.read_bytes() for file in sorted(out.iterdir())]
    assert len(sizes["plain"]) == len(sizes["own"]) == 4
    assert all(a != b for a, b in zip(sizes["plain"], sizes["own"], strict=True))


def test_a_sample_is_a_dataclass_with_pixels_when_they_are_read(user, tmp_path):
    maker = batches_of(objects(tmp_path), "more:same").maker
    view = maker.view(0, np.random.default_rng(0), scale=0, flip=False, room=None)
    sample = maker.sample(view, 0)
    assert sample.view is not None, "nothing was drawn"
    assert [f.name for f in dataclasses.fields(Sample)] == (
        ["image", "masks", "boxes", "labels", "keypoints", "rng", "has_mask", "user"]
    )
    spans = sample.outlines()
    assert sample.image.dtype == np.uint8 and sample.masks.dtype == bool
    assert sample.view is None and sample.size == sample.image.shape[:2]
    for a, b in zip(
        dataclasses.astuple(spans), dataclasses.astuple(sample.outlines()), strict=True
    ):
        np.testing.assert_array_equal(a, b)
