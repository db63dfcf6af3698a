"""Weights readers on mutated files: memory, time and the error's form are bounded.

Minutes long: pytest -m slow tests/test_weights_fuzz.py. SOLOV2_FUZZ_EXAMPLES (200) is the
number of mutations of each format.
"""

import os
import pathlib
import pickle
import resource
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from checkpoint_files import p_dict, small_state, state_pickle, write_legacy, write_state, write_zip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_paddle_static import variable, write_tar
from test_weights_names import caffe2_state

from solov2_jax.io import InputError
from solov2_jax.weights.array_files import write_safetensors
from solov2_jax.weights.sources import read_weights

EXAMPLES = int(os.environ.get("SOLOV2_FUZZ_EXAMPLES", "200"))
FORMATS = (
    "npz",
    "npz deflated",
    "pth zip",
    "pth legacy",
    "pickle",
    "pickle 2",
    "safetensors",
    "tar",
)
# Beside 16 times the file: 64 MiB each of declared zeros, objects and their float32 form.
FLOOR = 256 * 2**20
SECONDS = 10.0
# Bytes that mean something somewhere: opcodes, sizes, dtypes.
TOKENS = [
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x00\x00\x00\x10",
    b"q\x00h\x00",
    b"h\x00\x86",
    b"\x8f" * 64,
    b"}" * 64,
    b"(" * 64,
    b"\x85" * 64,
    b"2" * 64,
    b"R",
    b"b",
    b"u",
    b"Q",
    b"<f8",
    b">f2",
    b"F64",
    b"BF16",
    b"cos\nsystem\n",
    b"PK\x01\x02",
    b"\x0c\x00",
]


def valid_file(kind, folder):
    """Returns the bytes of a small file that reads."""
    state = small_state("r18", divide=64)
    state = {name: value for name, value in state.items() if "res5" not in name}
    path = folder / "valid"
    if kind.startswith("npz"):
        with open(path, "wb") as file:
            (np.savez_compressed if "deflated" in kind else np.savez)(file, **state)
    elif kind == "pth zip":
        write_state(path, state)
    elif kind == "pth legacy":
        value, storages = state_pickle(state)
        write_legacy(path, p_dict({"model": value}), storages)
    elif kind.startswith("pickle"):
        # The first names of Caffe2's, which are numpy arrays in a pickle.
        blobs = caffe2_state({k: v for k, v in state.items() if "bottom_up" in k})
        path.write_bytes(pickle.dumps({"model": blobs}, 2 if "2" in kind else 4))
    elif kind == "tar":
        write_tar(path, {f"a/{name}": variable(value) for name, value in state.items()})
    else:
        write_safetensors(str(path), state, {})
    return path.read_bytes()


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut", "zip sizes"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.sampled_from(TOKENS),
        st.integers(1, 2000),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data, mutations):
    """Returns the bytes with changes, most of them in the head or the directory."""
    data = bytearray(data)
    for kind, where, byte, token, count in mutations:
        place = int(where * len(data))
        if byte % 4 == 0:  # headers are at the beginning, a zip's directory at the end
            place = int(where * min(len(data), 600))
        elif byte % 4 == 1:
            place = max(len(data) - 1 - int(where * 2000), 0)
        if kind == "flip" and data:
            data[min(place, len(data) - 1)] ^= 1 << byte % 8
        elif kind == "set":
            data[place : place + len(token)] = token
        elif kind == "insert":
            data[place:place] = token
        elif kind == "delete":
            del data[place : place + count % 64]
        elif kind == "repeat":
            data[place:place] = data[place : place + 1 + byte % 40] * count
        elif kind == "cut":
            del data[place:]
        else:  # sizes and methods in a zip's directory
            start = data.rfind(b"PK\x01\x02", 0, place + 1)
            if start >= 0:
                field = start + (10, 20, 24, 42)[byte % 4]
                data[field : field + 4] = token[:4].ljust(4, b"\x00")
    return bytes(data)


def fuzz(kind, folder):
    """Reads mutations in this process; prints how many were tried, refused and read."""
    folder = pathlib.Path(folder)
    valid = valid_file(kind, folder)
    path = folder / "mutated"
    path.write_bytes(valid)
    read_weights(str(path))
    counts = {"tried": 0, "read": 0, "slowest": 0.0}
    before = peak_memory()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(MUTATIONS)
    def run(mutations):
        data = mutate(valid, mutations)
        path.write_bytes(data)
        start = time.process_time()
        try:
            read_weights(str(path))
            counts["read"] += 1
        except InputError as error:
            text = str(error)
            assert text.startswith(str(path)) and "\n" not in text and len(text) < 2000, text
        seconds = time.process_time() - start
        counts["tried"] += 1
        counts["slowest"] = max(counts["slowest"], seconds)
        assert seconds < SECONDS, f"{seconds:.1f} s"
        grown = peak_memory() - before
        assert grown < FLOOR + 16 * len(data), f"{grown / 2**20:.0f} MiB"

    run()
    grown = (peak_memory() - before) / 2**20
    refused = counts["tried"] - counts["read"]
    print(
        f"{kind}: {counts['tried']} files of about {len(valid)} bytes, {refused} refused, "
        f"slowest {counts['slowest']:.2f} s, memory +{grown:.0f} MiB"
    )


def peak_memory():
    """Returns the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_files_are_read_or_refused_in_bounded_memory_and_time(tmp_path, kind):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))

    done = subprocess.run(
        [sys.executable, __file__, kind, str(tmp_path)],
        preexec_fn=limit,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout.strip())


def test_the_mutations_start_from_files_that_read(tmp_path):
    for kind in FORMATS:
        path = tmp_path / "x"
        path.write_bytes(valid_file(kind, tmp_path))
        assert read_weights(str(path)).flat
    with zipfile.ZipFile(write_zip(tmp_path / "y", p_dict({}), {})) as archive:
        assert archive.namelist()
    assert mutate(b"abc", [("cut", 0.5, 2, b"", 1)]) == b"a"


if __name__ == "__main__":
    fuzz(*sys.argv[1:])
