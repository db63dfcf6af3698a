"""How long prediction takes, part by part: what `solov2 benchmark` measures."""

import dataclasses
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from solov2_jax.checkpoint import read_classes
from solov2_jax.data.build import load_val_dataset
from solov2_jax.data.images import list_images
from solov2_jax.inference.predictor import Predictor
from solov2_jax.inference.preprocess import InputOptions, load_image, make_batches
from solov2_jax.inference.programs import apply_network, compiler_options, detect_outputs
from solov2_jax.io import InputError, make_folder, write_json, write_text
from solov2_jax.logging import processor
from solov2_jax.pretrained import check_data_known, load_run_config, local_folder
from solov2_jax.tools.doctor.data_report import spread
from solov2_jax.training.workdir import environment

# In the order of the work; "predict" is network and post-processing in one program, as
# prediction runs them, and "total" the sum with that instead of the two.
PARTS = ("load", "decode", "resize", "network", "post-processing", "predict", "paste", "total")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The rounds of one padded shape and batch; each time is of a batch, in seconds."""

    shape: tuple[int, int]  # padded (height, width) at the network
    batch_size: int
    images: int  # different ones
    detections: float  # mean number in an image, whatever their scores
    compiled: int  # programs that were compiled in counted rounds: should be 0
    seconds: dict[str, list[float]]  # by part, one for each round

    def median(self, part: str) -> float:
        """Returns milliseconds per image."""
        return 1000 * statistics.median(self.seconds[part]) / self.batch_size

    def quantile(self, part: str, share: float) -> float:
        """Returns milliseconds per image that a share of the rounds stays below."""
        return 1000 * float(np.quantile(self.seconds[part], share)) / self.batch_size


def choose_images(folder: str, workdir: str, overrides: Sequence[str], number: int) -> list[str]:
    """Returns the paths of some images, spread over a folder or a run's validation data."""
    if folder:
        paths = [os.path.join(folder, name) for name in list_images(folder)]
    else:
        check_data_known(workdir, overrides, "--input FOLDER")
        config = load_run_config(workdir, overrides)
        names, ids = read_classes(local_folder(workdir))
        dataset = load_val_dataset(config, dict(zip(ids, names, strict=True)))
        paths = [dataset.path(i) for i in range(len(dataset))]
    if not paths:
        raise InputError(f"{folder or dataset.annotation_file}: has no images")
    return [paths[i] for i in spread(len(paths), number)]


def size_overrides(short: int, options: InputOptions) -> list[str]:
    """Returns what makes the shorter side `short`, the longer one in proportion."""
    longest = round(short * options.max_size / options.min_size)
    return [
        f"--config.input.min_size_test={short}",
        f"--config.input.max_size_test={max(longest, short)}",
        "--config.input.buckets_test=()",
    ]


def measure(
    predictor: Predictor, paths: Sequence[str], *, batch_size: int, rounds: int, warm_up: int
) -> list[Measurement]:
    """Returns a row for each padded shape that the images go into."""
    groups: dict[tuple[int, int], list[str]] = {}
    for path in paths:
        height, width = load_image(path, path, predictor.input.pixels).shape[:2]
        groups.setdefault(predictor.padded_shape(height, width), []).append(path)
    rows = []
    for shape, members in sorted(groups.items()):
        # Each batch has images of one shape, repeated where there are fewer.
        number = max(1, -(-len(members) // batch_size))
        filled = [members[i % len(members)] for i in range(number * batch_size)]
        batches = [filled[i : i + batch_size] for i in range(0, len(filled), batch_size)]
        timer = Timer(predictor)
        for i in range(max(warm_up, number)):  # every image once: canvases are programs
            timer.round(batches[i % number])
        timer.reset()
        with compilations() as compiled:
            for i in range(rounds):
                timer.round(batches[i % number])
        rows.append(
            Measurement(
                shape=shape,
                batch_size=batch_size,
                images=len(members),
                detections=float(statistics.mean(timer.detections)),
                compiled=len(compiled),
                seconds=timer.seconds,
            )
        )
    return rows


class Timer:
    """Predicts batches of files and keeps the time of each part."""

    def __init__(self, predictor: Predictor):
        self.predictor, options = predictor, predictor.input
        self._network = jax.jit(
            functools.partial(apply_network, predictor.model, mean=options.mean, std=options.std),
            compiler_options=compiler_options(),
        )
        self._post = jax.jit(
            functools.partial(detect_outputs, options=predictor.options),
            compiler_options=compiler_options(),
        )
        self.reset()

    def reset(self) -> None:
        """Forgets the rounds so far."""
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.detections: list[int] = []

    def round(self, paths: Sequence[str]) -> None:
        """Does the work for a batch of files, waiting for each part before the next."""
        took = dict.fromkeys(PARTS, 0.0)
        clock = time.perf_counter
        examples = []
        for number, path in enumerate(paths):
            start = clock()
            Path(path).read_bytes()
            loaded = clock()
            image = load_image(path, path, self.predictor.input.pixels)
            decoded = clock()
            examples.append(self.predictor.preprocess(image, number))
            took["load"] += loaded - start
            took["decode"] += max(decoded - loaded - (loaded - start), 0.0)  # reads it again
            took["resize"] += clock() - decoded
        start = clock()
        (batch,) = make_batches(examples, len(examples))
        took["resize"] += clock() - start
        sizes = np.asarray(batch["image_size"], np.int32)

        start = clock()
        network = self._network(self.predictor.placed, batch["image"], sizes)
        outputs = jax.block_until_ready(network)
        took["network"] = clock() - start
        start = clock()
        jax.block_until_ready(self._post(outputs, sizes))
        took["post-processing"] = clock() - start
        start = clock()
        detections = jax.block_until_ready(self.predictor.detect(batch))
        took["predict"] = clock() - start

        start = clock()
        for row, example in enumerate(examples):
            prediction = self.predictor.paste(
                detections,
                row,
                example["image_size"],
                example["original_size"],
                self.predictor.mask_threshold,
            )
            self.detections.append(len(prediction))
        took["paste"] = clock() - start
        took["total"] = sum(took[p] for p in ("load", "decode", "resize", "predict", "paste"))
        for part, value in took.items():
            self.seconds[part].append(value)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that gets an entry for each program that is compiled inside."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def conditions(predictor: Predictor) -> dict[str, Any]:
    """Returns what the times depend on: device, versions, precision."""
    about = environment()
    device, cpu = jax.devices()[0], json.loads(processor())[0] or platform.machine()
    return {
        "device": device.device_kind if device.platform != "cpu" else cpu,
        "platform": device.platform,
        "cpu_cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "dtype": str(np.dtype(predictor.model.dtype)),
        "matmul_precision": predictor.model.matmul_precision,
        "max_per_image": predictor.options.max_per_image,
        **{key: about[key] for key in ("solov2_jax", "revision", "python", "packages")},
    }


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark's rows and the conditions they were measured in."""

    title: str
    rows: list[Measurement]
    conditions: dict[str, Any]

    def markdown(self) -> str:
        """Returns the table with its heading and what must be known to read it."""
        about = self.conditions
        heads = ("size", "batch", *PARTS, "90 % below", "images/s", "detections")
        table = [f"| {' | '.join(heads)} |", f"|---|---:|{'---:|' * (len(heads) - 2)}"]
        for row in self.rows:
            total = row.median("total")
            cells = [f"{row.shape[0]}x{row.shape[1]}", str(row.batch_size)]
            cells += [f"{row.median(part):.1f}" for part in PARTS]
            cells += [f"{row.quantile('total', 0.9):.1f}", f"{1000 / total:.2f}"]
            table.append(f"| {' | '.join([*cells, f'{row.detections:.0f}'])} |")
        cores = f"{about['cpu_cores']} cores, load {about['load_average']}"
        lines = [
            f"# {self.title}",
            "",
            f"{about['device']} ({about['platform']}; {cores}), {about['dtype']}, matmul precision "
            f"{about['matmul_precision']}, jax {about['packages']['jax']}, Python "
            f"{about['python']}.",
            "",
            *table,
            "",
            "Milliseconds per image, medians of "
            f"{len(self.rows[0].seconds['total'])} rounds after a warm-up, nothing overlapping. "
            "predict is network and post-processing in one program, copies to the device "
            "included, which total takes instead of the two; total is without drawing and "
            "writing. Files were read from the system's cache.",
        ]
        if any(row.compiled for row in self.rows):
            lines.append("Programs were compiled in counted rounds: use more --warm_up rounds.")
        return "\n".join(lines)

    def write(self, folder: str) -> str:
        """Writes benchmark.json and benchmark.md; returns the latter's path."""
        out = make_folder(folder)
        rows = [
            dataclasses.asdict(row)
            | {"median_ms_per_image": {part: round(row.median(part), 3) for part in PARTS}}
            for row in self.rows
        ]
        content = {"title": self.title, "conditions": self.conditions, "rows": rows}
        write_json(content, out / "benchmark.json")
        write_text(self.markdown() + "\n", out / "benchmark.md")
        return str(out / "benchmark.md")
