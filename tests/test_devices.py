"""Prediction and evaluation on several devices: the results of one, in as many programs."""

import jax
import numpy as np
import pytest
from test_predictor import picture, predictor

from solov2_jax.evaluation.evaluate import StagedBatchPredictor
from solov2_jax.inference import pasting
from solov2_jax.inference.pasting import rows_on_one_device
from solov2_jax.inference.prediction import MaskCrops, to_coco_results
from solov2_jax.inference.preprocess import make_batches
from solov2_jax.inference.programs import DetectPrograms

IDS = (1, 2, 3)
# The network of test_predictor.py paints, without a sum that an order could round.
BUCKETS = ((96, 96), (160, 96))


@pytest.fixture(scope="module")
def single():
    return predictor("devices", buckets=BUCKETS)


@pytest.fixture(scope="module")
def images():
    sizes = [(64, 80), (90, 64), (128, 96), (64, 64), (300, 280), (40, 50), (80, 64)]
    return [picture(*size) for size in sizes]


@pytest.fixture(scope="module")
def wanted(single, images):
    return list(single.predict_images(images, batch_size=2))


def assert_equal(predictions, wanted):
    assert [p.image_id for p in predictions] == [p.image_id for p in wanted]
    for ours, theirs in zip(predictions, wanted, strict=True):
        assert len(theirs) > 1
        assert to_coco_results(ours, IDS) == to_coco_results(theirs, IDS), "to the bit"
        np.testing.assert_array_equal(np.asarray(ours.masks), np.asarray(theirs.masks))
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)


@pytest.mark.parametrize("devices", [2, 8])
def test_predictions_are_those_of_one_device(single, images, wanted, devices, caplog):
    with caplog.at_level("INFO"):
        several = single.on_devices(jax.devices()[:devices])
    assert f"prediction on {devices} device(s): cpu" in caplog.text
    assert several.num_devices == devices and single.num_devices == 1
    assert isinstance(several, StagedBatchPredictor)
    assert_equal(list(several.predict_images(images, batch_size=2 * devices)), wanted)
    # No multiple of the devices: the first of them does it.
    assert_equal(list(several.predict_images(images[:3], batch_size=3)), wanted[:3])
    assert several.on_first_device().num_devices == 1


def test_several_rounds_and_packed_masks_are_the_same(single, images, wanted, monkeypatch):
    several = single.on_devices(jax.devices()[:2])
    monkeypatch.setattr(pasting, "ROUND_PIXELS", 512 * 512)
    monkeypatch.setattr(pasting, "PACK_BYTES", 3 * 100 * 130)
    found = list(several.predict_images(images, batch_size=4))
    assert isinstance(found[4].masks, MaskCrops) and not isinstance(found[3].masks, MaskCrops)
    assert_equal(found, wanted)


def test_each_device_has_its_rows_and_a_shape_is_compiled_once(single, images, monkeypatch):
    compiled = []
    compile_shape = DetectPrograms._compile

    def note(self, variables, shape, dtype):
        compiled.append(shape)
        return compile_shape(self, variables, shape, dtype)

    monkeypatch.setattr(DetectPrograms, "_compile", note)
    several = single.on_devices(jax.devices()[:4])
    several.compile([(96, 96)], batch_size=4)
    examples = [several.preprocess(image, i) for i, image in enumerate(images)]
    (batch,) = make_batches([examples[0], examples[3], examples[5]], 4)
    started = several.start_batch(batch)
    shards = started.detections.soft_masks.addressable_shards
    assert [shard.data.shape[0] for shard in shards] == [1] * 4
    assert {shard.device for shard in shards} == set(jax.devices()[:4])
    assert [p.image_id for p in several.finish_batch(started)] == [0, 3, 5]
    assert compiled == [(4, 96, 96, 3)]
    for row in range(4):
        own, index = rows_on_one_device(started.detections.soft_masks, row)
        assert own.devices() == {jax.devices()[0]} and index == 0
        np.testing.assert_array_equal(own[index], started.detections.soft_masks[row])


def test_the_service_answers_the_same(single, images, monkeypatch):
    pytest.importorskip("prometheus_client")
    from solov2_jax.tools.serving import engine

    monkeypatch.setattr(engine, "CANVASES", ((128, 128),))
    one, two = (
        engine.Engine(p, ((160, 160),), 1) for p in (single, single.on_devices(jax.devices()[:2]))
    )
    assert (one.sizes, two.sizes) == ((1,), (1, 2))
    jobs = [one.preprocess(image, 0.1, 100, drawn=False) for image in images[:3]]
    want = [answer for job in jobs for answer in one.answer([job])]
    assert two.answer(jobs[:2]) + two.answer(jobs[2:]) == want
    assert b"segmentation" in want[0]
