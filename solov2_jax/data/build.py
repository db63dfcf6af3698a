"""Data sets and batches from a config: the one place here that reads its keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from solov2_jax.data import records
from solov2_jax.data.augment import Augment
from solov2_jax.data.batch import PixelMap
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import CocoDataset, load_coco
from solov2_jax.data.pipeline import Batches, Reading, eval_batches, train_batches
from solov2_jax.data.transforms import Keypoints
from solov2_jax.io import InputError, import_object


def load_datasets(config: Any) -> tuple[CocoDataset, CocoDataset]:
    """Returns the training and the validation data set, with equal categories."""
    # Only the evaluation needs the whole table, which may be large.
    train = dataclasses.replace(load_coco(*data_files(config)[0]), table=None)
    names = dict(zip(train.category_ids, train.class_names, strict=True))
    val = load_val_dataset(config, names)
    if config.model.num_classes not in (0, len(names)):
        raise ValueError(
            f"model.num_classes is {config.model.num_classes}, but "
            f"{train.annotation_file} has {len(names)} categories; set 0 to count them."
        )
    return train, val


def load_val_dataset(config: Any, categories: Mapping[int, str]) -> CocoDataset:
    """Returns the validation data set, which must have these categories, id -> name; the
    training data need not be there."""
    return load_coco(*data_files(config)[1], categories=categories)


def data_files(config: Any) -> tuple[tuple[str, str], tuple[str, str]]:
    """Returns (image folder, json) of the training and of the validation data.

    `data.name` says whose: "" data.train and data.val, "tfds:FOLDER" records, any other
    name the function that `data.providers` gives it; that one gets the config.
    """
    data = config.data
    if data.name == "":
        train = data.train.images, data.train.annotations
        return train, (data.val.images, data.val.annotations)
    if records.is_records(data.name):
        train, val = (records.split_root(data.name, s) for s in records.SPLITS)
        return train, val
    if data.name in data.providers:
        key = f"data.providers.{data.name}"
        return import_object(data.providers[data.name], key)(config)
    names = ", ".join(f'"{name}"' for name in data.providers)
    raise InputError(
        f'data.name is {data.name!r}; use "" for data.train and data.val, {names} for the '
        'data of data.providers, or "tfds:FOLDER" for records.'
    )


def build_train_batches(
    config: Any,
    dataset: CocoDataset,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
    *,
    keypoints: Keypoints | None = None,
    pixel_maps: Mapping[str, PixelMap] | None = None,
) -> Batches:
    """Returns the batches of steps `start_step` to `train.steps`; see `train_batches`."""
    return train_batches(
        dataset,
        seed=config.seed,
        num_steps=config.train.steps,
        batch_size=config.train.batch_size,
        resize=train_resize(config),
        flip_prob=config.input.flip_prob,
        max_instances=config.data.max_instances,
        keep_empty=config.data.keep_empty,
        repeat_threshold=config.data.repeat_threshold,
        max_images=config.data.train.max_images,
        channel_order=config.input.channel_order,
        start_step=start_step,
        shard=shard,
        augment=_augment(config),
        keypoints=keypoints,
        pixel_maps=pixel_maps or {},
        reading=_reading(config),
    )


def build_loss_batches(
    config: Any, dataset: CocoDataset, shard: tuple[int, int] = (0, 1)
) -> Batches:
    """Returns validation images with their objects, as for training, to see their loss.

    The same ones each time, `eval.loss_images` of them in whole batches, not mirrored.
    """
    size = config.train.batch_size
    return train_batches(
        dataset,
        seed=config.seed,
        num_steps=-(-min(config.eval.loss_images, len(dataset)) // size),
        batch_size=size,
        resize=_test_resize(config),
        flip_prob=0.0,
        channel_order=config.input.channel_order,
        shard=shard,
        reading=_reading(config),
    )


def build_eval_batches(
    config: Any, dataset: CocoDataset, shard: tuple[int, int] = (0, 1)
) -> Batches:
    """Returns the i-th of n parts, `shard`, of batches that hold every image once, or the
    first `eval.max_images`."""
    return eval_batches(
        dataset,
        batch_size=config.eval.batch_size,
        resize=_test_resize(config),
        channel_order=config.input.channel_order,
        max_images=config.eval.max_images,
        shard=shard,
        reading=_reading(config),
    )


def train_resize(config: Any) -> Resize:
    """Returns the sizes of training images."""
    values = config.input
    shorts = values.min_sizes_train
    if values.size_sampling == "range":
        shorts = range(min(shorts), max(shorts) + 1)
    return Resize(tuple(shorts), values.max_size_train, tuple(values.buckets_train))


def _test_resize(config: Any) -> Resize:
    values = config.input
    return Resize((values.min_size_test,), values.max_size_test, tuple(values.buckets_test))


def _augment(config: Any) -> Augment:
    values: dict[str, Any] = dict(config.augment)
    values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Augment(**values)


def _reading(config: Any) -> Reading:
    data = config.data
    return Reading(data.num_workers, data.num_threads, data.prefetch)
