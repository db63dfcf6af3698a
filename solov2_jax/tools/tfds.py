"""A COCO-style folder as a TFDS data set with masks: few large files to read from.

    solov2 tfds --name photos --output datasets \\
        --images photos --annotations train.json \\
        --val_images photos --val_annotations val.json
    solov2 tfds --name cells --output datasets \\
        --images im --annotations a.json --val_images im --val_annotations b.json
    solov2 train --config r50_3x --workdir runs/photos \\
        --config.data.name=tfds:datasets/photos/1.0.0

Needs the extra `tfds` (pip install "solov2_jax[tfds]"), without TensorFlow; training
from the shards needs neither. Exit code 0: written; 2: an error.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from solov2_jax.config_schema import text
from solov2_jax.data.annotations import read_instances
from solov2_jax.data.coco import CocoDataset, load_coco
from solov2_jax.data.records import PREFIX, SPLITS
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app
from solov2_jax.tools.cli.flags import Flag

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
        raise InputError(
            f"--name {name}: use lower-case letters, digits and underscores, a letter first."
        )
    folder = os.path.join(output, name, NUMBER)
    if os.path.exists(folder):
        raise InputError(f"{folder} exists; remove it or give another --name.")
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
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
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
                "in pixels, 0 where none was annotated; `mask` is COCO's compressed run "
                "lengths at the image's size, likewise empty. Ids that do not fit are "
                "replaced by places.",
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
    table = read_instances(dataset.annotation_file)
    ids = table.ids if table.ids.dtype.kind == "i" else np.arange(len(table.ids))
    category_ids = list(table.categories)
    if not all(abs(c) < 2**63 for c in category_ids):
        category_ids = list(range(len(category_ids)))
    ends = np.cumsum(np.bincount(table.image, minlength=len(table.image_ids)))[:-1]
    by_image = np.split(np.argsort(table.image, kind="stable"), ends)
    for i, image_id in enumerate(table.batch_ids().tolist()):
        size = table.size(i)
        objects = []
        for row in by_image[i].tolist():
            mask = table.segmentations.rle(row, size) if table.has_mask[row] else None
            area = coco_mask.area(mask) if mask else 0  # pyright: ignore
            label = int(table.label[row])
            objects.append(
                {
                    "id": ids[row],
                    "label": label,
                    "category_id": category_ids[label],
                    "bbox": np.nan_to_num(table.boxes[row]),
                    "area": float(area if np.isnan(table.areas[row]) else table.areas[row]),
                    "is_crowd": bool(table.crowd[row]),
                    "mask": mask["counts"].decode() if mask else "",
                }
            )
        yield {
            "image": dataset.path(i),
            "image/file_name": table.file_names[i],
            "image/id": image_id,
            "image/height": size[0],
            "image/width": size[1],
            "objects": objects,
        }


_NAME = Flag("name", text(), "Of the data set, in lower case.", required=True)
_OUTPUT = Flag("output", text(), "Folder that it is written below.", required=True)
_IMAGES = Flag("images", text(), "Folder of the training images.", required=True)
_ANNOTATIONS = Flag("annotations", text(), "Their instances json.", required=True)
_VAL_IMAGES = Flag("val_images", text(), "Folder of the validation images.", required=True)
_VAL_ANNOTATIONS = Flag("val_annotations", text(), "Their instances json.", required=True)
FLAGS = (_NAME, _OUTPUT, _IMAGES, _ANNOTATIONS, _VAL_IMAGES, _VAL_ANNOTATIONS)


def write(overrides: list[str]) -> None:
    if overrides:
        raise InputError(f"{overrides[0]}: this command has no config")
    splits = {
        "train": (_IMAGES.value, _ANNOTATIONS.value),
        "val": (_VAL_IMAGES.value, _VAL_ANNOTATIONS.value),
    }
    folder = build(_NAME.value, _OUTPUT.value, splits)
    print(f"train from it by --config.data.name={PREFIX}{folder}")


def main(argv: Sequence[str] | None = None) -> None:
    app.run(write, FLAGS, argv=argv, platform=False)


if __name__ == "__main__":
    main()
