"""The doctor finds what is wrong with a data set, and nothing in a good one."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_coco import annotation, content, encode_mask, square, write

from configs import base, finetune
from solov2_jax.config import load_config
from solov2_jax.data.coco import read_coco
from solov2_jax.tools.cli.doctor import main
from solov2_jax.tools.doctor.data_report import Settings, settings_of
from solov2_jax.tools.doctor.data_report import examine as examine_data
from solov2_jax.tools.doctor.derive import derive
from solov2_jax.tools.doctor.findings import ERROR, NOTE, WARNING, DataLimits
from solov2_jax.tools.doctor.grids import Layout, grid_collisions
from solov2_jax.tools.doctor.measure import measure
from solov2_jax.tools.doctor.start import check_at_start
from solov2_jax.tools.synthetic.shapes import ShapesSettings, write_shapes

GRIDS = Layout((16, 16, 8, 6, 4), ((1, 32), (16, 64), (32, 96), (64, 128), (96, 512)), 0.2)
SETTINGS = Settings(short=64, max_size=96, layout=GRIDS, keep_empty=True)


def examine(files, val=None, **changes):
    """Returns [(level, text, examples)] of every finding."""
    result = examine_data(files, val, Settings(**{**vars(SETTINGS), **changes}))
    every = [*result.findings, *(f for p in result.parts for f in p.findings)]
    return result, [(f.level, f.text, f.examples) for f in every]


def wrong(found) -> list[tuple[str, str]]:
    return [(level, text) for level, text, _ in found if level != NOTE]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> tuple[tuple[str, str], tuple[str, str]]:
    settings = ShapesSettings(num_train=40, num_val=10, height=64, width=96, min_radius=0.16)
    folder = write_shapes(str(tmp_path_factory.mktemp("shapes")), settings)
    return tuple((f"{folder}/{s}", f"{folder}/instances_{s}.json") for s in ("train", "val"))


def test_nothing_is_wrong_with_a_good_data_set(shapes):
    train, val = shapes
    wide = Layout((32, 24, 16, 12, 8), GRIDS.scale_ranges, 0.2)
    result, found = examine(train, val, layout=wide)
    assert [t for t in wrong(found) if "cell" not in t[1]] == []
    assert any("crowd regions" in text for _, text, _ in found)
    assert result.verdict in (NOTE, WARNING)
    assert [p.name for p in result.parts] == ["training", "validation"]


def one(record=None, **changes):
    """The data of a json whose second image has one more object."""
    values = content()
    values["annotations"].append(record or annotation(9, 7, 5, **changes))
    return values


BOW_TIE = [[30, 20, 60, 45, 60, 20, 30, 45]]


@pytest.mark.parametrize(
    ("values", "level", "text", "example"),
    [
        (
            one(segmentation=BOW_TIE, bbox=[30, 20, 30, 25]),
            WARNING,
            "1 of 4 .* outline that crosses itself",
            "a.png (annotation 9)",
        ),
        (
            one(bbox=[5, 5, 50, 40], segmentation=square(40, 30, 12)),
            WARNING,
            "box that disagrees with their mask",
            "a.png (annotation 9)",
        ),
        (one(), WARNING, "1 of 4 .* annotated twice", "a.png (annotation 9)"),
        (
            one(bbox=[40, 4, 3, 3], segmentation=square(40, 4, 3)),
            WARNING,
            "no pixel left|fewer than 4 pixels at a quarter",
            "a.png (annotation 9)",
        ),
        (
            one(bbox=[50, 4, 14, 20], segmentation=[[50, 4, 90, 4, 90, 24, 50, 24]]),
            NOTE,
            "1 of 4 .* outline that leaves the image",
            "a.png (annotation 9)",
        ),
        (
            one(segmentation={"size": [48, 64], "counts": "9999"}),
            ERROR,
            "annotation 9: .* damaged run lengths",
            None,
        ),
        (
            one(segmentation=[[1, 2, 3, 4]], bbox=None),
            WARNING,
            "none of their polygons was usable",
            None,
        ),
        (
            one(segmentation=[[1, 2, 3, 4]]),  # its box stays
            WARNING,
            "1 polygons dropped",
            None,
        ),
        (
            content() | {"categories": [*content()["categories"], {"id": 7, "name": "x"}]},
            WARNING,
            "1 of 3 .* classes have no object to train on",
            "x",
        ),
        (content() | {"annotations": []}, ERROR, "no object to train on", None),
        (_ := content() | {"images": []}, ERROR, "`images` is empty", None),
    ],
)
def test_bad_annotations_are_found(tmp_path, values, level, text, example):
    _, found = examine(write(tmp_path, values))
    hits = [f for f in found if f[0] == level and re.search(text, f[1])]
    assert hits, found
    if example:
        assert any(example in e for e in hits[0][2]), hits


def test_a_clean_tiny_set_has_no_warning(tmp_path):
    _, found = examine(write(tmp_path))
    assert wrong(found) == []


def test_bad_files_are_found(tmp_path):
    images, path = write(tmp_path)
    folder = Path(images)
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes()[:300])
    _, found = examine((images, path))
    (level, text, examples) = next(f for f in found if "cannot be read" in f[1])
    assert level == ERROR and text.startswith("1 of 3") and "c.png" in examples[0]
    (folder / "c.png").unlink()
    result, found = examine((images, path))
    assert (ERROR, "1 of 3 images are not in the folder", ("c.png",)) in found
    assert result.verdict == ERROR
    Image.new("RGB", (20, 30)).save(folder / "c.png")
    _, found = examine((images, path))
    (_, text, examples) = next(f for f in found if "another size" in f[1])
    assert examples == ("c.png is 30 x 20, json 40 x 40",)


def test_orientations(tmp_path):
    images, path = write(tmp_path)
    upright = json.loads(Path(path).read_text())
    picture = Image.open(Path(images) / "a.png")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.rotate(0).save(Path(images) / "a.png", exif=exif)
    _, found = examine((images, path))
    (_, _, examples) = next(f for f in found if "before its EXIF" in f[1])
    assert examples == ("a.png",)
    upright["images"][0] |= {"height": 64, "width": 48}
    Path(path).write_text(json.dumps(upright))
    _, found = examine((images, path))
    assert any(f[0] == NOTE and "rotated by their EXIF tag" in f[1] for f in found)
    assert not any(f[0] == ERROR for f in found)


def test_copies_are_found_within_and_across(tmp_path, shapes):
    (images, path), val = shapes
    data = read_coco(images, path)
    folder = tmp_path / "train"
    shutil.copytree(images, folder)
    names = data.file_names.tolist()
    png = [n for n in names if n.endswith("png")]
    shutil.copy(folder / png[0], folder / png[1])
    Image.open(folder / png[2]).save(folder / names[1], quality=95)
    stolen = Path(val[0]) / read_coco(*val).file_names[0]
    shutil.copy(stolen, folder / png[3])
    _, found = examine((str(folder), path), val)
    copies = next(f for f in found if "byte for byte" in f[1])
    assert copies[0] == WARNING and copies[1].startswith("1 images")
    assert set(copies[2][0].split(" = ")) == set(png[:2])
    alike = next(f for f in found if "look the same" in f[1])
    assert set(alike[2][0].split(" ~ ")) == {png[2], names[1]}
    leak = next(f for f in found if "in the training data too" in f[1])
    assert leak[0] == WARNING and leak[2] == (f"{stolen.name} = {png[3]}",)


def test_other_categories_in_the_validation_data(tmp_path):
    train = write(tmp_path / "a")
    values = content()
    values["categories"][1]["name"] = "lion"
    result, found = examine(train, write(tmp_path / "b", values))
    (_, text, _) = next(f for f in found if f[0] == ERROR)
    assert "5 ('cat' became 'lion')" in text
    assert [p.name for p in result.parts] == ["training"]


def test_objects_are_measured_as_training_sees_them(tmp_path):
    mask = np.zeros((48, 64), bool)
    mask[8:28, 12:44] = True
    values = content()
    values["annotations"] = [
        annotation(1, 7, 5, bbox=[12, 8, 32, 20], segmentation=encode_mask(mask)),
        annotation(2, 7, 5, bbox=[12, 8, 32, 20], segmentation=[[12, 8, 44, 8, 44, 28, 12, 28]]),
    ]
    data = read_coco(*write(tmp_path, values))
    objects = measure(data, range(len(data)), 96, 128)
    assert objects.sizes[0].tolist() == [96, 128]
    np.testing.assert_array_equal(objects.box, [[24, 16, 88, 56]] * 2)
    np.testing.assert_array_equal(objects.tight, objects.box)
    assert objects.area.tolist() == [64 * 40] * 2
    assert objects.quarter.tolist() == [16 * 10] * 2
    np.testing.assert_allclose(objects.center, [[55.5, 35.5]] * 2)
    assert objects.twins == ((0, 1),)
    collisions = grid_collisions(objects, GRIDS)
    assert collisions.without_cell.tolist() == [0] and collisions.total == 2
    assert collisions.pairs.tolist() == [collisions.pairs.sum()] and collisions.pairs[0] >= 4
    assert collisions.shared.tolist() == [0, 2, 2, 0, 0]


def test_denser_grids_are_suggested_for_crowded_images(tmp_path):
    values = content()
    values["annotations"] = [
        annotation(i + 1, 9, 5, bbox=[x, y, 5, 5], segmentation=square(x, y, 5))
        for i, (x, y) in enumerate((x, y) for x in range(0, 36, 6) for y in range(0, 36, 6))
    ]
    sparse = Layout((4, 4, 4, 4, 4), GRIDS.scale_ranges, 0.2)
    result, _ = examine(write(tmp_path, values), layout=sparse)
    assert result.advice is not None
    before, after = result.parts[0].collisions, result.advice.collisions
    assert before.untrained_share > 0.3 and after.untrained_share < before.untrained_share
    assert result.advice.layout.num_grids == (8, 8, 8, 8, 8)
    flags = result.advice.overrides()
    assert "--config.model.ins_head.num_grids='(8,8,8,8,8)'" in flags


@pytest.mark.parametrize("name", ["r50_3x", "finetune", "light_448_r50", "quickstart"])
def test_what_is_suggested_can_be_given_to_a_training_by_the_same_config(tmp_path, name):
    config = load_config(name)
    report = examine_data(write(tmp_path), None, settings_of(config))
    assert report.advice is not None
    given = [flag.replace("'", "") for flag in report.advice.overrides()]
    changed = load_config(name, given)
    reference = config.optim.name == "sgd" and not config.train.epochs
    if not reference or config.optim.reference_batch_size:
        assert changed.optim == config.optim and "SGD" not in " ".join(report.advice.reasons)
    else:
        assert changed.train.steps == report.advice.steps


def test_a_cpu_is_given_fewer_pixels_and_more_steps(tmp_path):
    """Objects of 10 and 40 pixels: the size is chosen by the middle one there."""
    values = content()
    for image in values["images"]:
        image["height"], image["width"] = 480, 640
    values["annotations"] = [
        annotation(i + 1, 9, 5, bbox=[60 * i, 9, side, side], segmentation=square(60 * i, 9, side))
        for i, side in enumerate((10, 10, 40, 40, 40, 40))
    ]
    dataset = read_coco(*write(tmp_path, values))

    def values_of(on_cpu):
        derived = derive(finetune.get_config(), dataset, set(), on_cpu=on_cpu)
        return {key: value for each in derived for key, value in each.values.items()}

    cpu, gpu = values_of(on_cpu=True), values_of(on_cpu=False)
    assert (cpu["input.min_size_test"], gpu["input.min_size_test"]) == (320, 800)
    assert cpu["input.min_sizes_train"] == (320,)
    assert gpu["input.min_sizes_train"] == (640, 800, 960)
    assert cpu["train.batch_size"] == 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_per_image": 5}, "more objects than detections .* up to 6: set test.max_per_image=6"),
        ({"nms_pre": 4}, "than candidates enter NMS, up to 6: set test.nms_pre=6, not 4"),
        ({"max_detections": 3}, "of one class .* up to 4: set eval.max_detections=4, not 3"),
        ({"max_instances": 2}, "not trained on, up to 6: set data.max_instances=6, not 2"),
        ({"max_pairs": 7}, "pairs of a grid cell and an object .*: set targets.max_pairs="),
    ],
)
def test_limits_that_the_data_reaches_are_told(tmp_path, changes, text):
    values = content()
    values["annotations"] = [
        annotation(i + 1, 9, 5 if i < 4 else 20, bbox=[x, 4, 5, 5], segmentation=square(x, 4, 5))
        for i, x in enumerate(range(0, 36, 6))
    ]
    files = write(tmp_path, values)
    _, found = examine(files, files, limits=DataLimits(**changes))
    hits = [f for f in found if re.search(text, f[1])]
    # What is about training is not said of the validation data.
    both = set(changes) & {"max_per_image", "nms_pre", "max_detections"}
    assert [level for level, *_ in hits] == [WARNING] * (2 if both else 1), found
    assert not any("set test." in f[1] or "set targets." in f[1] for f in examine(files)[1])


def test_validation_data_without_objects(tmp_path):
    empty = write(tmp_path / "val", content() | {"annotations": []})
    _, found = examine(write(tmp_path / "train"), empty)
    assert (
        WARNING,
        "the validation data has no object: AP is undefined, so no checkpoint is the best",
        (),
    ) in found
    crowds = content()
    for record in crowds["annotations"]:
        record["iscrowd"] = 1
    _, found = examine(write(tmp_path / "train"), write(tmp_path / "crowds", crowds))
    assert any("no object: AP is undefined" in f[1] and "iscrowd 1" in f[1] for f in found)


def test_crowds_are_named_as_the_reason(tmp_path):
    values = content()
    for record in values["annotations"][:2]:
        record["iscrowd"] = 1
    _, found = examine(write(tmp_path, values))
    assert any(f[0] == WARNING and "2 of 3 annotations have iscrowd 1" in f[1] for f in found)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_command_writes_one_page_and_tells_by_its_exit_code(tmp_path, shapes, capsys):
    train, val = shapes
    data = [f"--images={train[0]}", f"--annotations={train[1]}"]
    data += [f"--val_images={val[0]}", f"--val_annotations={val[1]}"]
    size = ["--config.input.min_size_test=64", "--config.input.max_size_test=96"]
    output = tmp_path / "out"
    arguments = ["--config=configs/quickstart.py", *data, *size, f"--output={output}"]
    assert run(*arguments, "--pictures=4") == 0
    said = capsys.readouterr().out
    assert "40 images" in said and "training may start" in said
    text = (output / "report.html").read_text()
    assert len(re.findall(r"<figure", text)) >= 8
    assert set(re.findall(r'src="([^:"]*:?)', text)) == {"data:"}
    assert "http" not in text.replace('lang="en"', "")
    assert {p.name for p in output.glob("*.png")} == {
        *("classes.png", "sizes.png", "images.png", "grids.png")
    }
    images, path = write(tmp_path / "bad")
    (Path(images) / "a.png").unlink()
    assert run(f"--images={images}", f"--annotations={path}", f"--output={output}") == 1
    assert "1 of 3 images are not in the folder" in (output / "report.html").read_text()
    assert "error: training: 1 of 3 images" in capsys.readouterr().out
    assert run(f"--images={images}") == 2
    assert "error: give --images and --annotations together" in capsys.readouterr().err
    assert run("--images=/no", "--annotations=/no.json") == 1
    assert "/no.json: no such annotation file" in capsys.readouterr().out


def config_of(train: tuple[str, str]):
    config = base.get_config()
    config.data.train.images, config.data.train.annotations = train
    config.input.min_size_test, config.input.max_size_test = 64, 96
    return config


def test_training_looks_before_it_starts(tmp_path, caplog):
    train = write(tmp_path, one())
    data = read_coco(*train)
    with caplog.at_level(logging.INFO, "solov2_jax"):
        check_at_start(config_of(train), data, data)
    assert "data, warning: 1 of 4 (25.0 %) objects are annotated twice" in caplog.text
    assert "at no image file" in caplog.text
    crowds = content()
    for record in crowds["annotations"]:
        record["iscrowd"] = 1
    data = read_coco(*write(tmp_path, crowds))
    with pytest.raises(ValueError, match=r"instances.json: error: .*iscrowd 1"):
        check_at_start(config_of(train), data, data)
