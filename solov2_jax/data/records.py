"""Images in array_record shards, as `tools/tfds.py` writes them, without TensorFlow.

A record is a serialized tf.train.Example. Its three nested messages are few enough to
be read here, so that training needs neither TensorFlow nor tensorflow-datasets.
"""

import glob
import io
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from solov2_jax import io as files
from solov2_jax.io import InputError, is_object, reading

PREFIX = "tfds:"
SPLITS = ("train", "val")
_FIX = "Build the records again."


def is_records(root: str) -> bool:
    """Returns whether an image root means records: "tfds:FOLDER" or "..#SPLIT"."""
    return root.startswith(PREFIX)


def split_root(name: str, split: str) -> tuple[str, str]:
    """Returns (image root, json) of a split of "tfds:FOLDER".

    Args:
      name: the folder has the shards, and the instances jsons beside them.
    """
    folder = name.removeprefix(PREFIX)
    if is_object(folder):
        raise InputError(
            f"{name}: array_record reads no object storage; copy the shards to a disk first, or "
            "give the images themselves as data.train.images"
        )
    return f"{PREFIX}{folder}#{split}", os.path.join(folder, f"instances_{split}.json")


def record_path(root: str, index: int, file_name: str) -> str:
    """Returns the place of a record as text: "tfds:FOLDER#SPLIT/INDEX/FILE"."""
    return f"{root}/{index}/{file_name}"


def is_streamed(path: str) -> bool:
    """Returns whether a picture is no file here, but a record or an object: read as bytes."""
    return is_records(path) or is_object(path)


def source(path: str) -> str | io.BytesIO:
    """Returns what PIL opens: a path as it is, or the bytes of a record or object."""
    return io.BytesIO(read_bytes(path)) if is_streamed(path) else path


def read_bytes(path: str) -> bytes:
    """Returns the file's content, or that of a record's image."""
    if not is_records(path):
        return files.read_bytes(path)
    folder, _, rest = path.removeprefix(PREFIX).partition("#")
    split, index, file_name = rest.split("/", 2)
    shards = _open(folder, split)
    with reading(f"{folder}: record {index} of {split}", "a record", _FIX):
        example = parse_example(shards[int(index)])
        stored = example.get("image/file_name", [b""])[0].decode()
    if stored != file_name or not example.get("image"):
        raise InputError(
            f"{folder}: record {index} of {split} is {stored!r}, but the json beside "
            f"it says {file_name!r}; build the records again."
        )
    return example["image"][0]


def check(root: str, num_images: int) -> None:
    """Raises if the shards are missing or do not hold so many images."""
    folder, _, split = root.removeprefix(PREFIX).partition("#")
    num_records = len(_open(folder, split))
    if num_records != num_images:
        raise InputError(
            f"{folder}: the shards of {split} have {num_records} images, the json beside "
            f"them {num_images}; build the records again."
        )


@lru_cache(maxsize=8)
def _open(folder: str, split: str) -> Any:
    """Returns the records of a split, by index; opened once in each process."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    pattern = os.path.join(glob.escape(folder), f"*-{split}.array_record-*-of-*")
    shards = sorted(glob.glob(pattern))
    total = int(shards[0].rpartition("-")[2]) if shards else 0
    if not shards or len(shards) != total:
        raise InputError(
            f"{folder}: has {len(shards)} of {total or 'the'} array_record shards of "
            f"{split}; correct data.name, or build them by "
            "`solov2 tfds`."
        )
    for shard in shards:
        with reading(shard, "an array_record file", _FIX):
            len(ArrayRecordDataSource([shard]))
    return ArrayRecordDataSource(shards)


def parse_example(record: bytes) -> dict[str, list[bytes]]:
    """Returns the bytes features of a serialized tf.train.Example, by name.

    Numbers in it are left out. Source: the messages Example, Features, Feature and
    BytesList of TensorFlow's example.proto and feature.proto, in protobuf's encoding.
    """
    features: dict[str, list[bytes]] = {}
    for _, message in _fields(record):  # Example: 1 features
        for _, entry in _fields(message):  # Features: 1 map of name and Feature
            pair = dict(_fields(entry))  # 1 name, 2 Feature
            for kind, values in _fields(pair.get(2, b"")):
                if kind == 1:  # of bytes, not numbers
                    name = pair.get(1, b"").decode()
                    features[name] = [value for _, value in _fields(values)]
    return features


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields number and content of the length-delimited fields of a message."""
    for number, kind, value in proto_fields(message):
        if kind != 2 or not isinstance(value, bytes):
            raise ValueError("a record is damaged: it is no tf.train.Example")
        yield number, value


def proto_fields(message: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """Yields number, wire type and value of a protocol buffer's fields."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        value, at = _varint(message, at) if kind in (0, 2) else ({1: 8, 5: 4}.get(kind, 0), at)
        if kind:
            begin, at = at, at + value
            if at > len(message):
                raise ValueError("a record is damaged: it is cut off")
            value = message[begin:at]
        yield number, kind, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Returns a whole number in groups of seven bits, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("a record is damaged: it is cut off")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
