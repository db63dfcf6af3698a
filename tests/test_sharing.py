"""A run that is handed on: pushed to a hub, pulled from it, and the same network again."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_network
import yaml
from hub_server import hub_server  # noqa: F401  a fixture

from solov2_jax import pretrained
from solov2_jax.config import read_config
from solov2_jax.inference.predictor import Predictor
from solov2_jax.io import InputError
from solov2_jax.pretrained import find_pretrained, load_run_config, portable_config
from solov2_jax.tools.cli import benchmark, convert, env, evaluate, export
from solov2_jax.tools.cli import hub as command
from solov2_jax.tools.report.thresholds import read_thresholds
from solov2_jax.tools.sharing import share
from solov2_jax.tools.sharing.describe import metrics_at
from solov2_jax.training import restore
from solov2_jax.training.workdir import check_workdir

ALONE = "--nokeep_memory"  # the process of the tests does not start anew


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, with what a training leaves there."""
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((64, 64),)
    config.init_from = "timm/resnet18.a1_in1k"
    with config.unlocked():
        config.data.train.images = "/home/somebody/photos"
        config.user.secret = "mine"
    folder = tmp_path_factory.mktemp("run")
    tiny_network.write_workdir(folder, config, steps=(3, 5))
    lines = [{"step": 3, "segm/AP": 0.5, "segm/AP/cat": 0.25, "bbox/AP": None}]
    lines += [{"step": 5, "loss": 1.0}, {"step": 5, "segm/AP": 0.4}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = {"step": 3, "metric": "segm/AP", "value": 0.5}
    (folder / "best.json").write_text(json.dumps(best))
    origin = {"name": config.init_from, "address": "https://hub/x", "revision": "c" * 40}
    record = {"path": "x", "sha256": "ab" * 32, "source": "torchvision", "settings": {}}
    record["origin"] = {**origin, "licence": "apache-2.0"}
    (folder / "init_from.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def folder(tmp_path, run):
    """The run as a folder that is handed on."""
    share.write_pretrained(str(run), tmp_path / "folder", "me/model", share.PushOptions())
    return tmp_path / "folder"


IMAGE = np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)


def same(one, other):
    """Asserts that two predictors find the same, to the last bit."""
    a, b = one(IMAGE), other(IMAGE)
    assert len(a.scores) > 0 and one.category_ids == other.category_ids
    for name in ("scores", "labels", "boxes", "masks"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


# The hub's library calls its HTTP client in a way that the client wants changed.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push_and_pull_give_the_same_network(server, run, tmp_path, monkeypatch, capsys):
    server.token = "hf_secret"
    with pytest.raises(InputError, match="pushing needs a token"):
        share.push(str(run), "me/model", share.PushOptions())
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"push to me/model: .* refuses access \(401\)"):
        share.push(str(run), "me/model", share.PushOptions())
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    address = share.push(str(run), "me/model", share.PushOptions(licence="mit", dataset="cats"))
    assert address.startswith(f"{server.url}/me/model/commit/")
    files = server.repositories["me/model"].commits[address.rpartition("/")[2]]
    assert {*share.FILES} - {pretrained.THRESHOLDS} <= set(files) and not any(
        b"somebody" in data for data in files.values()
    )
    share.push(str(run), "me/model", share.PushOptions("last"))

    best = Predictor.from_workdir(run, "best")
    monkeypatch.delenv("HF_TOKEN")
    same(best, Predictor.from_pretrained(f"me/model@{address.rpartition('/')[2]}"))
    same(Predictor.from_workdir(run), Predictor.from_workdir("hf:me/model"))
    pulled = share.pull("me/model", str(tmp_path / "pulled"))
    same(Predictor.from_workdir(run), Predictor.from_pretrained(pulled))
    same(best, Predictor.from_pretrained(_write(run, tmp_path / "again")))
    with pytest.raises(InputError, match="holds something already"):
        share.pull("me/model", str(pulled))
    with pytest.raises(InputError, match="no such repository"):
        Predictor.from_pretrained("me/other")
    # Its weights start another run, by name and from the folder.
    for name in ("hf:me/model", str(pulled)):
        weights = restore.read_init(name)
        assert weights.class_names == tiny_network.NAMES and weights.num_classes == 2
    assert restore.read_init("hf:me/model").origin["address"] == f"{server.url}/me/model"


def _write(run, folder):
    share.write_pretrained(str(run), folder, "a/b", share.PushOptions("best"))
    return folder


def test_a_model_card_says_what_is_known(folder):
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "timm/resnet18.a1_in1k" and "license" not in head
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [
        {"type": "mean_average_precision", "name": "segm/AP", "value": 0.5}
    ]
    for words in (
        "Classes (2): cat, dog.",
        "| segm/AP/cat | 0.250 |",
        "at step 3 (checkpoint best)",
        "timm/resnet18.a1\\_in1k (https://hub/x, revision",
        "sha256 `abab",
        "licence of those: apache-2.0",
        'Predictor.from_pretrained("me/model")',
    ):
        assert words in card, words
    about = json.loads((folder / "run.json").read_text())
    assert about["step"] == 3 and about["metrics"] == {"segm/AP": 0.5, "segm/AP/cat": 0.25}
    assert pretrained.read_step(folder) == 3


def test_the_scores_of_the_checkpoint_are_handed_on(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "own")
    classes = {name: {"score": score} for name, score in (("cat", 0.25), ("dog", 0.75))}
    steps = {"3": {"classes": classes}, "9": {"classes": {}}}
    (own / "thresholds.json").write_text(json.dumps({"steps": steps}))
    folder = _write(own, tmp_path / "folder")
    predictor = Predictor.from_pretrained(folder)
    assert predictor.step == 3
    scores = read_thresholds(folder, 3, predictor.class_names, predictor.category_ids)
    assert scores.tolist() == [0.25, 0.75]
    assert list(json.loads((folder / "thresholds.json").read_text())["steps"]) == ["3"]


def test_a_card_without_metrics_and_origin_says_so(run, tmp_path):
    bare = shutil.copytree(run, tmp_path / "bare")
    for name in ("metrics.jsonl", "init_from.json", "best.json"):
        os.remove(bare / name)
    share.write_pretrained(str(bare), tmp_path / "folder", "a/b", share.PushOptions())
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "no evaluation of this checkpoint is recorded" in card and "model-index" not in card
    assert "Training started from random weights" in card


def test_nothing_of_this_machine_is_handed_on(run, folder):
    config = json.loads((folder / "config.json").read_text())
    assert "user" not in config and "somebody" not in json.dumps(config)
    assert read_config(folder / "config.json").init_from == "timm/resnet18.a1_in1k"
    own = read_config(run / "config.json")
    with own.unlocked():
        own.init_from = str(run / "best.json")
    assert portable_config(own)["init_from"] == "best.json"


def test_code_that_a_config_names_is_not_taken(folder):
    values = json.loads((folder / "config.json").read_text())
    values["train"]["hooks"] = values["eval"]["reports"] = ["os:abort"]
    values["augment"]["custom"] = ["os:abort"]
    values["data"]["name"], values["data"]["providers"] = "evil", {"evil": "os:abort"}
    values["user"] = {"anything": "os:abort"}
    (folder / "config.json").write_text(json.dumps(values))
    config = load_run_config(folder)
    assert "os:abort" not in json.dumps(config.to_dict())
    assert config.data.name == "" and "evil" not in config.data.providers


def test_what_is_overridden(folder):
    config = load_run_config(folder, ["--config.test.score_threshold=0.25"])
    assert config.test.score_threshold == 0.25 and config.model.backbone.depth == 18
    with pytest.raises(InputError, match="keep their network"):
        load_run_config(folder, ["--config.model.backbone.depth=50"])
    with pytest.raises(InputError, match="has no checkpoint '7', only its weights"):
        Predictor.from_workdir(folder, "7")


def test_a_damaged_folder_is_one_error(folder):
    names = json.dumps({"names": ["cat"], "ids": [5]})
    cases = {
        "config.json": [
            (None, "config.json"),
            ("[]", "not a config"),
            ('{"a": 1}', "unknown keys"),
        ],
        "classes.json": [(None, "classes.json: no such file"), (names, "config.json says 2")],
        "model.safetensors": [("nothing", "cannot be read as weights")],
    }
    for file, each in cases.items():
        kept = (folder / file).read_bytes()
        for content, message in each:
            (folder / file).unlink(missing_ok=True)
            if content is not None:
                (folder / file).write_text(content)
            with pytest.raises(InputError, match=message):
                Predictor.from_pretrained(folder)
        (folder / file).write_bytes(kept)
    os.remove(folder / "run.json")
    assert pretrained.read_step(folder) is None and find_pretrained(folder) == Path(folder)


def test_every_command_knows_a_folder_that_was_handed_on(folder, run, tmp_path, capsys, caplog):
    weights = pretrained.read_folder(folder)
    assert weights.settings["class_names"] == list(tiny_network.NAMES)
    for name, leaf in pretrained.read_folder(run, "best").flat.items():
        np.testing.assert_array_equal(leaf, weights.flat[name])
    with pytest.raises(InputError, match="has no checkpoint '3', only its weights"):
        pretrained.read_folder(folder, "3")
    convert.run(argv=[f"--input={folder}", f"--output={tmp_path}/c/x.pth", "--to=adelaidet", ALONE])
    assert (tmp_path / "c" / "x.pth").is_file()
    env.run(argv=[f"--workdir={folder}"])
    assert "  model.backbone.depth = 18" in capsys.readouterr().out
    for each, flag in (
        (benchmark, "--input FOLDER"),
        (evaluate, "--data FOLDER"),
        (export, "--images FOLDER"),
    ):
        words = [f"--workdir={folder}", "--config.test.nms_pre=10", ALONE]
        words += ["--format=onnx"] if each is export else []
        with pytest.raises(SystemExit):
            each.run(argv=words)
        error = capsys.readouterr().err
        assert error == f"error: --workdir {folder}: comes without its data; add {flag}\n"
    assert sorted(os.listdir(folder)) == sorted({*share.FILES} - {pretrained.THRESHOLDS})


def test_a_line_that_a_kill_cut_short_keeps_no_run_from_being_handed_on(tmp_path, caplog):
    lines = '{"step": 3, "segm/AP": 0.5}\n{"step": 3, "segm/AP": 0.'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert metrics_at(tmp_path, 3) == {"segm/AP": 0.5}
    assert "dropped the last line" in caplog.text


def test_what_is_neither_a_folder_nor_a_name(tmp_path, folder):
    for name, message in {
        "nothing here": "no such folder, and no name of a repository",
        str(tmp_path): "neither a run nor a folder of",
        str(tmp_path / "none"): "no such folder",
    }.items():
        with pytest.raises(InputError, match=message):
            Predictor.from_pretrained(name)
    config = tiny_network.tiny_config()
    with pytest.raises(InputError, match="holds the weights of a finished run"):
        check_workdir(folder, config, tiny_network.NAMES, tiny_network.IDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "write `solov2 hub push WORKDIR USER/REPO`"),
        (["push", "a"], "write `solov2 hub push"),
        (["steal", "a", "b"], "write `solov2 hub push"),
        (["pull", "a/b", "--private"], "--private is for push"),
        (["pull", "a b"], "is no name of a repository"),
        (["push", "{run}", "a/b/c", "--output={new}"], "give USER/REPO alone"),
        (["push", "{run}", "ab", "--output={new}"], "is no name of a repository"),
        (["push", "{new}", "a/b", "--output={new}"], "no checkpoint in checkpoints/"),
        (["push", "{run}", "a/b", "--output={run}"], "holds something already"),
        (["push", "{run}", "a/b", "--checkpoint=9", "--output={new}"], "no checkpoint '9'"),
        (["push", "{run}", "a/b", "--licence=a b"], "a name such as apache-2.0"),
        (["push", "{run}", "a/b", "--config.seed=1"], "this command has no config"),
    ],
)
def test_wrong_use_is_one_error(run, tmp_path, capsys, words, message):
    places = {"run": run, "new": tmp_path / "new"}
    with pytest.raises(SystemExit) as ended:
        command.run([word.format(**places) for word in [*words, "--nokeep_memory"]])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_push_into_a_folder(run, tmp_path, capsys):
    words = ["push", str(run), "a/b", f"--output={tmp_path}/new", "--licence=mit"]
    command.run([*words, "--nokeep_memory"])
    assert f"written to {tmp_path}/new; nothing was sent" in capsys.readouterr().out
    assert {*share.FILES} - {pretrained.THRESHOLDS} == {*os.listdir(tmp_path / "new")}
    assert "These weights: mit." in (tmp_path / "new" / "README.md").read_text()
