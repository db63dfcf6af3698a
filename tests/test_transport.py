"""Batches in memory that worker processes and the reader share."""

import gc
import os
import pickle
import threading

import numpy as np
import pytest
from tiny_coco import load

from solov2_jax.data import buckets, pipeline
from solov2_jax.data.shared_memory import PoolBlock, PoolSender, SharedMemoryPool, receive

if not hasattr(os, "memfd_create"):
    pytest.skip("this system has no files in memory", allow_module_level=True)


def maker(step, new=lambda shape: np.empty(shape, np.uint8)):
    """Returns a batch with two arrays that may lie in a slot, and one that does not."""
    if step < 0:
        raise ValueError("a bad image")
    image, masks = new((2, 3, 5)), new((4, 5))
    image[...], masks[...] = step, step + 1
    return {"image": image, "masks": masks[:3], "valid": np.array([True, False])}


def test_a_batch_arrives_without_a_copy_and_its_slot_comes_back():
    pool = SharedMemoryPool(2, 100)
    other = pickle.loads(pickle.dumps(PoolSender(maker, pool)))  # as a worker has it
    sent = [pickle.loads(pickle.dumps(other(step))) for step in (7, 9)]
    assert sent[0]["image"] == PoolBlock(0, 0, (2, 3, 5))
    assert sent[1]["masks"] == PoolBlock(1, 30, (3, 5))
    batches = [receive(batch, pool) for batch in sent]
    for batch, step in zip(batches, (7, 9), strict=True):
        assert batch["image"].shape == (2, 3, 5) and (batch["image"] == step).all()
        assert batch["masks"].shape == (3, 5) and (batch["masks"] == step + 1).all()
        assert batch["valid"].tolist() == [True, False]
    other.pool.array(0)[0] = 200
    assert batches[0]["image"][0, 0, 0] == 200
    # No slot is free: the batch is one of plain arrays, and nobody waits.
    full = receive(other(5), pool)
    assert (full["image"] == 5).all()
    part = batches[0]["masks"][1:, 2]
    batches.pop(0)
    gc.collect()
    assert other.pool.take() is None, "a view of the batch is still in use"
    assert (part == 8).all()
    del part, batch
    gc.collect()
    assert other.pool.take() == 0


def test_a_failing_maker_gives_its_slot_back():
    sender = PoolSender(maker, SharedMemoryPool(1, 100))
    for _ in range(3):
        with pytest.raises(ValueError, match="a bad image"):
            sender(-1)
    assert isinstance(sender(1)["image"], PoolBlock)


def test_no_slot_is_taken_twice():
    pool = SharedMemoryPool(64, 1)
    mappings = [pool, pickle.loads(pickle.dumps(pool))]
    taken = []

    def take(mapping):
        taken.extend(mapping.take() for _ in range(8))

    threads = [threading.Thread(target=take, args=(m,)) for m in mappings * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(64))
    assert pool.take() is None


def test_workers_deliver_the_same_with_one_slot_and_with_none(tmp_path, monkeypatch):
    data = load(tmp_path)
    options = {"seed": 1, "num_steps": 5, "batch_size": 2, "flip_prob": 0.5}
    resize = buckets.Resize((32, 40, 48), 64)
    expected = list(pipeline.train_batches(data, resize=resize, **options))
    size = 1 << 20
    for pool in (SharedMemoryPool(1, size), None):
        monkeypatch.setattr(pipeline.Batches, "_make_pool", lambda self, a=pool: a)
        reading = pipeline.Reading(num_workers=1)
        found = pipeline.train_batches(data, resize=resize, reading=reading, **options)
        for a, b in zip(found, expected, strict=True):
            for key in b:
                np.testing.assert_array_equal(a[key], b[key], err_msg=key)
