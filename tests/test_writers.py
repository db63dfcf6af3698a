"""CSV, TensorBoard's pictures and histograms, trackers, traces."""

import csv
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import toy
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from solov2_jax.training.loop import train
from solov2_jax.training.writers import CsvWriter


def opened(writer, workdir, step):
    writer.check(workdir, step)
    writer.open(workdir, step, {})
    return writer


def rows_of(path):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_csv_has_a_row_per_step_and_a_column_per_name(tmp_path):
    path = tmp_path / "metrics.csv"
    writer = opened(CsvWriter(), tmp_path, 0)
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": 0.25})
    writer.write(2, {"segm/AP": 0.125})  # an evaluation joins its step's row
    writer.write(3, {"loss": float("nan"), "segm/AP": 1.0})
    writer.close()
    want = [
        {"step": "1", "loss": "0.5"},
        {"step": "2", "loss": "0.25", "segm/AP": "0.125"},
        {"step": "3", "segm/AP": "1.0"},
    ]
    assert rows_of(path) == want
    with open(path, "a") as file:
        file.write("4,0.")  # a kill in the middle of a row
    writer = opened(CsvWriter(), tmp_path, 2)
    assert rows_of(path) == want[:2]
    writer.write(3, {"loss": 2.0})
    writer.close()
    assert rows_of(path) == [*want[:2], {"step": "3", "loss": "2.0"}]


def events_of(folder):
    """Returns the summaries in TensorBoard's event files: (step, tag, kind)."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                found.append((event.step, value.tag, value.WhichOneof("value")))
    return found


def evaluate_with_pictures(workdir):
    """Returns the toy's evaluation that leaves two pictures, as the real one does."""

    def evaluate(variables):
        folder = Path(workdir) / "eval" / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        for number in (3, 7):
            pixels = np.full((8, 16, 3), 10 * number, np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
        return toy.toy_evaluate(variables)

    return evaluate


def build(config, workdir):
    return toy.toy_task(config, workdir, evaluate=evaluate_with_pictures(workdir))


def test_tensorboard_gets_pictures_and_histograms(tmp_path):
    config = toy.toy_config(
        train__steps=4, train__histogram_every=2, train__writers=("tensorboard", "csv")
    )
    train(config, tmp_path, build)
    events = events_of(tmp_path / "tensorboard")
    assert (4, "pictures/3", "image") in events and (4, "pictures/7", "image") in events
    assert not [e for e in events if e[2] == "image" and e[0] != 4]
    name = "params/ins_head/cate_pred/kernel"
    assert [e[0] for e in events if e[1:] == (name, "histo")] == [2, 4]
    assert (4, "losses/loss", "simple_value") in events
    rows = rows_of(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and rows[3]["segm/AP"]


class FakeTracker(types.ModuleType):
    """wandb and mlflow in one, as far as the writers use them."""

    def __init__(self):
        super().__init__("fake")
        self.calls = []
        self.id, self.info = "abc", types.SimpleNamespace(run_id="abc")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def test_wandb_gets_everything_and_resumes_its_run(tmp_path, monkeypatch):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    changes = {"train__writers": ("wandb",), "train__histogram_every": 2}
    for steps in (2, 3):
        train(toy.toy_config(**changes, train__steps=steps), tmp_path, build)
    first, second = (kwargs for _, kwargs in fake.named("init"))
    assert first["id"] is None and first["config"]["train"]["steps"] == 2
    assert second["id"] == "abc" and second["resume"] == "allow"
    logged = [(kwargs["step"], set(args[0])) for args, kwargs in fake.named("log")]
    assert any(step == 1 and "loss" in names for step, names in logged)
    assert any(step == 3 and "segm/AP" in names for step, names in logged)
    assert (2, {"pictures/3", "pictures/7"}) in logged
    assert len(fake.named("Histogram")) == 8 and len(fake.named("finish")) == 2


def test_mlflow_gets_scalars_and_pictures(tmp_path, monkeypatch):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for steps in (2, 3):
        config = toy.toy_config(train__writers=("mlflow",), train__steps=steps)
        train(config, tmp_path, build)
    first, second = (kwargs for _, kwargs in fake.named("start_run"))
    assert first["run_id"] is None and second["run_id"] == "abc"
    steps = [kwargs["step"] for _, kwargs in fake.named("log_metrics")]
    assert steps == [1, 2, 2, 3, 3]
    assert {k["key"] for _, k in fake.named("log_image")} == {
        "pictures_3",
        "pictures_7",
    }
    assert len(fake.named("log_dict")) == 1 and len(fake.named("end_run")) == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_clear_error(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    config = toy.toy_config(train__writers=(name,))
    with pytest.raises(ValueError, match=f"has '{name}', but .*: pip install {name}"):
        train(config, tmp_path, toy.toy_task)


def test_a_trace_of_the_chosen_steps_is_written(tmp_path, caplog):
    caplog.set_level("INFO", logger="solov2_jax")
    train(toy.toy_config(train__profile_steps=(2, 3)), tmp_path, toy.toy_task)
    assert f"trace of steps 2 to 3: {tmp_path}/profile" in caplog.text
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    short = toy.toy_config(train__steps=2, train__profile_steps=(2, 9))
    train(short, tmp_path / "short", toy.toy_task)
    assert "trace of steps 2 to 2" in caplog.text


def test_impossible_values_are_errors():
    from solov2_jax.config import check_config

    with pytest.raises(ValueError, match="train.writers = .*'tensorbord' must be one of"):
        check_config(toy.toy_config(train__writers=("tensorbord",)))
    for steps in ((3,), (5, 4), (0, 2)):
        with pytest.raises(ValueError, match="train.profile_steps"):
            check_config(toy.toy_config(train__profile_steps=steps))
