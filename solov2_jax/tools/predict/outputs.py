"""What is written about a picture: overlay, masks, cut-outs, labels to correct by hand.

<name>.jpg, .png     overlay; of a video <name>.mp4
predictions.json     COCO's results
masks/<name>/        000_cat.png: one mask each, 0 and 255, of the picture's size
cutouts/<name>/      000_cat.png: the object alone, transparent around it
yolo/                labels/<name>.txt, classes.txt and data.yaml: YOLO-seg
labelme/             <name>.json
cvat.xml             CVAT's XML for images, version 1.1
label_studio.json    Label Studio's tasks, with label_studio_config.xml
frames/              <name>.jpg: of a video or an address, for the labels
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.config import suggest
from solov2_jax.inference.draw import draw_prediction
from solov2_jax.inference.prediction import Prediction, reaches
from solov2_jax.io import InputError
from solov2_jax.tools.predict.label_files import (
    CONFIG,
    CVAT,
    CVAT_TAIL,
    LABEL_STUDIO,
    LabelledImage,
    cvat_head,
    cvat_image,
    label_studio_config,
    label_studio_task,
)
from solov2_jax.tools.predict.output_folder import (
    RESULTS,
    OutputFolder,
    ResultsFile,
    during,
    names_in,
    of_process,
)
from solov2_jax.tools.predict.polygons import join_rings, mask_polygons
from solov2_jax.tools.predict.sources import BrokenFile, Frame, ImageFiles, Source
from solov2_jax.tools.predict.video import CODECS

# Files about all pictures, by format.
RESULT_FILES = {"coco": RESULTS, "cvat": CVAT, "label_studio": LABEL_STUDIO}
LABEL_WRITERS = {"cvat": cvat_image, "label_studio": label_studio_task}
FORMATS = ("overlay", "coco", "masks", "cutouts", "yolo", "labelme", *LABEL_WRITERS)
JPEG_QUALITY = 92
JPEGS = (".jpg", ".jpeg", ".jfif")
OBJECT_FILE = r"\d{3,}_.*\.png"  # of masks and cutouts
LABELS, OBJECTS = {"yolo", "labelme", *LABEL_WRITERS}, {"masks", "cutouts"}


@dataclass(frozen=True)
class DetectionFilter:
    """What a detection must be to be kept."""

    score: float | np.ndarray  # at least; one for all, or that of each class [K]
    labels: frozenset[int] | None = None  # None: all
    most: int = 0  # best ones of an image; 0: all

    @property
    def lowest(self) -> float:
        """The least score that any class is kept from."""
        return float(np.min(self.score))

    def __call__(self, prediction: Prediction) -> Prediction:
        """Returns the detections that are kept, still best first."""
        keep = reaches(prediction.scores, prediction.labels, self.score)
        if self.labels is not None:
            keep &= np.isin(prediction.labels, list(self.labels))
        chosen = np.flatnonzero(keep)
        return prediction.take(chosen[: self.most] if self.most else chosen)


def parse_classes(
    words: Sequence[str], class_names: Sequence[str], category_ids: Sequence[int]
) -> frozenset[int] | None:
    """Returns the labels of class names or category ids; None, all, without a word."""
    words = [word.strip() for word in words if word.strip()]
    labels: set[int] = set()
    for word in words:
        found = [i for i, name in enumerate(class_names) if name == word]
        if not found:
            folded = word.casefold()
            found = [i for i, name in enumerate(class_names) if name.casefold() == folded]
        if not found and word.isdigit():
            found = [i for i, number in enumerate(category_ids) if number == int(word)]
        if not found:
            why = "category id." if word.isdigit() else f"class{suggest(word, class_names)}"
            raise InputError(
                f"--classes {word}: no such {why} The classes are {', '.join(class_names)}"
            )
        labels.update(found)
    return frozenset(labels) if words else None


def parse_formats(words: Iterable[str]) -> tuple[str, ...]:
    """Returns the formats that `--write` names."""
    formats = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    unknown = [word for word in formats if word not in FORMATS]
    if unknown or not formats:
        raise ValueError(
            f"--write {','.join(unknown)}: give one or more of {', '.join(FORMATS)}, "
            "such as --write=overlay,coco"
        )
    return formats


def check_outputs(sources: Sequence[Source], folder: OutputFolder, formats: Sequence[str]) -> None:
    """Raises if an output cannot be written, or would replace an input or a user's file."""
    if os.path.exists(folder.path) and not os.path.isdir(folder.path):
        raise InputError(f"--output {folder.path}: is a file; give a folder")
    results = [name for kind, name in RESULT_FILES.items() if kind in formats]
    names = [*results, *(during(n, s) for n in results for s in ("partial", "recovered"))]
    others = range(1, folder.num_processes)
    names += [of_process(during(n, "partial"), i) for n in results for i in others]
    names += ["yolo/data.yaml", "yolo/classes.txt"] if "yolo" in formats else []
    names += [CONFIG] if "label_studio" in formats else []
    paths = [os.path.join(folder.path, *name.split("/")) for name in names]
    for source in sources:
        paths += planned_files(source, folder.path, formats)
    inputs = {os.path.realpath(path) for source in sources for path in source.paths}
    for path in paths:
        if os.path.realpath(path) in inputs:
            raise InputError(
                f"--output {folder.path}: {os.path.basename(path)} would overwrite an input; "
                "choose another folder"
            )
    folder.check(paths)


def planned_files(source: Source, output: str, formats: Sequence[str]) -> list[str]:
    """Returns the paths that a source's outputs may be written to.

    Of a video's frames and of objects, whose names are known only later: the files that
    exist and look like one.
    """
    if isinstance(source, BrokenFile):
        return []
    paths = []
    if isinstance(source, ImageFiles):
        suffixes = {n: overlay_suffix(p) for n, p in zip(source.names, source.paths, strict=True)}
        stays = source.stays
    else:
        if "overlay" in formats and source.makes_video:
            paths += [os.path.join(output, source.name + s) for s in {c[1] for c in CODECS}]
        a_frame = re.compile(re.escape(source.name) + r"_\d{6,}")
        folders = [
            os.path.join(output, f) for f in ("", "frames", "yolo/labels", "labelme", *OBJECTS)
        ]
        names = {os.path.splitext(n)[0] for folder in folders for n in names_in(folder)}
        suffix = "" if source.makes_video else ".png"
        suffixes, stays = {n: suffix for n in names if a_frame.fullmatch(n)}, False
    for name, suffix in suffixes.items():
        for kind, path in picture_paths(output, formats, name, suffix, stays).items():
            paths += object_files(path) if kind in OBJECTS else [path]
    return paths


def object_files(folder: str) -> list[str]:
    """Returns the files of a folder that are named as objects' are."""
    return [os.path.join(folder, n) for n in names_in(folder) if re.fullmatch(OBJECT_FILE, n)]


def picture_paths(
    output: str, formats: Sequence[str], name: str, suffix: str, stays: bool
) -> dict[str, str]:
    """Returns where what is written about a picture goes, by format; also its "frame".

    Args:
      suffix: of the overlay; "": it goes into a video.
      stays: the picture is a file already, else labels need one.
    """
    files = {
        "overlay": name + suffix,
        "frame": f"frames/{name}.jpg",
        "yolo": f"yolo/labels/{name}.txt",
        "labelme": f"labelme/{name}.json",
        "masks": f"masks/{name}",
        "cutouts": f"cutouts/{name}",
    }
    kinds = set(formats)
    if not suffix:
        kinds.discard("overlay")
    if not stays and kinds & LABELS:
        kinds.add("frame")
    return {k: os.path.join(output, *f.split("/")) for k, f in files.items() if k in kinds}


def overlay_suffix(path: str) -> str:
    """Returns what the overlay of an image file ends with: .jpg of a JPEG, else .png."""
    return ".jpg" if os.path.splitext(path)[1].lower() in JPEGS else ".png"


def open_results(
    folder: OutputFolder, formats: Sequence[str], class_names: Sequence[str]
) -> dict[str, ResultsFile]:
    """Returns the files about all pictures that the formats ask for, by format."""
    files = {}
    for kind in [kind for kind in RESULT_FILES if kind in formats]:
        if kind == "cvat":
            head, tail = cvat_head(class_names).encode(), CVAT_TAIL.encode()
            files[kind] = ResultsFile(folder, CVAT, head=head, tail=tail, separator=b"\n")
        else:
            files[kind] = ResultsFile(folder, RESULT_FILES[kind])
    return files


class OutputFiles:
    """Writes the formats with files for each picture; `open_results` has the others.

    Args:
      folder: where to; a path is an `OutputFolder` that overwrites nothing.
      formats: of FORMATS.
      class_names: of all labels.
      color_by, labels: of overlays, see `draw.draw_prediction`.
    """

    def __init__(
        self,
        folder: OutputFolder | str,
        formats: Sequence[str],
        class_names: Sequence[str],
        color_by: str = "object",
        labels: bool = True,
    ):
        self.folder = OutputFolder(folder) if isinstance(folder, str) else folder
        self.formats = tuple(formats)
        self.class_names = tuple(class_names)
        self.color_by, self.labels = color_by, labels
        if self.folder.process:  # the first one writes what is about all pictures
            return
        if "yolo" in self.formats:
            self._write_yolo_classes()
        if "label_studio" in self.formats:
            where = os.path.join(self.folder.path, CONFIG)
            self._write_text(label_studio_config(self.class_names), where)

    def labelled(self, frame: Frame, number: int) -> LabelledImage:
        """Returns the picture that labels are about: the file, or the copy of a frame."""
        where = picture_paths(self.folder.path, self.formats, frame.name, "", frame.stays)
        if "frame" not in where:
            return LabelledImage(number, frame.path, frame.file_name)
        path = where["frame"]
        return LabelledImage(number, path, os.path.relpath(path, self.folder.path))

    def write(self, frame: Frame, prediction: Prediction) -> np.ndarray | None:
        """Writes a picture's files; returns the overlay of a video's frame."""
        assert frame.image is not None
        suffix = "" if frame.in_video else overlay_suffix(frame.path)
        where = picture_paths(self.folder.path, self.formats, frame.name, suffix, frame.stays)
        overlay = None
        if "overlay" in self.formats:
            overlay = draw_prediction(
                frame.image, prediction, self.class_names, self.color_by, self.labels
            )
        if overlay is not None and "overlay" in where:
            self._save(overlay, where["overlay"])
            overlay = None
        if "frame" in where:
            self._save(frame.image, where["frame"])
        for kind in OBJECTS & where.keys():
            self._write_objects(kind, frame.image, prediction, where[kind])
        if "yolo" in where:
            self._write_text(yolo_lines(prediction), where["yolo"])
        if "labelme" in where:
            image = where.get("frame", frame.path)
            image_path = os.path.relpath(image, os.path.dirname(where["labelme"]))
            content = labelme_content(prediction, self.class_names, image_path)
            self._write_text(json.dumps(content, indent=1), where["labelme"])
        return overlay

    def _write_objects(
        self, kind: str, image: np.ndarray, prediction: Prediction, where: str
    ) -> None:
        self.folder.remove_ours(object_files(where))  # of a run that found more
        for i, label in enumerate(prediction.labels.tolist()):
            window, mask = prediction.crop(i)
            if kind == "masks":
                picture = np.zeros(image.shape[:2], bool)
                picture[window] = mask
            else:
                alpha = (mask * np.uint8(255))[..., None]
                picture = np.concatenate([image[window], alpha], axis=2)
            name = f"{i:03d}_{file_word(self.class_names[label])}.png"
            self._save(picture, os.path.join(where, name))

    def _write_yolo_classes(self) -> None:
        folder = os.path.join(self.folder.path, "yolo")
        lines = [f"  {i}: {json.dumps(name)}" for i, name in enumerate(self.class_names)]
        self._write_text("\n".join(["names:", *lines, ""]), os.path.join(folder, "data.yaml"))
        names = [" ".join(name.split()) for name in self.class_names]  # one line each
        self._write_text("\n".join([*names, ""]), os.path.join(folder, "classes.txt"))

    def _save(self, picture: np.ndarray, path: str) -> None:
        file_format = "JPEG" if path.endswith(".jpg") else "PNG"
        with self.folder.replacing(path) as temporary:
            Image.fromarray(picture).save(temporary, file_format, quality=JPEG_QUALITY)

    def _write_text(self, text: str, path: str) -> None:
        with self.folder.replacing(path) as temporary:
            temporary.write_text(text, "utf-8")


def file_word(name: str) -> str:
    """Returns a class name as a part of a file name."""
    return re.sub(r"[^\w\-]+", "_", name).strip("_")[:60] or "object"


def yolo_lines(prediction: Prediction) -> str:
    """Returns a line for each object: label, then x y of its outline over the size.

    Parts and holes are joined by ways without width, as the format has one polygon.
    """
    height, width = prediction.masks.shape[1:]
    lines = []
    for i, label in enumerate(prediction.labels.tolist()):
        rings = [ring for part in object_polygons(prediction, i) for ring in part]
        points = join_rings(rings) / (width, height)
        lines.append(" ".join([str(label), *(f"{v:.6f}" for v in points.ravel())]))
    return "\n".join([*lines, ""]) if lines else ""


def labelme_content(
    prediction: Prediction, class_names: Sequence[str], image_path: str
) -> dict[str, Any]:
    """Returns the json of labelme (and of tools that read it).

    The parts of an object are shapes of one `group_id`; a hole is cut into its part.

    Args:
      image_path: relative to the json's folder.
    """
    shapes = []
    for i, label in enumerate(prediction.labels.tolist()):
        parts = object_polygons(prediction, i)
        shape = {
            "label": class_names[label],
            "group_id": i if len(parts) > 1 else None,
            "description": f"score {prediction.scores[i]:.3f}",
            "shape_type": "polygon",
            "flags": {},
        }
        shapes += [{**shape, "points": join_rings(part).round(2).tolist()} for part in parts]
    height, width = prediction.masks.shape[1:]
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path.replace(os.sep, "/"),
        "imageData": None,
        "imageHeight": int(height),
        "imageWidth": int(width),
    }


def object_polygons(prediction: Prediction, index: int) -> list[list[np.ndarray]]:
    """Returns an object's parts in the frame of the picture; see `mask_polygons`."""
    (rows, columns), mask = prediction.crop(index)
    return mask_polygons(mask, columns.start, rows.start)
