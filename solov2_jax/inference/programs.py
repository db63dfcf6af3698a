"""The two compiled programs of inference.

The first is the network with its post-processing, for a batch of one padded shape. The
second turns the soft masks of a few detections into masks of the original image, on a
canvas whose size is rounded up, so that thousands of differently sized photographs need
a handful of compilations.
"""

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int, Num

from solov2_jax import ops
from solov2_jax.data.buckets import STRIDE
from solov2_jax.io import InputError, read_json, write_json
from solov2_jax.models.conv import transformed_for
from solov2_jax.paste import paste_masks
from solov2_jax.postprocess import detect
from solov2_jax.progress import working
from solov2_jax.stored import load_or_compile
from solov2_jax.structs import Detections, Outputs

log = logging.getLogger(__name__)

# Sides of canvases are multiples of it. Up to the limit they are square, so that two serve
# a folder of photographs: the masks of one with 640 x 480 pixels are pasted as fast on
# 768 x 768 as on 640 x 512, and each canvas is a program.
CANVAS_DIVISOR, MAX_SQUARE_CANVAS = 256, 1024
# Pixels of the masks that are pasted together: 16 masks of 1024 x 1024.
CHUNK_PIXELS = 16 * 1024 * 1024
MAX_CHUNK = 16


@dataclass(frozen=True)
class DetectOptions:
    """Keyword arguments of `postprocess.detect`; see `configs/base.py`."""

    num_grids: tuple[int, ...]
    score_threshold: float
    mask_threshold: float
    update_threshold: float
    nms_pre: int
    max_per_image: int
    nms_type: str
    nms_kernel: str
    nms_sigma: float
    nms_iou: float
    max_candidates: int


@functools.lru_cache(maxsize=16)
def compile_detect(
    model: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    options: DetectOptions,
) -> "DetectPrograms":
    """Returns the compiled (variables, image, image_size) -> Detections.

    Cached, so that every evaluation during a training run uses the same programs.
    """

    def run(variables, image, image_size):
        return detect_images(
            model, variables, image, image_size, mean=mean, std=std, options=options
        )

    name = repr(("detect", model, mean, std, options))
    return DetectPrograms(jax.jit(run, compiler_options=compiler_options()), name)


class DetectPrograms:
    """One compiled program for each shape of images; safe to use from several threads.

    Args:
      run: jitted (variables, image, image_size) -> Detections.
      name: says what it computes besides, for `stored.load_or_compile`.
    """

    def __init__(self, run: Any, name: str):
        self._run, self._name = run, name
        self._lock = threading.Lock()
        self._programs: dict[Any, Future] = {}
        # Two: where cores are few, more at once finish none of them sooner.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="compile")

    def __call__(
        self, variables: Any, image: Num[Any, "B h w c"], image_size: Int[Any, "B 2"]
    ) -> Detections:
        """Returns the detections, by the shape's program; waits until it is there."""
        program = self.start(variables, image.shape, image.dtype).result()
        return program(variables, image, image_size)

    def start(self, variables: Any, shape: tuple[int, ...], dtype: Any = np.uint8) -> Future:
        """Returns the program for images [B, h, w, C], compiled by another thread."""
        leaves, structure = jax.tree.flatten(variables)
        shardings = tuple(getattr(leaf, "sharding", None) for leaf in leaves)
        key = (shape, np.dtype(dtype), structure, shardings)
        with self._lock:
            if key not in self._programs:
                self._programs[key] = self._pool.submit(self._compile, variables, shape, dtype)
            return self._programs[key]

    def _compile(self, variables: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        version = hashlib.sha256(f"{self._name} {jax.__version__}".encode()).hexdigest()[:16]
        key = f"{version} {shape}"
        seconds = compile_seconds().get(key)
        estimate = "" if seconds is None else f" ({seconds:.0f} s the last time)"
        log.info("compiling for %d image(s) padded to %d x %d%s", *shape[:3], estimate)
        start = time.perf_counter()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            variables,
        )
        image = jax.ShapeDtypeStruct(shape, dtype)
        image_size = jax.ShapeDtypeStruct((shape[0], 2), jnp.int32)
        with working("compiling for {} image(s) of {} x {}".format(*shape)):
            program = load_or_compile(self._run, (abstract, image, image_size), self._name)
        with self._lock:
            note_compile_seconds(key, time.perf_counter() - start)
        return program


def compile_seconds() -> dict[str, float]:
    """Returns how long programs took to compile, or to read, the last time, by name.

    Only a hint for the log: without a file that can be read it is empty.
    """
    path = _seconds_file()
    if path is None or not path.is_file():
        return {}
    try:
        values = read_json(path, "a file of compile times")
    except InputError as error:
        log.info("compile times of earlier runs are not known: %s", error)
        return {}
    known = values.items() if isinstance(values, dict) else ()
    return {name: value for name, value in known if isinstance(value, int | float)}


def note_compile_seconds(name: str, seconds: float) -> None:
    """Keeps a program's time beside the cached programs, if they are cached."""
    path = _seconds_file()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json({**compile_seconds(), name: round(seconds, 1)}, path)
    except OSError as error:  # a full or read-only disk: nothing that a prediction needs
        log.info("compile times are not kept: %s", error)


def _seconds_file() -> Path | None:
    folder = jax.config.values["jax_compilation_cache_dir"]
    is_local = folder and "://" not in folder
    return Path(folder) / "solov2_seconds.json" if is_local else None


def compiler_options() -> dict[str, int] | None:
    """Returns XLA's options for programs without gradients.

    On a CPU LLVM's first level takes a fifth less time than the default third, and the
    programs are as fast: their work is in products that are not compiled anew.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None


def detect_images(
    model: Any,
    variables: Any,
    image: Num[Array, "B h w c"],
    image_size: Int[Array, "B 2"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    options: DetectOptions,
) -> Detections:
    """Returns the detections of images in the config's channel order.

    They are those of each image alone, padded to multiples of 32 as the reference pads
    it, whatever shape holds the batch.
    """
    outputs = apply_network(model, variables, image, image_size, mean=mean, std=std)
    with jax.default_matmul_precision(model.matmul_precision):
        return detect_outputs(outputs, image_size, options)


def apply_network(
    model: Any,
    variables: Any,
    image: Num[Array, "B h w c"],
    image_size: Int[Array, "B 2"],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Outputs:
    """Returns what the network makes of images in the config's channel order."""
    pixels = ops.normalize_image(image, image_size, mean, std)
    with jax.default_matmul_precision(model.matmul_precision):
        return model.apply(variables, pixels, ops.at_stride(image_size, STRIDE) * STRIDE)


def detect_outputs(
    outputs: Outputs, image_size: Int[Array, "B 2"], options: DetectOptions
) -> Detections:
    """Returns the detections in the network's outputs for images of a size."""
    extent = ops.at_stride(image_size, STRIDE) * STRIDE
    return detect(outputs, **asdict(options), extent=ops.at_stride(extent, 4))


@functools.lru_cache(maxsize=16)
def compile_kernel_transform(
    model: Any, size: tuple[int, int], platform: str, channels: int = 3
) -> Any:
    """Returns the compiled variables -> variables with transformed kernels in their place.

    Those are in the form that is fastest on a platform for images of `size` (height, width)
    and right for all. They are for prediction: no gradient reaches the parameters through
    them.
    """

    def run(variables):
        image = jnp.zeros((1, *size, channels), jnp.float32)
        with transformed_for(platform):
            return model.apply(variables, image, mutable=["transformed"])[1]

    jitted = jax.jit(run, compiler_options=compiler_options())
    name = repr(("transform", model, size, platform))

    def transform_kernels(variables):
        transformed = load_or_compile(jitted, (variables,), name)(variables)
        replaced = flatten_dict(transformed["transformed"])
        params = flatten_dict(variables["params"])
        kept = {path: leaf for path, leaf in params.items() if path not in replaced}
        return {**variables, **transformed, "params": unflatten_dict(kept)}

    return transform_kernels


@functools.partial(jax.jit, static_argnames=("canvas", "threshold"))
def _paste(soft_masks, index, part, image_size, original_size, origin, *, canvas, threshold):
    """Returns the masks and boxes of detections `part` [N] of image `index`."""
    chosen = jnp.take(soft_masks[index], part, axis=0, mode="fill", fill_value=0)
    return paste_masks(chosen, image_size, original_size, canvas, threshold, origin)


def paste_detections(
    soft_masks: jax.Array,
    index: int,
    kept: np.ndarray,
    image_size: Sequence[Any] | np.ndarray,
    original_size: Sequence[Any] | np.ndarray,
    threshold: float,
    canvas: tuple[int, int] | None = None,
    origin: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns masks bool [n, H, W] and boxes [n, 4] of one image's detections.

    A few at a time: only the result itself grows with the image and their number.

    Args:
      soft_masks: [B, D, h4, w4], on the device.
      index: which image of the batch.
      kept: which of its detections, int [n].
      image_size, original_size: (height, width) at the network and of the file.
      canvas: holds the original size; each is a program. None: its next multiples.
      origin: (row, column) at which the canvas is a part of the original image; the
        masks and boxes are those of the part then.
    """
    height, width = (int(v) for v in original_size)
    if origin is not None and canvas is not None:
        height, width = (
            min(c, int(side) - o) for c, side, o in zip(canvas, original_size, origin, strict=True)
        )
    canvas = canvas or canvas_for(height, width)
    chunk = chunk_size(canvas)
    none = soft_masks.shape[1]  # pads with empty masks, which cost next to nothing
    masks = np.zeros((len(kept), height, width), bool)
    boxes = np.zeros((len(kept), 4), np.float32)
    for start in range(0, len(kept), chunk):
        part = np.asarray(kept[start : start + chunk], np.int32)
        n = len(part)
        pasted, pasted_boxes = _paste(
            soft_masks,
            np.int32(index),
            np.pad(part, (0, chunk - n), constant_values=none),
            np.asarray(image_size, np.int32),
            np.asarray(original_size, np.int32),
            None if origin is None else np.asarray(origin, np.int32),
            canvas=canvas,
            threshold=threshold,
        )
        masks[start : start + n] = np.asarray(pasted)[:n, :height, :width]
        boxes[start : start + n] = np.asarray(pasted_boxes)[:n]
    return masks, boxes


def canvas_for(height: int, width: int) -> tuple[int, int]:
    """Returns the canvas (height, width) on which masks of a size are pasted."""
    sides = round_up(height, CANVAS_DIVISOR), round_up(width, CANVAS_DIVISOR)
    longest = max(sides)
    return (longest, longest) if longest <= MAX_SQUARE_CANVAS else sides


def chunk_size(canvas: tuple[int, int]) -> int:
    """Returns how many masks are pasted at once: 16, fewer on a large canvas."""
    return int(np.clip(CHUNK_PIXELS // (canvas[0] * canvas[1]), 1, MAX_CHUNK))


def round_up(size: int, divisor: int) -> int:
    """Returns the smallest multiple of `divisor` that is not below `size`."""
    return -(-size // divisor) * divisor
