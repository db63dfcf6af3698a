"""The order and content of batches: a pure function of the seed and the step."""

import dataclasses
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_coco import annotation, content, load, square, write

from configs import base
from solov2_jax.data import buckets as sizes
from solov2_jax.data import build, pipeline, sampler, shared_memory
from solov2_jax.data.batch import BatchMaker
from solov2_jax.data.coco import load_coco

RESIZE = sizes.Resize((32, 40, 48), 64)
FIELDS = {
    "image",
    "image_size",
    "boxes",
    "labels",
    "centers",
    "masks",
    "valid",
    "image_id",
}


def train(data, **options):
    """Returns training batches of the tiny data set."""
    defaults = {
        "seed": 1,
        "num_steps": 12,
        "batch_size": 2,
        "resize": RESIZE,
        "flip_prob": 0.5,
    }
    return pipeline.train_batches(data, **(defaults | options))


def assert_equal(a, b):
    """Two lists of batches are equal."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)
            assert x[key].dtype == y[key].dtype


# Order


def small_plan(num_steps, seed=0, batch_size=3, number=11):
    rng = np.random.default_rng(5)
    buckets = ((32, 32), (32, 64), (64, 32))
    assigned = rng.integers(0, 3, (number, 2)).astype(np.int16)
    return sampler.train_schedule(
        np.arange(number),
        buckets,
        assigned,
        seed=seed,
        num_steps=num_steps,
        batch_size=batch_size,
    ), assigned


def test_a_longer_run_begins_with_the_same_batches(monkeypatch):
    long, _ = small_plan(200)
    for steps in (1, 7, 50):
        short, _ = small_plan(steps)
        np.testing.assert_array_equal(short.image, long.image[:steps])
        np.testing.assert_array_equal(short.bucket, long.bucket[:steps])
    monkeypatch.setattr(sampler, "_CHUNK", 25)
    chunked, _ = small_plan(200)
    np.testing.assert_array_equal(chunked.image, long.image)
    np.testing.assert_array_equal(chunked.epoch, long.epoch)


def test_each_epoch_sees_each_image_once_and_batches_share_a_bucket():
    batches, assigned = small_plan(400)
    scale = sampler.scale_index(0, batches.epoch, batches.image, 2)
    np.testing.assert_array_equal(
        assigned[batches.image, scale],
        np.broadcast_to(batches.bucket[:, None], scale.shape),
    )
    pairs = np.stack([batches.epoch, batches.image], axis=-1).reshape(-1, 2)
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    # All but what may still wait in the three buckets has been emitted.
    first = pairs[pairs[:, 0] < batches.epoch.max() - 3]
    assert len(first) == 11 * (batches.epoch.max() - 3)


def test_order_differs_between_epochs_and_seeds():
    one, _ = small_plan(100)
    two, _ = small_plan(100, seed=1)
    assert (one.image != two.image).any()
    orders = {tuple(one.image[one.epoch == e]) for e in range(10)}
    assert len(orders) > 5


def test_random_bits_are_uniform_and_distinct():
    bits = sampler.random_bits(3, 0, np.arange(300)[:, None], np.arange(300))
    assert len(np.unique(bits)) == bits.size
    share = (bits >> np.uint64(11)).astype(float) * 2.0**-53
    assert abs(share.mean() - 0.5) < 0.005 and abs(share.std() - 12**-0.5) < 0.005
    flips = [sampler.is_flipped(0, e, i, 0.3) for e in range(40) for i in range(40)]
    assert abs(np.mean(flips) - 0.3) < 0.04
    assert not any(sampler.is_flipped(0, 0, i, 0.0) for i in range(99))
    assert all(sampler.is_flipped(0, 0, i, 1.0) for i in range(99))


def test_the_reference_schedule_is_planned_in_seconds():
    assigned = np.zeros((118_000, 6), np.int16)
    batches = sampler.train_schedule(
        np.arange(118_000),
        ((32, 32),),
        assigned,
        seed=0,
        num_steps=20_000,
        batch_size=16,
    )
    assert len(batches) == 20_000
    assert batches.image.nbytes + batches.epoch.nbytes < 3 << 20


# Buckets


def test_one_size_gets_exactly_its_shape():
    images = np.tile([100, 130], (50, 1, 1))
    assert sizes.derive_buckets(images, 5, 0.05) == ((128, 160),)


def test_few_derived_buckets_hold_every_size():
    rng = np.random.default_rng(0)
    h, w = rng.integers(200, 700, (2, 300))
    images = sizes.Resize((640, 672, 704, 736, 768, 800), 1333).sizes(h, w)
    buckets = sizes.derive_buckets(images, 5, 0.05)
    assert 1 < len(buckets) <= 5
    names = np.array([str(i) for i in range(300)])
    assigned = sizes.assign_buckets(images, buckets, names, "key")
    shapes = np.array(buckets)[assigned]
    assert (shapes >= images).all() and (shapes % 32 == 0).all()
    # Better than one shape for landscape and one for portrait.
    one = np.where((images[..., :1] > images[..., 1:]), [1344, 800], [800, 1344])
    assert shapes.prod(axis=-1).sum() < one.prod(axis=-1).sum()


def test_the_smallest_bucket_is_taken():
    images = np.array([[[30, 30]], [[30, 50]], [[50, 30]]])
    names = np.array(["a", "b", "c"])
    buckets = ((64, 64), (32, 64), (32, 32))
    assert sizes.assign_buckets(images, buckets, names, "k").ravel().tolist() == [2, 1, 0]


def test_buckets_that_do_not_fit_are_an_error(tmp_path):
    data = load(tmp_path)
    with pytest.raises(ValueError, match=r"buckets_train: no shape in .*a.png, sub/b"):
        train(data, resize=sizes.Resize((48,), 64, ((48 // 32 * 32, 64),)))
    with pytest.raises(ValueError, match=r"buckets_train: .50, 64. is not"):
        train(data, resize=sizes.Resize((48,), 64, ((50, 64),)))


# Training batches


def test_batches_have_the_fields_and_padding_of_batch(tmp_path):
    data = load(tmp_path)
    batches = train(data)
    assert len(batches) == 12
    seen = set()
    for batch in batches:
        assert set(batch) == FIELDS
        b, h, w, _ = batch["image"].shape
        assert (h, w) in batches.buckets and b == 2
        assert batch["masks"].shape == (2, 8, h // 4, w // 4)
        for row in range(b):
            size = batch["image_size"][row]
            assert not batch["image"][row, size[0] :].any()
            assert not batch["image"][row, :, size[1] :].any()
            valid = batch["valid"][row]
            index = data.image_ids.tolist().index(batch["image_id"][row])
            assert valid.sum() == data.objects_per_image[index]
            assert not batch["masks"][row, ~valid].any()
            boxes = batch["boxes"][row, valid]
            assert (boxes[:, 2:] <= size[::-1]).all()
            # A square's mass centre is its box's centre, in pixel indices.
            middle = (boxes[:, :2] + boxes[:, 2:] - 1) / 2
            np.testing.assert_allclose(batch["centers"][row, valid], middle, atol=0.6)
            seen.add(int(batch["image_id"][row]))
    assert seen == {3, 7, 9}


def test_empty_images_can_be_left_out(tmp_path):
    data = load(tmp_path)
    batches = list(train(data, keep_empty=False))
    assert {int(i) for b in batches for i in b["image_id"]} == {3, 7}
    empty = load(tmp_path, content() | {"annotations": []})
    assert not any(b["valid"].any() for b in train(empty))
    with pytest.raises(ValueError, match="no image has an object.*keep_empty"):
        train(empty, keep_empty=False)


def test_resuming_and_workers_change_nothing(tmp_path):
    data = load(tmp_path)
    whole = list(train(data))
    assert_equal(list(train(data)), whole)
    assert_equal(list(train(data, start_step=5)), whole[5:])
    assert list(train(data, start_step=12)) == []
    reading = pipeline.Reading(num_workers=2, num_threads=1, prefetch=1)
    assert_equal(list(train(data, start_step=7, reading=reading)), whole[7:])


def test_shards_are_slices_of_the_global_batch(tmp_path):
    data = load(tmp_path)
    whole = list(train(data, batch_size=4))
    parts = [list(train(data, batch_size=4, shard=(i, 2))) for i in range(2)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    assert_equal(joined, whole)
    with pytest.raises(ValueError, match="batch_size 4 cannot be split into 3"):
        train(data, batch_size=4, shard=(0, 3))


def test_the_largest_objects_are_kept(tmp_path, caplog):
    values = content()
    values["annotations"] = [
        annotation(i, 7, 5, bbox=[i, i, i, i], segmentation=square(i, i, i)) for i in (9, 3, 12, 5)
    ]
    data = load(tmp_path, values)
    options = {"resize": sizes.Resize((48,), 64), "flip_prob": 0.0}
    batches = train(data, max_instances=2, keep_empty=False, **options)
    assert "1 images have more than data.max_instances = 2" in caplog.text
    boxes = next(iter(batches))["boxes"][0]
    assert boxes.tolist() == [[9, 9, 18, 18], [12, 12, 24, 24]]


def test_flipping_mirrors_everything(tmp_path):
    data = load(tmp_path)
    resize = sizes.Resize((48,), 64)
    plain, mirrored = (list(train(data, resize=resize, flip_prob=p)) for p in (0.0, 1.0))
    for a, b in zip(plain, mirrored, strict=True):
        w = a["image_size"][0, 1]
        image, other = a["image"][0][:, :w], b["image"][0][:, :w]
        np.testing.assert_array_equal(image[:, ::-1], other)
        n = a["valid"][0].sum()
        np.testing.assert_allclose(
            w - a["boxes"][0, :n][:, [2, 0]], b["boxes"][0, :n][:, [0, 2]], atol=1e-4
        )
        np.testing.assert_allclose(w - 1 - a["centers"][0, :n, 0], b["centers"][0, :n, 0], atol=1)


def test_channel_order(tmp_path):
    data = load(tmp_path)
    rgb, bgr = (next(iter(train(data, channel_order=o))) for o in ("RGB", "BGR"))
    np.testing.assert_array_equal(rgb["image"][..., ::-1], bgr["image"])
    with pytest.raises(KeyError):
        train(data, channel_order="GBR")


# Evaluation batches


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_evaluation_sees_each_image_once(tmp_path, batch_size):
    data = load(tmp_path)
    resize = sizes.Resize((48,), 64)
    for workers in (0, 2) if batch_size == 2 else (0,):
        batches = pipeline.eval_batches(
            data,
            batch_size=batch_size,
            resize=resize,
            reading=pipeline.Reading(num_workers=workers),
        )
        seen = list(batches)
        assert len(seen) == len(batches)
        ids = np.concatenate([b["image_id"] for b in seen])
        assert sorted(ids[ids >= 0].tolist()) == [3, 7, 9]
        if batch_size == 1:
            assert ids.tolist() == [7, 3, 9]
        for batch in seen:
            assert set(batch) == {"image", "image_size", "image_id", "original_size"}
            assert len(batch["image_id"]) == batch_size
            for i, size in zip(batch["image_id"], batch["original_size"], strict=True):
                if i >= 0:
                    row = data.image_ids.tolist().index(i)
                    assert size.tolist() == [data.heights[row], data.widths[row]]
    few = pipeline.eval_batches(data, batch_size=1, resize=resize, max_images=2)
    assert [int(b["image_id"][0]) for b in few] == [7, 3]


# Workers and errors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_the_same_clear_error(tmp_path, workers):
    images, path = write(tmp_path)
    data = load_coco(images, path)
    broken = Path(images) / "a.png"
    broken.write_bytes(broken.read_bytes()[:300])
    batches = train(data, reading=pipeline.Reading(num_workers=workers))
    with pytest.raises(ValueError, match=r"a.png: .* truncated .* Fetch"):
        list(batches)
    if workers:
        return  # processes take seconds to start
    Image.new("RGB", (48, 64)).save(broken)
    with pytest.raises(ValueError, match=r"a.png: is 64 x 48 .* EXIF"):
        list(batches)


def test_damaged_run_lengths_name_the_annotation(tmp_path):
    values = content()
    values["annotations"] = [annotation(8, 7, 5, segmentation={"size": [48, 64], "counts": "5:"})]
    with pytest.raises(ValueError, match="annotation 8: `segmentation`.*damaged"):
        load(tmp_path, values)


def test_own_modules_run_without_jax(tmp_path):
    """The package imports no jax; grain, which would, finds it hidden here."""
    images, path = write(tmp_path)
    script = f"""
        import sys
        sys.modules["jax"] = sys.modules["flax"] = None
        from solov2_jax.data import buckets, build, coco, pipeline
        data = coco.load_coco({images!r}, {path!r})
        resize = buckets.Resize((48,), 64)
        batches = pipeline.eval_batches(data, batch_size=1, resize=resize)
        assert len(list(batches)) == 3
        assert not [m for m in sys.modules if m.startswith(("jaxlib", "flax."))]
    """
    root = Path(__file__).resolve().parent.parent
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=True,
        cwd=root,
        timeout=120,
    )


class _Spy(BatchMaker):
    """Replaces the image ids by what a worker process has loaded."""

    def __call__(self, step, new=None):
        jax = sys.modules.get("jax._src.xla_bridge")
        started = 0 if jax is None else len(jax._backends)
        ours = [m for m in sys.modules if m.startswith("solov2_jax.")]
        light = ("solov2_jax.data", "solov2_jax.io", "solov2_jax.rle", "solov2_jax.progress")
        light += ("solov2_jax.config_schema",)  # of this file, through configs/base.py
        heavy = sum(not m.startswith(light) for m in ours)
        return {"seen": np.array([started, heavy, "flax" in sys.modules])}


def test_workers_start_no_device_and_load_no_model(tmp_path):
    data = load(tmp_path)
    batches = train(data, reading=pipeline.Reading(num_workers=1))
    fields = [f.name for f in dataclasses.fields(BatchMaker)]
    batches.maker = _Spy(**{f: getattr(batches.maker, f) for f in fields})
    assert next(iter(batches))["seen"].tolist() == [0, 0, 0]


def test_large_data_is_mapped_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "_SMALL", 0)
    data = load(tmp_path)
    shared = shared_memory.MmapPickle(train(data).maker)
    text = pickle.dumps(shared)
    other = pickle.loads(text)
    assert_equal([shared(3)], [other(3)])
    maker = other._function
    assert not maker.dataset.boxes.flags.owndata
    assert not maker.dataset.boxes.flags.writeable
    path = Path(shared.__reduce__()[1][0])
    assert path.exists() and "(deleted)" in str(path.readlink()), "it has no name"
    del shared
    assert not path.exists()


# From a configuration


def test_batches_from_a_config(tmp_path):
    images, path = write(tmp_path)
    config = base.get_config()
    for split in (config.data.train, config.data.val):
        split.images, split.annotations = images, path
    config.input.min_sizes_train = (32, 40)
    config.input.max_size_train = config.input.max_size_test = 64
    config.input.min_size_test = 48
    config.train.steps, config.train.batch_size = 3, 2
    config.data.num_workers = 0
    data, val = build.load_datasets(config)
    assert val.category_ids == data.category_ids == (5, 20)
    assert len(list(build.build_train_batches(config, data, start_step=1))) == 2
    assert len(list(build.build_eval_batches(config, val))) == 3
    config.model.num_classes = 80
    with pytest.raises(ValueError, match="model.num_classes is 80, but .* 2 categor"):
        build.load_datasets(config)
    config.data.name = "shape"
    with pytest.raises(ValueError, match='data.name is .shape.; use ""'):
        build.load_datasets(config)
