"""Other annotation formats -> COCO instances json.

    solov2 import yolo --data data.yaml --split train \\
        --output train.json
    solov2 import labelme --images photos --labels photos \\
        --names classes.txt --output train.json
    solov2 import voc --images JPEGImages --labels Annotations --output train.json
    solov2 import masks --images JPEGImages \\
        --objects SegmentationObject --classes SegmentationClass --void 255 \\
        --names voc.txt --output train.json

Exit code 0: written; 2: an error that the one line `error: ...` explains.
"""

import sys
from collections.abc import Sequence

from solov2_jax.config_schema import several, text, whole
from solov2_jax.data.coco import load_coco
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.tools.importers.instances import Instances, read_names
from solov2_jax.tools.importers.labelme import import_labelme
from solov2_jax.tools.importers.masks import import_masks
from solov2_jax.tools.importers.voc import import_voc
from solov2_jax.tools.importers.yolo import (
    files_of_folders,
    files_of_yaml,
    import_yolo,
    names_in_yaml,
)

_NAMES = (
    "Class names: a file (a name a line; YAML with `names`; COCO json or a run's "
    "classes.json, whose ids are kept), or names separated by commas."
)


_DATA = Flag("data", text(), "yolo: data.yaml with names, and folders or lists of images.")
_SPLIT = Flag("split", text("train"), "yolo: split of data.yaml: train, val or test.")
_IGNORE = Flag("ignore", several((), text()), "labelme: labels to leave out, separated by commas.")
_OBJECTS = Flag("objects", text(), "masks: folder of PNGs with object numbers.")
_CLASSES = Flag("classes", text(), "masks: folder of PNGs with class numbers.")
_VOID = Flag(
    "void", whole(255, high=65_535), "masks: value of pixels to ignore; 255 in VOC.", optional=True
)
_IMAGES = Flag("images", text(), "Folder of the images.")
_LABELS = Flag("labels", text(), "yolo, labelme and voc: folder of the label files.")
_NAMES_FLAG = Flag("names", text(), _NAMES)
_OUTPUT = Flag("output", text(), "JSON file to write.", required=True)
_FOR = {
    "yolo": (_DATA, _SPLIT, _LABELS),
    "labelme": (_IGNORE, _LABELS),
    "voc": (_LABELS,),
    "masks": (_OBJECTS, _CLASSES, _VOID),
}
FLAGS = (
    *(_IMAGES, _NAMES_FLAG, _OUTPUT, _LABELS),
    *(_DATA, _SPLIT, _IGNORE, _OBJECTS, _CLASSES, _VOID),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    kind = words.pop(0) if words and not words[0].startswith("-") else ""
    if kind not in _FOR and not app.wants_help(words):
        with app.user_errors():
            raise InputError(f"give a format first, one of {', '.join(_FOR)}; got {kind!r}")

    def work(overrides: list[str]) -> None:
        if overrides:
            raise InputError(f"{overrides[0]}: this command has no config")
        for flag in FLAGS[3:]:
            if flag.present and flag not in _FOR[kind]:
                raise InputError(f"--{flag.name} is not for {kind}; see --help")
        images, instances = _import(kind)
        instances.write(_OUTPUT.value)
        print(load_coco(images, _OUTPUT.value, boxes=True).summary())
        print(f"image folder: {images}")

    app.run(work, FLAGS, argv=words, platform=False)


def _import(kind: str) -> tuple[str, Instances]:
    """Returns the folder of the images and their instances."""
    categories = read_names(_NAMES_FLAG.value) if _NAMES_FLAG.value else None
    if kind == "yolo" and _DATA.value:
        categories = categories or names_in_yaml(_DATA.value)
        if not _IMAGES.value and not _LABELS.value:
            files = files_of_yaml(_DATA.value, _SPLIT.value)
            return files.images, import_yolo(files, categories)
    if not _IMAGES.value:
        raise InputError("--images: give the folder of the images.")
    if kind == "labelme":
        labels = _LABELS.value or _IMAGES.value
        instances, left_out = import_labelme(_IMAGES.value, labels, categories, _IGNORE.value)
        for what, number in left_out.items():
            app.echo(f"{number} shapes left out: {what}")
        return _IMAGES.value, instances
    if kind == "voc":
        instances, notes = import_voc(_IMAGES.value, _LABELS.value or _IMAGES.value, categories)
        for note in notes:
            app.echo(note)
        return _IMAGES.value, instances
    if categories is None:
        raise InputError("--names: give the class names (see --help).")
    if kind == "masks":
        if not _OBJECTS.value:
            raise InputError("--objects: give the folder of object numbers.")
        instances, _ = import_masks(
            _IMAGES.value, _OBJECTS.value, _CLASSES.value, categories, _VOID.value
        )
        return _IMAGES.value, instances
    if not _LABELS.value:
        raise InputError("--labels: give the folder of the label files, or --data.")
    return _IMAGES.value, import_yolo(files_of_folders(_IMAGES.value, _LABELS.value), categories)
