"""An export's folder: what its metadata says, and running it by the format's own runtime."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import solov2_jax
from solov2_jax.data.buckets import Bucket
from solov2_jax.data.pixel_format import PixelFormat
from solov2_jax.data.transforms import shortest_edge_sizes
from solov2_jax.inference.pasting import paste_detections, scale_points
from solov2_jax.inference.prediction import Prediction
from solov2_jax.inference.preprocess import InputOptions, make_batches, make_example
from solov2_jax.io import InputError, read_json, reading
from solov2_jax.tools.export.formats import FORMATS, Runner, find_format
from solov2_jax.tools.export.program import MASKS, output_names

FILE = "metadata.json"
REPORT = "export.json"
# Of this file's form; a reader refuses what it does not know.
VERSION = 1
# What a reader uses, as types; [T] is a list of T.
_FORM = {
    "version": int,
    "format": str,
    "masks": str,
    "batch": int,
    "outputs": [str],
    "classes": {"names": [str], "ids": [int]},
    "preprocessing": {"channel_order": str, "min_size": int, "max_size": int},
    "options": {"mask_threshold": float},
    "files": {},
}
_SCALE = (
    "(value - low) / (high - low) * 255, cut to 0..255, in float32; value_range is low and high "
    "of all channels, or of each in turn"
)
_FIX = "Give a folder that export.py wrote, or export again"


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and how."""

    file_format: str
    precision: str = "float32"
    masks: str = "input"  # see `program.MASKS`
    batch: int = 1  # images per call
    buckets: tuple[Bucket, ...] = ()  # (): the config's, or landscape and portrait
    best_scores: tuple[float, ...] | None = None  # of each label, for `--score best`


def describe_export(
    options: ExportOptions, buckets: Sequence[Bucket], predictor: Any, source: str
) -> dict[str, Any]:
    """Returns the metadata of an export of a predictor, as JSON has it."""
    size, longest = predictor.input.min_size, predictor.input.max_size
    pixels = predictor.input.pixels
    example = shortest_edge_sizes(480, 640, size, longest)
    ids = [int(i) for i in predictor.category_ids]
    return {
        "version": VERSION,
        "solov2_jax": solov2_jax.__version__,
        "jax": jax.__version__,
        "source": source,
        "format": options.file_format,
        "precision": options.precision,
        "classes": {"names": list(predictor.class_names), "ids": ids},
        "preprocessing": {
            "channel_order": "RGB" if pixels.channels == 3 else "as in the picture",
            "channels": pixels.channels,
            "value_range": list(pixels.value_range),
            "dtype": np.dtype(pixels.dtype).name,
            **({"scale": _SCALE} if pixels.value_range else {}),
            "normalised_inside": True,
            "min_size": size,
            "max_size": longest,
            "resize": "bilinear, antialiased (Pillow's BILINEAR); the short side to "
            "min_size unless the long side would exceed max_size",
            "example": {"from": [480, 640], "to": [int(n) for n in example]},
            "pad": "zeros at the right and bottom, up to one of `files`",
        },
        "inputs": {
            "image": f"{np.dtype(pixels.dtype).name} [batch, height, width, {pixels.channels}]",
            "image_size": "int32 [batch, 2]: (height, width) before padding",
        },
        "outputs": list(output_names(options.masks, bool(predictor.keypoint_names))),
        "keypoints": {
            "names": list(predictor.keypoint_names),
            "skeleton": [list(pair) for pair in predictor.skeleton],
        },
        "masks": options.masks,
        "max_detections": predictor.options.max_per_image,
        "batch": options.batch,
        "files": {file_name(b, options.file_format): list(b) for b in buckets},
        "options": asdict(predictor.options),
        "best_scores": options.best_scores and list(options.best_scores),
    }


def file_name(bucket: Bucket, file_format: str) -> str:
    """Returns the file, or folder, of one padded shape."""
    height, width = bucket
    return f"{height}x{width}.{file_format}"


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the metadata of an export's folder.

    Raises:
      InputError: naming the file and the entry that is missing or of another form.
    """
    path = Path(folder) / FILE
    return check_metadata(read_json(path, "an export's metadata", _FIX), path)


def check_metadata(metadata: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns an export's metadata; raises InputError for anything else.

    Args:
      path: of the file that holds it.
    """
    version = metadata.get("version") if isinstance(metadata, dict) else None
    if type(version) is int and version != VERSION:
        raise InputError(f"{path}: has form {version}, this version reads {VERSION}; export again")
    _check_form(path, "", metadata, _FORM)
    classes, files = metadata["classes"], metadata["files"]
    names = {
        name: isinstance(size, list)
        and len(size) == 2
        and all(type(n) is int and n > 0 for n in size)
        and name == file_name((size[0], size[1]), metadata["format"])
        for name, size in files.items()
    }
    scores = metadata.get("best_scores")  # older exports have none
    for holds, what in (
        (scores is None or _are_scores(scores, len(classes["ids"])), "a score for each class"),
        (len(classes["names"]) == len(classes["ids"]), "as many classes.ids as classes.names"),
        (metadata["format"] in FORMATS, f"format one of {', '.join(FORMATS)}"),
        (metadata["masks"] in MASKS, f"masks one of {', '.join(MASKS)}"),
        (metadata["batch"] > 0, "batch at least 1"),
        (names and all(names.values()), "files such as {'64x96.onnx': [64, 96]}"),
        (
            set(metadata["outputs"])
            in [set(output_names(metadata["masks"], k)) for k in (False, True)],
            "the outputs of masks",
        ),
    ):
        if not holds:
            raise InputError(f"{path}: not an export's metadata: must have {what}. {_FIX}")
    return metadata


def _are_scores(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and 0 <= v <= 1 for v in values)
    )


def _check_form(path: str | os.PathLike[str], key: str, value: Any, form: Any) -> None:
    """Raises InputError naming the first entry whose type is another."""
    if isinstance(form, dict):
        fits, kind = isinstance(value, dict), "an object"
    elif isinstance(form, list):
        fits = isinstance(value, list) and all(type(v) is form[0] for v in value)
        kind = f"a list of {form[0].__name__}"
    elif form is float:
        fits, kind = type(value) in (int, float), "a number"
    else:
        fits, kind = type(value) is form, form.__name__
    if not fits:
        shown = "is missing" if value is None else f"is of type {type(value).__name__}"
        raise InputError(f"{path}: {key or 'the file'} {shown}, should be {kind}. {_FIX}")
    if isinstance(form, dict) and isinstance(value, dict):
        for name, inner in form.items():
            _check_form(path, f"{key}.{name}".strip("."), value.get(name), inner)


def written_by_exports(folder: Path) -> set[str]:
    """Returns the names in a folder that earlier exports wrote; none if it is no export's."""
    try:
        written = {FILE, REPORT, *read_metadata(folder)["files"]}
    except InputError:
        return set()
    if (folder / REPORT).exists():
        report = read_json(folder / REPORT, "an export's report")
        earlier = report.get("written") if isinstance(report, dict) else None
        written |= {name for name in earlier or () if isinstance(name, str)}
    return written


# --- Running it ----------------------------------------------------------------------


def input_of(metadata: dict[str, Any]) -> InputOptions:
    """Returns how images are prepared for the exported program, which normalises."""
    preprocessing = metadata["preprocessing"]
    values = tuple(preprocessing.get("value_range", ()))  # earlier exports have none
    pixels = PixelFormat(preprocessing.get("channels", 3), values)
    return InputOptions(
        channel_order=preprocessing["channel_order"],
        mean=(0.0,) * pixels.channels,
        std=(1.0,) * pixels.channels,
        min_size=preprocessing["min_size"],
        max_size=preprocessing["max_size"],
        buckets=tuple((h, w) for h, w in metadata["files"].values()),
        pixels=pixels,
    )


class ExportedPredictor:
    """Predicts with an export's files: a `PicturePredictor` like `Predictor`.

    Args:
      metadata: None: that of the folder.
      files: padded shape -> file, where it is not in the folder under its own name.
    """

    num_devices = 1  # what reads the file places it

    def __init__(
        self,
        folder: str | os.PathLike[str],
        metadata: dict[str, Any] | None = None,
        files: Mapping[Bucket, Path] | None = None,
    ):
        self.metadata = metadata or read_metadata(folder)
        self._files = dict(files or {})
        self.class_names = tuple(self.metadata["classes"]["names"])
        self.category_ids = tuple(self.metadata["classes"]["ids"])
        self.batch = int(self.metadata["batch"])
        lines = self.metadata.get("keypoints", {}).get("skeleton", ())  # earlier ones have none
        self.skeleton = tuple((int(a), int(b)) for a, b in lines)
        # Of each label, the least score with the best F1 on validation; None: not known.
        scores = self.metadata.get("best_scores")
        self.best_scores = None if scores is None else np.asarray(scores, np.float64)
        self._folder = Path(folder)
        self._format = find_format(self.metadata["format"])
        self._runners: dict[tuple[int, int], Runner] = {}
        self.input = input_of(self.metadata)

    def run(self, image: np.ndarray, image_size: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the outputs of a batch of one exported shape."""
        height, width = image.shape[1:3]
        if (height, width) not in self._runners:
            own = self._folder / file_name((height, width), self.metadata["format"])
            path = self._files.get((height, width), own)
            if not path.exists():
                raise InputError(f"{path}: the export has no file for this shape")
            outputs = tuple(self.metadata["outputs"])
            with reading(path, f"an export ({self.metadata['format']})", "Export again"):
                self._runners[height, width] = self._format.read(path, outputs)
        return self._runners[height, width](image, image_size)

    def predict_images(
        self, images: Iterable[np.ndarray | str], batch_size: int = 1
    ) -> Iterator[Prediction]:
        """Yields the prediction of each image, in order; `image_id` counts from 0.

        The export's own batch size rules; `batch_size` is there for the protocol.
        """
        del batch_size
        waiting: list[dict[str, np.ndarray]] = []
        for number, image in enumerate(images):
            waiting.append(self.preprocess(image, number))
            if len(waiting) == self.batch:
                yield from self._predict(waiting)
                waiting = []
        yield from self._predict(waiting)

    def preprocess(self, image: np.ndarray | str, image_id: int = 0) -> dict[str, np.ndarray]:
        """Returns an image as the program takes it, without a batch axis.

        Raises:
          InputError: if it fits into none of the exported shapes.
        """
        try:
            return make_example(image, image_id, self.input)
        except InputError as error:
            if "no shape in" not in str(error):
                raise
            shapes = ", ".join(f"{h}x{w}" for h, w in self.input.buckets)
            name = image if isinstance(image, str) else f"image {image_id}"
            raise InputError(
                f"{name}: fits into none of the padded shapes of {self._folder}, {shapes}; give "
                "the export's folder with all its files, or export with --shape"
            ) from error

    def _predict(self, examples: Sequence[dict[str, np.ndarray]]) -> list[Prediction]:
        done = {}
        for batch in make_batches(examples, self.batch):
            outputs = self.run(batch["image"], batch["image_size"])
            for i, image_id in enumerate(batch["image_id"].tolist()):
                if image_id != -1:
                    done[image_id] = self.paste(
                        outputs,
                        i,
                        np.arange(int(outputs["count"][i])),
                        image_size=batch["image_size"][i],
                        original=batch["original_size"][i],
                        image_id=image_id,
                    )
        return [done[int(example["image_id"])] for example in examples]

    def paste(
        self,
        outputs: dict[str, np.ndarray],
        row: int,
        kept: np.ndarray,
        *,
        image_size: np.ndarray,
        original: np.ndarray,
        image_id: int = 0,
    ) -> Prediction:
        """Returns detections of a row of a batch's outputs at the original size.

        Args:
          kept: which of the row's detections, int [n].
          image_size, original: (height, width) at the network and of the file.
        """
        if self.metadata["masks"] == "quarter":
            soft = jnp.asarray(outputs["masks"][row : row + 1])
            threshold = self.metadata["options"]["mask_threshold"]
            masks, boxes = paste_detections(soft, 0, kept, image_size, original, threshold)
        else:
            masks = resize_masks(outputs["masks"][row][kept], image_size, original)
            boxes = tight_boxes(masks)
        nonempty = boxes[:, 2] > boxes[:, 0]
        points = outputs["keypoints"][row][kept] if "keypoints" in outputs else None
        points = points if points is None else scale_points(points, image_size, original)
        return Prediction(
            masks=masks[nonempty],
            boxes=boxes[nonempty],
            scores=outputs["scores"][row][kept][nonempty],
            labels=outputs["labels"][row][kept][nonempty],
            image_id=image_id,
            class_names=self.class_names,
            keypoints=points if points is None else points[nonempty],
            skeleton=self.skeleton,
        )


def resize_masks(masks: np.ndarray, image_size: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Returns masks of the padded input, uint8 [n, h, w], at the original size, bool.

    The smooth form of a resize of 0 and 1: bilinear, then above a half.
    """
    (h, w), (height, width) = image_size.tolist(), original.tolist()
    large = np.zeros((len(masks), height, width), bool)
    for mask, result in zip(masks, large, strict=True):
        picture = Image.fromarray(mask[:h, :w] * np.uint8(255))
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        result[:] = np.asarray(resized) > 127
    return large


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """Returns (x0, y0, x1, y1) of masks, float32 [n, 4]; the ends exclusive."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for mask, box in zip(masks, boxes, strict=True):
        columns, rows = (np.flatnonzero(mask.any(axis)) for axis in (0, 1))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
