"""A folder or file of any format that is understood -> its parts as COCO instances.

What a folder is follows from what lies in it, never from its name; only which part is for
validation follows from names such as `valid`, `instances_val2017.json` or `test`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from solov2_jax.data.annotations import describe, read_instances
from solov2_jax.data.coco import find_files
from solov2_jax.data.images import image_suffixes, is_junk, list_files, list_images
from solov2_jax.io import InputError, read_json
from solov2_jax.tools.importers import cityscapes, cvat, label_studio, supervisely, via, voc
from solov2_jax.tools.importers.instances import Instances, part_of, read_names, read_yaml
from solov2_jax.tools.importers.labelme import import_labelme
from solov2_jax.tools.importers.masks import import_masks
from solov2_jax.tools.importers.parts import TEST, TRAIN, VAL, DataPart, split_of
from solov2_jax.tools.importers.yolo import (
    files_of_folders,
    files_of_yaml,
    import_yolo,
    names_in_yaml,
)

FORMATS = (
    "COCO json (also as Roboflow, CVAT and Label Studio export it), YOLO's outlines or boxes "
    "with data.yaml, labelme, VGG Image Annotator, CVAT's XML, Pascal VOC's XML, Label Studio's "
    "json, Supervisely, Cityscapes' gtFine, images with PNG masks"
)
_MASKS = ("masks", "mask", "segmentationobject", "instances", "instance_masks", "labels")
_PICTURES = ("images", "image", "imgs", "img", "jpegimages")
_XML = ("annotations", "annotation", "xmls", "labels")
_IDS = {"images": ("id",), "categories": ("id",), "annotations": ("image_id", "category_id")}
_FEW = 20  # image names by which a folder of images is known


def recognise(place: str) -> list[DataPart]:
    """Returns the parts of a data set, each checked by the reader that training uses.

    Raises:
      InputError: for a place without a data set, or a data set with a defect.
    """
    path = Path(place)
    if not path.exists():
        raise InputError(f"--data {place}: there is no such folder or file; correct it.")
    parts = _of_file(path) if path.is_file() else _of_folder(path)
    if not parts:
        cityscapes.check_halves(path)
        raise InputError(
            f"--data {place}: holds no annotations of a known format, only "
            f"{describe(_entries(path)) or 'nothing'}. Known are: {FORMATS}."
        )
    return [_checked(part) for part in parts]


def _checked(part: DataPart) -> DataPart:
    """Returns a part with whole numbers for ids, which a json may write as text.

    Raises:
      InputError: for damaged annotations and missing images.
    """
    table = read_instances(part.content, part.file or f"{part.images} ({part.kind})")
    names, missing = find_files(part.images, table)
    if missing:
        raise InputError(
            f"{table.source}: {len(missing)} of {len(names)} images are not in {part.images}: "
            f"{describe([names[i] for i in missing])}; add them, or remove them from the file."
        )
    content = dict(part.content)
    for kind, keys in _IDS.items():
        content[kind] = [{**r, **{key: int(r[key]) for key in keys}} for r in content[kind]]
    for image, name in zip(content["images"], table.file_names, strict=True):
        image["file_name"] = name  # LVIS has only an address
    return replace(part, content=content)


def _of_file(path: Path) -> list[DataPart]:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return _yolo(path)
    if suffix == ".json":
        return _jsons([path], top=path.parent.parent, labelme=path.parent)
    if suffix == ".xml":
        return _of_voc(path.parent) if voc.is_voc(path) else _cvat(path)
    raise InputError(
        f"--data {path}: is no json, yaml or xml file; unpack an archive, and give the folder."
    )


def _of_folder(folder: Path) -> list[DataPart]:
    """Returns the parts of a folder, [] if it has no annotations that are understood."""
    for reader in _READERS:
        if parts := reader(folder):
            return parts
    # A folder of train, valid and test, each of which is a data set.
    parts = []
    for child in _folders(folder):
        if split := split_of(child.name):
            parts += [replace(p, split=split) for p in _of_folder(child)]
    return parts


def _entries(folder: Path) -> list[str]:
    if not folder.is_dir():
        return [folder.name]
    return sorted(e.name + "/" * e.is_dir() for e in os.scandir(folder) if not is_junk(e.name))


def _folders(folder: Path) -> list[Path]:
    return [folder / name for name in _entries(folder) if name.endswith("/")]


def _files(folder: Path, *suffixes: str) -> list[Path]:
    """Returns the regular files with these endings: reading a pipe would wait for ever."""
    paths = [folder / n for n in _entries(folder) if n.lower().endswith(suffixes)]
    return [path for path in paths if path.is_file()]


# --- YOLO ----------------------------------------------------------------------------


def _of_yaml(folder: Path) -> list[DataPart]:
    for path in _files(folder, ".yaml", ".yml"):
        content = read_yaml(path)
        if "names" in content and {"train", "val"} & content.keys():
            return _yolo(path)
    return []


def _yolo(path: Path) -> list[DataPart]:
    file, content = str(path), read_yaml(path)
    names = names_in_yaml(file)
    parts: list[DataPart] = []
    for split in (TRAIN, VAL, TEST):
        if not content.get(split):
            continue
        try:
            files = files_of_yaml(file, split)
        except InputError:
            if split == TEST:  # often named and not packed
                continue
            raise
        notes: tuple[str, ...] = ()
        whole = {os.path.join(files.images, name) for name in files.labels}
        if parts and whole == {
            os.path.join(parts[0].images, i["file_name"]) for i in parts[0].content["images"]
        }:
            parts[0] = replace(
                parts[0], notes=(f"`{split}` in {file} is the training data: not used",)
            )
            continue
        instances = import_yolo(files, names)
        parts.append(DataPart("YOLO", split, files.images, instances.content(), "", notes))
    return parts


def _of_yolo_folders(folder: Path) -> list[DataPart]:
    """Returns the part of `images` and `labels` without a yaml, as Label Studio writes them."""
    images, labels = folder / "images", folder / "labels"
    if not images.is_dir() or not labels.is_dir() or not list_files(labels, [".txt"]):
        return []
    places = [p / n for p in (folder, labels) for n in ("classes.txt", "obj.names")]
    names = next((str(p) for p in places if p.is_file()), None)
    if names is None:
        raise InputError(
            f"{labels}: the classes of YOLO's labels have no names; write them, a name a line in "
            f"the order of their numbers, into {places[0]}."
        )
    instances = import_yolo(files_of_folders(str(images), str(labels)), read_names(names))
    parts = _by_subfolder(instances)
    return [DataPart("YOLO", split, str(images), c) for split, c in parts.items()]


# --- Jsons: COCO, labelme, VIA, Label Studio -----------------------------------------


def _of_jsons(folder: Path) -> list[DataPart]:
    """Returns what the jsons of a folder, its `annotations` and its parts hold."""
    places = [folder, folder / "annotations"]
    places += [child for child in _folders(folder) if split_of(child.name)]
    paths = [path for place in places if place.is_dir() for path in _files(place, ".json")]
    if instances := [p for p in paths if p.name.startswith("instances")]:
        paths = instances  # beside key points and captions of the same images
    parts = _jsons(paths, top=folder, labelme=folder)
    if not parts and (names := list_files(folder, [".json"])):  # labelme's, in any subfolder
        parts = _jsons([folder / name for name in names[:1]], top=folder, labelme=folder)
    return parts


def _jsons(paths: Sequence[Path], *, top: Path, labelme: Path) -> list[DataPart]:
    """Returns the parts that these files are; labelme's jsons are read as a folder.

    Args:
      top: the data set's folder: its own name says nothing, and images are inside.
      labelme: folder that is read as a whole if a file is labelme's.
    """
    parts: list[DataPart] = []
    for path in paths:
        content = read_json(path, "json")
        inner = path.parent != top
        split = split_of(path.stem) or (split_of(path.parent.name) if inner else "")
        if label_studio.is_label_studio(content):
            images, instances, notes = label_studio.import_tasks(content, path)
            parts.append(DataPart("Label Studio", split, images, instances.content(), "", notes))
        elif _is_coco(content):
            parts.append(_coco(path, content, split, inner=inner))
        elif isinstance(content, dict) and "shapes" in content and "imagePath" in content:
            return parts or _labelme(labelme)
        elif via.is_via(content):
            images = str(path.parent)
            instances, notes = via.import_via(content, images, str(path))
            parts.append(DataPart("VIA", split, images, instances.content(), "", notes))
    return parts


def _is_coco(content: Any) -> bool:
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in lists):
        return False
    records = [a for a in content["annotations"][:1] if isinstance(a, dict)]
    return not any("segments_info" in a for a in records)  # that is panoptic


def _coco(path: Path, content: dict[str, Any], split: str, *, inner: bool) -> DataPart:
    images = _image_folder(path, content, split, inner=inner)
    notes = []
    used = {a.get("category_id") for a in content["annotations"] if isinstance(a, dict)}
    kept = [c for c in content["categories"] if not _is_placeholder(c, content, used)]
    if len(kept) < len(content["categories"]):
        names = [c["name"] for c in content["categories"] if c not in kept]
        notes.append(f"class {describe(names)} has no object and only groups the others: left out")
        content = {**content, "categories": kept}
    file = "" if notes else str(path)
    return DataPart("COCO", split, images, content, file, tuple(notes))


def _is_placeholder(category: Any, content: dict[str, Any], used: set[Any]) -> bool:
    """Returns whether a category is what Roboflow puts above all others."""
    if not isinstance(category, dict) or category.get("id") in used:
        return False
    others = [c for c in content["categories"] if isinstance(c, dict) and c is not category]
    above = [c.get("supercategory") == category.get("name") for c in others]
    return bool(above) and all(above)


def _image_folder(path: Path, content: dict[str, Any], split: str, *, inner: bool) -> str:
    """Returns the folder that has most of a json's images.

    Args:
      inner: whether the folder above the json's belongs to the data set too.
    """
    names = [i.get("file_name") for i in content["images"][:_FEW] if isinstance(i, dict)]
    texts = [n.replace("\\", "/") for n in names if isinstance(n, str)]
    above = path.parent.parent if inner else path.parent
    bases = [path.parent, path.parent / "images", above, above / "images"]
    places = []
    for base in (b for b in bases if b.is_dir()):
        children = _folders(base)
        same = [c for c in children if split and split_of(c.name) == split]
        places += [base, *same, *(c for c in children if c not in same)]
    found = [sum((place / name).is_file() for name in texts) for place in places]
    if not max(found, default=0):
        raise InputError(
            f"{path}: its images, such as {describe(texts[:1])}, are neither beside it nor in a "
            f"folder near it ({describe(_entries(above))}); put the images into "
            f"{path.parent / 'images'}."
        )
    return str(places[found.index(max(found))])


def _labelme(folder: Path) -> list[DataPart]:
    """Returns labelme's part, or those of its subfolders train, valid, ..."""
    top = [name for name in list_files(folder, [".json"]) if "/" not in name]
    children = [c for c in _folders(folder) if split_of(c.name) and list_files(c, [".json"])]
    places = [folder] if top or not children else children
    parts = []
    for place in places:
        instances, left_out = import_labelme(str(place), str(place))
        notes = tuple(f"{number} shapes left out: {what}" for what, number in left_out.items())
        split = split_of(place.name) if place != folder else ""
        parts.append(DataPart("labelme", split, str(place), instances.content(), "", notes))
    return parts


# --- XML, Supervisely ----------------------------------------------------------------


def _of_xml(folder: Path) -> list[DataPart]:
    paths = [p for p in _files(folder, ".xml") if cvat.is_cvat(p)]
    return [part for path in paths for part in _cvat(path)]


def _cvat(path: Path) -> list[DataPart]:
    groups = cvat.import_cvat(path)
    return [
        DataPart("CVAT XML", split_of(subset), images, instances.content(), "", notes)
        for subset, images, instances, notes in groups
    ]


def _of_supervisely(folder: Path) -> list[DataPart]:
    if not supervisely.is_project(folder):
        return []
    return [
        DataPart("Supervisely", split_of(name), images, instances.content(), "", notes)
        for name, images, instances, notes in supervisely.import_project(folder)
    ]


def _of_voc(folder: Path) -> list[DataPart]:
    """Returns the parts of Pascal VOC's XML files, beside their images or in a folder of
    their own; `ImageSets/Main/train.txt` and `val.txt` say which are for what."""
    children = {child.name.lower(): child for child in _folders(folder)}
    own = [children[name] for name in _XML if name in children]
    labels = next((p for p in [folder, *own] if any(map(voc.is_voc, _files(p, ".xml")[:1]))), None)
    if labels is None:
        return []
    beside = _files(labels, *image_suffixes())
    pictures = next((children[name] for name in _PICTURES if name in children), folder)
    images = str(labels if beside else pictures)
    return [
        DataPart("Pascal VOC", split, images, content, "", notes)
        for split, content, notes in voc.import_parts(images, labels, folder / "ImageSets")
    ]


# --- PNG masks -----------------------------------------------------------------------


def _of_masks(folder: Path) -> list[DataPart]:
    children = {child.name.lower(): child for child in _folders(folder)}
    objects = next((children[n] for n in _MASKS if n in children), None)
    images = next((children[n] for n in _PICTURES if n in children), None)
    if objects is None and _are_pairs(folder):
        objects = images = folder
    if objects is None or images is None or not list_files(objects, [".png"]):
        return []
    classes = children.get("segmentationclass")
    texts = [folder / n for n in ("classes.txt", "names.txt", "labels.txt")]
    names = next((read_names(str(t)) for t in texts if t.is_file()), None)
    notes: tuple[str, ...] = ()
    if names is None and classes:
        raise InputError(
            f"{classes}: the numbers of its classes have no names; write them, a name a line "
            f"from 1 on, into {texts[0]}."
        )
    if names is None:
        names = {1: "object"}
        notes = (f"one class, called `object`: there is no {texts[0].name} with another name",)
    instances, parted = import_masks(
        str(images), str(objects), str(classes or ""), names, 255 if classes else None, parts=True
    )
    if parted:
        notes += (f"{parted} masks have one value: each connected region is an object",)
    missed = (
        len(list_images(images))
        - len(instances.images)
        - (images == objects) * len(instances.images)
    )
    if missed > 0:
        notes += (f"{missed} images have no mask: left out",)
    parts = _by_subfolder(instances)
    return [DataPart("PNG masks", s, str(images), c, "", notes) for s, c in parts.items()]


def _are_pairs(folder: Path) -> bool:
    """Returns whether pictures of a folder have PNG masks of the same name beside them."""
    pictures = _files(folder, ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
    return bool(pictures) and any(p.with_suffix(".png").is_file() for p in pictures[:_FEW])


def _by_subfolder(instances: Instances) -> dict[str, dict[str, Any]]:
    """Returns the content of each split that the images' subfolders name, or all as ""."""
    content = instances.content()
    splits = {i["id"]: split_of(i["file_name"].partition("/")[0]) for i in content["images"]}
    if not {TRAIN, VAL} <= set(splits.values()):
        return {"": content}
    return {
        split: part_of(content, {i for i, s in splits.items() if s == split})
        for split in sorted(set(splits.values()))
    }


_READERS: tuple[Callable[[Path], list[DataPart]], ...] = (
    *(cityscapes.import_parts, _of_yaml, _of_supervisely, _of_jsons, _of_xml),
    *(_of_yolo_folders, _of_masks, _of_voc),
)
