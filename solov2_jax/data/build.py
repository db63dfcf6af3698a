"""Data sets and batches from a config: the one place here that reads its keys."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from solov2_jax.config_schema import RGB_ONLY, as_steps
from solov2_jax.data import records
from solov2_jax.data.augment import Augment
from solov2_jax.data.batch import PixelMap
from solov2_jax.data.buckets import STRIDE, TOLERANCE, Resize, derive_buckets
from solov2_jax.data.coco import CocoDataset, load_coco, with_share_of_masks
from solov2_jax.data.custom_augment import custom_function
from solov2_jax.data.keypoints import keypoints_of
from solov2_jax.data.pipeline import Batches, Reading, chosen_images, eval_batches, train_batches
from solov2_jax.data.pixel_format import PixelFormat
from solov2_jax.data.semantic_masks import known_classes
from solov2_jax.data.transforms import Keypoints
from solov2_jax.io import InputError

# Keys of `augment` that say nothing of an image by itself.
_NOT_OF_AN_IMAGE = ("preset", "stop_last", "stop_last_epochs")


def load_datasets(config: Any) -> tuple[CocoDataset, CocoDataset]:
    """Returns the training and the validation data set, with equal categories."""
    check_augment(config)
    semantic_folder(config)
    # Only the evaluation needs the whole table, which may be large.
    train = dataclasses.replace(load_train_dataset(config), table=None)
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
    dataset = load_coco(*data_files(config)[1], categories=categories)
    return dataclasses.replace(dataset, pixels=pixel_format(config))


@dataclasses.dataclass(frozen=True)
class FurtherVal:
    """A validation set of `data.vals`."""

    name: str  # its metrics are name/segm/AP
    dataset: CocoDataset
    metric: str  # as data.val.metric


def load_further_vals(config: Any, categories: Mapping[int, str]) -> list[FurtherVal]:
    """Returns the validation sets of `data.vals`, which must have these categories too."""
    sets = []
    for name, images, annotations, *metric in config.data.vals:
        dataset = load_coco(images, annotations, categories=categories)
        dataset = dataclasses.replace(dataset, pixels=pixel_format(config))
        sets.append(FurtherVal(name, dataset, metric[0] if metric else "auto"))
    return sets


def load_train_dataset(config: Any) -> CocoDataset:
    """Returns the training data set, with all that its json holds."""
    boxes = config.loss.box_supervised
    dataset = load_coco(*data_files(config)[0], boxes=boxes)
    if boxes and config.data.mask_share < 1:
        dataset = with_share_of_masks(dataset, config.data.mask_share, config.seed)
    return dataclasses.replace(dataset, pixels=pixel_format(config))


def pixel_format(config: Any) -> PixelFormat:
    """Returns what the pictures hold."""
    data = config.data
    return PixelFormat(data.channels, tuple(data.value_range), tuple(data.display_channels))


def semantic_folder(config: Any) -> str:
    """Returns the folder of the semantic masks that are trained on, "" for none."""
    folder = config.data.train.semantic_masks if config.loss.semantic_weight else ""
    if folder and not os.path.isdir(folder):
        raise InputError(
            f"data.train.semantic_masks = {folder!r}: there is no such folder; give one with a "
            '.npz file for each image, or "" for the masks of the objects.'
        )
    return folder


def mapped_keypoints(config: Any, dataset: CocoDataset) -> Keypoints | None:
    """Returns the key points of a data set's objects, None where `data.mapper` has none."""
    if config.data.mapper != "fcpose":
        return None
    return keypoints_of(dataset, tuple(config.data.flip_pairs))[0]


def with_keypoints(config: Any, dataset: CocoDataset) -> Any:
    """Returns the config, a copy that notes the training data's key points if it learns them."""
    if config.data.mapper != "fcpose":
        return config
    keypoints, skeleton = keypoints_of(dataset, tuple(config.data.flip_pairs))
    config, head = config.copy_and_resolve_references(), config.model.keypoint_head
    if head.names and tuple(head.names) != keypoints.names:
        raise InputError(
            f"model.keypoint_head.names are {', '.join(head.names)}, but "
            f"{dataset.annotation_file} has {', '.join(keypoints.names)}; set () to take these."
        )
    config.model.keypoint_head.names = keypoints.names
    config.model.keypoint_head.skeleton = tuple(head.skeleton) or skeleton
    return config


def check_augment(config: Any) -> None:
    """Raises an InputError for augmentations that the pictures have no colours for, and for
    functions of `augment.custom` that are not there."""
    for path in config.augment.custom:
        custom_function(path)
    if pixel_format(config).is_rgb:
        return
    for key in RGB_ONLY:
        if value := config.augment[key]:
            raise InputError(
                f"augment.{key} = {value} is for 8-bit RGB pictures, and data.channels is "
                f"{config.data.channels} with data.value_range = "
                f"{tuple(config.data.value_range)}; set it to 0. Brightness, contrast, blur, "
                "noise, cutout and all moves are for any picture."
            )


def last_joining_step(config: Any) -> int:
    """Returns the step from which on no images are joined, by `augment.stop_last`."""
    steps = config.train.steps
    return max(steps - as_steps(config.augment.stop_last, steps), 0) if steps else 0


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
        from solov2_jax.user_code import import_function

        return import_function(data.providers[data.name], key, ("config",))(config)
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
    join_steps: int | None = None,
) -> Batches:
    """Returns the batches of steps `start_step` to `train.steps`; see `train_batches`.

    Args:
      join_steps: see there; None: as the config says of a run of `train.steps`.
    """
    check_augment(config)
    if pixel_maps is None and (folder := semantic_folder(config)):
        pixel_maps = {"basis_sem": functools.partial(known_classes, folder=folder)}
    keypoints = keypoints or mapped_keypoints(config, dataset)
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
        join_steps=last_joining_step(config) if join_steps is None else join_steps,
        reading=_reading(config),
    )


def has_own_padding(config: Any, dataset: CocoDataset) -> bool:
    """Returns whether a training image, padded to multiples of 32 as the reference does, may be
    smaller than its batch's arrays.

    Large-scale jitter's canvas is the image: what it leaves empty is no padding.
    """
    augment, resize = _augment(config), train_resize(config)
    if augment.jitter_scale or augment.changes_size:
        return not augment.jitter_scale
    images = chosen_images(dataset, config.data.keep_empty, config.data.train.max_images)
    sizes = resize.sizes(dataset.heights[images], dataset.widths[images]).reshape(-1, 2)
    padded = np.unique(-(-sizes // STRIDE) * STRIDE, axis=0)
    buckets = resize.buckets or derive_buckets(sizes, resize.max_buckets, TOLERANCE["train"])
    return {*map(tuple, padded.tolist())} != {*map(tuple, buckets)}


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
        keypoints=mapped_keypoints(config, dataset),
        reading=_reading(config),
    )


def build_eval_batches(
    config: Any, dataset: CocoDataset, shard: tuple[int, int] = (0, 1), devices: int = 1
) -> Batches:
    """Returns the i-th of n parts, `shard`, of batches that hold every image once, or the
    first `eval.max_images`.

    Args:
      devices: that a batch is split over, `eval.batch_size` images for each.
    """
    return eval_batches(
        dataset,
        batch_size=config.eval.batch_size * devices,
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
    buckets = tuple(values.buckets_train)
    return Resize(tuple(shorts), values.max_size_train, buckets, values.max_buckets_train)


def _test_resize(config: Any) -> Resize:
    values = config.input
    return Resize((values.min_size_test,), values.max_size_test, tuple(values.buckets_test))


def _augment(config: Any) -> Augment:
    values: dict[str, Any] = dict(config.augment)
    values = {key: value for key, value in values.items() if key not in _NOT_OF_AN_IMAGE}
    values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Augment(**values, user=config.user.to_dict())


def _reading(config: Any) -> Reading:
    data = config.data
    return Reading(data.num_workers, data.num_threads, data.prefetch)
