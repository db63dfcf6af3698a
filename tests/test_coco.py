"""Reading a COCO folder: what is kept, what is counted, what is one clear error."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from tiny_coco import annotation, content, load, square, write

from solov2_jax.data.coco import load_coco


def test_columns_are_sorted_by_image_and_labels_by_category_id(tmp_path):
    data = load(tmp_path)
    assert data.category_ids == (5, 20)
    assert data.class_names == ("cat", "dog")
    assert data.image_ids.tolist() == [7, 3, 9]
    assert data.start.tolist() == [0, 2, 3, 3]
    assert data.annotation_ids.tolist() == [2, 3, 1]
    assert data.labels.tolist() == [0, 1, 1]
    assert data.boxes[1].tolist() == [30, 20, 42, 32]
    np.testing.assert_array_equal(data.segmentations.polygons(1)[0], square(30, 20, 12)[0])
    assert "3 images (1 without objects), 3 objects of 2 classes" in data.summary()


def test_no_python_object_per_annotation(tmp_path):
    data = load(tmp_path)
    arrays = (data.boxes, data.labels, data.start, data.file_names)
    arrays += tuple(vars(data.segmentations).values())
    assert all(a.dtype != object for a in arrays)


def test_run_lengths_compressed_or_not_are_the_same(tmp_path):
    mask = np.zeros((48, 64), np.uint8, order="F")
    mask[5:20, 10:30] = 1
    packed = coco_mask.encode(mask)
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff([0, *edges, mask.size]).tolist()
    values = content()
    values["annotations"] = [
        annotation(
            1,
            7,
            5,
            segmentation={"size": [48, 64], "counts": packed["counts"].decode()},
        ),
        annotation(2, 7, 5, segmentation={"size": [48, 64], "counts": counts}),
    ]
    runs = load(tmp_path, values).segmentations
    assert runs.polygons(0) == []
    assert runs.run_lengths(0) == runs.run_lengths(1) == packed["counts"]


def test_crowds_are_counted_and_not_trained_on(tmp_path):
    values = content()
    values["annotations"].append(annotation(4, 9, 5, iscrowd=1))
    data = load(tmp_path, values)
    assert len(data.labels) == 3
    assert "1 crowd regions" in data.summary()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"segmentation": None}, "no_segmentation"),
        ({"segmentation": []}, "no_segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "no_valid_polygon"),
        ({"segmentation": [[1, 2, 9, 4, 5, 6, 7]]}, "no_valid_polygon"),
        ({"bbox": [10, 10, 0, 5]}, "empty"),
        ({"bbox": [70, 10, 5, 5]}, "empty"),
        ({"bbox": [-20, 10, 20, 5]}, "empty"),
        ({"segmentation": [[5, 5, 9, 5, 12, 5]]}, "empty"),
        ({"segmentation": square(70, 50, 9)}, "empty"),
        ({"segmentation": {"size": [48, 64], "counts": [48 * 64]}}, "empty"),
    ],
)
def test_useless_objects_are_dropped_and_counted(tmp_path, changes, key):
    values = content()
    values["annotations"].append(annotation(4, 7, 5, **changes))
    data = load(tmp_path, values)
    assert data.counts[key] == 1
    assert data.annotation_ids.tolist() == [2, 3, 1]
    assert data.summary().count("\n") >= 1


def test_one_bad_polygon_of_two_is_dropped(tmp_path):
    values = content()
    two = [[1, 2, 3, 4], square(5, 5, 9)[0]]
    values["annotations"] = [annotation(4, 7, 5, segmentation=two)]
    data = load(tmp_path, values)
    assert data.counts["bad_polygons"] == 1
    assert len(data.segmentations.polygons(0)) == 1


def test_a_missing_box_comes_from_the_segmentation(tmp_path):
    values = content()
    values["annotations"] = [annotation(4, 7, 5, bbox=None)]
    data = load(tmp_path, values)
    assert data.boxes.tolist() == [[10, 8, 30, 28]]
    assert data.counts["derived_boxes"] == 1


def test_no_annotations_at_all(tmp_path):
    data = load(tmp_path, content() | {"annotations": []})
    assert data.start.tolist() == [0, 0, 0, 0]
    assert data.counts["images_without_objects"] == 3


def _spoil(key, **changes):
    values = content()
    for record in values[key]:
        record.update(changes)
    return values


def _without(key, field=None):
    values = content()
    if field is None:
        del values[key]
    else:
        del values[key][0][field]
    return values


def _plus(key, record):
    values = content()
    values[key].append(record)
    return values


def _object(**changes):
    return _plus("annotations", annotation(4, 7, 5, **changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("not json", "cannot be read as json"),
        ("[]", "not an object with images"),
        (_without("categories"), "no list `categories`"),
        (_without("images"), "no list `images`"),
        (_without("annotations"), "no list `annotations`"),
        (content() | {"images": []}, "`images` is empty"),
        (_without("images", "height"), "image 7: has no `height` .1 of 3"),
        (_without("images", "file_name"), "no `file_name`"),
        (_without("categories", "name"), "no `name`"),
        (_without("annotations", "image_id"), "no `image_id`"),
        (_without("annotations", "category_id"), "no `category_id`"),
        (_spoil("images", id=7), "image ids must be unique; repeated: 7"),
        (_spoil("images", id="x"), 'image "x": `id` is "x", not a whole number .3 of 3'),
        (_spoil("categories", id=5), "category ids must be unique; repeated: 5"),
        (
            _spoil("images", height=0),
            "image 7: `height` is 0, not a whole number of at least 1 .3 of 3",
        ),
        (_spoil("annotations", id=1), "annotation ids must be unique"),
        (_spoil("annotations", image_id=77), "3 of 3 .*unknown image: image_id 77"),
        (_spoil("annotations", category_id=6), "unknown category: category_id 6"),
        (_object(bbox=[1, 2, 3]), "annotation 4: `bbox` is .1, 2, 3., not four"),
        (_object(segmentation="x"), "annotation 4: `segmentation` is a str"),
        (_object(segmentation=[1, 2, 3]), "must be a list of polygons"),
        (_object(segmentation=[[1, 2, 3, "a", 5, 6]]), "must be a list of polygons"),
        (_object(segmentation=[[1, 2, 3, 1e9, 5, 6]]), "coordinate that is no number"),
        (_object(segmentation={"size": [48, 64]}), "needs `counts`"),
        (_object(segmentation={"size": [9, 9], "counts": "0"}), "has size .9, 9."),
        (
            _object(segmentation={"size": [48, 64], "counts": [5, 5]}),
            "add up to 10, not to 48 x 64 = 3072",
        ),
    ],
)
def test_one_error_names_file_field_and_ids(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, values)
    assert "instances.json" in str(error.value)


def test_missing_json_and_missing_folder(tmp_path):
    images, path = write(tmp_path)
    with pytest.raises(ValueError, match="no such annotation file"):
        load_coco(images, path + "x")
    with pytest.raises(ValueError, match="no such image folder"):
        load_coco(images + "x", path)


def test_missing_images_are_listed(tmp_path):
    images, path = write(tmp_path)
    (Path(images) / "sub" / "b.png").unlink()
    (Path(images) / "c.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 3 images are not in .*sub/b.png, c.p"):
        load_coco(images, path)


def test_categories_must_be_the_training_datas(tmp_path):
    assert load(tmp_path, categories={5: "cat", 20: "dog"}).category_ids == (5, 20)
    with pytest.raises(ValueError) as error:
        load(tmp_path, categories={5: "lion", 21: "dog"})
    message = str(error.value)
    assert "missing ids: 21 (dog)" in message and "unknown ids: 20 (dog)" in message
    assert "5 ('lion' became 'cat')" in message


def test_the_json_is_not_changed(tmp_path):
    _, path = write(tmp_path)
    before = Path(path).read_text()
    load(tmp_path)
    assert json.loads(before) == content()
