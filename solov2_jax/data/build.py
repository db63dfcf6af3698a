"""Data sets and batches from a config: the one place here that reads its keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from solov2_jax.data import records
from solov2_jax.data.augment import Augment
from solov2_jax.data.buckets import resize_of
from solov2_jax.data.coco import CocoDataset, load_coco
from solov2_jax.data.pipeline import Batches, Reading, eval_batches, train_batches
from solov2_jax.io import InputError, import_object


def load_datasets(config: Any) -> tuple[CocoDataset, CocoDataset]:
    """Returns the training and the validation data set, with equal categories."""
    train = load_coco(*data_files(config)[0])
    names = dict(zip(train.category_ids, train.class_names, strict=True))
    val = load_val_dataset(config, names)
    if config.model.num_classes not in (0, len(names)):
        raise ValueError(
            f"model.num_classes is {config.model.num_classes}, but "
            f"{train.annotation_file} has {len(names)} categories; set 0 to count them."
        )
    return train, val


def load_val_dataset(config: Any, categories: Mapping[int, str]) -> CocoDataset:
    """Returns the validation data set; the training data need not be there.

    Args:
      categories: id -> name that it must have, those of the training.
    """
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
) -> Batches:
    """Returns the batches of steps `start_step` to `train.steps`.

    Args:
      shard: (i, n) fetches the i-th of n slices of each global batch.
    """
    input_ = config.input
    return train_batches(
        dataset,
        seed=config.seed,
        num_steps=config.train.steps,
        batch_size=config.train.batch_size,
        resize=resize_of(
            input_.min_sizes_train,
            input_.max_size_train,
            input_.buckets_train,
            "input.min_sizes_train",
            input_.size_sampling,
        ),
        flip_prob=input_.flip_prob,
        max_instances=config.data.max_instances,
        keep_empty=config.data.keep_empty,
        repeat_threshold=config.data.repeat_threshold,
        max_images=config.data.train.max_images,
        channel_order=input_.channel_order,
        start_step=start_step,
        shard=shard,
        augment=_augment(config),
        reading=_reading(config),
    )


def build_loss_batches(
    config: Any, dataset: CocoDataset, shard: tuple[int, int] = (0, 1)
) -> Batches:
    """Returns validation images with their objects, as for training, to see their loss.

    The same ones each time, `eval.loss_images` of them in whole batches, not mirrored.
    """
    input_, size = config.input, config.train.batch_size
    wanted = min(config.eval.loss_images, len(dataset))
    return train_batches(
        dataset,
        seed=config.seed,
        num_steps=-(-wanted // size),
        batch_size=size,
        resize=resize_of(
            (input_.min_size_test,),
            input_.max_size_test,
            input_.buckets_test,
            "input.min_size_test",
        ),
        flip_prob=0.0,
        channel_order=input_.channel_order,
        shard=shard,
        reading=_reading(config),
    )


def build_eval_batches(
    config: Any, dataset: CocoDataset, shard: tuple[int, int] = (0, 1)
) -> Batches:
    """Returns batches of every image once, or of the first `eval.max_images`.

    Args:
      shard: (i, n) gives the i-th of n parts.
    """
    input_ = config.input
    resize = resize_of(
        (input_.min_size_test,),
        input_.max_size_test,
        input_.buckets_test,
        "input.min_size_test",
    )
    return eval_batches(
        dataset,
        batch_size=config.eval.batch_size,
        resize=dataclasses.replace(resize, exact=config.eval.exact_padding),
        channel_order=input_.channel_order,
        max_images=config.eval.max_images,
        shard=shard,
        reading=_reading(config),
    )


def _augment(config: Any) -> Augment:
    values = config.augment
    return Augment(
        rotate_prob=values.rotate_prob,
        rotate_degrees=values.rotate_degrees,
        crop_size=tuple(values.crop_size),
        crop_objects=values.crop_objects,
        brightness=values.brightness,
        contrast=values.contrast,
        saturation=values.saturation,
        jitter_scale=tuple(values.jitter_scale),
        jitter_size=tuple(values.jitter_size),
        paste_prob=values.paste_prob,
    ).check()


def _reading(config: Any) -> Reading:
    data = config.data
    return Reading(data.num_workers, data.num_threads, data.prefetch)
