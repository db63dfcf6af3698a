"""What each augmentation costs: milliseconds of one core per image, beyond plain reading.

    python benchmarks/augment.py --images DIR --annotations FILE.json [--short 448] [--steps 24]

The batch maker alone, in one thread, batches of two, the same images for each row: the
plain batches and those with one augmentation for every image take turns, and the rows are
the medians of the differences per batch. Prints a Markdown table.
"""

import argparse
import gc
import statistics
import time

from solov2_jax.data.augment import Augment
from solov2_jax.data.batch import BatchMaker
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import load_coco
from solov2_jax.data.images import reuse_memory
from solov2_jax.data.pipeline import train_batches

ROWS = {
    "brightness, contrast, saturation": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3},
    "hue": {"hue": 0.1},
    "rotation": {"rotate_prob": 1.0},
    "turn by quarters": {"turn_prob": 1.0},
    "upside down": {"vflip_prob": 1.0},
    "crop": {"crop_size": (0.6, 0.6)},
    "scale": {"scale": (0.5, 1.5)},
    "blur": {"blur_prob": 1.0},
    "noise": {"noise": 8.0},
    "JPEG": {"jpeg_prob": 1.0},
    "cutout": {"cutout_prob": 1.0},
    "copy and paste": {"paste_prob": 1.0},
    "mosaic": {"mosaic_prob": 1.0},
    "mixup": {"mixup_prob": 1.0},
}
BATCH = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--short", type=int, default=448)
    parser.add_argument("--longest", type=int, default=768)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    dataset = load_coco(args.images, args.annotations)
    reuse_memory()

    def maker_of(augment: Augment) -> BatchMaker:
        batches = train_batches(
            dataset,
            seed=0,
            num_steps=args.steps,
            batch_size=BATCH,
            resize=Resize((args.short,), args.longest),
            flip_prob=0.5,
            augment=augment,
        )
        assert isinstance(batches.maker, BatchMaker)
        return batches.maker

    makers = {"plain": maker_of(Augment())}
    makers |= {name: maker_of(Augment(**values)) for name, values in ROWS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    gc.disable()
    for step in range(args.steps):
        for name, maker in makers.items():
            start = time.process_time()
            maker(step)
            seconds[name].append((time.process_time() - start) * 1000 / BATCH)
    print("| augmentation | ms per image |\n|---|---:|")
    print(f"| (none: reading, resizing, masks) | {statistics.median(seconds['plain']):.1f} |")
    for name in ROWS:
        pairs = zip(seconds[name], seconds["plain"], strict=True)
        print(f"| {name} | {statistics.median(a - b for a, b in pairs):+.1f} |")


if __name__ == "__main__":
    main()
