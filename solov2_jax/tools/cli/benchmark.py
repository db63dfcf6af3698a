r"""Measures how long prediction takes, part by part, on this machine.

    solov2 benchmark --workdir runs/mine
    solov2 benchmark --workdir runs/mine --checkpoint best --input photos \
        --sizes 320,448,640 --batch_sizes 1,4 --output speed
    solov2 benchmark --config light_448_r50 --weights r50.npz --input photos --output speed

Of pictures that are there (`--input`, or the run's validation images) it times reading the
file, decoding, resizing, the network, its post-processing, and making masks of the picture's
size, for each size at the network and each batch. Rounds that warm up come first and are
not counted; medians are shown. Nothing overlaps, other than in `solov2 predict`.

Prints a table, and writes `benchmark.json`, with every round, and `benchmark.md` into
`--output`, by default WORKDIR/benchmark.
"""

import contextlib
import functools
import os
from typing import Any

from solov2_jax.config_schema import several, text, whole
from solov2_jax.io import InputError, make_folder, unmade_if_empty
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

_INPUT = Flag("input", text(), "Folder of images. Default: the run's validation images.")
_IMAGES = Flag("images", whole(8, 1, 10_000), "Images to take, spread over all.")
_SIZES = Flag(
    "sizes",
    several((), whole(1, 32, 65_536), unique=True),
    "Shorter sides at the network, pixels; longer ones grow with them. Default: the config's.",
)
_BATCHES = Flag(
    "batch_sizes", several((), whole(1, 1, 4096), unique=True), "Images per batch. Default: 1."
)
_ROUNDS = Flag("rounds", whole(20, 3, 100_000), "Rounds that are counted, for each row.")
_WARM_UP = Flag("warm_up", whole(3, 1, 10_000), "Rounds before them, at least.")
_OUTPUT = Flag("output", text(), "Folder to write. Default: WORKDIR/benchmark; none without.")
FLAGS = (*shared.MODEL, _INPUT, _IMAGES, _SIZES, _BATCHES, _ROUNDS, _WARM_UP, _OUTPUT)


def main(overrides: list[str]) -> None:
    shared.check_model()
    if shared.WEIGHTS.value and not _INPUT.value:
        raise InputError("--weights needs --input, a folder of images")
    workdir = shared.WORKDIR.value
    output = _OUTPUT.value or (os.path.join(workdir, "benchmark") if os.path.isdir(workdir) else "")
    if output and os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"--output {output}: is a file; give a folder")
    with unmade_if_empty(output) if output else contextlib.nullcontext():
        if output:
            make_folder(output)  # raises now instead of after measuring
        result = _measure(overrides)
        app.echo(result.markdown())
        if output:
            app.echo(f"written: {result.write(output)}")


def _measure(overrides: list[str]) -> Any:
    from solov2_jax.tools import benchmark

    workdir = shared.WORKDIR.value
    paths = benchmark.choose_images(_INPUT.value, workdir, overrides, _IMAGES.value)
    rows = []
    predictor = shared.load_predictor(overrides)
    for size in _SIZES.value or (predictor.input.min_size,):
        sized = overrides
        if _SIZES.value:
            sized = [*overrides, *benchmark.size_overrides(size, predictor.input)]
            predictor_of_size = shared.load_predictor(sized)
        else:
            predictor_of_size = predictor
        for batch in _BATCHES.value or (1,):
            rows += benchmark.measure(
                predictor_of_size,
                paths,
                batch_size=batch,
                rounds=_ROUNDS.value,
                warm_up=_WARM_UP.value,
            )
    name = os.path.basename(os.path.abspath(workdir)) if workdir else shared.WEIGHTS.value
    step = f", step {predictor.step}" if predictor.step is not None else ""
    return benchmark.Benchmark(f"{name}{step}", rows, benchmark.conditions(predictor))


run = functools.partial(app.run, main, FLAGS)
