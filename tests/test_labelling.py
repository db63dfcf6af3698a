"""`solov2 select` and `solov2 pseudo`: the choice, the labels, what is left out and refused."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_network
from PIL import Image
from tiny_network import IDS, NAMES

from solov2_jax.inference.predictor import Predictor
from solov2_jax.io import InputError
from solov2_jax.models.solov2 import intermediates
from solov2_jax.tools.cli import pseudo as pseudo_command
from solov2_jax.tools.cli import select as select_command
from solov2_jax.tools.importers.merge import Options, merge
from solov2_jax.tools.importers.recognise import recognise
from solov2_jax.tools.labelling.choose import choose, uncertainty
from solov2_jax.tools.labelling.pictures import (
    PictureFolder,
    find_pictures,
    leave_out,
    open_pictures,
    own_pictures,
)
from solov2_jax.tools.labelling.pseudo import PseudoOptions, pseudo
from solov2_jax.tools.labelling.select import SelectOptions, describe, select


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns (workdir, predictor) of a tiny run whose data is two pictures."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_network.tiny_config()
    for part, shade in (("train", 10), ("val", 20)):
        (folder / part).mkdir()
        picture(shade).save(folder / part / "own.png")
        content = {
            "images": [{"id": 1, "file_name": "own.png", "height": 48, "width": 64}],
            "annotations": [],
            "categories": [{"id": i, "name": n} for i, n in zip(IDS, NAMES, strict=True)],
        }
        (folder / f"{part}.json").write_text(json.dumps(content))
        config.data[part].images = str(folder / part)
        config.data[part].annotations = str(folder / f"{part}.json")
    workdir = tiny_network.write_workdir(folder / "w", config)
    return workdir, Predictor.from_workdir(workdir)


def picture(seed, size=(48, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8))


@pytest.fixture
def photos(tmp_path, run):
    """Five pictures, one in a subfolder, two of them the same; a damaged one; own ones."""
    folder = tmp_path / "photos"
    (folder / "süd, west").mkdir(parents=True)
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
    picture(4, (64, 48)).save(folder / "süd, west" / "4.png")
    shutil.copy(folder / "1.png", folder / "twin.png")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "notes.txt").write_text("no picture")
    for part in ("train", "val"):
        shutil.copy(Path(run[0]).parent / part / "own.png", folder / f"{part}.png")
    return folder


def test_uncertainty_is_the_mean_entropy_of_the_ten_most_uncertain():
    assert uncertainty(np.array([])) == 0
    assert uncertainty(np.array([0.5])) == 1
    assert uncertainty(np.array([0.0, 1.0])) < 1e-9
    entropy = -0.25 * np.log2(0.25) - 0.75 * np.log2(0.75)
    assert uncertainty(np.array([0.25, 0.75])) == pytest.approx(entropy)
    assert uncertainty(np.array([0.99] * 50 + [0.5] * 10)) == 1


def test_the_choice_is_that_of_the_plain_definition():
    rng = np.random.default_rng(0)
    features, unsure = rng.normal(size=(30, 8)), rng.uniform(size=30)
    labelled = rng.normal(size=(3, 8))
    both = np.concatenate([features, labelled])
    both = (both - both.mean(0)) / both.std(0)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    for diversity in (0.0, 0.3, 1.0):
        taken, wanted = list(range(30, 33)), []
        for _ in range(6):
            nearest = ((1 - both[:30] @ both[taken].T) / 2).min(axis=1)
            gain = unsure ** (1 - diversity) * np.clip(nearest, 0, 1) ** diversity
            gain[wanted] = -1
            wanted.append(int(gain.argmax()))
            taken.append(wanted[-1])
        found = choose(unsure, features, 6, labelled=labelled, diversity=diversity)
        assert found.index.tolist() == wanted
    assert sorted(choose(unsure, features, 99).index.tolist()) == list(range(30))


def test_equal_pictures_are_not_taken_twice_and_nothing_found_is_no_error():
    features = np.array([[1.0, 0], [1, 0], [0, 1], [0, 2]])
    found = choose(np.ones(4), features, 2)
    assert set(found.index.tolist()) in ({0, 2}, {0, 3}) and found.difference[0] == 1
    assert choose(np.zeros(4), features, 4).index.tolist()[0] == 0
    assert len(choose(np.zeros(1), np.ones((1, 3)), 5).index) == 1


def test_features_are_the_fpn_s_means_whatever_holds_the_picture(run, photos):
    predictor = run[1].with_shapes(((64, 64),))
    pictures = PictureFolder(str(photos), ["0.png", "1.png", "2.png"])
    found = describe(predictor, pictures, 2, "looking")
    example = run[1].with_shapes(()).preprocess(str(photos / "1.png"))
    mean, std = (np.array(v, np.float32) for v in (predictor.input.mean, predictor.input.std))
    height, width = example["image_size"]
    pixels = np.zeros((1, *example["image"].shape), np.float32)
    pixels[0, :height, :width] = (example["image"][:height, :width] - mean) / std
    by_path = intermediates(predictor.model, predictor.variables, jnp.asarray(pixels))
    wanted = np.concatenate([by_path[f"fpn/p{k}"].mean((0, 1, 2)) for k in range(2, 7)])
    # Sums in another order, of values of the order 1.
    np.testing.assert_allclose(found.features[1], wanted, atol=2e-4 * np.abs(wanted).max())
    prediction = predictor(str(photos / "1.png"))
    assert found.objects[1] >= len(prediction)  # some masks may have no pixel at full size
    assert found.unsure[1] == pytest.approx(uncertainty(prediction.scores), abs=0.05)


def test_a_selection_is_written_and_the_same_each_time(run, photos, tmp_path):
    workdir, predictor = run
    options = SelectOptions(number=3, images="copy", batch_size=2)
    out = tmp_path / "next"
    pictures = select(predictor, workdir, str(photos), str(out), options)
    assert len(pictures.problems) == 1 and "damaged.jpg" in pictures.problems[0]
    first = (out / "selection.csv").read_bytes()
    rows = list(csv.DictReader(first.decode().splitlines()))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    names = [row["file_name"] for row in rows]
    assert not {"train.png", "val.png", "damaged.jpg"} & set(names) and len(set(names)) == 3
    assert not {"1.png", "twin.png"} <= set(names)
    about = json.loads((out / "selection.json").read_text())
    assert (about["looked_at"], about["labelled"]) == (6, 1)
    assert about["left_out"] == ["train.png", "val.png"] and len(about["unreadable"]) == 1
    assert [row["file_name"] for row in about["selected"]] == names
    copies = {p.relative_to(out / "images").as_posix() for p in (out / "images").rglob("*.png")}
    assert copies == set(names)
    # Again, fewer: the same first two; what is not chosen any more goes, the user's stays.
    (out / "images" / "mine.txt").write_text("mine")
    select(predictor, workdir, str(photos), str(out), replace(options, number=2, images="link"))
    assert (out / "selection.csv").read_bytes() == b"\n".join(first.split(b"\n")[:3]) + b"\n"
    left = [p for p in (out / "images").rglob("*") if not p.is_dir()]
    assert {p.name for p in left} == {os.path.basename(n) for n in names[:2]} | {"mine.txt"}
    assert all(p.is_symlink() for p in left if p.suffix == ".png")
    # A list that somebody edited is not replaced.
    (out / "selection.csv").write_text("mine")
    with pytest.raises(InputError, match="selection.csv: not written by this command"):
        select(predictor, workdir, str(photos), str(out), options)


def test_pseudo_labels_go_through_training_s_reader(run, photos, tmp_path):
    workdir, predictor = run
    options = PseudoOptions(least=(0.4, 0.0), batch_size=2, origin="w")
    out = tmp_path / "pseudo"
    pictures = pseudo(predictor, lambda p: p, workdir, str(photos), str(out), options)
    assert len(pictures.problems) == 1
    content = json.loads((out / "pseudo.json").read_text())
    assert content["info"]["thresholds"] == {"cat": 0.4, "dog": 0.0}
    assert content["categories"] == [{"id": 5, "name": "cat"}, {"id": 20, "name": "dog"}]
    by_name = {i["file_name"]: i["id"] for i in content["images"]}
    assert by_name and "train.png" not in by_name
    name = next(n for n in by_name if "/" not in n)
    found = predictor(str(photos / name))
    wanted = [s for s, k in zip(found.scores, found.labels, strict=True) if s >= (0.4, 0)[k]]
    records = [a for a in content["annotations"] if a["image_id"] == by_name[name]]
    assert [r["score"] for r in records] == pytest.approx(wanted)
    assert [r["area"] for r in records] == [
        m.sum()
        for m, s, k in zip(found.masks, found.scores, found.labels, strict=True)
        if s >= (0.4, 0)[k]
    ]
    # As `--data` sees it: training only; alone it has nothing to evaluate on.
    parts = recognise(str(out))
    with pytest.raises(InputError, match="only pseudo-labels"):
        merge({"p": parts}, Options())
    labelled = recognise(str(write_labelled(tmp_path / "labelled")))
    merged = merge({"a": labelled, "p": parts}, Options(weights=(2.0, 1.0)))
    train, val = merged.contents
    assert len(train["images"]) + len(val["images"]) == 10 + len(by_name)
    assert merged.images[1].endswith("labelled") and len(val["images"]) == 2
    assert any("pseudo-labels: trained on" in line for line in merged.lines)


def write_labelled(folder):
    folder.mkdir()
    images, records = [], []
    for n in range(1, 11):
        picture(100 + n).save(folder / f"{n}.png")
        images.append({"id": n, "file_name": f"{n}.png", "height": 48, "width": 64})
        outline = [[2, 2, 20, 2, 20, 20, 2, 20]]
        records.append({"id": n, "image_id": n, "category_id": 1, "segmentation": outline})
    content = {
        "images": images,
        "annotations": records,
        "categories": [{"id": 1, "name": "dog"}],
    }
    (folder / "labels.json").write_text(json.dumps(content))
    return folder


def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(run, photos, tmp_path):
    workdir, predictor = run
    out = str(tmp_path / "out")
    sure = PseudoOptions(least=(1.0, 1.0))
    with pytest.raises(InputError, match="no label: of 6 pictures none .* Lower --score"):
        pseudo(predictor, lambda p: p, workdir, str(photos), out, sure)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no picture in this folder"):
        select(predictor, workdir, str(tmp_path / "empty"), out, SelectOptions())
    with pytest.raises(InputError, match="no picture is left: 1 are the run's own"):
        select(predictor, workdir, str(photos / "train.png"), out, SelectOptions())
    with pytest.raises(InputError, match="no label: of 0 pictures none"):
        pseudo(predictor, lambda p: p, workdir, str(photos / "train.png"), out, sure)
    for words, message in (
        ("bird=0.5", "no such class. The classes are cat, dog"),
        ("dgo=0.5", "did you mean dog"),
        ("cat=2", "from 0 to 1"),
        ("cat=nan", "from 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            pseudo_command.class_scores((words,), NAMES)
    assert pseudo_command.class_scores(("cat=0.5", "dog=1"), NAMES) == {"cat": 0.5, "dog": 1.0}
    assert not os.path.exists(out)


def test_pictures_that_are_known_are_found_by_their_bytes(tmp_path):
    for name, seed in (("a.png", 0), ("b.png", 1)):
        picture(seed).save(tmp_path / name)
    shutil.copy(tmp_path / "a.png", tmp_path / "known.bin")
    pictures = find_pictures(str(tmp_path))
    kept, left = leave_out(pictures, [str(tmp_path / "known.bin"), str(tmp_path / "gone")])
    assert (kept.names, left) == (["b.png"], ["a.png"])
    os.mkfifo(tmp_path / "pipe.png")
    assert "is a FIFO" in find_pictures(str(tmp_path / "*.png")).problems[0]


def test_several_devices_say_what_one_does(run, photos):
    predictor = run[1].with_shapes(((64, 64),))
    several = predictor.on_devices(jax.local_devices()[:2])
    pictures = PictureFolder(str(photos), ["0.png", "1.png", "2.png"])
    one, two = (describe(p, pictures, 1, "looking") for p in (predictor, several))
    assert one.names == two.names and (one.objects == two.objects).all()
    np.testing.assert_allclose(two.unsure, one.unsure, atol=1e-5)
    np.testing.assert_allclose(two.features, one.features, atol=1e-4 * np.abs(one.features).max())


def test_commands_use_every_device(run, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    words = [f"--workdir={run[0]}", f"--input={photos}", "--nokeep_memory"]
    for command, name in ((select_command, "selection.csv"), (pseudo_command, "pseudo.json")):
        with pytest.raises(SystemExit) as ended:
            command.run(argv=[*words, f"--output={tmp_path / name}"])
        assert ended.value.code == 1, "a picture is damaged"
        assert "prediction on 2 device(s)" in capsys.readouterr().out
        assert (tmp_path / name / name).is_file()


def test_pictures_of_further_validation_sets_are_the_run_s_own(run, photos, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "w")
    config = json.loads((workdir / "config.json").read_text())
    shutil.copy(photos / "0.png", tmp_path / "far.png")
    image = {"id": 1, "file_name": "far.png", "height": 48, "width": 64}
    categories = [{"id": i, "name": n} for i, n in zip(IDS, NAMES, strict=True)]
    values = {"images": [image], "annotations": [], "categories": categories}
    (tmp_path / "far.json").write_text(json.dumps(values))
    config["data"]["vals"] = [["far", str(tmp_path), str(tmp_path / "far.json")]]
    (workdir / "config.json").write_text(json.dumps(config))
    train, others = own_pictures(str(workdir))
    assert [os.path.basename(p) for p in train + others] == ["own.png", "own.png", "far.png"]
    found = open_pictures(str(workdir), str(photos), str(tmp_path / "out"), [], overwrite=False)
    assert found.left == ["0.png", "train.png", "val.png"]


def test_a_file_of_the_user_s_among_the_pictures_stops_before_anything_is_written(
    run, photos, tmp_path
):
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    for name in ("0.png", "2.png", "3.png", "twin.png", "1.png"):
        (out / "images" / name).write_text("mine")
    with pytest.raises(InputError, match="not written by this command"):
        select(run[1], run[0], str(photos), str(out), SelectOptions(number=0, images="copy"))
    with pytest.raises(InputError, match="not written by this command"):
        pseudo(run[1], lambda p: p, run[0], str(photos), str(out), PseudoOptions((0.0, 0.0)))
    left = [p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")]
    assert len(left) == 5 and all(p.read_text() == "mine" for p in left)
