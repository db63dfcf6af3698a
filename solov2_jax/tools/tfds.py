"""A COCO-style folder as a TFDS data set with masks: few large files to read from.

    python -m solov2_jax.tools.tfds --name photos --output datasets \\
        --images photos --annotations train.json \\
        --val_images photos --val_annotations val.json
    python train.py ... --config.data.name=tfds:datasets/photos/1.0.0

Needs the extra `tfds` (pip install "solov2_jax[tfds]"), without TensorFlow; training
from the shards needs neither. Exit code 0: written; 2: an error.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from solov2_jax.data.coco import CocoDataset, load_coco
from solov2_jax.data.records import PREFIX, SPLITS
from solov2_jax.rle import segmentation_to_rle
from solov2_jax.tools.cli.plain import command

NUMBER = "1.0.0"  # of the version: names the folder


def build(name: str, output: str, splits: dict[str, tuple[str, str]]) -> str:
    """Returns the folder of the data set, written below `output`.

    It holds array_record shards in the order of the jsons, TFDS's description of them,
    and the jsons.

    Args:
      name: of the data set: lower-case letters, digits and underscores.
      splits: "train" and "val" -> (image folder, instances json).
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"--name {name}: use lower-case letters, digits and underscores, a letter first."
        )
    folder = os.path.join(output, name, NUMBER)
    if os.path.exists(folder):
        raise ValueError(f"{folder} exists; remove it or give another --name.")
    data = {"train": load_coco(*splits["train"])}
    categories = dict(zip(data["train"].category_ids, data["train"].class_names, strict=True))
    data["val"] = load_coco(*splits["val"], categories=categories)
    builder = _builder(name, output, data)
    with tempfile.TemporaryDirectory() as nothing:  # it would leave a folder there
        builder.download_and_prepare(download_dir=nothing)
    for split, dataset in data.items():
        path = os.path.join(folder, f"instances_{split}.json")
        shutil.copyfile(dataset.annotation_file, path)
    return folder


def _builder(title: str, output: str, data: dict[str, CocoDataset]) -> Any:
    """Returns the TFDS builder."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"tensorflow-datasets cannot be imported ({error}); install it by "
            'pip install "solov2_jax[tfds]".'
        ) from None
    core, features = tfds.core, tfds.features
    names = list(data["train"].class_names)

    options: Any = {"skip_registration": True}

    class MaskBuilder(core.GeneratorBasedBuilder, **options):
        name = title
        VERSION = core.Version(NUMBER)
        # TFDS would look for its own files beside the source of a builder.
        pkg_dir_path = code_path = None

        def _info(self) -> Any:
            objects = {
                "id": np.int64,
                "label": features.ClassLabel(names=names),
                "category_id": np.int64,
                "bbox": features.Tensor(shape=(4,), dtype=np.float64),
                "area": np.float64,
                "is_crowd": np.bool_,
                "mask": features.Text(),
            }
            return core.DatasetInfo(
                builder=self,
                description="Images with instance masks. `bbox` is x, y, width, height "
                "in pixels; `mask` is COCO's compressed run lengths at the image's "
                "size, empty where none was annotated.",
                features=features.FeaturesDict(
                    {
                        "image": features.Image(shape=(None, None, 3)),
                        "image/file_name": features.Text(),
                        "image/id": np.int64,
                        "image/height": np.int64,
                        "image/width": np.int64,
                        "objects": features.Sequence(objects),
                    }
                ),
                # Record i is image i of the json.
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(data[split]) for split in SPLITS}

        def _generate_examples(self, dataset: CocoDataset) -> Iterator[Any]:
            yield from enumerate(examples(dataset))

    return MaskBuilder(data_dir=output, file_format="array_record")


def examples(dataset: CocoDataset) -> Iterator[dict[str, Any]]:
    """Yields an example per image, in the json's order, crowds included."""
    with open(dataset.annotation_file, encoding="utf-8") as file:
        records = json.load(file)["annotations"]
    by_image: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_image.setdefault(int(record["image_id"]), []).append(record)
    labels = {c: k for k, c in enumerate(dataset.category_ids)}
    for i, image_id in enumerate(dataset.image_ids.tolist()):
        height, width = int(dataset.heights[i]), int(dataset.widths[i])
        objects = [
            _object(record, (height, width), labels, number)
            for number, record in enumerate(by_image.get(image_id, []))
        ]
        yield {
            "image": dataset.path(i),
            "image/file_name": str(dataset.file_names[i]),
            "image/id": image_id,
            "image/height": height,
            "image/width": width,
            "objects": objects,
        }


def _object(
    record: dict[str, Any], size: tuple[int, int], labels: dict[int, int], number: int
) -> dict[str, Any]:
    runs = segmentation_to_rle(record.get("segmentation"), size)
    return {
        "id": int(record.get("id", number)),
        "label": labels[record["category_id"]],
        "category_id": int(record["category_id"]),
        "bbox": np.array(record.get("bbox") or [0, 0, 0, 0], np.float64),
        "area": float(record.get("area", 0)),
        "is_crowd": bool(record.get("iscrowd", 0)),
        "mask": runs,
    }


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    top = argparse.ArgumentParser(
        prog="python -m solov2_jax.tools.tfds",
        description="Writes array_record shards with masks from a COCO-style folder.",
    )
    top.add_argument("--name", required=True, help="of the data set, in lower case")
    top.add_argument("--output", required=True, help="folder that it is written below")
    top.add_argument("--images", required=True, help="folder of the training images")
    top.add_argument("--annotations", required=True, help="their instances json")
    top.add_argument("--val_images", required=True, help="of the validation images")
    top.add_argument("--val_annotations", required=True, help="their instances json")
    return top


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Builds as the arguments say."""
    args = parser().parse_args(argv)
    splits = {
        "train": (args.images, args.annotations),
        "val": (args.val_images, args.val_annotations),
    }
    folder = build(args.name, args.output, splits)
    print(f"train from it by --config.data.name={PREFIX}{folder}")


if __name__ == "__main__":
    main()
