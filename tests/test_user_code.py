"""What a user wrote is found by its import path, and refused before a run if it cannot work."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from solov2_jax.evaluation.coco_score import read_ground_truth
from solov2_jax.evaluation.evaluators import Evaluator, OwnEvaluator
from solov2_jax.inference.prediction import Prediction
from solov2_jax.io import InputError
from solov2_jax.training import HookBase, WriterBase
from solov2_jax.training.optim import check_groups
from solov2_jax.user_code import (
    check_objects,
    failure,
    import_function,
    import_object,
    make_objects,
    named_failure,
)


class Good(HookBase):
    def after_step(self, run):
        self.helper()

    def helper(self):
        pass


class Misspelt(HookBase):
    def afterstep(self, run): ...


class Own(HookBase):
    """A helper may have nearly the name of a method that is there."""

    def before_step(self, run): ...
    def before_steps(self): ...


class Idle(HookBase):
    def say(self): ...


class NoRun(HookBase):
    def after_step(self): ...


class Wants(HookBase):
    def __init__(self, every):
        self.every = every


class Breaks(HookBase):
    def __init__(self):
        self.steps = {}["no such key"]


class Writes(WriterBase):
    def write(self, scalars): ...


def function(run): ...


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A module of a user with a mistake in it, beside a right one."""
    (tmp_path / "good_aug.py").write_text("def cutout(sample): return sample\n")
    (tmp_path / "bad_aug.py").write_text("import json\n\nx = json.nothing\n")
    (tmp_path / "no_aug.py").write_text("def cutout(sample:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("good_aug", "bad_aug"):
        sys.modules.pop(name, None)


def test_an_import_path_leads_to_an_object():
    assert import_object("json:dumps", "augment.custom") is json.dumps


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("json", "is no import path; write"),
        (".aug:cutout", "is no import path"),
        (":cutout", "is no import path"),
        ("no_such_package:f", "No module named 'no_such_package'.* PYTHONPATH"),
        ("good_aug:cutot", "good_aug.py has no cutot; did you mean cutout"),
        ("bad_aug:cutout", "AttributeError: .*nothing.*, bad_aug.py line 3"),
        ("no_aug:cutout", "SyntaxError: .*no_aug.py, line 1"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_sentence(package, path, message):
    with pytest.raises(InputError, match=f"^augment.custom: .*{message}") as error:
        import_object(path, "augment.custom")
    assert "\n" not in str(error.value)


def test_a_function_takes_what_it_is_called_with():
    assert import_function("json:dumps", "train.checks", ("config",)) is json.dumps
    with pytest.raises(InputError, match=r"json:dumps has other parameters, .*\(a, b\)"):
        import_function("json:dumps", "train.checks", ("a", "b"))
    with pytest.raises(InputError, match="of type dict, not a function"):
        import_function("sys:modules", "train.checks", ("config",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Misspelt", "nothing calls its afterstep; did you mean after_step"),
        ("Idle", "has none of the methods after_step, after_train, before_step, before_train"),
        ("NoRun", r"after_step has other parameters, \(\): it is called with \(run\)"),
        ("Wants", r"has other parameters, \(every\): it is called with \(\)"),
        ("Breaks", r"cannot be made \(KeyError: 'no such key', test_user_code.py line"),
        ("function", "is not a class derived from solov2_jax.training.HookBase"),
        ("Writes", "is not a class derived from solov2_jax.training.HookBase"),
    ],
)
def test_a_hook_that_cannot_work_is_refused(name, message):
    with pytest.raises(InputError, match=f"^train.hooks: test_user_code:{name}.*{message}"):
        make_objects([f"{__name__}:{name}"], "train.hooks", HookBase)


def test_hooks_and_writers_that_can_work():
    made = make_objects([f"{__name__}:Good", f"{__name__}:Own"], "train.hooks", HookBase)
    assert [type(hook) for hook in made] == [Good, Own]
    check_objects((*made, Good()), "hooks", HookBase)


@pytest.mark.parametrize(
    ("objects", "base", "message"),
    [
        ([Good], HookBase, r"has the class Good; give an object of it, Good\(\)"),
        ([function], HookBase, "has function, which is no object of a class derived from"),
        (Good(), HookBase, "is a Good; give a list"),
        ([Misspelt()], HookBase, "Misspelt: nothing calls its afterstep"),
        ([Writes()], WriterBase, r"Writes: write .*\(scalars\).* with \(step, scalars\)"),
    ],
)
def test_objects_that_are_given_are_checked_too(objects, base, message):
    with pytest.raises(InputError, match=rf"^hooks of train\(\).*{message}"):
        check_objects(objects, "hooks of train()", base)


def test_a_failure_names_the_users_line():
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads("{")
    assert failure(error.value).startswith("JSONDecodeError: ")
    assert ", test_user_code.py line " in failure(error.value)


def one_image():
    return read_ground_truth(
        {
            "images": [{"id": 1, "file_name": "a", "height": 2, "width": 2}],
            "annotations": [],
            "categories": [{"id": 1, "name": "a"}],
        }
    )


@pytest.mark.parametrize(("reset", "process"), [(True, None), (None, True), (True, True)])
def test_an_evaluator_has_its_three_methods(reset, process):
    def make(truth, category_ids, class_names):
        methods = {"reset": reset and (lambda self: None), "evaluate": lambda self: {}}
        methods["process"] = process and (lambda self: None)
        return type("Metric", (), {k: v for k, v in methods.items() if v})()

    wrong = "process" if reset else "reset"
    with pytest.raises(InputError, match=f"^data.val.metric.*{wrong}"):
        OwnEvaluator(make, "data.val.metric", one_image(), (), ())


def test_the_documented_metric():
    page = Path(__file__).resolve().parent.parent / "docs" / "evaluation_and_prediction.md"
    (code,) = re.findall(r"```python\n(# mypackage/metrics\.py.*?)```", page.read_text(), re.S)
    names: dict = {}
    exec(code, names)
    metric = OwnEvaluator(names["Coverage"], "data.val.metric", one_image(), (1,), ("a",))
    masks = np.zeros((1, 2, 2), bool)
    masks[0, 0] = True
    metric.process(
        Prediction(
            masks=masks,
            boxes=np.array([[0, 0, 2, 1]], np.float32),
            scores=np.array([0.5], np.float32),
            labels=np.array([0]),
            image_id=1,
            class_names=("a",),
        )
    )
    metrics = metric.evaluate()
    assert metrics["mine/coverage"] == 0.5 and metrics["mine/found"] == 1
    assert {"mine/coverage", "segm/AP"} <= set(metric.metric_names())


class Unfinished(Evaluator):
    """Derived from the protocol, whose own methods do nothing."""

    def __init__(self, truth, category_ids, class_names): ...
    def reset(self): ...
    def process(self, prediction): ...


def test_a_method_of_the_protocol_is_no_method():
    with pytest.raises(InputError, match="has no method evaluate"):
        OwnEvaluator(Unfinished, "data.val.metric", one_image(), (), ())


def test_what_fails_is_named_and_an_error_that_names_itself_is_not_wrapped():
    with (
        pytest.raises(InputError, match=r"^a:B failed \(KeyError: 1, test_user_code.py line"),
        named_failure("a:B"),
    ):
        raise KeyError(1)
    with pytest.raises(InputError, match="^complete$"), named_failure("a:B"):
        raise InputError("complete")


def test_stages_and_layers_that_no_parameter_is_in():
    params = {"backbone": {"conv0": {"kernel": 0}}, "fpn": {"stem": 0}}
    check_groups(params, [("stem*",), ("conv*",)], "freeze_at = 2", "stages")
    check_groups({"fpn": 0}, [("stem*",)], "freeze_at = 1", "stages")
    with pytest.raises(InputError, match=r"freeze_at = 1 is about .*stem\*.* conv0/kernel.*stages"):
        check_groups(params, [("stem*",)], "freeze_at = 1", "stages")
