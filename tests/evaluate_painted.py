"""One of several processes that evaluate a network that paints, on all devices.

python tests/evaluate_painted.py --folder DIR --out DIR, and the flags by which processes join
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from PIL import Image
from test_predictor import picture, predictor

from solov2_jax import distributed
from solov2_jax.config_schema import text
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import load_coco
from solov2_jax.data.pipeline import Reading, eval_batches
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.evaluate import evaluate
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

FOLDER, OUT = (Flag(name, text(), "", required=True) for name in ("folder", "out"))
SIZES = [
    (64, 80),
    (90, 64),
    (128, 96),
    (64, 64),
    (300, 280),
    (64, 90),
    (90, 70),
    (64, 70),
    (80, 64),
]


def write_data(folder):
    """Writes pictures of many sizes, each with one object, and their json."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i, (height, width) in enumerate(SIZES, 1):
        Image.fromarray(picture(height, width)).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        x0, y0, x1, y1 = width // 8, height // 8, width // 2, 3 * (height // 8)
        square = {
            "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        annotations.append({"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, **square})
        annotations[-1]["area"] = (x1 - x0) * (y1 - y0)
    categories = [{"id": i, "name": name} for i, name in enumerate("xyz", 1)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances))


def main(overrides):
    del overrides
    import jax

    folder = pathlib.Path(FOLDER.value)
    dataset = load_coco(str(folder / "images"), str(folder / "instances.json"))
    batches = eval_batches(
        dataset,
        batch_size=distributed.devices_per_process(),
        resize=Resize((64,), 160, ((96, 96), (160, 96))),
        channel_order="BGR",
        shard=(jax.process_index(), jax.process_count()),
        reading=Reading(num_workers=0, num_threads=1),
    )
    evaluator = CocoEvaluator(dataset.annotation_file, dataset.category_ids, dataset.class_names)
    painter = predictor("evaluated").on_devices(jax.local_devices())
    evaluate(painter, evaluator, dataset, batches, OUT.value)
    shapes = sorted({batch["image"].shape for batch in batches})
    print(f"process {jax.process_index()}: shapes {shapes}", file=sys.stderr)
    print(f"process {jax.process_index()}: {len(evaluator.results)} results", file=sys.stderr)


if __name__ == "__main__":
    app.run(main, (FOLDER, OUT, *shared.PROCESSES), shared.run_joined)
