"""Which images are shown how often, and at which sizes."""

import logging

import numpy as np
import pytest
from tiny_coco import annotation, content, load

from configs import base
from solov2_jax.data import buckets as sizes
from solov2_jax.data import build, pipeline, sampler

RESIZE = sizes.Resize((32, 40, 48), 64)


def repeated_plan(num_steps, repeats, seed=0):
    rng = np.random.default_rng(5)
    buckets = ((32, 32), (32, 64), (64, 32))
    assigned = rng.integers(0, 3, (len(repeats) + 2, 2)).astype(np.int16)
    images = np.arange(2, len(repeats) + 2)
    return sampler.train_schedule(
        images,
        buckets,
        assigned,
        seed=seed,
        num_steps=num_steps,
        batch_size=3,
        repeats=np.asarray(repeats, float),
    ), assigned


def test_images_are_shown_as_often_as_wanted():
    repeats = np.array([1, 1, 1.5, 1, 3.25, 2, 1, 1, 1])
    batches, assigned = repeated_plan(4000, repeats)
    epochs = (batches.epoch // 4).max() - 2  # the last ones still wait in buckets
    seen = batches.image[batches.epoch < epochs * 4]
    found = np.bincount(seen, minlength=11)[2:] / epochs
    whole = repeats == repeats.astype(int)
    np.testing.assert_array_equal(found[whole], repeats[whole])
    np.testing.assert_allclose(found, repeats, atol=0.08)
    # Every copy has a key of its own, so its own scale and flip.
    pairs = np.stack([batches.epoch, batches.image], axis=-1).reshape(-1, 2)
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    scale = sampler.scale_index(0, batches.epoch, batches.image, 2)
    np.testing.assert_array_equal(
        assigned[batches.image, scale],
        np.broadcast_to(batches.bucket[:, None], scale.shape),
    )


def test_a_longer_run_begins_with_the_same_repeats(monkeypatch):
    repeats = [1, 2.5, 1, 1.25, 1]
    long, _ = repeated_plan(200, repeats)
    short, _ = repeated_plan(60, repeats)
    monkeypatch.setattr(sampler, "_CHUNK", 25)
    chunked, _ = repeated_plan(200, repeats)
    for other in (short, chunked):
        np.testing.assert_array_equal(other.image, long.image[: len(other)])
        np.testing.assert_array_equal(other.epoch, long.epoch[: len(other)])


def test_repeating_nothing_changes_nothing():
    once, _ = repeated_plan(100, np.ones(7))
    buckets = ((32, 32), (32, 64), (64, 32))
    assigned = np.random.default_rng(5).integers(0, 3, (9, 2)).astype(np.int16)
    plain = sampler.train_schedule(
        np.arange(2, 9), buckets, assigned, seed=0, num_steps=100, batch_size=3
    )
    np.testing.assert_array_equal(once.image, plain.image)
    np.testing.assert_array_equal(once.epoch, plain.epoch)


def test_factors_follow_the_rarest_class():
    # Images: {0}, {0, 1}, {0, 0}, {}, {2}; shares 3/5, 1/5, 1/5.
    labels = np.array([0, 1, 0, 0, 0, 2])
    start = np.array([0, 1, 3, 5, 5, 6])
    found = sampler.repeat_factors(labels, start, np.arange(5), 0.45)
    rare = np.sqrt(0.45 / 0.2)
    np.testing.assert_allclose(found, [1, rare, 1, 1, rare])
    np.testing.assert_array_equal(
        sampler.repeat_factors(labels, start, np.arange(5), 0.2), np.ones(5)
    )
    # Images that are not trained on do not count: shares 2/3 and 1/3.
    some = sampler.repeat_factors(labels, start, np.array([0, 2, 4]), 0.45)
    np.testing.assert_allclose(some, [1, 1, np.sqrt(0.45 * 3)])


def test_rare_classes_from_a_data_set(tmp_path, caplog):
    values = content()
    values["annotations"] = [
        annotation(1, 3, 20),
        annotation(2, 7, 20),
        annotation(3, 9, 20),
        annotation(4, 9, 5),
    ]
    data = load(tmp_path, values)
    options = {"seed": 0, "num_steps": 40, "batch_size": 1, "flip_prob": 0.5}
    with caplog.at_level(logging.INFO):
        batches = pipeline.train_batches(data, resize=RESIZE, repeat_threshold=1.0, **options)
    assert "1 of 3 images are shown more than once an epoch, at most 1.7 times" in (caplog.text)
    shown = [int(b["image_id"][0]) for b in batches]
    assert shown.count(9) > 1.3 * shown.count(7)


@pytest.mark.parametrize("keep", [True, False])
def test_the_share_of_negatives_is_reported(tmp_path, caplog, keep):
    data = load(tmp_path)
    with caplog.at_level(logging.INFO):
        pipeline.train_batches(
            data,
            seed=0,
            num_steps=1,
            batch_size=1,
            resize=RESIZE,
            flip_prob=0.0,
            keep_empty=keep,
        )
    fate = "trained on as negatives" if keep else "left out"
    assert f"1 of 3 images (33.3 %) have no object; they are {fate}" in caplog.text


def test_a_range_of_sizes_is_every_whole_number(tmp_path):
    config = base.get_config()
    config.input.min_sizes_train, config.input.max_size_train = (30, 34, 40), 64
    config.input.size_sampling = "range"
    resize = build.train_resize(config)
    assert resize.shorts == tuple(range(30, 41))
    data = load(tmp_path)
    batches = pipeline.train_batches(
        data, seed=0, num_steps=60, batch_size=1, resize=resize, flip_prob=0.5
    )
    shorts = {int(min(b["image_size"][0])) for b in batches}
    assert shorts <= set(range(30, 41)) and len(shorts) > 7
