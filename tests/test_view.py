"""Pictures of training batches show what training gets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_coco import annotation, content, square, write

from configs import base
from solov2_jax.data.build import build_train_batches
from solov2_jax.data.coco import load_coco
from solov2_jax.inference.draw import distinct_color
from solov2_jax.tools import browse_batches
from solov2_jax.tools.cli import view

FLAGS = [
    "--config=configs/quickstart.py",
    "--config.data.name=",
    "--config.train.batch_size=2",
    "--config.input.min_sizes_train=(64,)",
    "--config.input.max_size_train=96",
]


def config_of(images: str, path: str):
    config = base.get_config()
    config.data.train.images, config.data.train.annotations = images, path
    config.input.min_sizes_train, config.input.max_size_train = (64,), 96
    config.model.ins_head.num_grids = (16, 16, 8, 6, 4)
    config.targets.scale_ranges = ((1, 32), (16, 64), (32, 96), (64, 128), (96, 512))
    config.train.batch_size, config.train.steps = 2, 4
    config.data.num_workers = 0
    return config


def test_a_picture_for_every_image_of_a_batch(tmp_path, capsys):
    images, path = write(tmp_path)
    data = [f"--config.data.train.images={images}"]
    data += [f"--config.data.train.annotations={path}"]
    out = tmp_path / "view"
    view.run(argv=[*FLAGS, *data, f"--output={out}", "--step=1", "--batches=3"])
    said = capsys.readouterr().out
    assert "6 pictures" in said and "cat, box side" in said
    config = config_of(images, path)
    batches = list(build_train_batches(config, load_coco(images, path), 1))
    expected = [
        f"step_{step:06d}_{row}_{image_id}.jpg"
        for step, batch in enumerate(batches, start=1)
        for row, image_id in enumerate(batch["image_id"].tolist())
    ]
    assert sorted(p.name for p in out.iterdir()) == sorted(expected)
    with Image.open(out / expected[0]) as picture:
        assert picture.width == 3 * browse_batches.WIDTH + 16


def test_cells_have_their_objects_colour(tmp_path):
    values = content()
    values["annotations"] = [annotation(1, 9, 20, segmentation=square(10, 8, 20))]
    values["annotations"] += [annotation(2, 7, 5)]
    images, path = write(tmp_path, values)
    config, data = config_of(images, path), load_coco(images, path)
    batch = next(iter(build_train_batches(config, data)))
    row = next(i for i, v in enumerate(batch["valid"].any(axis=1)) if v)
    fields = {key: value[row] for key, value in batch.items()}
    fields["image"] = np.zeros_like(fields["image"])
    cells, sharing = browse_batches.targets_of(fields, config)
    assert 1 < cells.hit[:, 0].sum() < 5
    picture = browse_batches.draw_sample(fields, config, data.class_names)
    height = (picture.shape[0] - 8) // 2
    panels = {}
    for i in range(6):
        y, x = i // 3 * (height + 8), i % 3 * (browse_batches.WIDTH + 8)
        panels[i] = picture[y + 20 : y + height, x : x + browse_batches.WIDTH]
    tint = np.array(distinct_color(0)) * 0.65
    for level, grid in enumerate(config.model.ins_head.num_grids):
        panel = panels[level + 1]
        found = (np.abs(panel - tint) < 2).all(axis=-1)
        h, w = panel.shape[:2]
        middle = (np.arange(grid) * 2 + 1) * np.array([[h], [w]]) // (2 * grid)
        at_cells = found[middle[0]][:, middle[1]]
        np.testing.assert_array_equal(at_cells, sharing.owner[level] == 0)
    text = browse_batches.list_objects(fields, config, data.class_names, "x")
    levels = np.flatnonzero(cells.hit[:, 0]) + 1
    assert f"levels {levels.tolist()}" in text and "NOT TRAINED" not in text


def test_an_image_without_objects_and_a_wrong_flag(tmp_path, capsys):
    images, path = write(tmp_path, content() | {"annotations": []})
    data = [f"--config.data.train.images={images}"]
    data += [f"--config.data.train.annotations={path}"]
    view.run(argv=[*FLAGS, *data, f"--output={tmp_path}/out", "--batches=1"])
    assert len(list(Path(tmp_path, "out").iterdir())) == 2
    capsys.readouterr()
    wrong = [f"--output={tmp_path}/new/view", "--config.augment.custom=('no_such_package:cut',)"]
    with pytest.raises(SystemExit):
        view.run(argv=[*FLAGS, *data, *wrong])
    assert "cannot be imported" in capsys.readouterr().err and not Path(tmp_path, "new").exists()
    with pytest.raises(SystemExit) as stop:
        view.run(argv=[*FLAGS, *data, f"--output={tmp_path}/out", "--batches=0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --batches=0 must be at least 1")
