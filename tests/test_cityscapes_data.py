"""Cityscapes as it is unpacked -> training data, and validation by its own metric."""

import json
from pathlib import Path

import numpy as np
import pytest
from metric_cases import encode
from PIL import Image
from test_own_data import refused
from test_own_data_command import flags_as_they_were, settings  # noqa: F401

from solov2_jax.data.build import load_datasets
from solov2_jax.data.cityscapes import CLASSES
from solov2_jax.evaluation.cityscapes import CityscapesEvaluator
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.evaluate import build_evaluator
from solov2_jax.evaluation.evaluators import make_evaluator
from solov2_jax.io import InputError
from solov2_jax.tools.importers.merge import Options, merge
from solov2_jax.tools.importers.recognise import recognise

SIZE = (48, 96)
# Of each part's images: what a square of 14 x 14 pixels is, as instanceIds has it.
CAR, GROUP_OF_CARS, PERSON, BICYCLE, VOID, ROAD = 26001, 26, 24000, 33002, 4, 7
PARTS = {
    "train": {
        "aachen/aachen_000000_000019": (CAR, 26002, GROUP_OF_CARS),
        "aachen/aachen_000001_000019": (PERSON, VOID),
        "ulm/ulm_000000_000019": (BICYCLE, 24, 25000),
    },
    "val": {
        "munster/munster_000000_000019": (CAR, PERSON, GROUP_OF_CARS, VOID),
        "munster/munster_000001_000019": (),
    },
    "test": {"bonn/bonn_000000_000019": ()},
}


def write_cityscapes(folder: Path, parts=PARTS) -> None:
    for part, images in parts.items():
        for stem, values in images.items():
            ids = np.full(SIZE, ROAD, np.uint16)
            for n, value in enumerate(values):
                ids[4 + 3 * n : 18 + 3 * n, 2 + 22 * n : 16 + 22 * n] = value
            truth = folder / "gtFine" / part / f"{stem}_gtFine_instanceIds.png"
            image = folder / "leftImg8bit" / part / f"{stem}_leftImg8bit.png"
            for path in (truth, image):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids).save(truth)
            (truth.parent / f"{Path(stem).name}_gtFine_polygons.json").write_text("{}")
            Image.new("RGB", SIZE[::-1], (90, 90, 90)).save(image)


def classes(content):
    """Returns the ids and the names of the categories."""
    return [c["id"] for c in content["categories"]], [c["name"] for c in content["categories"]]


def objects(content, crowd=0):
    """Returns (file name without ending, class, pixels) of the objects or crowds, sorted."""
    names = {i["id"]: i["file_name"].removesuffix("_leftImg8bit.png") for i in content["images"]}
    chosen = [a for a in content["annotations"] if a["iscrowd"] == crowd]
    return sorted((names[a["image_id"]], a["category_id"], a["area"]) for a in chosen)


def wanted(part, crowd=0):
    values = [(stem, v) for stem, each in PARTS[part].items() for v in each]
    pairs = [(s, v // 1000 if v >= 1000 else v) for s, v in values if (v < 1000) == bool(crowd)]
    return sorted((stem, label, 14 * 14) for stem, label in pairs if label in CLASSES)


def test_the_whole_preparation_of_a_run(tmp_path, capsys):
    write_cityscapes(tmp_path / "city")
    words = (f"--data={tmp_path}/city", f"--workdir={tmp_path}/run", "--epochs=1")
    config = settings(*words)
    lines = capsys.readouterr().out.splitlines()
    assert "Cityscapes, training 3 images, 5 objects, 2 crowd regions" in lines[0]
    assert "the test part's ground truth is withheld: left out" in lines[0]
    assert "Cityscapes, validation 2 images, 2 objects, 1 crowd regions" in lines[1]
    train, val = (
        json.loads((tmp_path / "run/data" / name).read_text())
        for name in ("train.json", "val.json")
    )
    for part, content in (("train", train), ("val", val)):
        assert {c["id"]: c["name"] for c in content["categories"]} == CLASSES
        for crowd in (0, 1):
            assert objects(content, crowd) == wanted(part, crowd)
    assert config.model.num_classes == 8 and settings(*words) == config
    training, validation = load_datasets(config)
    assert (len(training.labels), len(validation.labels)) == (5, 2)
    evaluator = build_evaluator(config, validation)
    assert isinstance(evaluator, CityscapesEvaluator)
    right = [{**a, "score": 0.9} for a in val["annotations"] if not a["iscrowd"]]
    # The fourth square is void: what is found there is neither right nor wrong.
    ids = np.full(SIZE, False)
    ids[13:27, 68:82] = True
    in_void = {**right[0], "segmentation": encode(ids), "score": 0.95}
    evaluator.add_results([*right, in_void])
    metrics = evaluator.evaluate()
    assert metrics["segm/AP"] == metrics["segm/AP/car"] == metrics["segm/AP50/person"] == 1
    assert np.isnan(metrics["segm/AP/bicycle"])


@pytest.mark.parametrize(
    ("options", "metric", "numbers"),
    [
        (Options(), CityscapesEvaluator, (3, 2)),
        (Options(classes=("car", "person")), CityscapesEvaluator, (3, 2)),
        (Options(single_class=True), CocoEvaluator, (3, 2)),
    ],
)
def test_its_metric_is_chosen_where_classes_keep_their_numbers(tmp_path, options, metric, numbers):
    write_cityscapes(tmp_path)
    merged = merge({"a": recognise(str(tmp_path / "gtFine"))}, options)
    assert tuple(len(c["images"]) for c in merged.contents) == numbers
    assert type(make_evaluator(merged.contents[1], *classes(merged.contents[1]))) is metric


def test_without_a_validation_part_one_is_split_off_and_validated_alike(tmp_path):
    parts = {"train": {f"aachen/aachen_{n:06}_000019": (CAR,) for n in range(10)}}
    # As the archives are unpacked: each in a folder of its name.
    write_cityscapes(tmp_path / "all", parts)
    for name in ("gtFine", "leftImg8bit"):
        (tmp_path / f"{name}_trainvaltest").mkdir()
        (tmp_path / "all" / name).rename(tmp_path / f"{name}_trainvaltest" / name)
    train, val = merge({"a": recognise(str(tmp_path))}, Options()).contents
    assert (len(train["images"]), len(val["images"])) == (8, 2)
    evaluator = make_evaluator(val, *classes(val))
    assert isinstance(evaluator, CityscapesEvaluator)
    evaluator.add_results([{**a, "score": 0.9} for a in val["annotations"]])
    assert evaluator.evaluate()["segm/AP"] == 1
    # The pictures of instance ids must be there when it is evaluated.
    next(
        (tmp_path / "gtFine_trainvaltest").rglob(f"*{val['images'][0]['file_name'][-30:-16]}*.png")
    ).unlink()
    with pytest.raises(InputError, match="lacks 1 of its 2 pictures of instance ids"):
        make_evaluator(val, *classes(val))


def test_what_is_missing_is_one_error(tmp_path):
    write_cityscapes(tmp_path)
    image = tmp_path / "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png"
    truth = tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png"
    for path, message in (
        (
            image,
            f"leftImg8bit/train: 1 of 3 images of {tmp_path}/gtFine/train are missing: ulm/ulm_",
        ),
        (truth, "gtFine/train: has no ground truth of 1 of 3 images in"),
        (tmp_path / "leftImg8bit" / "val", "leftImg8bit/val: there is no such folder, which"),
        (tmp_path / "leftImg8bit", "is Cityscapes' gtFine, and there is no leftImg8bit beside it"),
        (tmp_path / "gtFine", "is Cityscapes' leftImg8bit, and there is no gtFine beside it"),
    ):
        path.rename(tmp_path / "away")
        assert message in refused(tmp_path)
        (tmp_path / "away").rename(path)
    assert f"give the folder that has gtFine and leftImg8bit, {tmp_path}" in refused(
        tmp_path / "gtFine" / "train"
    )
    Image.new("RGB", (20, 10)).save(image)
    assert "is 10 x 20, and its ground truth 48 x 96" in refused(tmp_path)
    Image.new("RGB", SIZE[::-1]).save(image)
    truth.write_bytes(b"no picture")
    assert f"{truth}: " in refused(tmp_path)
    for path in (tmp_path / "gtFine").rglob("*Ids.png"):
        path.unlink()
    assert "has no file *_gtFine_instanceIds.png in a folder of a part" in refused(tmp_path)
