"""From files to batches on one core: images a second, by stage, against a plain form.

    python benchmarks/data.py --images DIR --annotations FILE.json
    python benchmarks/data.py --short 640 672 704 736 768 800 --images ...
    python benchmarks/data.py --soak 10000
    python benchmarks/data.py                 # a generated data set, in PNG files

Two measurements of both programs in turns. "stages": the loader alone, in one thread,
with a clock around decoding, resizing and rasterising. "pipeline": batches as training
gets them from one worker process, which shares one core with the reader; what that
takes beyond the stages is the making and the transport of batches. Everything runs on
the first core that this process may use. The programs' batches must be equal in every
bit, else nothing is reported. `--soak` runs two workers through so many small batches
and fails if memory goes on growing.
"""

import argparse
import hashlib
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import data_side
import harness
import numpy as np
import worker

from solov2_jax.data import buckets, pipeline
from solov2_jax.data.coco import CocoDataset, load_coco
from solov2_jax.tools.synthetic.shapes import ShapesSettings, write_shapes

PROGRAMS = ("ours", "plain")
CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "data_benchmark"


def main() -> None:
    """Measures both programs in turns, or is one of them, or soaks ours."""
    args = parse()
    if args.program:
        pin()
        dataset = read_dataset(args)
        load = {"stages": load_stages, "pipeline": load_pipeline}[args.what]
        worker.serve(lambda: load(args, dataset))
        return
    if args.soak:
        import data_soak

        data_soak.run(args, read_dataset(args))
        return
    dataset = read_dataset(args)
    objects = dataset.objects_per_image.mean()
    kind = "images of a file" if args.annotations else "generated images"
    shorts = f"{min(args.short)}" + (f"..{max(args.short)}" if args.short[1:] else "")
    label = (
        f"{kind}, {objects:.1f} objects each, {shorts} px (at most {args.longest}), "
        f"batch {args.batch}"
    )
    for what in ("stages", "pipeline"):
        command = [sys.executable, __file__, *sys.argv[1:], "--what", what]
        programs = [harness.Program(n, [*command, "--program", n]) for n in PROGRAMS]
        work = {"script": "data", "what": what, "label": label}
        work |= {"images": args.batches * args.batch}
        name = f"data_{what}_{shorts.replace('..', '_')}"
        harness.measure(name, work, programs, args, {"digest": 0.0})


def parse() -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", help="folder; default: a generated data set")
    parser.add_argument("--annotations", help="instances json")
    parser.add_argument("--short", type=int, nargs="+", default=[800], help="pixels")
    parser.add_argument("--longest", type=int, default=1333, help="pixels")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--batches", type=int, default=25, help="in a run")
    parser.add_argument("--soak", type=int, default=0, help="batches, of small size")
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--what", default="stages", help=argparse.SUPPRESS)
    harness.add_arguments(parser, runs=7)
    parser.set_defaults(warmups=1)
    args = parser.parse_args()
    if bool(args.images) != bool(args.annotations):
        parser.error("--images and --annotations belong together: give both or none")
    return args


def pin() -> None:
    """Keeps this process and those it starts on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def read_dataset(args: argparse.Namespace) -> CocoDataset:
    """Returns the data set of the command line."""
    if args.annotations:
        return load_coco(args.images, args.annotations)
    settings = ShapesSettings(num_train=48, num_val=1, height=480, width=640, max_objects=10)
    folder = write_shapes(str(CACHE), settings)
    return load_coco(f"{folder}/train", f"{folder}/instances_train.json")


def batches_of(args: argparse.Namespace, dataset: CocoDataset, workers: int) -> pipeline.Batches:
    """Returns our batches, more than any measurement takes."""
    return pipeline.train_batches(
        dataset,
        seed=0,
        num_steps=100_000 // args.batch,
        batch_size=args.batch,
        resize=buckets.Resize(tuple(args.short), args.longest),
        flip_prob=0.5,
        channel_order="BGR",
        reading=pipeline.Reading(num_workers=workers, num_threads=1, prefetch=2),
    )


def versions() -> dict[str, str]:
    """Returns the versions of what does the work."""
    return {name: version(name) for name in ("pillow", "pycocotools", "numpy", "grain")}


def digest(batch: dict[str, np.ndarray]) -> int:
    """Returns a number that differs if any bit does."""
    found = hashlib.sha256()
    for key in sorted(batch):
        found.update(np.ascontiguousarray(batch[key]).tobytes())
    return int(found.hexdigest()[:12], 16)


def load_stages(args: argparse.Namespace, dataset: CocoDataset) -> worker.Work:
    """Returns the loader's work, in one thread of this process."""
    loader = data_side.with_loader(batches_of(args, dataset, 0), args.program, True)
    step = 0

    def run() -> dict[str, float]:
        nonlocal step
        loader.stages.seconds.clear()
        for _ in range(args.batches):
            loader(step)
            step += 1
        return dict(loader.stages.seconds)

    found = {"digest": [digest(loader(t)) for t in range(3)]}
    return worker.Work(run, {"versions": versions()}, found=lambda: found)


def load_pipeline(args: argparse.Namespace, dataset: CocoDataset) -> worker.Work:
    """Returns the work of reader and worker; each run has a worker of its own."""
    batches = data_side.with_loader(batches_of(args, dataset, 1), args.program, False)
    found: dict[str, Any] = {"worker_peak_gb": 0.0}
    iterator: Iterator[dict[str, np.ndarray]] = iter(())

    def prepare() -> None:
        nonlocal iterator
        iterator = iter(batches)
        # The first ones come from buffers that filled up while the process started.
        found["digest"] = [digest(next(iterator)) for _ in range(8)]

    def run() -> None:
        for _ in range(args.batches):
            next(iterator)

    def finish() -> None:
        peaks = [worker.peak_memory_gb(p.pid) for p in multiprocessing.active_children()]
        found["worker_peak_gb"] = max(found["worker_peak_gb"], *peaks)
        iterator.close()  # pyright: ignore

    return worker.Work(
        run,
        {"versions": versions()},
        found=lambda: found,
        prepare=prepare,
        finish=finish,
    )


if __name__ == "__main__":
    main()
