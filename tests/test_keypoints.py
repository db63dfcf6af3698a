"""Key points move with their image and keep their meaning; other jsons are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_coco import annotation, content, write

from configs import base
from solov2_jax.data.transforms import Affine, Keypoints
from solov2_jax.tools.fcpose import (
    build_pose_batches,
    load_keypoints,
    mirror_order,
    read_basis,
)

COCO = (
    "nose left_eye right_eye left_ear right_ear "
    "left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee "
    "left_ankle right_ankle "
).split()


def posed() -> dict:
    """Annotation 2 and 3 have their box's corners as eyes; image 9 has no person."""
    values = content()
    values["categories"][1]["keypoints"] = COCO
    for record, visible in zip(values["annotations"], (0, 2, 1), strict=True):
        x, y, w, h = record["bbox"]
        points = np.zeros((17, 3))
        if visible:
            points[0] = [x + w / 2 - 0.5, y - 0.5, visible]
            points[1] = [x - 0.5, y - 0.5, visible]
            points[2] = [x + w - 0.5, y + h - 0.5, visible]
        record["keypoints"] = points.ravel().tolist()
    return values


def test_the_order_of_the_mirrored_image():
    expected = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    assert mirror_order(COCO).tolist() == expected
    assert mirror_order(["tip", "left", "right", "left_x"]).tolist() == [0, 2, 1, 3]


def test_points_are_read_in_the_objects_order(tmp_path):
    data, keypoints = load_keypoints(*write(tmp_path, posed()))
    assert data.image_ids.tolist() == [7]  # image 3 has no visible point, 9 no object
    assert data.annotation_ids.tolist() == [2, 3]
    assert keypoints.points.shape == (2, 17, 3)
    np.testing.assert_array_equal(keypoints.points[:, 1, :2], data.boxes[:, :2].astype(np.float32))
    assert keypoints.points[:, 1, 2].tolist() == [2, 1]
    assert not keypoints.points[:, 3:].any()  # not annotated: zeros, not 0.5


def whole(size) -> Affine:
    return Affine(size, size, np.eye(2, 3))


def test_points_move_with_the_image():
    points = np.zeros((1, 17, 3), np.float32)
    points[0, 1] = [10, 20, 2]
    points[0, 16] = [63.9, 40, 1]
    order, chosen = mirror_order(COCO), np.array([0])
    larger = whole((48, 64)).resized((96, 128)).flipped()
    moved = Keypoints(tuple(COCO), order, points).moved(chosen, larger)
    np.testing.assert_allclose(moved[0, 2], [128 - 20, 40, 2])
    np.testing.assert_allclose(moved[0, 15], [128 - 127.8, 80, 1], rtol=1e-4)
    back = whole((96, 128)).resized((48, 64)).flipped()
    again = Keypoints(tuple(COCO), order, moved).moved(chosen, back)
    np.testing.assert_allclose(again, points, atol=1e-5)
    outside = points.copy()
    outside[0, 1, 0] = 65
    same = Keypoints(tuple(COCO), order, outside).moved(chosen, whole((48, 64)))
    assert not same[0, 1].any()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_batches_carry_points_and_semantic_masks(tmp_path, flip):
    values = posed()
    # A first object that is left out moves the others' slots.
    values["annotations"].insert(1, annotation(9, 7, 5, segmentation=[[1, 1, 2, 2]]))
    images, path = write(tmp_path, values)
    data, keypoints = load_keypoints(images, path)
    mask = np.zeros((48, 64), np.uint8)
    mask[:10, :20] = 3
    (tmp_path / "basis").mkdir()
    np.savez(tmp_path / "basis" / "a.npz", mask=mask)
    config = base.get_config()
    config.input.min_sizes_train, config.input.max_size_train = (96,), 160
    config.input.flip_prob = flip
    config.train.steps, config.train.batch_size = 2, 1
    config.data.num_workers = 0
    batches = build_pose_batches(config, data, keypoints, basis=str(tmp_path / "basis"))
    (batch, _) = list(batches)
    assert batch["image_size"].tolist() == [[96, 128]]
    boxes, points = batch["boxes"][0, :2], batch["keypoints"][0]
    assert batch["keypoints"].shape == (1, 8, 17, 3) and not points[2:].any()
    # The left eye was in the upper left corner, the right eye in the lower right one.
    upper, lower = (boxes[:, [0, 1]], boxes[:, [2, 3]])
    if flip:
        upper, lower = boxes[:, [2, 1]], boxes[:, [0, 3]]
    first, second = (2, 1) if flip else (1, 2)
    np.testing.assert_allclose(points[:2, first, :2], upper, atol=1e-4)
    np.testing.assert_allclose(points[:2, second, :2], lower, atol=1e-4)
    assert points[:2, 1, 2].tolist() == [2, 1]
    basis = batch["basis_sem"][0]
    assert basis.shape == batch["image"].shape[1:3]
    expected = np.zeros((96, 128), np.uint8)
    expected[:20, :40] = 3
    np.testing.assert_array_equal(basis[:96, :128], expected[:, ::-1] if flip else expected)


def spoil(tmp_path, change) -> str:
    values = posed()
    change(values)
    images, path = write(tmp_path, values)
    with pytest.raises(ValueError) as error:
        load_keypoints(images, path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_json_without_key_points_is_one_clear_error(tmp_path):
    def no_names(values):
        del values["categories"][1]["keypoints"]

    def no_points(values):
        for record in values["annotations"]:
            del record["keypoints"]

    def nothing_visible(values):
        for record in values["annotations"]:
            record["keypoints"] = [0] * 51

    def too_few(values):
        values["annotations"][1]["keypoints"] = [1, 2, 2]

    assert "categories name none: it is no person_key" in spoil(tmp_path, no_names)
    assert "annotations have no `keypoints`" in spoil(tmp_path, no_points)
    assert "no annotation has a key point" in spoil(tmp_path, nothing_visible)
    assert "annotation 2: `keypoints` must be" in spoil(tmp_path, too_few)


def test_a_bad_semantic_mask_is_named(tmp_path):
    path = str(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="a.npz: no such file. There must be"):
        read_basis(path, (4, 5))
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="a.npz: cannot be read as a semantic mask .*array `mask`"):
        read_basis(path, (4, 5))
    np.savez(path, mask=np.zeros((4, 6), np.uint8))
    with pytest.raises(ValueError, match=r"uint8 \(4, 6\); it must be"):
        read_basis(path, (4, 5))
    Path(path).write_text(json.dumps({}))
    with pytest.raises(ValueError, match="a.npz: cannot be read as a semantic mask"):
        read_basis(path, (4, 5))
