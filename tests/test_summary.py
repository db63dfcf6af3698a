"""The table of the network against the reference's parameter counts."""

import json
import pathlib
import re

import pytest

from configs import base
from solov2_jax.models import build_model
from solov2_jax.tools import summary
from solov2_jax.tools.cli import summary as command

CONFIG = str(pathlib.Path(__file__).resolve().parent.parent / "configs" / "base.py")

# Computed by the reference (PyTorch): number of parameters of its six models.
REFERENCE = json.loads(
    pathlib.Path(__file__)
    .with_name("golden")
    .joinpath("reference_parameters.json")
    # Read at import, because the names parametrise a test.
    .read_text()
)


def rows_of(height, width, num_classes=80, **changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    model = build_model(config, num_classes)
    rows = summary.summarize(model, height, width, config.model.backbone.freeze_at)
    return {"/".join(row.path): row for row in rows}


@pytest.mark.parametrize("name", REFERENCE)
def test_parameter_counts_are_the_references(name):
    ref = REFERENCE[name]
    changes = {
        "model.backbone.depth": ref["depth"],
        "model.ins_head.channels": ref["channels"],
        "model.ins_head.num_convs": ref["num_convs"],
        "model.ins_head.num_kernels": ref["num_kernels"],
    }
    total = rows_of(64, 64, ref["num_classes"], **changes)[""]
    assert (total.parameters, total.trainable) == (ref["params"], ref["trainable"])


@pytest.mark.parametrize(("depth", "gmacs"), [(18, 1.814), (50, 4.087), (101, 7.799)])
def test_flops_of_the_backbone_are_the_published_ones(depth, gmacs):
    """Torchvision publishes 1.814, 4.089 and 7.801 G multiply-adds at 224x224.

    That includes the last layer, 2.05 M for 2048 features (0.51 M for ResNet-18).
    """
    changes = {"model.backbone.depth": depth, "model.backbone.stride_in_1x1": False}
    flops = rows_of(224, 224, **changes)["backbone"].flops
    assert flops / 2e9 == pytest.approx(gmacs, abs=1e-3)


def test_rows_of_a_head():
    rows = rows_of(800, 1344)
    cells = 40**2 + 36**2 + 24**2 + 16**2 + 12**2
    conv0 = rows["ins_head/kernel_tower/conv0"]
    assert conv0.flops == 2 * 9 * 258 * 512 * cells
    assert conv0.what == "3x3 258->512"
    assert conv0.outputs == [(g, g, 512) for g in (40, 36, 24, 16, 12)]
    assert rows["ins_head/cate_tower/gn0"].parameters == 2 * 512
    assert rows["mask_head"].outputs == [(200, 336, 256)]
    stem = rows["backbone/stem/conv1"]
    assert (stem.parameters, stem.trainable, stem.frozen_norm) == (9408, 0, 256)
    # The parts of every module add up to it.
    for group in ("", "ins_head", "backbone/res2_0", "mask_head/level3"):
        inside = [r for p, r in rows.items() if p.rpartition("/")[0] == group and p]
        assert rows[group].parameters == sum(r.parameters for r in inside)
        assert rows[group].flops == sum(r.flops for r in inside)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ([(40, 40, 512), (36, 36, 512)], "40x40 36x36 x512"),
        ([(9, 80), (9, 256), (4, 8, 256)], "9 x80, 9 4x8 x256"),
        ([(1, 1, 2)] * 10, "10 arrays"),
    ],
)
def test_format_shapes(shapes, text):
    assert summary.format_shapes(shapes) == text


def test_command_prints_the_table(capsys):
    command.run(
        argv=["--config", CONFIG, "--size", "64,96", "--depth", "1"]
        + ["--config.model.backbone.depth=18", "--config.model.num_classes=3"]
    )
    out = capsys.readouterr().out
    assert "image 64x96, 3 classes\n" in out
    assert "parameters 33,159,619, of these trained 33,002,755" in out
    assert [line.split()[0] for line in out.splitlines()[2:7]] == [
        "(all)",
        "backbone",
        "fpn",
        "ins_head",
        "mask_head",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "100,64"], "--size 100,64: .* for example 128,64"),
        (["--size", "big"], "write H,W"),
        (["--depth", "-1"], "--depth=-1 must be at least 0"),
        (["--config.model.backbone.dept=18"], "did you mean model.backbone.depth"),
    ],
)
def test_bad_arguments_are_one_sentence(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.run(argv=["--config", CONFIG, *args])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.fullmatch(f"error: .*{message}.*\n", error), error


def test_default_size_is_the_padded_test_size():
    config = base.get_config()
    assert summary.padded_test_size(config) == (800, 1344)
    config.input.buckets_test = ((1344, 800), (128, 160), (96, 160))
    assert summary.padded_test_size(config) == (128, 160)
