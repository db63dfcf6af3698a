"""Every key has a rule that refuses nonsense, and a key that is given has an effect."""

import json
import logging
import math

import pytest

from configs import base
from solov2_jax import config as configs
from solov2_jax.config_schema import Section, whole, wrong_values

RULES = base.rules()
FLAT = configs.flatten(base.get_config())
NAN, INF = math.nan, math.inf


def message(**changes):
    """Returns what is wrong with the base config and these changes (a__b for a.b)."""
    flat = {**FLAT, **{key.replace("__", "."): value for key, value in changes.items()}}
    return "; ".join(wrong_values(flat, RULES, base.RELATIONS))


def refused(key, value):
    return any(
        text.startswith(f"{key} = ")
        for text in wrong_values({**FLAT, key: value}, RULES, base.RELATIONS)
    )


def test_every_key_has_a_rule_and_a_possible_default():
    """A key added to configs/base.py without one fails here."""
    assert sorted(RULES) == sorted(FLAT)
    assert not message()
    assert all(rule.describe() for rule in RULES.values())


def test_a_key_without_a_rule_is_told():
    section = Section()
    section.steps = whole(3)
    section.rate = 0.1
    with pytest.raises(TypeError, match="rate = 0.1 has no rule"):
        section.rules()


def bad_values(rule):
    """Returns values that no key of the rule's kind may have, as a rule's reader would."""
    wrong_types = {int: 0.5, float: "1", str: 1, bool: 1, tuple: 1}
    bad = [NAN, INF, -INF, None, wrong_types[rule.kind], {}]
    if rule.kind in (int, float):
        bad += [True, -1, -1e30, 10**30, 1e308, "", ()]
    if rule.kind is str:
        bad += ["\0", ()]
        bad += ["no such choice", ""] if rule.choices and "" not in rule.choices else []
    if rule.kind is tuple:
        entry = rule.item.default
        bad += ["", (None,), (NAN,), ((),)]
        bad += [tuple(rule.default[:-1]), (*rule.default, entry)] if fixed(rule) else []
        bad += [(value, *rule.default[1:]) for value in bad_values(rule.item)]
        bad += [()] if rule.default != () and rule.length[0] else []
        if rule.rising and len(rule.default) > 1:
            bad += [tuple(reversed(rule.default))]
    return bad


def fixed(rule):
    return rule.length[0] == rule.length[1] and rule.default != ()


@pytest.mark.parametrize("key", RULES)
def test_nonsense_is_refused_by_name(key):
    passed = [value for value in bad_values(RULES[key]) if not refused(key, value)]
    # A mean may be below 0; everything else that is a number may not.
    if key == "input.mean":
        passed = [value for value in passed if value != (-1, *FLAT[key][1:])]
    assert not passed


# Values that once ran on, each for its kind.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input.std", (0, 0, 0)),
        ("input.std", (1.0, NAN, 1.0)),
        ("input.std", (1.0, 1.0, -57.0)),
        ("input.mean", (1.0, 2.0)),
        ("input.mean", (NAN, 0.0, 0.0)),
        ("input.flip_prob", NAN),
        ("input.flip_prob", 1.5),
        ("input.min_sizes_train", ()),
        ("input.min_sizes_train", (0,)),
        ("input.buckets_train", ((100, 64),)),
        ("input.buckets_test", ((64,),)),
        ("test.score_threshold", NAN),
        ("test.mask_threshold", NAN),
        ("test.mask_threshold", 1.0),
        ("test.update_threshold", NAN),
        ("test.max_per_image", 0),
        ("test.nms_sigma", 0.0),
        ("test.nms_sigma", NAN),
        ("test.nms_pre", -1),
        ("test.nms_pre", 0),
        ("test.nms_iou", NAN),
        ("test.max_candidates", 0),
        ("targets.scale_ranges", ((96, 1), (48, 192), (96, 384), (192, 768), (384, 2048))),
        ("targets.scale_ranges", ((1, 1), (48, 192), (96, 384), (192, 768), (384, 2048))),
        ("targets.scale_ranges", ((1, 96),) * 4),
        ("targets.sigma", -1.0),
        ("targets.sigma", 0.0),
        ("model.fpn.channels", 33),
        ("model.ins_head.channels", 100),
        ("model.mask_head.channels", 0),
        ("model.ins_head.num_kernels", 250),
        ("model.ins_head.num_grids", (0, 36, 24, 16, 12)),
        ("model.ins_head.num_grids", (40, 36, 24, 16)),
        ("model.ins_head.prior_prob", 0.0),
        ("model.ins_head.prior_prob", 1.0),
        ("loss.focal_alpha", 2.0),
        ("loss.focal_gamma", NAN),
        ("loss.dice_weight", INF),
        ("augment.rotate_degrees", INF),
        ("augment.rotate_prob", NAN),
        ("augment.crop_size", (0.5,)),
        ("augment.jitter_scale", (2.0, 0.1)),
        ("augment.jitter_size", (0, 1024)),
        ("optim.ema_decay", NAN),
        ("optim.ema_decay", 1.0),
        ("optim.clip_norm", NAN),
        ("optim.clip_norm", -1.0),
        ("optim.learning_rate", NAN),
        ("optim.learning_rate", INF),
        ("optim.momentum", 1.0),
        ("optim.weight_decay", NAN),
        ("optim.milestones", (20, 10)),
        ("optim.milestones", (-5, 10)),
        ("optim.milestones", (0.5, 10.5)),
        ("optim.warmup_steps", 1.5),
        ("optim.freeze", ("*",)),
        ("optim.freeze", ("backbone/*", "fpn/*", "ins_head/*", "mask_head/*")),
        ("optim.freeze", ("",)),
        ("train.profile_steps", (5, 3)),
        ("train.profile_steps", (5,)),
        ("train.writers", ("tensorbord",)),
        ("train.writers", ("csv", "csv")),
        ("data.generated.min_radius", 0.5),
        ("data.generated.classes", ("star", "star")),
        ("data.generated.image_size", (128,)),
        ("data.name", "tfds:"),
        ("data.name", "shape"),
        ("seed", 10**30),
        ("seed", -1),
    ],
)
def test_a_value_that_cannot_work_is_refused(key, value):
    assert refused(key, value) or f"{key} = " in message(**{key.replace(".", "__"): value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 0),
        ("train.steps", 2**31 - 1),
        ("optim.learning_rate", 1),
        ("optim.freeze", ("backbone/res3_*", "fpn/*")),
        ("input.mean", [0.0, -1.0, 255.0]),
        ("augment.jitter_scale", (0.1, 2.0)),
        ("augment.jitter_scale", (1.0, 1.0)),
        ("input.buckets_train", ((800, 1344), (1344, 800))),
        ("train.profile_steps", (3, 3)),
        ("train.writers", ()),
        ("optim.milestones", ()),
        ("optim.milestones", (0.78, 0.93)),
        ("optim.warmup_steps", 0.05),
        ("optim.warmup_steps", 1000),
        ("data.name", "tfds:records/photos"),
        ("seed", 2**32 - 1),
    ],
)
def test_a_possible_value_passes(key, value):
    assert not message(**{key.replace(".", "__"): value})


def test_the_message_names_key_value_and_range():
    assert message(test__nms_pre=-1) == "test.nms_pre = -1 must be at least 1"
    assert message(model__fpn__channels=33) == "model.fpn.channels = 33 must be a multiple of 8"
    assert message(input__flip_prob=NAN) == (
        "input.flip_prob = nan must be finite: a number, at least 0, at most 1"
    )
    assert message(augment__crop_size=(0.5,)) == (
        "augment.crop_size = (0.5,) must have 2 entries, and has 1"
    )
    both = message(train__steps=-1, input__std=(0, 0, 0))
    assert both == (
        "input.std = (0, 0, 0) must be numbers, above 0, at most 1000: 0 must be above 0; "
        "train.steps = -1 must be at least 0"
    )


@pytest.mark.parametrize(
    ("config", "given", "reason"),
    [
        ("quickstart", "data.train.annotations=mine.json", "data.name = '', and that is 'shapes'"),
        ("quickstart", "data.val.images=photos", "data.name = ''"),
        ("base", "data.generated.num_train=5", "data.name = 'shapes'"),
        ("base", "optim.num_decays=5", "optim.schedule = 'fixed_gamma'"),
        ("base", "optim.final_rate=0.1", "optim.schedule = 'cosine'"),
        ("base", "optim.decay_steps=5", "'fixed_gamma' or 'cosine'"),
        ("strong_r50", "optim.milestones=(5,)", "'multistep', and that is 'cosine'"),
        ("strong_r50", "optim.gamma=0.5", "'multistep' or 'fixed_gamma'"),
        ("base", "augment.jitter_size=(64, 64)", "augment.jitter_scale is ()"),
        ("base", "augment.rotate_degrees=5.0", "augment.rotate_prob is 0.0"),
        ("base", "augment.crop_objects=False", "augment.crop_size is ()"),
        ("base", "test.nms_iou=0.4", "test.nms_type = 'mask'"),
        ("light_448_r18", "model.backbone.stride_in_1x1=False", "model.backbone.depth"),
    ],
)
def test_a_given_key_without_effect_is_an_error(config, given, reason):
    with pytest.raises(ValueError) as error:
        configs.load_config(config, [f"--config.{given}"])
    assert str(error.value).startswith(f"--config.{given} has no effect: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        ["test.nms_kernel=linear", "test.nms_sigma=1.0"],
        ["test.nms_type=mask", "test.nms_kernel=linear"],
        ["augment.jitter_scale=(0.5, 2.0)", "input.min_sizes_train=(64,)"],
        ["augment.jitter_scale=(0.5, 2.0)", "input.max_size_train=64"],
        ["augment.jitter_scale=(0.5, 2.0)", "input.size_sampling=range"],
        ["optim.warmup_steps=0", "optim.warmup_factor=0.5"],
        ["train.log_every=0", "train.watch_steps=5"],
    ],
)
def test_the_later_of_two_keys_has_no_effect(given):
    with pytest.raises(ValueError, match="has no effect") as error:
        configs.load_config("base", [f"--config.{key}" for key in given])
    assert given[1] in str(error.value)


def test_a_key_with_an_effect_passes_and_so_does_a_file_that_holds_unused_ones(tmp_path):
    configs.load_config("quickstart", ["--config.data.name=", "--config.data.val.images=x"])
    configs.load_config("base", ["--config.optim.schedule=cosine", "--config.optim.final_rate=0"])
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import base\ndef get_config():\n    c = base.get_config()\n"
        "    c.optim.schedule = 'cosine'\n    c.optim.gamma = 0.5\n    return c\n"
    )
    assert configs.load_config(str(file)).optim.gamma == 0.5


def write_config(tmp_path, *lines):
    file = tmp_path / "mine.py"
    body = "".join(f"    {line}\n" for line in lines)
    file.write_text(
        "from configs import base\ndef get_config():\n    config = base.get_config()\n"
        f"{body}    return config\n"
    )
    return str(file)


def test_a_user_has_keys_of_their_own(tmp_path):
    file = write_config(tmp_path, "config.user.margin = 3", "config.user.names = ('a', 'b')")
    config = configs.load_config(
        file, ["--config.user.margin=5", "--config.user.deep.rate=0.5", "--config.user.word=abc"]
    )
    user = {"margin": 5, "names": ("a", "b"), "deep": {"rate": 0.5}, "word": "abc"}
    assert config.user.to_dict() == user
    configs.save_config(config, tmp_path / "config.json")
    again = configs.load_config(str(tmp_path / "config.json"), ["--config.user.margin=6"])
    assert again.user.to_dict() == {**user, "margin": 6}
    assert configs.changed_keys(config, again) == {"user.margin": (5, 6)}
    with pytest.raises(ValueError, match="user.margin"):
        configs.load_config(file, ["--config.user.margin=many"])
    with pytest.raises(ValueError, match="margin"):
        configs.load_config(write_config(tmp_path, "config.margin = 3"))


@pytest.fixture
def renamed(monkeypatch):
    names = {"optim.rate": "optim.learning_rate", "solver.steps": "train.steps"}
    monkeypatch.setattr(configs._base(), "RENAMED", names)


def test_an_old_key_is_read_in_files_and_on_the_command_line(tmp_path, caplog, renamed):
    caplog.set_level(logging.INFO, logger="solov2_jax")
    file = write_config(tmp_path, "config.optim.rate = 0.5")
    config = configs.load_config(file, ["--config.solver.steps=7"])
    assert (config.optim.learning_rate, config.train.steps) == (0.5, 7)
    assert "rate" not in config.optim and "solver" not in config
    lines = [line for line in caplog.messages if "is now called" in line]
    assert len(lines) == 2
    assert "mine.py: optim.rate is now called optim.learning_rate" in lines[0]
    assert "--config.solver.steps: the key is now called train.steps" in lines[1]
    values = {"optim": {"rate": 0.25}, "solver": {"steps": 9}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    old = configs.load_config(str(tmp_path / "config.json"))
    assert (old.optim.learning_rate, old.train.steps) == (0.25, 9)
    caplog.clear()
    assert configs.load_config("base").optim.learning_rate == 0.01
    assert not [line for line in caplog.messages if "is now called" in line]


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", DEEP.encode()),
        ("config.json", b'{"seed": 1e999999, "optim": 3}'),
        ("config.json", b'{"optim": {"learning_rate": {"a": 1}}}'),
        ("config.json", b'{"": {"": 1}}'),
        ("config.json", b'{"seed": "\xff"}'),
        ("config.json", b"\x00\x01\x02"),
        ("config.json", b""),
        ("config.json", b"null"),
        ("config.json", b'{"user": [1]}'),
        ("mine.py", b"x = '\xff\xfe'"),
        ("mine.py", b"\x00"),
        ("mine.py", b"def get_config(:"),
        ("mine.py", b"  x = 1"),
        ("mine.py", b"1 / 0"),
        ("mine.py", b"def get_config(): return get_config()"),
        ("mine.py", b"def get_config(): raise OSError(5, 'x')"),
        ("mine.py", b"get_config = 3"),
        ("mine.py", b"(" * 500),
        ("mine.toml", b"a = 1"),
    ],
)
def test_a_damaged_file_is_one_sentence_that_names_it(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        configs.load_config(str(file))
    assert name in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500
