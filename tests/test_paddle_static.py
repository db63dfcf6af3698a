"""PaddleDetection's static graphs: their names, and PaddlePaddle's tar of variables."""

import io
import json
import pickle
import struct
import tarfile

import numpy as np
import pytest
from golden_backbones import backbone_weight
from test_weights_zoo import PADDLE, assert_same, leaves_of, paddle_name

from solov2_jax.config import load_config
from solov2_jax.io import InputError
from solov2_jax.tools.verify import original, ours
from solov2_jax.tools.verify.paddle_program import static_name
from solov2_jax.weights.sources import read_contents, read_weights

MOBILE = "paddle_mobilenet_v3_448"
FIRST = {1: 2, 2: 3, 3: 5, 4: 8, 5: 14}  # number in the names of a stage's first block
UNITS = {"expand": "expand", "dw": "depthwise", "project": "linear"}
# What PaddlePaddle 3.3.1 writes: paddle.static.io.save_vars of a parameter "conv1_weights",
# float32 [2, 3], 0 to 2.5 in steps of a half.
WRITTEN = bytes.fromhex(
    "0000000000000000000000000000000006000000080510021003"
    "000000000000003f0000803f0000c03f0000004000002040"
)


def mobile_name(leaf):
    """Returns the name of a leaf of the backbone, written down from the graph's layers."""
    *path, last = leaf.replace("stem/block", "res1_0").split("/")[2:]
    roles = {"kernel": "weights", "scale": "scale", "bias": "offset", "var": "variance"}
    role, place = roles.get(last, last), path[0].split("_")[-1]
    if place == "stem":
        layer = "conv1"
    elif place == "out":
        layer = f"conv{FIRST[int(path[0][3]) + 1]}_expand" if path[0][3] < "5" else "conv_last"
    else:
        layer = f"conv{FIRST[int(path[0][3])] + int(place)}"
        if path[1] == "se":
            return f"{layer}_se_{1 if path[2] == 'reduce' else 2}_{role}"
        layer += f"_{UNITS[path[1]]}"
    return f"{layer}{'_bn' if path[-1] == 'norm' else ''}_{role}"


def static_state(name):
    """Returns (config, zeros by the names that the variant's static graph has)."""
    flags = ["--config.model.dcn.head_bias=False"]
    config = load_config(f"zoo:{name}", flags)
    leaves, deep, state = leaves_of(config), config.model.backbone.deep_stem, {}
    counts = (3, 4, 6, 3) if config.model.backbone.depth == 50 else (3, 4, 23, 3)
    for leaf, value in leaves.items():
        if "/backbone/" in leaf and name == MOBILE:
            key = mobile_name(leaf)
        else:
            key = static_name(paddle_name(leaf, leaves, counts, deep))
        if name == MOBILE and "fpn" in key:
            key = key.replace("_sum", "")
            for level in (2, 3, 4, 5):
                key = key.replace(f"res{level}", f"mv3_{level - 2}")
        assert key not in state, key
        squeezed = "/se/" in leaf and value.ndim == 2
        value = value.T[:, :, None, None] if squeezed else value
        state[key] = value.transpose(3, 2, 0, 1) if value.ndim == 4 and not squeezed else value
    return config, state


@pytest.mark.parametrize("name", [*PADDLE, MOBILE])
def test_names_of_every_variant(name):
    config, state = static_state(name)
    expected = {"bbox_head.solo_cate.bias", "mask_feat_head.convs_all_levels.3.conv2.gn_scale"}
    expected |= (
        {"conv14_se_1_offset", "fpn_inner_mv3_3_w"} if name == MOBILE else {"fpn_res2_sum_b"}
    )
    assert expected <= state.keys()
    settings = assert_same(config, "paddle", state)
    assert settings["input.channel_order"] == "RGB"
    if name != MOBILE:
        assert settings["model.backbone.avg_down"] is config.model.backbone.deep_stem


def test_a_file_of_the_published_kind_is_read_and_has_its_program(tmp_path):
    config, state = static_state(MOBILE)
    state = {n: backbone_weight(n, v.shape) for n, v in state.items()}
    path = tmp_path / "solov2_mobilenetv3_fpn_448_3x.pdparams"
    path.write_bytes(pickle.dumps(state, 2))
    weights = read_weights(str(path))
    assert weights.source == "paddle" and weights.num_classes == 80 and not weights.dropped
    assert weights.settings["model.backbone.name"] == config.model.backbone.name
    assert "model.backbone.stride_in_1x1" not in weights.settings
    found = original.find_original(ours.config_of(weights), weights)
    assert found.program == "paddle" and "static graph" in found.described
    assert set(found.state) == set(state)


def variable(array, *, kind=5, shape=None, zeros=(0, 0, 0)):
    """Returns the bytes of a variable, as PaddlePaddle writes them."""
    message = bytes([8, kind])
    for side in array.shape if shape is None else shape:
        message += b"\x10"
        while side > 127:
            message, side = message + bytes([side & 127 | 128]), side >> 7
        message += bytes([side])
    return struct.pack("<IQIi", *zeros, len(message)) + message + array.tobytes()


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    """Writes members: bytes by name, None for a folder."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 0  # has a header of its own
            archive.addfile(info, io.BytesIO(data or b""))
    return str(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_variables_is_read(tmp_path, form):
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((300, 2, 1, 1)).astype(np.float32)
    members = {
        "MobileNetV3/": None,
        "MobileNetV3/conv1_weights": WRITTEN,
        "MobileNetV3/conv2_expand_weights": variable(wide),
        "MobileNetV3/conv3_se_1_offset": variable(np.float64([1, 2]), kind=6),
        "MobileNetV3/fc_offset": variable(np.float16([0.5]), kind=4),
        "MobileNetV3/step": variable(np.int64([3]), kind=3),
        "MobileNetV3/scalar": variable(np.float32(7.0)),
    }
    path = write_tar(tmp_path / "MobileNetV3 ü.tar", members, form)
    contents = read_contents(path)
    assert contents.container == "tar"
    tensors = contents.tensors
    assert tensors["conv1_weights"].tolist() == [[0, 0.5, 1], [1.5, 2, 2.5]]
    np.testing.assert_array_equal(tensors["conv2_expand_weights"], wide)
    assert tensors["conv3_se_1_offset"].dtype == np.float64
    assert tensors["fc_offset"][0] == 0.5 and tensors["step"][0] == 3
    assert tensors["scalar"].shape == ()


def test_imagenet_weights_in_a_tar_are_named(tmp_path, golden):
    shapes = json.loads(str(golden("backbones")["mobilenet_paddle_shapes"]))
    state = {name: backbone_weight(name, tuple(shape)) for name, shape in shapes.items()}
    members = {f"a/{name}": variable(value) for name, value in state.items()}
    members["a/fc_weights"] = variable(np.zeros((4, 2), np.float32))
    weights = read_weights(write_tar(tmp_path / "a.tar", members))
    assert weights.source == "paddle" and weights.num_classes is None
    assert weights.dropped == (("fc_weights", "ImageNet classifier, not used"),)
    assert weights.settings["model.backbone.name"] == "mobilenet_v3_large_paddle"
    leaf = weights.flat["params/backbone/res2_out/kernel"]
    np.testing.assert_array_equal(leaf, state["conv5_expand_weights"].transpose(2, 3, 1, 0))


ONE = np.ones(2, np.float32)
HOSTILE = {
    "text": (b"not a variable, but a text", "is no variable of PaddlePaddle's"),
    "empty": (b"", "has 0 bytes: no variable"),
    "levels of sequences": (variable(ONE, zeros=(0, 1, 0)), "is no variable"),
    "cut": (variable(ONE)[:-1], "does not fit its 7 bytes"),
    "huge": (variable(ONE, shape=(1 << 40, 1 << 20)), "does not fit its 8 bytes"),
    "negative": (variable(ONE, shape=((1 << 64) - 1,)), "does not fit its 8 bytes"),
    "many sides": (variable(ONE, shape=(1,) * 9 + (2,)), "has a damaged description"),
    "type": (variable(ONE, kind=7), "has data type 7 of PaddlePaddle's"),
    "no type": (variable(ONE)[:20] + b"\x10\x02\x10\x01" + bytes(8), "has data type -1"),
    "endless number": (struct.pack("<IQIi", 0, 0, 0, 30) + b"\x08" + b"\xff" * 40, "damaged"),
    "long message": (struct.pack("<IQIi", 0, 0, 0, 1 << 30) + bytes(99), "is no variable"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_members_that_are_no_variables_are_refused(tmp_path, case):
    data, message = HOSTILE[case]
    path = write_tar(tmp_path / "x.tar", {"a/conv1_weights": data})
    with pytest.raises(InputError, match=rf"x\.tar: cannot be read .*a/conv1_weights.*{message}"):
        read_weights(path)


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("../conv1_weights", tarfile.USTAR_FORMAT, "points outside the archive"),
        ("/conv1_weights", tarfile.USTAR_FORMAT, "points outside the archive"),
        ("a/" * 60 + "conv1_weights", tarfile.PAX_FORMAT, "renames the next; pack with"),
        ("a" * 120, tarfile.GNU_FORMAT, "is neither a file nor a folder"),
    ],
)
def test_names_that_no_such_file_has_are_refused(tmp_path, name, form, message):
    path = write_tar(tmp_path / "x.tar", {name: WRITTEN}, form)
    with pytest.raises(InputError, match=message):
        read_weights(path)


def changed(data, at, field):
    """Returns a tar whose first header has other bytes, and the sum that fits them."""
    header = bytearray(data[:512])
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:1024] + d[:300], "the archive is truncated"),
        (lambda d: d[:540], "claims more bytes than the file has"),
        (lambda d: d[:100] + b"1" + d[101:], "a member's header is damaged"),
        (lambda d: changed(d, 124, b"77777777777\0"), "claims more bytes than the file has"),
        (lambda d: changed(d, 124, b"-0000000001\0"), "claims more bytes than the file has"),
        (lambda d: changed(d, 124, b"\x80" + b"\xff" * 11), "claims more bytes than the file"),
        (lambda d: changed(d, 156, b"2"), "is neither a file nor a folder"),
        (lambda d: d[:1024] + d, "duplicate archive member 'conv1_weights'"),
        (lambda d: changed(d, 0, b"b/conv9_weights\0"), "no known source has such tensor names"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, change, message):
    path = tmp_path / "x.tar"
    write_tar(path, {"a/conv1_weights": WRITTEN})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read_weights(str(path))
