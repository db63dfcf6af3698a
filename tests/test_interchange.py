"""Predictions as the objects of other libraries, read back by those libraries."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from solov2_jax.inference.prediction import MaskCrops, Prediction, pack
from solov2_jax.io import InputError


def two_objects() -> Prediction:
    """Returns a ring that a bar crosses, in an image that is not square, held packed."""
    masks = np.zeros((2, 30, 50), bool)
    masks[0, 5:20, 3:23], masks[0, 9:15, 8:16] = True, False
    masks[1, 12:14, 0:50] = True
    packed = MaskCrops([pack(m) for m in masks], (30, 50))  # pyright: ignore
    return Prediction(
        masks=packed,
        boxes=packed.boxes(),
        scores=np.array([0.9, 0.4], np.float32),
        labels=np.array([1, 0]),
        image_id=0,
        class_names=("cat", "dog"),
    )


def test_supervision_sees_the_same_masks_boxes_and_classes():
    pytest.importorskip("supervision")
    found = replace(two_objects(), tracks=np.array([4, 7]))
    detections = found.to_supervision()
    assert len(detections) == 2 and list(detections["class_name"]) == ["dog", "cat"]
    # Its own areas and boxes of the masks; its boxes end on the last pixel.
    assert detections.area.tolist() == [15 * 20 - 6 * 8, 2 * 50]
    import supervision

    own = supervision.mask_to_xyxy(detections.mask)
    assert (own + [0, 0, 1, 1] == detections.xyxy).all()
    dogs = detections[detections.class_id == 1]
    assert dogs.confidence.tolist() == [np.float32(0.9)] and dogs.tracker_id.tolist() == [4]
    image = supervision.MaskAnnotator(opacity=1.0).annotate(np.zeros((30, 50, 3), np.uint8), dogs)
    assert (image.any(2) == np.asarray(found.masks)[0]).all()


def test_supervision_takes_images_without_objects_and_merges_them():
    supervision = pytest.importorskip("supervision")
    found = two_objects()
    nothing = found.take(np.array([], int)).to_supervision()
    assert nothing.is_empty()
    both = supervision.Detections.merge([nothing, found.to_supervision()])
    assert len(both) == 2 and both.mask.shape == (2, 30, 50)
    assert replace(found, class_names=()).to_supervision().data == {}


def test_fiftyone_draws_the_same_masks():
    """Labels only: data sets of FiftyOne need a database, which is not started here."""
    pytest.importorskip("fiftyone", reason="pip install fiftyone, in an environment of its own")
    found = replace(two_objects(), tracks=np.array([4, 7]))
    labels = found.to_fiftyone()
    for detection, mask in zip(labels.detections, np.asarray(found.masks), strict=True):
        drawn = detection.to_segmentation(frame_size=(50, 30), target=255).mask
        assert ((drawn == 255) == mask).all()
    first, second = labels.detections
    assert (first.label, second.label, first.index) == ("dog", "cat", 4)
    assert first.confidence == pytest.approx(0.9) and second.bounding_box == [0, 0.4, 1, 2 / 30]
    assert not found.take(np.array([], int)).to_fiftyone().detections
    assert replace(found, class_names=()).to_fiftyone().detections[0].label == "1"


@pytest.mark.parametrize("package", ["supervision", "fiftyone"])
def test_a_missing_library_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"not installed: pip install {package}"):
        getattr(two_objects(), f"to_{package}")()
