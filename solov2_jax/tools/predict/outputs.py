"""What is written about a picture: overlay, masks, cut-outs, labels to correct by hand.

<name>.jpg, .png     overlay; of a video <name>.mp4
predictions.json     COCO's results
masks/<name>/        000_cat.png: one mask each, 0 and 255, of the picture's size
cutouts/<name>/      000_cat.png: the object alone, transparent around it
yolo/                labels/<name>.txt, classes.txt and data.yaml: YOLO-seg
labelme/             <name>.json
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
from solov2_jax.inference.prediction import Prediction
from solov2_jax.io import InputError
from solov2_jax.tools.predict.output_folder import (
    PARTIAL,
    RECOVERED,
    RESULTS,
    OutputFolder,
    matching_files,
)
from solov2_jax.tools.predict.polygons import join_rings, mask_polygons
from solov2_jax.tools.predict.sources import Frame, ImageFiles, Source, VideoFile
from solov2_jax.tools.predict.video import CODECS

FORMATS = ("overlay", "coco", "masks", "cutouts", "yolo", "labelme")
JPEG_QUALITY = 92
JPEGS = (".jpg", ".jpeg", ".jfif")
OBJECT_FILE = r"\d{3,}_.*\.png"  # of masks and cutouts
# Where labels go: folders, and the end of the name.
LABEL_FILES = {"yolo": ("yolo", "labels", ".txt"), "labelme": ("labelme", ".json")}


@dataclass(frozen=True)
class DetectionFilter:
    """What a detection must be to be kept."""

    score: float  # at least
    labels: frozenset[int] | None = None  # None: all
    most: int = 0  # best ones of an image; 0: all

    def __call__(self, prediction: Prediction) -> Prediction:
        """Returns the detections that are kept, still best first."""
        keep = prediction.scores >= self.score
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
    names = [RESULTS, PARTIAL, RECOVERED] if "coco" in formats else []
    names += ["yolo/data.yaml", "yolo/classes.txt"] if "yolo" in formats else []
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

    Names that are known only later (a video's frames, an object's mask) are those that
    exist and look like one.
    """
    paths, patterns = [], []  # patterns: (folder, regular expression)
    per_frame = ""  # expression of the names of a video's frames
    if isinstance(source, ImageFiles):
        stems = list(zip(source.names, source.paths, strict=True))
        frames = not source.stays
    elif isinstance(source, VideoFile):
        base = os.path.join(output, source.name)
        if "overlay" in formats and source.makes_video:
            paths += [base + suffix for suffix in sorted({suffix for _, suffix, _ in CODECS})]
        elif "overlay" in formats:
            patterns.append((output, re.escape(source.name) + r"_\d{6,}\.png"))
        stems, frames = [], True
        per_frame = re.escape(source.name) + r"_\d{6,}"
    else:
        return []
    for name, path in stems:
        paths += [overlay_path(output, name, path)] if "overlay" in formats else []
        paths += [os.path.join(output, "frames", f"{name}.jpg")] if frames else []
    for kind, parts in LABEL_FILES.items():
        if kind not in formats:
            continue
        where = os.path.join(output, *parts[:-1])
        paths += [os.path.join(where, name + parts[-1]) for name, _ in stems]
        if not stems:
            patterns.append((where, per_frame + re.escape(parts[-1])))
            patterns.append((os.path.join(output, "frames"), per_frame + r"\.jpg"))
    for kind in {"masks", "cutouts"} & set(formats):
        folders = [os.path.join(output, kind, name) for name, _ in stems]
        if not stems:
            folders = matching_files(os.path.join(output, kind), per_frame)
        patterns += [(folder, OBJECT_FILE) for folder in folders]
    for where, pattern in patterns:
        paths += matching_files(where, pattern)
    return paths


def overlay_path(output: str, name: str, path: str) -> str:
    """Returns where the overlay of an image file goes: .jpg of a JPEG, else .png."""
    suffix = os.path.splitext(path)[1].lower()
    return os.path.join(output, name + (".jpg" if suffix in JPEGS else ".png"))


class OutputFiles:
    """Writes the formats but "coco", which is one file of all pictures.

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
        if "yolo" in self.formats:
            self._write_yolo_classes()

    def write(self, frame: Frame, prediction: Prediction) -> np.ndarray | None:
        """Writes a picture's files; returns the overlay of a video's frame."""
        assert frame.image is not None
        overlay = None
        if "overlay" in self.formats:
            overlay = draw_prediction(
                frame.image, prediction, self.class_names, self.color_by, self.labels
            )
            if not frame.in_video:
                self._save(overlay, overlay_path(self.folder.path, frame.name, frame.path))
                overlay = None
        source = frame.path
        if not frame.stays and {"yolo", "labelme"} & set(self.formats):
            source = self._path("frames", f"{frame.name}.jpg")
            self._save(frame.image, source)
        for kind in ("masks", "cutouts"):
            if kind in self.formats:
                self._write_objects(kind, frame, prediction)
        if "yolo" in self.formats:
            path = self._path("yolo", "labels", f"{frame.name}.txt")
            self._write_text(yolo_lines(prediction), path)
        if "labelme" in self.formats:
            path = self._path("labelme", f"{frame.name}.json")
            image_path = os.path.relpath(source, os.path.dirname(path))
            content = labelme_content(prediction, self.class_names, image_path)
            self._write_text(json.dumps(content, indent=1), path)
        return overlay

    def _path(self, *parts: str) -> str:
        return os.path.join(self.folder.path, *parts)

    def _write_objects(self, kind: str, frame: Frame, prediction: Prediction) -> None:
        where = self._path(kind, frame.name)
        self.folder.remove_ours(where, OBJECT_FILE)  # of a run that found more
        assert frame.image is not None
        for i, label in enumerate(prediction.labels.tolist()):
            window, mask = prediction.crop(i)
            if kind == "masks":
                picture = np.zeros(frame.image.shape[:2], bool)
                picture[window] = mask
            else:
                alpha = (mask * np.uint8(255))[..., None]
                picture = np.concatenate([frame.image[window], alpha], axis=2)
            name = f"{i:03d}_{file_word(self.class_names[label])}.png"
            self._save(picture, os.path.join(where, name))

    def _write_yolo_classes(self) -> None:
        lines = [f"  {i}: {json.dumps(name)}" for i, name in enumerate(self.class_names)]
        self._write_text("\n".join(["names:", *lines, ""]), self._path("yolo", "data.yaml"))
        names = [" ".join(name.split()) for name in self.class_names]  # one line each
        self._write_text("\n".join([*names, ""]), self._path("yolo", "classes.txt"))

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
        for part in parts:
            points = join_rings(part).round(2).tolist()
            shapes.append(
                {
                    "label": class_names[label],
                    "points": points,
                    "group_id": i if len(parts) > 1 else None,
                    "description": f"score {prediction.scores[i]:.3f}",
                    "shape_type": "polygon",
                    "flags": {},
                }
            )
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
