"""Reading checkpoint files: types, layouts, and files that mean harm."""

import io
import os
import pathlib
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from checkpoint_files import (
    p_call,
    p_dict,
    p_global,
    p_int,
    p_list,
    p_str,
    p_tensor,
    p_tuple,
    pickle_of,
    small_state,
    state_pickle,
    write_legacy,
    write_safetensors_raw,
    write_state,
    write_zip,
)
from test_weights_names import caffe2_state

from solov2_jax.io import InputError
from solov2_jax.weights.array_files import read_safetensors, write_safetensors, write_torch
from solov2_jax.weights.sources import detect_source, read_contents, read_weights

A = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def read_tensor(path, name="w"):
    return read_contents(str(path)).tensors[name]


def one(path, tensor, storages, **options):
    """Writes a zip checkpoint with one tensor "w"."""
    return write_zip(path, p_dict({"w": tensor}), storages, **options)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", ["f4", "f8", "f2", "i8"])
@pytest.mark.parametrize("order", [None, "little", "big"])
def test_types_and_byte_orders(tmp_path, kind, order):
    stored = A.astype((">" if order == "big" else "<") + kind)
    tensor = p_tensor("0", kind, A.size, A.shape)
    path = one(tmp_path / "x.pth", tensor, {"0": stored.tobytes()}, order=order)
    found = read_tensor(path)
    assert found.dtype == np.dtype(kind)
    assert np.array_equal(found, A.astype(kind))


@pytest.mark.parametrize("order", ["little", "big"])
def test_bfloat16_becomes_float32(tmp_path, order):
    bits = (A.view(np.uint32) >> 16).astype(">u2" if order == "big" else "<u2")
    tensor = p_tensor("0", "bf16", A.size, A.shape)
    found = read_tensor(one(tmp_path / "x.pth", tensor, {"0": bits.tobytes()}, order=order))
    assert found.dtype == np.float32
    assert np.array_equal(found, A)  # small integers are exact in bfloat16


def test_shared_storage_strides_and_offsets(tmp_path):
    storages = {"7": A.tobytes()}
    value = p_dict(
        {
            "all": p_tensor("7", "f4", 24, (2, 3, 4)),
            "last": p_tensor("7", "f4", 24, (3, 4), offset=12),
            "turned": p_tensor("7", "f4", 24, (4, 3, 2), strides=(1, 4, 12)),
            "every_other": p_tensor("7", "f4", 24, (2, 2), strides=(12, 2), offset=1),
            "number": p_tensor("7", "f4", 24, (), offset=5),
            "empty": p_tensor("7", "f4", 24, (0, 3)),
        }
    )
    found = read_contents(write_zip(tmp_path / "x.pth", value, storages)).tensors
    assert np.array_equal(found["all"], A)
    assert np.array_equal(found["last"], A[1])
    assert np.array_equal(found["turned"], A.transpose(2, 1, 0))
    assert np.array_equal(found["every_other"], [[1, 3], [13, 15]])
    assert found["number"] == 5 and found["number"].shape == ()
    assert found["empty"].shape == (0, 3)


@pytest.mark.parametrize("little", [True, False])
def test_old_format(tmp_path, little):
    order = "<" if little else ">"
    none = p_tensor("5", "f4", 24, (2, 3, 4), view=b"N")
    view = p_tuple(p_str("v"), p_int(12), p_int(12))
    part = p_tensor("5", "f4", 24, (3, 4), view=view)
    path = write_legacy(
        tmp_path / "x.pth",
        p_dict({"w": none, "part": part}),
        {"5": A.astype(order + "f4").tobytes()},
        little,
    )
    assert np.array_equal(read_tensor(path), A)
    assert np.array_equal(read_tensor(path, "part"), A[1])


def test_parameters_wrappers_and_containers(tmp_path):
    """nn.Parameter, DataParallel's prefix, attributes of a state dict, run state."""
    tensor = p_tensor("0", "f4", 24, (2, 3, 4))
    parameter = p_call(
        "torch._utils",
        "_rebuild_parameter",
        tensor,
        b"\x88",
        p_global("collections", "OrderedDict") + b")R",
    )
    entries = b"(" + p_str("module.w") + parameter + b"u"
    attributes = p_dict({"_metadata": p_dict({})})
    state = p_global("collections", "OrderedDict") + b")R" + entries + attributes + b"b"
    namespace = p_global("argparse", "Namespace") + b")\x81" + p_dict({}) + b"b"
    value = p_dict(
        {
            "state_dict": state,
            "optimizer": p_dict({"m": p_tensor("1", "f4", 3, (3,))}),
            "state_dict_ema": p_dict({"w": tensor}),
            "epoch": p_int(3),
            "args": namespace,
            "size": p_call("torch", "Size", p_list(p_int(2))),
        }
    )
    # Storage 1 is not in the file: the optimiser's numbers are not even read.
    path = write_zip(tmp_path / "x.pth", value, {"0": A.tobytes()})
    contents = read_contents(path)
    assert list(contents.tensors) == ["w"]
    assert dict(contents.dropped) == {
        "optimizer": "optimiser state",
        "state_dict_ema": "moving average (EMA) of the weights",
        "epoch": "run state",
        "args": "run state",
        "size": "not part of the weights",
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2_pickles(tmp_path, protocol):
    state = caffe2_state({k: v for k, v in small_state("r50").items() if "bottom_up" in k})
    state["turned"] = np.asfortranarray(A[0])
    state["big"] = A.astype(">f4")
    path = tmp_path / "R-50.pkl"
    checkpoint = {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(checkpoint, protocol))
    contents = read_contents(str(path))
    assert sorted(contents.tensors) == sorted(state)
    for name, value in state.items():
        assert np.array_equal(contents.tensors[name], value)
    weights = read_weights(str(path))
    assert weights.source == "detectron2"
    assert weights.settings["input.channel_order"] == "BGR"
    assert dict(weights.dropped)["turned"] == "no rule for this name"


def test_python_2_pickle_with_latin_1_strings(tmp_path):
    """Detectron's own files: arrays of Python 2, whose bytes are text."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    data = A.tobytes()
    dtype = p_global("numpy", "dtype") + p_tuple(short(b"f4"), p_int(0), p_int(1)) + b"R"
    order = [p_int(3), short(b"<"), b"N", b"N", b"N", p_int(-1), p_int(-1), p_int(0)]
    dtype += p_tuple(*order) + b"b"
    array = (
        p_call(
            "numpy.core.multiarray",
            "_reconstruct",
            p_global("numpy", "ndarray"),
            p_tuple(p_int(0)),
            short(b"b"),
        )
        + p_tuple(
            p_int(1),
            p_tuple(p_int(2), p_int(3), p_int(4)),
            dtype,
            b"\x89",
            b"T" + struct.pack("<I", len(data)) + data,
        )
        + b"b"
    )
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle_of(p_dict({"blobs": p_dict({"w": array})})))
    assert np.array_equal(read_tensor(path), A)


def test_safetensors_round_trip_and_types(tmp_path):
    path = str(tmp_path / "x.safetensors")
    arrays = {"a": A, "b": A.astype(np.float16).T, "empty": np.zeros((0, 2), "f4")}
    write_safetensors(path, arrays, {"note": "é"})
    found, metadata = read_safetensors(path)
    assert metadata == {"note": "é"}
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value)
    bits = (A.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = {"w": {"dtype": "BF16", "shape": [24], "data_offsets": [0, 48]}}
    path = write_safetensors_raw(tmp_path / "bf16.safetensors", header, bits)
    assert np.array_equal(read_tensor(path), A.ravel())


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50])
def test_safetensors_whose_length_looks_like_another_format(tmp_path, length):
    header = b'{"w":{"dtype":"F32","shape":[24],"data_offsets":[0,96]}}'.ljust(length)
    path = write_safetensors_raw(tmp_path / "x", header, A.tobytes())
    assert np.array_equal(read_tensor(path), A.ravel())


def test_the_writer_writes_what_the_reader_reads(tmp_path):
    state = small_state("r18")
    path = str(tmp_path / "x.pth")
    write_torch(path, state, {"note": "text"})
    contents = read_contents(path)
    assert contents.container == "torch zip" and contents.metadata == {"note": "text"}
    for name, value in state.items():
        assert np.array_equal(contents.tensors[name], value)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        kinds = {info.compress_type for info in archive.infolist()}
        assert kinds == {zipfile.ZIP_STORED}
        # Python's own pickle reads it as far as it can without torch.
        with pytest.raises(ModuleNotFoundError, match="torch"):
            pickle.load(archive.open("archive/data.pkl"))


def test_sources_are_told_by_names():
    one = np.zeros(1)
    for source, name in {
        "adelaidet": "ins_head.cate_pred.weight",
        "mmdet": "mask_head.mask_feature_head.conv_pred.gn.bias",
        "detectron2": "res2_0_branch2a_w",
        "paddle": "solov2_head.bbox_head.solo_cate.weight",
        "torchvision": "layer1.0.conv1.weight",
        "solov2_jax": "params/fpn/lateral2/kernel",
    }.items():
        assert detect_source({"other": one, name: one}, "torch zip") == source
    assert detect_source({"layer1.0.conv1.weight": one}, "npz") == "keras"
    with pytest.raises(ValueError, match="no known source has such tensor names: foo"):
        detect_source({"foo": one}, "torch zip")


# ------------------------------------------------------------ what is refused


def hostile_globals():
    yield "os.system", p_call("os", "system", p_str("touch owned"))
    yield "posix.system", p_call("posix", "system", p_str("touch owned"))
    yield "builtins.eval", p_call("builtins", "eval", p_str("open('owned', 'w')"))
    yield "builtins.getattr", p_call("builtins", "getattr", b"N", p_str("x"))
    yield "torch.load", p_call("torch", "load", p_str("x"))
    yield "models.resnet.ResNet", p_global("models.resnet", "ResNet") + b")\x81"
    # Protocol 4's way to name things, and a dotted name inside a harmless module.
    yield "os.system", b"\x8c\x02os\x8c\x06system\x93" + p_tuple(p_str("x")) + b"R"
    yield (
        "collections.OrderedDict.__class__",
        p_global("collections", "OrderedDict.__class__"),
    )


@pytest.mark.parametrize(("name", "value"), list(hostile_globals()))
@pytest.mark.parametrize("form", ["zip", "legacy", "pkl"])
def test_pickles_that_call_are_refused_by_name(tmp_path, monkeypatch, name, value, form):
    monkeypatch.chdir(tmp_path)
    value = p_dict({"model": value})
    if form == "zip":
        path = write_zip("x.pth", value, {})
    elif form == "legacy":
        path = write_legacy("x.pth", value, {})
    else:
        path = "x.pkl"
        (tmp_path / path).write_bytes(pickle_of(value))
    with pytest.raises(ValueError, match=rf"x\.p.*'{name}'.*nothing was executed"):
        read_weights(path)
    assert not os.path.exists("owned")


def test_a_real_malicious_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Bomb:
        def __reduce__(self):
            return os.system, ("touch owned",)

    for protocol in (2, 4, 5):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": Bomb()}, protocol))
        with pytest.raises(ValueError, match=r"'(posix|nt)\.system'"):
            read_weights("x.pkl")
    assert not os.path.exists("owned")


T = p_tensor("0", "f4", 24, (2, 3, 4))
HOSTILE_VALUES = {
    # What may be named but not called, and values that are no callables.
    "calls a torch.FloatStorage": p_global("torch", "FloatStorage") + b")R",
    "calls a str": p_str("x") + b")R",
    "sets attributes of a str": p_str("x") + p_dict({}) + b"b",
    # Opcodes that weights do not need.
    "operation INST": b"(ios\nsystem\n",
    "operation OBJ": b"(" + p_global("collections", "OrderedDict") + b"o",
    "operation EXT1": b"\x82\x01",
    "operation PERSID": b"P0\n",
    # Sizes that are not there.
    "4294967295 bytes is declared": b"B" + struct.pack("<I", 2**32 - 1) + b"x",
    "bytes is declared": b"\x8e" + struct.pack("<Q", 2**62) + b"x",
    "more numbers than its storage": p_tensor("0", "f4", 24, (2**20, 2**10)),
    "has \\(24\\)": p_tensor("0", "f4", 24, (2**30,), strides=(0,)),
    "offset|more numbers": p_tensor("0", "f4", 24, (24,), offset=1),
    "should have": p_tensor("0", "f4", 2**30, (2**30,)),
    "not a count": p_tensor("0", "f4", 24, (2,), strides=(-1,)),
    "storage 'nope'": p_tensor("nope", "f4", 24, (24,)),
    "storage '../../etc/passwd'": p_tensor("../../etc/passwd", "f4", 24, (24,)),
    # Structures that cannot be.
    "duplicate key 'a'": p_dict([("a", p_int(1)), ("a", p_int(2))]),
    "key of type tuple": b"}(" + b"))" + b"u",
    "malformed pickle": b"t",
    "malformed torch._utils": p_call("torch._utils", "_rebuild_tensor_v2", p_int(1)),
}


@pytest.mark.parametrize("message", list(HOSTILE_VALUES))
def test_hostile_values_are_refused(tmp_path, message):
    value = p_dict([("w", HOSTILE_VALUES[message]), ("v", T)])
    path = write_zip(tmp_path / "x.pth", value, {"0": A.tobytes()})
    with pytest.raises(ValueError, match=rf"x\.pth: .*{message}"):
        read_weights(path)


def test_deeply_nested_values_do_no_harm(tmp_path):
    deep = b"N" + b"\x85" * 30_000
    path = write_zip(tmp_path / "x.pth", p_dict({"w": deep}), {})
    with pytest.raises(ValueError, match="no known source"):
        read_weights(path)
    path = write_zip(tmp_path / "y.pth", b"}(" + deep + b"Nu", {})
    with pytest.raises(ValueError, match="key of type tuple"):
        read_weights(path)


def test_copies_without_end_are_refused(tmp_path):
    """One long text, encoded again and again: a small file, much memory."""
    text = p_str("x" * 100_000) + b"q\x00"  # BINPUT 0
    encode = p_global("_codecs", "encode") + b"(h\x00" + p_str("latin1") + b"tR"
    path = write_zip(tmp_path / "x.pth", p_list(text, *[encode] * 1000), {})
    with pytest.raises(ValueError, match="duplicates its data"):
        read_weights(path)


def doubled(levels):
    """A tuple of two references to a tuple of two references ...: 2^levels leaves."""
    return b"K\x01\x85q\x00" + b"0h\x00h\x00\x86q\x00" * levels


_SAVED = p_list(*[p_int(1)] * 1000) + b"q\x01"
COLLIDING = [i * (2**61 - 1) for i in range(30_000)]
BOMBS = {
    # message -> a pickled value that took seconds or gigabytes.
    "duplicates its data": p_list(_SAVED, *[p_call("torch", "Size", b"h\x01")] * 3000),
    "more than weights files do": p_list(
        b"\x96" + struct.pack("<Q", 100_000) + bytes(100_000) + b"q\x01",
        *[p_call("builtins", "bytearray", b"h\x01")] * 3000,
    ),
    "a tensor of 1000 axes": _SAVED
    + b"0"
    + p_call(
        "torch._utils",
        "_rebuild_tensor_v2",
        p_tuple(
            p_str("storage"),
            p_global("torch", "FloatStorage"),
            p_str("0"),
            p_str("cpu"),
            p_int(24),
        )
        + b"Q",
        p_int(0),
        b"h\x01",
        b"h\x01",
    ),
    "memo index out of range": b"Nr" + struct.pack("<I", 2**28),
    "key of type tuple": b"}" + doubled(40) + b"Ns",
    "not a short string": p_call("_codecs", "encode", p_str("x"), doubled(40)),
    "not a short string .tuple": doubled(40) + b"\x8c\x01x\x93",
    "small objects": b"(" + b"\x8f" * 1_000_000 + b"t",
    "key of more than 64 bits": b"}(" + b"".join(p_int(i) + b"N" for i in COLLIDING) + b"u",
    "of more than 64 bits: refused": b"(" + b"".join(map(p_int, COLLIDING)) + b"d",
    "size that is not a count": p_tensor("0", "f4", 24, (2**62 + 1,)),
}


@pytest.mark.parametrize("message", list(BOMBS))
def test_small_files_stay_small_and_fast(tmp_path, message):
    path = write_zip(tmp_path / "x.pth", p_dict({"w": BOMBS[message]}), {"0": A.tobytes()})
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"x\.pth: .*{message}"):
        read_weights(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 2 MiB and what a megabyte of opcodes makes; traced, and slowed down by that.
    assert peak < 100 * 2**20
    assert time.process_time() - start < 20


def test_bytes_that_many_arrays_share_are_refused(tmp_path):
    """Arrays of another byte order are copied later, each of them."""
    dtype = p_call("numpy", "dtype", p_str(">f4"), p_int(0), p_int(1)) + b"q\x02"
    data = b"B" + struct.pack("<I", 40_000) + bytes(40_000) + b"q\x01"
    arrays = [
        p_call(
            "numpy.core.numeric",
            "_frombuffer",
            b"h\x01",
            b"h\x02",
            p_tuple(p_int(10_000)),
            p_str("C"),
        )
    ] * 300
    path = tmp_path / "x.pkl"
    value = data + b"0" + dtype + b"0" + p_dict({f"w{i}": a for i, a in enumerate(arrays)})
    path.write_bytes(pickle_of(value))
    with pytest.raises(InputError, match="more than weights files do"):
        read_weights(str(path))


def test_safetensors_with_a_name_twice_many_times(tmp_path):
    """Looking for duplicates took 82 s in a file of 2 MB."""
    entry = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    unique = b",".join(
        b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}' % i for i in range(40_000)
    )
    header = b"{" + unique + b"," + entry + b"," + entry + b"}"
    path = write_safetensors_raw(tmp_path / "x.safetensors", header, bytes(8))
    start = time.process_time()
    with pytest.raises(InputError, match="duplicate key 'a' in the header"):
        read_weights(path)
    assert time.process_time() - start < 5
    path = write_safetensors_raw(tmp_path / "y.safetensors", b"{" + b" " * 2**23 + b"}")
    with pytest.raises(InputError, match="header of .* bytes: at most"):
        read_weights(path)


def test_views_without_end_are_refused(tmp_path):
    """A thousand tensors on one storage are a thousand times its memory."""
    pairs = {f"w{i}": p_tensor("0", "f4", 10_000, (10_000,)) for i in range(1000)}
    storage = {"0": bytes(40_000)}
    path = write_zip(tmp_path / "x.pth", p_dict(pairs), storage)
    with pytest.raises(ValueError, match="share storages more"):
        read_weights(path)


def test_no_memory_blow_up(tmp_path):
    """4 GB declared in a kilobyte: refused before anything of the size is allocated."""
    big = p_tensor("0", "f4", 2**30, (2**30,))
    paths = [
        write_zip(tmp_path / "a.pth", p_dict({"w": big}), {"0": b"1234"}),
        write_legacy(tmp_path / "b.pth", p_dict({"w": big}), {"0": b"1234"}),
        write_safetensors_raw(
            tmp_path / "c.safetensors",
            {"w": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}},
        ),
        str(tmp_path / "d.pkl"),
        write_npz(tmp_path / "e.npz", {"w.npy": npy(b"\x00" * 8, (2**30,))}),
    ]
    (tmp_path / "d.pkl").write_bytes(b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"x.")
    assert all(os.path.getsize(path) < 2000 for path in paths)
    tracemalloc.start()
    for path in paths:
        with pytest.raises(ValueError, match=rf"{os.path.basename(path)}: "):
            read_weights(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def npy(data, shape, dtype="<f4"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def write_npz(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


def test_zip_archives_that_lie(tmp_path):
    value, storages = state_pickle({"w": A})

    def refused(name, message, **options):
        path = write_zip(tmp_path / name, value, storages, **options)
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            read_weights(path)

    refused("up.pth", "outside the archive", extra=[("archive/../../x", b"")])
    refused("root.pth", "outside the archive", extra=[("/etc/passwd", b"")])
    refused("drive.pth", "outside the archive", extra=[("C:\\x", b"")])
    refused("packed.pth", "is compressed", method=zipfile.ZIP_DEFLATED)
    refused("two.pth", "lacks a NAME/data.pkl", extra=[("b/data.pkl", b"")])
    refused("order.pth", "byte order b'middle'", order="middle")
    with pytest.warns(UserWarning, match="Duplicate name"):
        refused("twice.pth", "duplicate", extra=[("archive/data/0", b"x" * 96)])


def test_truncated_and_wrong_files(tmp_path):
    path = tmp_path / "x.pth"
    write_state(path, {"w": A})
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:10], whole[:-5]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.pth: "):
            read_weights(str(path))
    legacy = tmp_path / "y.pth"
    write_legacy(legacy, p_dict({"w": T}), {"0": A.tobytes()})
    whole = legacy.read_bytes()
    for cut in (10, 60, len(whole) // 2, len(whole) - 96, len(whole) - 1):
        legacy.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"y\.pth: "):
            read_weights(str(legacy))
    for data, message in {
        b"": "not a weights file",
        b"<!DOCTYPE html><html>": "not a weights file",
        b"\x89HDF\r\n\x1a\n": "HDF5",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n": "git lfs pull",
        b"404: Not Found": "text: '404: Not Found'",
        b"\x93NUMPY\x01\x00": "np.savez",
        b"\x1f\x8b\x08\x00": "gzip",
        pickle_of(p_int(1)): "holds a int",
    }.items():
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"x\.pth: cannot be read as .*{message}"):
            read_weights(str(path))
    with pytest.raises(InputError, match="a folder, not a weights file"):
        read_weights(str(tmp_path))
    with pytest.raises(ValueError, match="no such weights file"):
        read_weights(str(tmp_path / "missing.pth"))


def test_damaged_numbers_are_noticed(tmp_path):
    path = tmp_path / "x.pth"
    write_state(path, {"w": A})
    data = bytearray(path.read_bytes())
    data[bytes(data).index(A.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        read_weights(str(path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{x", "not JSON"),
        (b'{"a":1,"a":2}', "duplicate key 'a'"),
        (b"[]", "not a weights file"),
        ({"w": {"dtype": "F32", "shape": [1]}}, "missing field `data_offsets`"),
        ({"w": {"dtype": "F8", "shape": [1], "data_offsets": [0, 4]}}, "'F8'"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "invalid shape"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "expected usize"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "invalid offset"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "not fully covered"),
    ],
)
def test_safetensors_that_lie(tmp_path, header, message):
    path = write_safetensors_raw(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}"):
        read_weights(path)


def test_safetensors_with_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(ValueError, match="header of 1099511627776 bytes: more than"):
        read_weights(str(path))


def test_npz_that_lie(tmp_path):
    bomb = {"w.npy": npy(bytes(2**27), (2**25,))}
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    for name, members, message in [
        ("bomb", bomb, "decompression bomb"),
        ("object", {"w.npy": objects.getvalue()}, "pickled objects"),
        ("text", {"w.npy": npy(b"x" * 8, (2,), "<U1")}, "not a number"),
        ("other", {"readme.txt": b"x"}, "not an array"),
        ("short", {"w.npy": npy(b"\x00" * 8, (3,))}, "does not fit its 8 bytes"),
        ("magic", {"w.npy": b"nonsense"}, "magic"),
        # What numpy's header parser raises: a tokenizer's error, a recursion error.
        ("token", {"w.npy": npy(b"", "(1,", "'\\x00")}, "cannot be read as an .npz"),
        ("deep", {"w.npy": npy(b"", "(" * 900 + "1" + ")" * 900)}, "cannot be read as an .npz"),
    ]:
        path = write_npz(tmp_path / f"{name}.npz", members, zipfile.ZIP_DEFLATED)
        with pytest.raises(ValueError, match=rf"{name}\.npz: .*{message}"):
            read_weights(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_npz_in_ways_that_cannot_be_bounded_are_refused(tmp_path, method):
    path = write_npz(tmp_path / "x.npz", {"w.npy": npy(bytes(8), (2,))}, method)
    with pytest.raises(InputError, match=r"x\.npz: .*neither stored nor deflated"):
        read_weights(path)


@pytest.mark.parametrize("declared", [100, 2**24])
def test_npz_whose_sizes_are_false(tmp_path, declared):
    """8 MiB of zeros in 8 kB, declared shorter or longer than they are."""
    path = write_npz(tmp_path / "x.npz", {"w.npy": npy(bytes(2**23), (2**21,))}, 8)
    data = bytearray(pathlib.Path(path).read_bytes())
    for magic, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.index(magic) + offset
        data[start : start + 4] = struct.pack("<I", declared)
    pathlib.Path(path).write_bytes(data)
    with pytest.raises(InputError, match=r"x\.npz: cannot be read as an \.npz archive"):
        read_weights(path)


def test_damaged_npz_is_one_sentence(tmp_path):
    """zlib's error is no ValueError, and neither is the checksum's."""
    path = write_npz(tmp_path / "x.npz", {"w.npy": npy(A.tobytes(), (2, 3, 4))}, 8)
    whole = pathlib.Path(path).read_bytes()
    for place in range(40, 120, 7):
        data = bytearray(whole)
        data[place] ^= 0xFF
        pathlib.Path(path).write_bytes(data)
        with pytest.raises(InputError, match=r"x\.npz: cannot be read as"):
            read_weights(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path, bad):
    state = small_state("r18")
    state["ins_head.kernel_pred.bias"][3] = bad
    path = write_state(tmp_path / "x.pth", state)
    with pytest.raises(ValueError, match="NaN or infinity in params/ins_head/kernel_p"):
        read_weights(path)


def test_integer_weights_are_refused(tmp_path):
    path = str(tmp_path / "x.npz")
    state = small_state("r18")
    np.savez(path, **{n: a.astype(np.int32) for n, a in state.items()})
    with pytest.raises(ValueError, match="integer weights: params/"):
        read_weights(path)
