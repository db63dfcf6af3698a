"""A run and a folder of pictures -> the list of those to label next."""

import contextlib
import csv
import functools
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from solov2_jax import ops
from solov2_jax.distributed import replicated, split_by_batch
from solov2_jax.inference.preprocess import make_batches
from solov2_jax.inference.programs import DetectOptions, compiler_options, over_devices
from solov2_jax.io import InputError
from solov2_jax.postprocess import detect
from solov2_jax.progress import working
from solov2_jax.tools.doctor.data_report import spread
from solov2_jax.tools.labelling.choose import Chosen, choose, uncertainty
from solov2_jax.tools.labelling.pictures import (
    PictureFolder,
    fit_shapes,
    open_pictures,
    place_pictures,
    read_pictures,
)

log = logging.getLogger(__name__)

LIST, ABOUT = "selection.csv", "selection.json"
MOST_LABELLED = 1000  # training images that the choice is kept away from
_LEVELS = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}  # strides


@dataclass(frozen=True)
class SelectOptions:
    """What is wanted of a selection.

    Attributes:
      diversity: 0 to 1, see `choose`.
      against_training: stay away from what the run was trained on.
      images: "none", "link" or "copy": whether the chosen pictures are put beside the list.
    """

    number: int = 50
    diversity: float = 0.5
    against_training: bool = True
    batch_size: int = 1
    images: str = "none"
    overwrite: bool = False


@dataclass(frozen=True)
class Described:
    """What the network says about pictures, in the order of `names`."""

    names: list[str]
    unsure: np.ndarray  # float64 [n]
    objects: np.ndarray  # int64 [n], detections
    features: np.ndarray  # float32 [n, c]


def select(
    predictor: Any, workdir: str, text: str, output: str, options: SelectOptions
) -> PictureFolder:
    """Writes the list; returns the pictures, with what could not be read.

    Raises:
      InputError: if no picture is left to choose from.
    """
    new = open_pictures(workdir, text, output, (LIST, ABOUT), overwrite=options.overwrite)
    pictures = new.pictures
    if not pictures.names:
        raise InputError(
            f"--input {text}: no picture is left: {len(new.left)} are the run's own data, "
            f"{len(pictures.problems)} cannot be read."
        )
    wanted = spread(len(new.train), MOST_LABELLED).tolist() if options.against_training else []
    labelled = [path for path in map(new.train.__getitem__, wanted) if os.path.isfile(path)]
    fitted = fit_shapes(predictor, [*map(pictures.path, pictures.names), *labelled])
    candidates = describe(fitted, pictures, options.batch_size, "looking at pictures")
    if not candidates.names:
        raise InputError(f"--input {text}: none of its pictures can be read.")
    known = None
    if labelled:
        own = PictureFolder("", labelled)
        known = describe(fitted, own, options.batch_size, "looking at training images").features
    chosen = choose(
        candidates.unsure,
        candidates.features,
        options.number or len(candidates.names),
        labelled=known,
        diversity=options.diversity,
    )
    rows = _rows(candidates, chosen)
    about = {
        "input": text,
        "looked_at": len(candidates.names),
        "labelled": len(labelled),
        "left_out": new.left,
        "unreadable": pictures.problems,
        "diversity": options.diversity,
        "selected": rows,
    }
    contents = _csv(rows), (json.dumps(about, indent=2) + "\n").encode()
    names = [row["file_name"] for row in rows] if options.images != "none" else []
    new.check(names)
    with new.folder.opened():
        for path, content in zip(new.paths, contents, strict=True):
            with new.folder.replacing(path) as temporary:
                temporary.write_bytes(content)
        if options.images != "none":
            place_pictures(new.folder, pictures, names, link=options.images == "link")
    log.info("%d of %d pictures to label next: %s", len(rows), len(candidates.names), new.paths[0])
    return pictures


def _rows(candidates: Described, chosen: Chosen) -> list[dict[str, Any]]:
    """Returns the list's rows."""
    pairs = zip(chosen.index.tolist(), chosen.difference.tolist(), strict=True)
    return [
        {
            "rank": rank,
            "file_name": candidates.names[i],
            "uncertainty": round(float(candidates.unsure[i]), 6),
            "difference": round(difference, 6),
            "detections": int(candidates.objects[i]),
        }
        for rank, (i, difference) in enumerate(pairs, start=1)
    ]


def describe(predictor: Any, pictures: PictureFolder, batch_size: int, what: str) -> Described:
    """Returns what the network says about the pictures that can be read, so many at a time on
    each of the predictor's devices."""
    mesh, options = predictor.mesh, predictor.options
    mean, std = predictor.input.mean, predictor.input.std
    program = compile_describe(predictor.model, mean, std, options, mesh)
    variables = jax.device_put(predictor.variables, mesh and replicated(mesh))
    found: dict[int, tuple[str, float, int, np.ndarray]] = {}
    shapes: set[tuple[int, ...]] = set()
    names: list[str] = []

    def examples() -> Iterator[Mapping[str, np.ndarray]]:
        for name, example in read_pictures(pictures, predictor.preprocess, what):
            names.append(name)
            yield {**example, "image_id": np.array(len(names) - 1)}

    for batch in _batches(examples(), batch_size * predictor.num_devices):
        shape = batch["image"].shape
        new = shape not in shapes
        if new:
            shapes.add(shape)
            log.info("compiling for %d picture(s) padded to %d x %d", *shape[:3])
        with working("computing the first batch") if new else contextlib.nullcontext():
            arrays = batch["image"], batch["image_size"]
            results = program(variables, *jax.device_put(arrays, mesh and split_by_batch(mesh)))
            scores, valid, features = jax.device_get(results)
        for row, number in enumerate(batch["image_id"].tolist()):
            if number >= 0:
                kept = scores[row][valid[row]]
                found[number] = names[number], uncertainty(kept), len(kept), features[row]
    rows = [found[number] for number in sorted(found)]
    return Described(
        names=[row[0] for row in rows],
        unsure=np.array([row[1] for row in rows]),
        objects=np.array([row[2] for row in rows], np.int64),
        features=np.array([row[3] for row in rows], np.float32),
    )


def _batches(
    examples: Iterator[Mapping[str, np.ndarray]], size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields full batches of one padded shape; the last ones are filled up."""
    waiting: dict[tuple[int, ...], list[Mapping[str, np.ndarray]]] = {}
    for example in examples:
        group = waiting.setdefault(example["image"].shape, [])
        group.append(example)
        if len(group) == size:
            yield from make_batches(waiting.pop(example["image"].shape), size)
    for group in waiting.values():
        yield from make_batches(group, size)


@functools.lru_cache(maxsize=4)
def compile_describe(
    model: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    options: DetectOptions,
    mesh: Mesh | None = None,
) -> Any:
    """Returns the compiled (variables, image, image_size) -> (scores, valid, features).

    scores and valid [B, D] are the detections', features [B, c] the FPN's means over
    each image without its padding.
    """

    def run(variables, image, image_size):
        pixels = ops.normalize_image(image, image_size, mean, std)
        extent = ops.padded_extent(image_size)
        with jax.default_matmul_precision(model.matmul_precision):
            outputs, state = model.apply(
                variables,
                pixels,
                extent,
                capture_intermediates=lambda module, _: module.name == "fpn",
            )
            found = detect(outputs, **asdict(options), extent=ops.at_stride(extent, 4))
        (levels,) = state["intermediates"]["fpn"]["__call__"]
        pooled = [
            _mean(levels[name], ops.at_stride(extent, stride))
            for name, stride in sorted(_LEVELS.items())
        ]
        return found.scores, found.valid, jnp.concatenate(pooled, axis=-1)

    return jax.jit(over_devices(run, mesh), compiler_options=compiler_options())


def _mean(features: jax.Array, extent: jax.Array | None) -> jax.Array:
    """Returns the means over the first (height, width) cells of each image, [B, c]."""
    assert extent is not None
    rows = jnp.arange(features.shape[1])[None] < extent[:, :1]
    columns = jnp.arange(features.shape[2])[None] < extent[:, 1:]
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    total = jnp.where(inside, features.astype(jnp.float32), 0).sum((1, 2))
    return total / extent.prod(axis=1)[:, None]


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns a table; names that are no Unicode are written as their bytes."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
