"""Labels of all pictures in one file each, to correct by hand: CVAT's and Label Studio's.

Both hold the masks pixel by pixel, holes and separate parts included, so that reading a file
back by `solov2 train --data` gives the masks that were predicted.
"""

import json
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from solov2_jax.inference.prediction import Prediction
from solov2_jax.io import InputError

CVAT, LABEL_STUDIO = "cvat.xml", "label_studio.json"
CONFIG = "label_studio_config.xml"  # the labelling interface that the tasks need
# Names of the interface's two parts, which each result refers to.
_IMAGE, _LABELS = "image", "label"
# What no XML 1.0 file may hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Of Label Studio's run lengths: bits of a count, by its two-bit number.
_LENGTHS = (3, 4, 8, 16)


@dataclass(frozen=True)
class LabelledImage:
    """Where a picture that is labelled lies, and its number in the run."""

    number: int
    path: str  # of the file, or of the copy of a frame
    file_name: str  # relative to the folder that holds all pictures


def cvat_head(class_names: Sequence[str]) -> str:
    """Returns how a file of CVAT's format begins, with the classes as labels."""
    labels = "".join(
        f"<label><name>{escape(_xml_text(name, 'class'))}</name><attributes></attributes></label>"
        for name in class_names
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
        f"<meta><task><labels>{labels}</labels></task></meta>"
    )


CVAT_TAIL = "\n</annotations>\n"


def cvat_image(prediction: Prediction, class_names: Sequence[str], image: LabelledImage) -> str:
    """Returns a picture's element of CVAT's XML for images, version 1.1.

    Raises:
      InputError: for a file name that XML cannot hold.
    """
    height, width = prediction.masks.shape[1:]
    name = quoteattr(_xml_text(image.file_name.replace(os.sep, "/"), "file"))
    lines = [f'<image id="{image.number}" name={name} width="{width}" height="{height}">']
    for i, label in enumerate(prediction.labels.tolist()):
        (rows, columns), mask = prediction.crop(i)
        runs = ", ".join(map(str, row_runs(mask).tolist()))
        place = f'left="{columns.start}" top="{rows.start}"'
        size = f'width="{mask.shape[1]}" height="{mask.shape[0]}"'
        lines.append(
            f'<mask label={quoteattr(class_names[int(label)])} source="auto" occluded="0" '
            f'rle="{runs}" {place} {size} z_order="0"></mask>'
        )
    return "\n".join([*lines, "</image>"])


def _xml_text(text: str, what: str) -> str:
    if _NOT_XML.search(text):
        raise InputError(
            f"the {what} name {text!r} holds characters that CVAT's XML cannot; rename it, or "
            "leave cvat out of --write"
        )
    return text


def row_runs(mask: np.ndarray) -> np.ndarray:
    """Returns lengths of runs, row by row, of a mask bool [h, w]: outside first, then inside."""
    flat = np.concatenate([[False], mask.ravel(), [not mask.flat[-1]]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], ends]))


def label_studio_config(class_names: Sequence[str]) -> str:
    """Returns the labelling interface for the tasks of `label_studio_task`."""
    labels = "".join(
        f"    <Label value={quoteattr(_xml_text(name, 'class'))}/>\n" for name in class_names
    )
    return (
        f'<View>\n  <Image name="{_IMAGE}" value="${_IMAGE}" zoom="true"/>\n'
        f'  <BrushLabels name="{_LABELS}" toName="{_IMAGE}">\n{labels}  </BrushLabels>\n</View>\n'
    )


def label_studio_task(
    prediction: Prediction, class_names: Sequence[str], image: LabelledImage
) -> str:
    """Returns a picture's task with its objects as an annotation of brush strokes, json.

    The picture is named as local storage serves it, from the parent of the folder that
    holds all pictures.
    """
    height, width = (int(side) for side in prediction.masks.shape[1:])
    path, name = (p.replace(os.sep, "/") for p in (os.path.abspath(image.path), image.file_name))
    root = os.path.basename(path.removesuffix(name).rstrip("/")) if path.endswith(name) else ""
    results: list[dict[str, Any]] = []
    for i, label in enumerate(prediction.labels.tolist()):
        results.append(
            {
                "id": f"{image.number}-{i}",
                "type": "brushlabels",
                "from_name": _LABELS,
                "to_name": _IMAGE,
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {
                    "format": "rle",
                    "rle": brush_runs(prediction, i),
                    "brushlabels": [class_names[label]],
                },
                "score": round(float(prediction.scores[i]), 4),
            }
        )
    place = urllib.parse.quote(f"{root}/{name}", errors="surrogateescape")
    data = {_IMAGE: f"/data/local-files/?d={place}"}
    return json.dumps({"data": data, "annotations": [{"result": results}]})


def brush_runs(prediction: Prediction, index: int) -> list[int]:
    """Returns an object's pixels as Label Studio packs them: bytes of four equal channels.

    Source: the format of thi.ng/rle-pack, which `importers.label_studio.decode_brush` reads.
    """
    height, width = prediction.masks.shape[1:]
    (rows, columns), mask = prediction.crop(index)
    band = np.zeros((mask.shape[0], width), bool)
    band[:, columns] = mask
    runs = row_runs(band) * 4
    runs[0] += rows.start * width * 4
    rest = (height - rows.stop) * width * 4
    values = [(i % 2) * 255 for i in range(len(runs))]
    if values[-1]:
        runs, values = np.append(runs, rest), [*values, 0]
    else:
        runs[-1] += rest
    most = 1 << _LENGTHS[-1]
    bits = [f"{height * width * 4:032b}{7:05b}", *(f"{n - 1:04b}" for n in _LENGTHS)]
    for run, value in zip(runs.tolist(), values, strict=True):
        for count in [most] * (run // most) + [run % most] * (run % most > 0):
            kind = next(k for k, n in enumerate(_LENGTHS) if count <= 1 << n)
            bits.append(f"1{kind:02b}{count - 1:0{_LENGTHS[kind]}b}{value:08b}")
    text = "".join(bits)
    return list(int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big"))
