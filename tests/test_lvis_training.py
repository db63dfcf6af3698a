"""LVIS's json, trained on by the settings of configs/lvis_r50.py at toy size, and evaluated."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_coco import square

from configs import lvis_r50
from solov2_jax.data.build import build_train_batches, load_datasets

ROOT = Path(__file__).parent.parent
# Of each image: the categories of its objects. Category 9 is in one image of eight.
SHOWN = ((5,), (5, 7), (5,), (5, 7), (5,), (5, 7), (5,), (5, 9))
CATEGORIES = {5: ("cat", "f"), 7: ("dog", "c"), 9: ("yak", "r"), 11: ("emu", "r")}


@pytest.fixture(scope="module")
def lvis(tmp_path_factory):
    """Returns (image folder, json); images are known by `coco_url` only."""
    folder = tmp_path_factory.mktemp("lvis")
    (folder / "coco" / "train2017").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, categories in enumerate(SHOWN, start=1):
        name = f"train2017/{number:012}.jpg"
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "coco" / name)
        images.append(
            {
                "id": number,
                "height": 64,
                "width": 64,
                "coco_url": f"http://images.cocodataset.org/{name}",
                "neg_category_ids": [11] if number % 2 else [],
                "not_exhaustive_category_ids": [7] if 7 in categories else [],
            }
        )
        for n, category in enumerate(categories):
            record = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            box = {"bbox": [4 + 28 * n, 10, 24, 24], "area": 576}
            outline = {"segmentation": square(4 + 28 * n, 10, 24)}
            annotations.append({**record, **box, **outline})
    names = [{"id": i, "name": n, "frequency": f} for i, (n, f) in CATEGORIES.items()]
    path = folder / "lvis_v1_train.json"
    content = {"images": images, "annotations": annotations, "categories": names}
    path.write_text(json.dumps(content))
    return str(folder / "coco"), str(path)


def config_of(lvis):
    """Returns the config with these files; the rest are its own settings."""
    config = lvis_r50.get_config()
    config.data.train.images = config.data.val.images = lvis[0]
    config.data.train.annotations = config.data.val.annotations = lvis[1]
    return config


def test_images_with_rare_classes_are_shown_more_often(lvis):
    config = config_of(lvis)
    config.data.repeat_threshold = 0.5  # 0.001 is below a share of one in eight
    config.data.num_workers, config.train.batch_size, config.train.steps = 0, 4, 300
    config.input.min_sizes_train, config.input.max_size_train = (64,), 64
    train, _ = load_datasets(config)
    seen = np.concatenate([b["image_id"] for b in build_train_batches(config, train)])
    counts = np.bincount(seen, minlength=9)[1:]
    # Category 9 is in 1/8 of the images: the root of 0.5 / (1/8) is 2, 7's of 0.5 / (3/8) 1.15.
    expected = np.array([1, 1.1547] * 3 + [1, 2])
    np.testing.assert_allclose(counts / counts[0::2].mean(), expected, rtol=0.04)


def test_two_steps_and_an_evaluation(lvis, tmp_path):
    run = tmp_path / "run"
    sizes = {
        "data.train.images": lvis[0],
        "data.train.annotations": lvis[1],
        "data.val.images": lvis[0],
        "data.val.annotations": lvis[1],
        "data.num_workers": 0,
        "model.backbone.depth": 18,
        "model.backbone.freeze_at": 0,
        "model.backbone.norm": "gn",
        "model.fpn.channels": 32,
        "model.ins_head.num_convs": 1,
        "model.ins_head.channels": 32,
        "model.ins_head.num_kernels": 32,
        "model.ins_head.num_grids": "(6,5,4,3,2)",
        "model.mask_head.channels": 32,
        "input.min_sizes_train": "(64,)",
        "input.max_size_train": 64,
        "input.min_size_test": 64,
        "input.max_size_test": 64,
        "train.batch_size": 4,
        "train.steps": 2,
        "train.log_every": 1,
        "train.checkpoint_every": 2,
        "optim.milestones": "()",
        "optim.warmup_steps": 0,
    }
    command = [sys.executable, "train.py", "--config=configs/lvis_r50.py", f"--workdir={run}"]
    command += [f"--config.{key}={value}" for key, value in sizes.items()]
    result = subprocess.run(
        [*command, "--cpu_devices=1"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    for name in ("AP", "APr", "APc", "APf", "AR@300"):
        assert f"segm/{name}" in metrics and f"bbox/{name}" in metrics
    assert metrics["num_images"] == 8 and metrics["segm/AP/emu"] is None  # no object: undefined
    assert all(metrics[f"segm/AP/{name}"] is not None for name in ("cat", "dog", "yak"))
    results = json.loads((run / "eval" / "predictions.json").read_text())
    # Far more detections an image than COCO's 100 count, by the config's low threshold.
    assert max(np.bincount([r["image_id"] for r in results])) > 100
    assert (run / "eval" / "report" / "report.html").exists()


def test_the_docs_state_what_1203_classes_cost():
    config = lvis_r50.get_config()
    classes = 1203
    weights = 9 * config.model.ins_head.channels * classes
    cells = sum(g * g for g in config.model.ins_head.num_grids)
    logits = 4 * cells * classes / 1e6
    text = (ROOT / "docs" / "evaluation_and_prediction.md").read_text("utf-8")
    for number in (
        *(f"{weights:,}", f"{4 * weights / 1e6:.1f} MB", f"{12 * weights / 1e6:.1f} MB"),
        *(f"{cells:,} cells", f"{logits:.1f} MB", f"{config.test.max_candidates:,}"),
    ):
        assert number in text, number
