"""albumentations' transforms in `augment.custom`, with the library itself."""

import sys

import numpy as np
import pytest
from test_augment import scenes  # noqa: F401
from test_augment_joined import assert_equal, dotted

from solov2_jax.data import custom_augment, pipeline, rasterize
from solov2_jax.data.augment import Augment
from solov2_jax.data.buckets import Resize
from solov2_jax.io import InputError

OWN = """
import albumentations as A

moved = A.Compose([A.HorizontalFlip(p=0.5), A.Affine(rotate=(-30, 30), scale=(0.7, 1.2), p=1.0)])
cropped = A.RandomCrop(40, 50, p=1.0)
holes = A.CoarseDropout(p=1.0)
bright = A.RandomBrightnessContrast(p=1.0)
floats = A.ToFloat(p=1.0)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    pytest.importorskip("albumentations")
    (tmp_path / "own_transforms.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    custom_augment.custom_function.cache_clear()
    sys.modules.pop("own_transforms", None)


def batches_of(data, *paths, **options):
    values = {"seed": 1, "num_steps": 6, "batch_size": 2, "flip_prob": 0.0}
    values |= {"resize": Resize((64,), 128)} | options
    return pipeline.train_batches(data, augment=Augment(custom=paths), **values)


def test_the_same_in_workers_and_resumed(own, scenes):  # noqa: F811
    paths = ("own_transforms:moved", "own_transforms:bright", "albumentations:GaussNoise")
    all_ = list(batches_of(scenes, *paths))
    reading = pipeline.Reading(num_workers=2, num_threads=2, prefetch=1)
    assert_equal(list(batches_of(scenes, *paths, reading=reading)), all_)
    assert_equal(list(batches_of(scenes, *paths, start_step=4)), all_[4:])
    plain = list(batches_of(scenes, "own_transforms:bright"))
    assert any((a["image"] != b["image"]).any() for a, b in zip(plain, all_, strict=True))


@pytest.mark.parametrize("name", ["moved", "cropped", "bright"])
def test_masks_boxes_and_points_follow(own, tmp_path, name):
    data, points = dotted(tmp_path)
    seen = 0
    for batch in batches_of(data, f"own_transforms:{name}", keypoints=points, batch_size=1):
        image = batch["image"][0].astype(int)
        if name == "cropped":
            assert batch["image_size"].tolist() == [[40, 50]]
        if not batch["valid"][0, 0]:
            continue
        mask, box = batch["masks"][0, 0], batch["boxes"][0, 0]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        extent = [columns[0] * 4, rows[0] * 4, columns[-1] * 4 + 4, rows[-1] * 4 + 4]
        np.testing.assert_allclose(box, extent, atol=4)
        bright = image.sum(-1) > image.sum(-1).max() * 0.9
        x, y, flag = batch["keypoints"][0, 0].max(axis=0)
        if flag and 3 < x < image.shape[1] - 3 and 3 < y < image.shape[0] - 3:
            assert bright[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].any()
            seen += 1
    assert seen


def test_holes_are_taken_from_the_masks(own, scenes):  # noqa: F811
    maker = batches_of(scenes, "own_transforms:holes").maker
    view = maker.view(3, np.random.default_rng(0), scale=0, flip=False, room=None)
    before, after = maker.sample(view, 3), maker.sample(view, 3)
    after.rng = np.random.default_rng(0)
    (path,) = maker.augment.custom
    after = custom_augment.apply_custom(
        after, [path], room=(128, 192), num_classes=3, where="a.png"
    )
    hidden = (after.image == 0).all(-1) & before.image.any(-1)
    assert hidden.any() and not (after.masks & hidden).any()
    boxes = rasterize.bounding_boxes(after.outlines(), len(after.labels))
    np.testing.assert_array_equal(after.boxes, boxes)


def test_images_without_objects_pass(own, scenes):  # noqa: F811
    maker = batches_of(scenes, "own_transforms:moved").maker
    row = {
        "image": np.zeros((128, 192, 3), np.uint8), "image_size": np.zeros(2, np.int32),
        "boxes": np.zeros((8, 4), np.float32), "labels": np.zeros(8, np.int32),
        "centers": np.zeros((8, 2), np.float32), "masks": np.zeros((8, 32, 48), np.uint8),
        "valid": np.zeros(8, bool),
    }  # fmt: skip
    assert maker.fill_row(row, 0, 0) == (0, 0)


def test_another_type_is_one_line(own, scenes):  # noqa: F811
    with pytest.raises(InputError, match="own_transforms:floats returned, .*`image` float32"):
        list(batches_of(scenes, "own_transforms:floats"))


@pytest.mark.parametrize("path", ["albumentations:HorizontalFlip", "needs_it:flip"])
def test_without_the_library(tmp_path, monkeypatch, path):
    (tmp_path / "needs_it.py").write_text("import albumentations\nflip = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] == "albumentations"]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "albumentations":
                raise ModuleNotFoundError("No module named 'albumentations'")

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    custom_augment.custom_function.cache_clear()
    with pytest.raises(InputError, match=r'pip install "solov2_jax\[albumentations\]"'):
        custom_augment.custom_function(path)
