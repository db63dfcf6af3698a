"""Checkpoint files written byte by byte: what PyTorch and its pickles look like.

Independent of the package's own writer, so that reader and writer cannot share a
mistake. A pickled value is its bytes; `p_...` functions make them.
"""

import gzip
import json
import pathlib
import struct
import zipfile

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
STORAGE_OF = {
    "f4": "FloatStorage",
    "f8": "DoubleStorage",
    "f2": "HalfStorage",
    "bf16": "BFloat16Storage",
    "i8": "LongStorage",
}


def reference_shapes(name):
    """Returns {state dict key: shape} of the reference's r18, r34, r50, r101,
    r50_light or r18_light."""
    text = gzip.decompress((GOLDEN / "state_dict_keys.json.gz").read_bytes())
    return {key: tuple(shape) for key, shape in json.loads(text)[name].items()}


def small_state(name, divide=16, seed=0):
    """Returns a state dict with the reference's names and every channel / `divide`."""
    rng = np.random.default_rng(seed)
    state = {}
    for key, shape in reference_shapes(name).items():
        small = tuple(-(-n // divide) if n > 7 else n for n in shape)
        state[key] = rng.standard_normal(small).astype(np.float32)
    return state


def p_str(text):
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def p_int(value):
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def p_tuple(*items):
    return b"(" + b"".join(items) + b"t"


def p_list(*items):
    return b"](" + b"".join(items) + b"e"


def p_dict(pairs):
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    body = b"".join(p_str(key) + value for key, value in pairs)
    return b"}(" + body + b"u"


def p_global(module, name):
    return f"c{module}\n{name}\n".encode()


def p_call(module, name, *args):
    return p_global(module, name) + p_tuple(*args) + b"R"


def p_tensor(key, kind, count, shape, strides=None, offset=0, view=None):
    """A tensor on storage `key` of `count` numbers."""
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    storage = p_tuple(
        p_str("storage"),
        p_global("torch", STORAGE_OF[kind]),
        p_str(key),
        p_str("cpu"),
        p_int(count),
        *([] if view is None else [view]),
    )
    return p_call(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage + b"Q",
        p_int(offset),
        p_tuple(*map(p_int, shape)),
        p_tuple(*map(p_int, strides)),
        b"\x89",
        p_global("collections", "OrderedDict") + b")R",
    )


def pickle_of(value):
    return b"\x80\x02" + value + b"."


def state_pickle(state, start=0):
    """Returns (pickled dict of float32 tensors, {storage key: bytes})."""
    pairs, storages = [], {}
    for number, (name, array) in enumerate(state.items(), start):
        pairs.append((name, p_tensor(str(number), "f4", array.size, array.shape)))
        storages[str(number)] = array.astype("<f4").tobytes()
    return p_dict(pairs), storages


def write_zip(path, value, storages, prefix="archive", extra=(), order=None, method=0):
    """Writes the format of PyTorch 1.6 and later; returns the path as a string."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{prefix}/data.pkl", pickle_of(value))
        if order is not None:
            archive.writestr(f"{prefix}/byteorder", order)
        for key, data in storages.items():
            archive.writestr(f"{prefix}/data/{key}", data)
        archive.writestr(f"{prefix}/version", "3\n")
        for name, data in extra:
            archive.writestr(name, data)
    return str(path)


def write_legacy(path, value, storages, little_endian=True, itemsize=4):
    """Writes the format of PyTorch 0.4 to 1.5; returns the path as a string."""
    system = p_dict({"little_endian": b"\x88" if little_endian else b"\x89"})
    magic = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
    data = pickle_of(b"\x8a" + bytes([10]) + magic) + pickle_of(p_int(1001))
    data += pickle_of(system) + pickle_of(value)
    data += pickle_of(p_list(*map(p_str, storages)))
    for numbers in storages.values():
        order = "<" if little_endian else ">"
        data += struct.pack(f"{order}q", len(numbers) // itemsize) + numbers
    pathlib.Path(path).write_bytes(data)
    return str(path)


def write_state(path, state, **others):
    """Writes {"model": state, **others (pickled)} as PyTorch does."""
    model, storages = state_pickle(state)
    return write_zip(path, p_dict({"model": model, **others}), storages)


def write_safetensors_raw(path, header, data=b""):
    """Writes a .safetensors file with any header (bytes or JSON data)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)
