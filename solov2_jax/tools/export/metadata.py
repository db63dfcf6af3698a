"""What an exported file says about itself: classes, preprocessing, outputs, origin."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

import solov2_jax
from solov2_jax.data.buckets import STRIDE, Bucket
from solov2_jax.data.transforms import shortest_edge_sizes
from solov2_jax.inference.preprocess import InputOptions
from solov2_jax.inference.programs import DetectOptions
from solov2_jax.io import write_json
from solov2_jax.tools.export.program import output_names

FILE = "metadata.json"
# Of this file's form; a reader refuses what it does not know.
VERSION = 1


def default_buckets(options: InputOptions) -> tuple[Bucket, ...]:
    """Returns the config's padded shapes, or a landscape and a portrait one.

    The two hold every image: the short side is at most `min_size`, the long `max_size`.
    """
    if options.buckets:
        return options.buckets
    short, long = (-(-n // STRIDE) * STRIDE for n in (options.min_size, options.max_size))
    return tuple(dict.fromkeys([(short, long), (long, short)]))


def describe_export(
    *,
    file_format: str,
    precision: str,
    masks: str,
    batch: int,
    buckets: Sequence[Bucket],
    input_options: InputOptions,
    detect_options: DetectOptions,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    source: str,
) -> dict[str, Any]:
    """Returns the metadata of an export, as JSON has it."""
    size, longest = input_options.min_size, input_options.max_size
    example = shortest_edge_sizes(480, 640, size, longest)
    return {
        "version": VERSION,
        "solov2_jax": solov2_jax.__version__,
        "jax": jax.__version__,
        "source": source,
        "format": file_format,
        "precision": precision,
        "classes": {"names": list(class_names), "ids": [int(i) for i in category_ids]},
        "preprocessing": {
            "channel_order": "RGB",
            "dtype": "uint8",
            "normalised_inside": True,
            "min_size": size,
            "max_size": longest,
            "resize": "bilinear, antialiased (Pillow's BILINEAR); the short side to "
            "min_size unless the long side would exceed max_size",
            "example": {"from": [480, 640], "to": [int(n) for n in example]},
            "pad": "zeros at the right and bottom, up to one of `files`",
        },
        "inputs": {
            "image": "uint8 [batch, height, width, 3]",
            "image_size": "int32 [batch, 2]: (height, width) before padding",
        },
        "outputs": list(output_names(masks)),
        "masks": masks,
        "max_detections": detect_options.max_per_image,
        "batch": batch,
        "files": {file_name(b, file_format): list(b) for b in buckets},
        "options": asdict(detect_options),
    }


def file_name(bucket: Bucket, file_format: str) -> str:
    """Returns the file, or folder, of one padded shape."""
    height, width = bucket
    return f"{height}x{width}.{file_format}"


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Writes an export's metadata beside its files."""
    write_json(metadata, folder / FILE)


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the metadata of an export's folder."""
    path = Path(folder) / FILE
    try:
        metadata = json.loads(path.read_text("utf-8"))
        version = metadata["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not the metadata of an export ({error}); give the folder that export.py wrote"
        ) from error
    if version != VERSION:
        raise ValueError(f"{path}: has form {version}, this version reads {VERSION}; export again")
    return metadata
