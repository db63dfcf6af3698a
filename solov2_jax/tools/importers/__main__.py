"""Other annotation formats -> COCO instances json.

    python -m solov2_jax.tools.importers yolo --data data.yaml --split train \\
        --output train.json
    python -m solov2_jax.tools.importers labelme --images photos --labels photos \\
        --names classes.txt --output train.json
    python -m solov2_jax.tools.importers masks --images JPEGImages \\
        --objects SegmentationObject --classes SegmentationClass --void 255 \\
        --names voc.txt --output train.json

Exit code 0: written; 2: an error that the one line `error: ...` explains.
"""

import argparse
from collections.abc import Sequence

from solov2_jax.data.coco import load_coco
from solov2_jax.io import InputError
from solov2_jax.tools.cli.plain import command
from solov2_jax.tools.importers.instances import Instances
from solov2_jax.tools.importers.labelme import import_labelme
from solov2_jax.tools.importers.masks import import_masks
from solov2_jax.tools.importers.names import read_names
from solov2_jax.tools.importers.yolo import (
    files_of_folders,
    files_of_yaml,
    import_yolo,
    names_in_yaml,
)

_NAMES = (
    "class names: a file (a name a line; YAML with `names`; COCO json or a run's "
    "classes.json, whose ids are kept), or names separated by commas"
)


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    top = argparse.ArgumentParser(
        prog="python -m solov2_jax.tools.importers",
        description="Writes a COCO instances json from another format.",
    )
    kinds = top.add_subparsers(dest="kind", required=True, metavar="FORMAT")
    yolo = kinds.add_parser("yolo", help="segmentation labels, a text file per image")
    yolo.add_argument("--data", help="data.yaml with names, and folders or lists of images")
    yolo.add_argument("--split", default="train", help="of data.yaml: train, val, test")
    labelme = kinds.add_parser("labelme", help="a json per image")
    labelme.add_argument(
        "--ignore", default="", help="labels that are no class, separated by commas"
    )
    masks = kinds.add_parser("masks", help="PNG files of object numbers (Pascal VOC)")
    masks.add_argument("--objects", required=True, help="folder of object numbers")
    masks.add_argument("--classes", default="", help="folder of class numbers")
    masks.add_argument("--void", type=int, help="value that means nothing; VOC's is 255")
    for kind in (yolo, labelme, masks):
        kind.add_argument("--images", help="folder of the images")
        if kind is not masks:
            kind.add_argument("--labels", help="folder of the label files")
        kind.add_argument("--names", help=_NAMES)
        kind.add_argument("--output", required=True, help="the json to write")
    return top


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Imports as the arguments say."""
    args = parser().parse_args(argv)
    images, instances = _import(args)
    instances.write(args.output)
    print(load_coco(images, args.output).summary())
    print(f"image folder: {images}")


def _import(args: argparse.Namespace) -> tuple[str, Instances]:
    """Returns the folder of the images and their instances."""
    categories = read_names(args.names) if args.names else None
    if args.kind == "yolo" and args.data:
        categories = categories or names_in_yaml(args.data)
        if not args.images and not args.labels:
            files = files_of_yaml(args.data, args.split)
            return files.images, import_yolo(files, categories)
    if not args.images:
        raise InputError("--images: give the folder of the images.")
    if args.kind == "labelme":
        ignored = [name for name in args.ignore.split(",") if name]
        labels = args.labels or args.images
        instances, left_out = import_labelme(args.images, labels, categories, ignored)
        for what, number in left_out.items():
            print(f"{number} shapes left out: {what}")
        return args.images, instances
    if categories is None:
        raise InputError("--names: give the class names (see --help).")
    if args.kind == "masks":
        instances = import_masks(args.images, args.objects, args.classes, categories, args.void)
        return args.images, instances
    if not args.labels:
        raise InputError("--labels: give the folder of the label files, or --data.")
    return args.images, import_yolo(files_of_folders(args.images, args.labels), categories)


if __name__ == "__main__":
    main()
