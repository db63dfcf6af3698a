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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.inference.draw import draw_prediction
from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.predict.polygons import join_rings, mask_polygons
from solov2_jax.tools.predict.sources import Frame

FORMATS = ("overlay", "coco", "masks", "cutouts", "yolo", "labelme")
JPEG_QUALITY = 92
JPEGS = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Style:
    """How an overlay looks; see `draw.draw_prediction`."""

    color_by: str = "object"
    labels: bool = True


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


def check_output(output: str, inputs: Iterable[str], overlays: Iterable[str]) -> None:
    """Raises if the folder is a file, or an overlay would replace an input."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"--output {output}: is a file; give a folder")
    taken = {os.path.realpath(path) for path in inputs}
    for overlay in overlays:
        if os.path.realpath(overlay) in taken:
            raise ValueError(
                f"--output {output}: the picture {os.path.basename(overlay)} would "
                "overwrite an input; choose another folder"
            )


def overlay_path(output: str, name: str, path: str) -> str:
    """Returns where the overlay of an image file goes: .jpg of a JPEG, else .png."""
    suffix = os.path.splitext(path)[1].lower()
    return os.path.join(output, name + (".jpg" if suffix in JPEGS else ".png"))


class OutputFiles:
    """Writes the formats but "coco", which is one file of all pictures.

    Args:
      formats: of FORMATS.
      class_names: of all labels.
    """

    def __init__(
        self,
        output: str,
        formats: Sequence[str],
        class_names: Sequence[str],
        style: Style,
    ):
        self.output, self.formats = output, tuple(formats)
        self.class_names, self.style = tuple(class_names), style
        os.makedirs(output, exist_ok=True)
        if "yolo" in self.formats:
            self._write_yolo_classes()

    def write(self, frame: Frame, prediction: Prediction) -> np.ndarray | None:
        """Writes a picture's files; returns the overlay of a video's frame."""
        assert frame.image is not None
        video = frame.index is not None
        shown = None
        if "overlay" in self.formats:
            picture = draw_prediction(
                frame.image,
                prediction,
                self.class_names,
                self.style.color_by,
                self.style.labels,
            )
            if video:
                shown = picture
            else:
                save(picture, overlay_path(self.output, frame.name, frame.path))
        source = frame.path
        if not frame.stays and {"yolo", "labelme"} & set(self.formats):
            source = self._path("frames", f"{frame.name}.jpg")
            save(frame.image, source)
        if "masks" in self.formats:
            self._write_objects("masks", frame, prediction)
        if "cutouts" in self.formats:
            self._write_objects("cutouts", frame, prediction)
        if "yolo" in self.formats:
            text = yolo_lines(prediction)
            write_text(text, self._path("yolo", "labels", f"{frame.name}.txt"))
        if "labelme" in self.formats:
            path = self._path("labelme", f"{frame.name}.json")
            image_path = os.path.relpath(source, os.path.dirname(path))
            content = labelme_content(prediction, self.class_names, image_path)
            write_text(json.dumps(content, indent=1), path)
        return shown

    def _path(self, *parts: str) -> str:
        path = os.path.join(self.output, *parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def _write_objects(self, kind: str, frame: Frame, prediction: Prediction) -> None:
        folder = Path(self._path(kind, frame.name, "."))
        for old in folder.glob("*.png"):
            if re.fullmatch(r"\d{3,}_.*\.png", old.name):
                old.unlink()  # of a run that found more
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
            save(picture, str(folder / name))

    def _write_yolo_classes(self) -> None:
        lines = [f"  {i}: {json.dumps(name)}" for i, name in enumerate(self.class_names)]
        text = "\n".join(["names:", *lines, ""])
        write_text(text, self._path("yolo", "data.yaml"))
        write_text("\n".join([*self.class_names, ""]), self._path("yolo", "classes.txt"))


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


def save(picture: np.ndarray, path: str) -> None:
    """Writes a picture, whole or not at all."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    Image.fromarray(picture).save(temporary, quality=JPEG_QUALITY)
    os.replace(temporary, path)


def write_text(text: str, path: str) -> None:
    """Writes a text file, whole or not at all."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    Path(temporary).write_text(text, "utf-8")
    os.replace(temporary, path)
