"""Prefixes and nesting of every training program: read when it is unambiguous."""

import numpy as np
import pytest
from checkpoint_files import p_call, p_dict, p_int, p_str, small_state, state_pickle, write_zip
from golden_weights import from_adelaidet
from test_weights_names import mmdet_name

from solov2_jax.io import InputError
from solov2_jax.weights.array_files import write_safetensors
from solov2_jax.weights.sources import read_weights
from solov2_jax.weights.state_dicts import split_wrappers

STATE = small_state("r18", divide=32)
FLAT = from_adelaidet(STATE)


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def check(path):
    weights = read_weights(str(path))
    assert weights.flat.keys() == FLAT.keys()
    for leaf, value in FLAT.items():
        assert np.array_equal(weights.flat[leaf], value), leaf
    return dict(weights.dropped)


def save(path, tree):
    """Writes nested dicts of arrays as a PyTorch checkpoint."""
    storages = {}

    def pickled(value):
        if isinstance(value, bytes):
            return value
        if all(isinstance(leaf, np.ndarray) for leaf in value.values()):
            text, more = state_pickle(value, len(storages))
            storages.update(more)
            return text
        return p_dict({key: pickled(leaf) for key, leaf in value.items()})

    return write_zip(path, pickled(tree), storages)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_orig_mod.module.",
        "module._orig_mod.module.module.",
        "model.",
        "net.",
        "model._orig_mod.",
        "module.model.net.",
        "student.",
        "ema_model.module.",
        "model_ema.",
        "teacher.",
        "_forward_module._orig_mod.solo.",
        "my_program.detector_of_mine.",
    ],
)
@pytest.mark.parametrize("kind", ["torch", "mmdet", "safetensors"])
def test_prefixes_in_any_order_and_number(tmp_path, prefix, kind):
    if kind == "safetensors":
        path = tmp_path / "x.safetensors"
        write_safetensors(str(path), prefixed(prefix), {})
    else:
        state = STATE if kind == "torch" else {mmdet_name(n): v for n, v in STATE.items()}
        path = save(tmp_path / "x.pth", {"state_dict": prefixed(prefix, state)})
    assert not check(path)


def test_wrappers_inside_names(tmp_path):
    """Submodules that were compiled or sharded by themselves."""
    state = {
        name.replace("backbone.", "backbone._orig_mod.").replace(
            "ins_head.", "ins_head._fsdp_wrapped_module."
        ): value
        for name, value in STATE.items()
    }
    assert not check(save(tmp_path / "x.pth", {"model": state}))
    assert split_wrappers("_orig_mod.model.module.neck.x") == ("model", "neck.x")


@pytest.mark.parametrize(
    "path",
    [
        ("model_ema",),
        ("ema", "module"),
        ("checkpoint", "model"),
        ("student",),
        ("ema_state_dict",),
        ("network",),
        ("a", "b", "c"),
    ],
)
def test_nested_state_dicts(tmp_path, path):
    tree = STATE
    for key in reversed(path):
        tree = {key: tree, "epoch": p_int(3)}
    dropped = check(save(tmp_path / "x.pth", tree))
    assert dropped == {"epoch": "run state"}


def test_the_plain_weights_win_over_their_average(tmp_path):
    other = {name: value + 1 for name, value in STATE.items()}
    dropped = check(save(tmp_path / "x.pth", {"model": STATE, "model_ema": other}))
    assert dropped == {"model_ema": "moving average (EMA) of the weights"}
    both = {**prefixed("online_model."), **prefixed("ema_model.", other)}
    both |= {"initted": np.ones(1), "step": np.ones(1)}
    dropped = check(save(tmp_path / "y.pth", both))
    assert len(dropped) == len(STATE) + 2
    assert dropped["ema_model.ins_head.cate_pred.bias"] == "moving average (EMA) of the weights"
    assert dropped["step"] == "run state"
    weights = read_weights(str(tmp_path / "x.pth"), prefix="model_ema")
    leaf = "params/ins_head/cate_pred/bias"
    assert np.array_equal(weights.flat[leaf], FLAT[leaf] + 1)


def test_averaged_models_count_their_steps(tmp_path):
    """torch.optim.swa_utils.AveragedModel: `module.` and n_averaged."""
    state = {**prefixed("module."), "n_averaged": np.array(7.0, np.float32)}
    dropped = check(save(tmp_path / "x.pth", {"state_dict": state}))
    assert dropped == {"n_averaged": "a counter, of batches or averaged steps"}


def test_lightning_checkpoints(tmp_path):
    hyper = p_call("pytorch_lightning.utilities.parsing", "AttributeDict")
    state = {**prefixed("model."), "loss.weight": np.ones(3, np.float32)}
    tree = {
        "epoch": p_int(3),
        "pytorch-lightning_version": p_str("2.4.0"),
        "hyper_parameters": hyper,
        "state_dict": state,
        "optimizer_states": p_dict({}),
        "lr_schedulers": p_dict({}),
        "callbacks": p_dict({}),
    }
    dropped = check(save(tmp_path / "x.ckpt", tree))
    assert dropped["loss.weight"] == "no rule for this name"
    assert dropped["optimizer_states"] == "optimiser state"
    assert dropped["lr_schedulers"] == "learning-rate schedule"
    assert dropped["hyper_parameters"] == "not part of the weights"


def test_two_networks_are_refused_until_one_is_chosen(tmp_path):
    other = {name: value + 1 for name, value in STATE.items()}
    path = save(
        tmp_path / "x.pth",
        {"state_dict": {**prefixed("student."), **prefixed("teacher.", other)}},
    )
    with pytest.raises(InputError, match=r"x\.pth: .*holds 2 networks: 'state_dict.student' "):
        read_weights(path)
    leaf = "params/ins_head/cate_pred/bias"
    for prefix, shift in (("student", 0), ("state_dict.teacher", 1), ("teacher.", 1)):
        weights = read_weights(path, prefix=prefix)
        assert np.array_equal(weights.flat[leaf], FLAT[leaf] + shift)
    with pytest.raises(InputError, match="--prefix=teach: fits 0 of"):
        read_weights(path, prefix="teach")
    name = "ins_head.cate_pred.bias"
    twice = {**STATE, f"_orig_mod.{name}": STATE[name]}
    with pytest.raises(InputError, match=f"'{name}' and '_orig_mod.{name}' are the same"):
        read_weights(save(tmp_path / "y.pth", {"model": twice}))


def test_optimiser_states_with_the_networks_names_are_no_network(tmp_path):
    tree = {"model": STATE, "optimizer": {"fp32_params": STATE}, "lr_scheduler": {"x": STATE}}
    assert check(save(tmp_path / "x.pth", tree)) == {
        "optimizer": "optimiser state",
        "lr_scheduler": "learning-rate schedule",
    }
