"""An exported folder, or a single file of one -> a predictor."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from solov2_jax.data.buckets import Bucket
from solov2_jax.io import InputError, read_json, reading
from solov2_jax.tools.export.exported import FILE, ExportedPredictor, check_metadata
from solov2_jax.tools.export.formats import FORMATS, METADATA_KEY, find_format


def open_export(path: str | os.PathLike[str]) -> ExportedPredictor:
    """Returns the predictor of what `solov2 export` wrote.

    Args:
      path: the folder; or one of its files, which stands for the folder as long as the
        metadata.json lies beside it. A file alone predicts images of its padded shape.

    Raises:
      InputError: for anything else, and where the format's packages are missing.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(f"--model {path}: no such file or folder; give what `solov2 export` wrote")
    kind = place.suffix.removeprefix(".")
    if kind in FORMATS:
        if (place.parent / FILE).is_file():
            predictor = ExportedPredictor(place.parent)
            if place.name in predictor.metadata["files"]:
                return predictor
        return _open_file(place, kind)
    if place.is_dir():
        if not (place / FILE).is_file():
            raise InputError(
                f"--model {path}: holds no {FILE}, so it is no export; give the folder that "
                "`solov2 export` wrote, or one of its files"
            )
        return ExportedPredictor(place)
    raise InputError(
        f"--model {path}: is none of .{', .'.join(FORMATS)}, and no folder of an export"
    )


def _open_file(path: Path, kind: str) -> ExportedPredictor:
    """Returns the predictor of a file by itself."""
    find_format(kind)
    fix = "Give the folder that `solov2 export` wrote"
    metadata: Any = None
    shape: Bucket | None = None
    if kind == "stablehlo":
        raise InputError(f"--model {path}: needs the {FILE} that was written beside it. {fix}")
    with reading(path, f"an export ({kind})", fix):
        if kind == "onnx":
            metadata, shape = _onnx_metadata(path)
        elif kind == "tflite":
            with zipfile.ZipFile(path) as archive:
                metadata = json.loads(archive.read(FILE))
        else:
            metadata = read_json(path / "assets.extra" / FILE, "an export's metadata", fix)
    metadata = check_metadata(metadata, path)
    files = {name: (int(h), int(w)) for name, (h, w) in metadata["files"].items()}
    shape = (
        shape or files.get(path.name) or (next(iter(files.values())) if len(files) == 1 else None)
    )
    if shape is None or shape not in files.values():
        raise InputError(
            f"--model {path}: which of the padded shapes it has is not known; call it by one of "
            f"its names, {', '.join(files)}"
        )
    predictor = ExportedPredictor(path, metadata, {shape: path})
    predictor.input = replace(predictor.input, buckets=(shape,))
    return predictor


def _onnx_metadata(path: Path) -> tuple[Any, Bucket]:
    """Returns what an ONNX file says of itself, and its image's (height, width)."""
    import onnx

    model = onnx.load(str(path))
    texts = {p.key: p.value for p in model.metadata_props}
    if METADATA_KEY not in texts:
        raise InputError(
            f"--model {path}: was not written by `solov2 export`: its metadata lacks {METADATA_KEY}"
        )
    (image,) = (i for i in model.graph.input if i.name == "image")
    height, width = (d.dim_value for d in image.type.tensor_type.shape.dim[1:3])
    return json.loads(texts[METADATA_KEY]), (height, width)
