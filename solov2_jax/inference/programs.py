"""The compiled programs of inference: the network with its post-processing.

One for each padded shape of a batch. `pasting.py` has those after it.
"""

import functools
import hashlib
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Int, Num

from solov2_jax import ops
from solov2_jax.distributed import replicated, split_by_batch
from solov2_jax.io import InputError, read_json, write_json
from solov2_jax.models.conv import transformed_for
from solov2_jax.postprocess import detect
from solov2_jax.progress import working
from solov2_jax.stored import load_or_compile, program_name
from solov2_jax.structs import Detections, Outputs

log = logging.getLogger(__name__)


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

    @classmethod
    def from_config(cls, config: Any) -> "DetectOptions":
        """Returns the options of a config's network and its section `test`."""
        names = [name for name in cls.__dataclass_fields__ if name != "num_grids"]
        options = {name: getattr(config.test, name) for name in names}
        return cls(num_grids=tuple(config.model.ins_head.num_grids), **options)


@functools.lru_cache(maxsize=16)
def compile_detect(
    model: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    options: DetectOptions,
    mesh: Mesh | None = None,
) -> "DetectPrograms":
    """Returns the compiled (variables, image, image_size) -> Detections.

    Cached, so that every evaluation during a training run uses the same programs. With a
    mesh, each of its devices computes its rows of the images; it has a copy of the variables.
    """

    def run(variables, image, image_size):
        return detect_images(
            model, variables, image, image_size, mean=mean, std=std, options=options
        )

    run = over_devices(run, mesh)
    name = program_name(model, "detect", mean, std, options, mesh and mesh.devices.size)
    return DetectPrograms(jax.jit(run, compiler_options=compiler_options()), name, mesh)


def over_devices(run: Any, mesh: Mesh | None) -> Any:
    """Returns (variables, image, image_size) -> results in which each device of a mesh computes
    its rows of the images, and has a copy of the variables; None: `run` itself."""
    if mesh is None:
        return run
    rows = split_by_batch(mesh).spec
    specs = (replicated(mesh).spec, rows, rows)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)


class DetectPrograms:
    """One compiled program for each shape of images; safe to use from several threads.

    Args:
      run: jitted (variables, image, image_size) -> Detections.
      name: says what it computes besides, for `stored.load_or_compile`.
      mesh: over whose devices the images are split; None: one device has all.
    """

    def __init__(self, run: Any, name: str, mesh: Mesh | None = None):
        self._run, self._name = run, name
        self._split = None if mesh is None else split_by_batch(mesh)
        self._lock = threading.Lock()
        self._programs: dict[Any, Future] = {}
        # Two: where cores are few, more at once finish none of them sooner.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="compile")

    def __call__(
        self, variables: Any, image: Num[Any, "B h w c"], image_size: Int[Any, "B 2"]
    ) -> Detections:
        """Returns the detections, by the shape's program; waits until it is there."""
        program = self.start(variables, image.shape, image.dtype).result()
        if self._split is not None:
            image, image_size = jax.device_put((image, image_size), self._split)
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
        image = jax.ShapeDtypeStruct(shape, dtype, sharding=self._split)
        image_size = jax.ShapeDtypeStruct((shape[0], 2), jnp.int32, sharding=self._split)
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
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Outputs:
    """Returns what the network makes of images in the config's channel order."""
    pixels = ops.normalize_image(image, image_size, mean, std)
    with jax.default_matmul_precision(model.matmul_precision):
        return model.apply(variables, pixels, ops.padded_extent(image_size))


def detect_outputs(
    outputs: Outputs, image_size: Int[Array, "B 2"], options: DetectOptions
) -> Detections:
    """Returns the detections in the network's outputs for images of a size."""
    extent = ops.at_stride(ops.padded_extent(image_size), 4)
    return detect(outputs, **asdict(options), extent=extent)


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
    name = program_name(model, "transform", size, platform)

    def transform_kernels(variables):
        transformed = load_or_compile(jitted, (variables,), name)(variables)
        replaced = flatten_dict(transformed["transformed"])
        params = flatten_dict(variables["params"])
        kept = {path: leaf for path, leaf in params.items() if path not in replaced}
        return {**variables, **transformed, "params": unflatten_dict(kept)}

    return transform_kernels
