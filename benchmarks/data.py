"""From files to batches on one core: images a second, by stage, against a plain form.

    python benchmarks/data.py --images DIR --annotations FILE.json
    python benchmarks/data.py --short 640 672 704 736 768 800 --images ...
    python benchmarks/data.py --soak 10000
    python benchmarks/data.py                 # a generated data set, in PNG files

Two measurements of both programs in turns. "stages": the batch maker alone, in one
thread, with a clock around decoding, resizing and rasterising. "pipeline": batches as
training gets them from one worker process, which shares one core with the reader; what
that takes beyond the stages is the making and the transport of batches. "plain" is what
one writes first: Pillow's picture as an array, resized as an array, turned around by
numpy; each object drawn by pycocotools as a whole mask and scaled down as one; batches
of zeros, handed from the worker by grain and copied. The programs' batches must be equal
in every bit, else nothing is reported. `--soak` runs two workers through so many small
batches and fails if memory goes on growing.
"""

import argparse
import dataclasses
import hashlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import grain
import harness
import numpy as np
from absl import flags
from harness import ROOT, Stages, Work
from PIL import Image
from pycocotools import mask as coco_mask
from tables import halves

from solov2_jax.data import buckets, pipeline, rasterize, sampler, transforms
from solov2_jax.data.augment import Sample
from solov2_jax.data.batch import ArrayDict, BatchMaker, expand_masks
from solov2_jax.data.coco import CocoDataset, load_coco
from solov2_jax.data.images import reuse_memory
from solov2_jax.data.outlines import MIN_BOX_SIDE
from solov2_jax.data.shared_memory import New, in_memory
from solov2_jax.data.transforms import Affine, AffineImage
from solov2_jax.tools.synthetic.shapes import ShapesSettings, write_shapes
from tests.plain_masks import plain_center, plain_stride4

PROGRAMS = ("ours", "plain")
CACHE = ROOT / ".cache" / "data_benchmark"
SOAK = {"sizes": (96, 112, 128, 192), "batch": 2, "workers": 2}
GROWTH = 0.05  # of the second half's largest memory over the first half's, at most


class TimedBatchMaker(BatchMaker):
    """Our batch maker with a clock around its stages."""

    stages = Stages()

    def __call__(self, step: int, new: New = in_memory) -> ArrayDict:
        return expand_masks(super().__call__(step, new))

    def read(self, index: int) -> Image.Image:
        with self.stages("decode"):
            return super().read(index)

    def write_pixels(self, view: AffineImage, out: np.ndarray) -> None:
        with self.stages("resize"):
            super().write_pixels(view, out)

    def sample(self, view: AffineImage, index: int) -> Sample:
        with self.stages("rasterise"):
            return super().sample(view, index)

    def write_objects(self, row: ArrayDict, sample: Sample) -> tuple[int, int]:
        with self.stages("rasterise"):
            return super().write_objects(row, sample)


class PlainBatchMaker(TimedBatchMaker):
    """The plain form, with the same clock."""

    def __call__(self, step: int, new: New = in_memory) -> ArrayDict:
        schedule = self.schedule
        h, w = schedule.buckets[schedule.bucket[step]]
        images, epochs = (x[step].tolist() for x in (schedule.image, schedule.epoch))
        b, g = len(images), self.slots
        batch = {
            "image": np.zeros((b, h, w, 3), np.uint8),
            "image_size": np.zeros((b, 2), np.int32),
            "boxes": np.zeros((b, g, 4), np.float32),
            "labels": np.zeros((b, g), np.int32),
            "centers": np.zeros((b, g, 2), np.float32),
            "masks": np.zeros((b, g, h // 4, w // 4), np.uint8),
            "valid": np.zeros((b, g), bool),
            "image_id": self.dataset.image_ids[images].astype(np.int32),
        }
        for row, (index, epoch) in enumerate(zip(images, epochs, strict=True)):
            scale = int(sampler.scale_index(self.seed, epoch, index, len(self.resize.shorts)))
            original = int(self.dataset.heights[index]), int(self.dataset.widths[index])
            affine = Affine(original, original, np.eye(2, 3))
            affine = affine.resized(self.resize.size(original, scale))
            if sampler.is_flipped(self.seed, epoch, index, self.flip_prob):
                affine = affine.flipped()
            batch["image_size"][row] = affine.size
            self.fill_image(index, affine, batch["image"][row])
            with self.stages("rasterise"):
                self.fill_objects({k: v[row] for k, v in batch.items()}, index, affine)
        return batch

    def fill_image(self, index: int, affine: Affine, out: np.ndarray) -> None:
        image, size = np.asarray(self.read(index)), affine.size
        with self.stages("resize"):
            image = transforms.resize_image(image, *size)
            image = image[:, ::-1] if affine.mirrored else image
            out[: size[0], : size[1]] = image[..., ::-1] if self.bgr else image

    def fill_objects(self, row: ArrayDict, index: int, affine: Affine) -> int:
        data, slot = self.dataset, 0
        objects = np.arange(data.start[index], data.start[index + 1])
        boxes = affine.boxes(data.boxes[objects])
        for item, box in zip(objects.tolist(), boxes, strict=True):
            if not (box[2:] - box[:2] > MIN_BOX_SIDE).all() or slot == self.slots:
                continue
            mask = self.whole_mask(item, affine)
            if not mask.any():
                continue
            small = plain_stride4(mask)
            row["masks"][slot, : small.shape[0], : small.shape[1]] = small
            row["centers"][slot] = plain_center(mask)
            row["boxes"][slot], row["labels"][slot] = box, data.labels[item]
            row["valid"][slot] = True
            slot += 1
        return slot

    def whole_mask(self, item: int, affine: Affine) -> np.ndarray:
        """Returns an object's mask in the resized image, uint8 [h, w]."""
        (height, width), old, flip = affine.size, affine.original, affine.mirrored
        polygons = []
        for polygon in self.dataset.segmentations.polygons(item):
            x, y = polygon[0::2] * (width / old[1]), polygon[1::2] * (height / old[0])
            polygons.append(np.stack([width - x if flip else x, y], axis=-1).ravel())
        if polygons:
            rle: Any = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
            return coco_mask.decode(rle)
        # Few data sets have run lengths: as ours.
        spans = rasterize.draw_spans(self.dataset.segmentations, [item], affine)
        return rasterize.spans_to_masks(spans, 1, affine.size)[0].view(np.uint8)


def main() -> None:
    """Measures both programs in turns, or is one of them, or soaks ours."""
    args = parse()
    if args.program:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # with those it starts
        harness.serve(lambda: load(args, read_dataset(args)))
        return
    dataset = read_dataset(args)
    if args.soak:
        soak(args, dataset)
        return
    kind = "images of a file" if args.annotations else "generated images"
    shorts = f"{min(args.short)}" + (f"..{max(args.short)}" if args.short[1:] else "")
    label = (
        f"{kind}, {dataset.objects_per_image.mean():.1f} objects each, {shorts} px "
        f"(at most {args.longest}), batch {args.batch}"
    )
    for what in ("stages", "pipeline"):
        command = [sys.executable, __file__, *sys.argv[1:], "--what", what, "--program"]
        programs = [harness.Program(name, [*command, name]) for name in PROGRAMS]
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
    harness.add_arguments(parser, runs=7, warmups=1)
    args = parser.parse_args()
    if bool(args.images) != bool(args.annotations):
        parser.error("--images and --annotations belong together: give both or none")
    return args


def read_dataset(args: argparse.Namespace) -> CocoDataset:
    """Returns the data set of the command line."""
    if args.annotations:
        return load_coco(args.images, args.annotations)
    settings = ShapesSettings(num_train=48, num_val=1, height=480, width=640, max_objects=10)
    folder = write_shapes(str(CACHE), settings)
    return load_coco(f"{folder}/train", f"{folder}/instances_train.json")


def batches_of(
    dataset: CocoDataset, sizes: tuple[int, ...], batch: int, steps: int, workers: int
) -> pipeline.Batches:
    """Returns our batches.

    Args:
      sizes: of the short side, and the longest one.
    """
    return pipeline.train_batches(
        dataset,
        seed=0,
        num_steps=steps,
        batch_size=batch,
        resize=buckets.Resize(tuple(sizes[:-1]), sizes[-1]),
        flip_prob=0.5,
        channel_order="BGR",
        reading=pipeline.Reading(num_workers=workers, num_threads=1, prefetch=2),
    )


def make_batch_maker(batches: pipeline.Batches, program: str) -> TimedBatchMaker:
    """Returns a program's batch maker: step -> batch."""
    maker: Any = batches.maker
    values = {f.name: getattr(maker, f.name) for f in dataclasses.fields(maker)}
    return {"ours": TimedBatchMaker, "plain": PlainBatchMaker}[program](**values)


def plain_stream(maker: PlainBatchMaker, steps: int) -> Iterator[ArrayDict]:
    """Yields batches from one worker process, as grain sends arrays, copied."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    stream = grain.MapDataset.range(steps).map(maker)
    stream = stream.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    workers = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=2)
    for batch in stream.mp_prefetch(workers):
        yield {key: np.array(value) for key, value in batch.items()}


def digest(batch: ArrayDict) -> int:
    """Returns a number that differs if any bit does."""
    total = hashlib.sha256()
    for key in sorted(batch):
        total.update(np.ascontiguousarray(batch[key]).tobytes())
    return int(total.hexdigest()[:12], 16)


def load(args: argparse.Namespace, dataset: CocoDataset) -> Work:
    """Returns the work of one program: the batch maker alone, or the whole pipeline."""
    whole, steps = args.what == "pipeline", 100_000 // args.batch
    batches = batches_of(dataset, (*args.short, args.longest), args.batch, steps, int(whole))
    maker = make_batch_maker(batches, args.program)
    versions = {name: version(name) for name in ("pillow", "pycocotools", "numpy", "grain")}
    about, found = {"versions": versions}, {}
    stream: Any = iter(range(3, steps))
    if not whole:
        if args.program == "ours":
            reuse_memory()
        found["digest"] = [digest(maker(step)) for step in range(3)]
        run = lambda: [maker(next(stream)) for _ in range(args.batches)][-1:]  # noqa: E731
        stages = maker.stages
        return Work(run, lambda _: found, about=about, stages=stages, first_call=False)

    def prepare() -> None:
        nonlocal stream
        plain = args.program == "plain"
        stream = plain_stream(maker, steps) if plain else iter(batches)
        # The first ones come from buffers that filled up while the process started.
        found["digest"] = [digest(next(stream)) for _ in range(8)]

    def finish() -> None:
        peaks = [harness.peak_memory_gb(p.pid) for p in multiprocessing.active_children()]
        found["worker_peak_gb"] = max(found.get("worker_peak_gb", 0.0), *peaks)
        stream.close()

    def take() -> None:
        for _ in range(args.batches):
            next(stream)

    around = {"prepare": prepare, "finish": finish, "first_call": False}
    return Work(take, lambda _: found, about=about, **around)


def resident_mb(process: int | str) -> float:
    """Returns the resident memory of a process, shared memory included, in MB."""
    return harness.status_kib(process, "VmRSS") * 1024 / 1e6


def soak(args: argparse.Namespace, dataset: CocoDataset) -> None:
    """Measures memory over many small batches, and fails if it grew."""
    every, start = max(1, args.soak // 50), time.perf_counter()
    samples: list[list[float]] = []  # MB: reader, largest worker
    batches = batches_of(dataset, SOAK["sizes"], SOAK["batch"], args.soak, SOAK["workers"])
    for step, _ in enumerate(batches, start=1):
        if step % every == 0 and step < args.soak - 20 * SOAK["workers"]:
            workers = [resident_mb(p.pid) for p in multiprocessing.active_children()]
            samples.append([resident_mb("self"), max(workers)])
    content = harness.header("data_soak") | SOAK
    content |= {"work": {"script": "data", "what": "soak", "label": "soak"}}
    content |= {"batches": args.soak, "resident_mb": samples}
    harness.write(content | {"seconds": time.perf_counter() - start}, args.results)
    for name, first, second in halves(samples):
        print(f"{name}: {first:.0f} MB at most in the first half, then {second:.0f}")
        if second > first * (1 + GROWTH):
            raise SystemExit(f"error: the memory of the {name} grew")


if __name__ == "__main__":
    main()
