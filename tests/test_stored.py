"""Compiled programs that a second process finds: they compute the same, untraced."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
import solov2_jax.stored as stored

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
traced = []

def function(tree, x):
    traced.append(x.shape)
    return {"y": jnp.sin(tree["w"] @ x), "z": x.sum()}

def values(size, name):
    arguments = {"w": jnp.full((size, size), 0.5)}, jnp.arange(float(size))
    program = stored.load_or_compile(jax.jit(function), arguments, name)
    return jax.tree.map(lambda a: a.tolist(), program(*arguments))

found = [values(3, "a"), values(4, "a"), values(3, "b")]
print(json.dumps({"found": found, "traced": len(traced)}))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(cache, program=PROGRAM):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment.pop("JAX_ENABLE_COMPILATION_CACHE", None)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_programs_are_found_by_shape_and_name_and_never_used_damaged(cache):
    first = run(cache)
    assert first["traced"] == 2
    files = sorted((cache / "solov2_programs").glob("*.program"))
    # The third is the first's computation, which JAX's cache has: such a copy is not stored.
    assert len(files) == 2
    second = run(cache)
    assert second["found"] == first["found"]
    assert second["traced"] == 1
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(b"")
    third = run(cache)
    assert third["found"] == first["found"]
    assert not list((cache / "solov2_programs").glob("*.program"))
    assert third["traced"] == 2


def test_shapes_of_a_network_are_those_of_tracing_it(cache, monkeypatch):
    from flax import linen as nn

    from solov2_jax import stored

    monkeypatch.setattr(stored, "folder", lambda: cache)
    model = nn.Conv(4, (3, 3))
    traced = stored.variable_shapes(model, 5)
    assert len(list(cache.glob("*.shapes.json"))) == 1
    monkeypatch.setattr(nn.Conv, "init", None)
    assert stored.variable_shapes(model, 5) == traced
    assert traced["params"]["kernel"].shape == (3, 3, 5, 4)


PASTE = """
import json
import jax, numpy as np
from solov2_jax.inference import pasting
from solov2_jax.structs import Detections

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
traced, paste_masks = [], pasting.paste_masks
def counted(*arguments):
    traced.append(1)
    return paste_masks(*arguments)
pasting.paste_masks = counted

rng = np.random.default_rng(0)
found = Detections(
    scores=np.ones((2, 5), np.float32),
    labels=np.zeros((2, 5), np.int32),
    soft_masks=jax.numpy.asarray(rng.random((2, 5, 16, 24), np.float32)),
    valid=np.arange(5) < np.array([[3], [5]]),
    num_candidates=np.full(2, 5),
)
size, original = np.array([[64, 90], [40, 96]]), np.array([[80, 100], [50, 120]])
wanted = np.array([True, True])
pasting.start_paste((2, 64, 96), 5, original, wanted, 0.5)
started = pasting.BatchPaste(found, size, original, wanted=wanted, threshold=0.5)
images = {i: pasted for i, pasted in started.rounds(np.array([3, 5]))}
paste = pasting._compile_paste(None, (256, 256), 5, 0.5)
alone = pasting.paste_detections(found.soft_masks, 1, np.arange(5), size[1], original[1], 0.5)
print(json.dumps({
    "traced": len(traced), "programs": len(paste._programs),
    "shapes": [images[i][0].shape for i in (0, 1)], "pixels": int(images[0][0].sum()),
    "equal": all(np.array_equal(a, b) for a, b in zip(images[1], alone)),
}))
"""


def test_pasting_is_prepared_beside_the_network_and_found_again(tmp_path):
    first, second = run(tmp_path, PASTE), run(tmp_path, PASTE)
    for found in (first, second):  # what was prepared is what is needed
        assert found["programs"] == 1 and found["equal"]
        assert found["shapes"] == [[3, 80, 100], [5, 50, 120]]
    assert first["pixels"] == second["pixels"] > 0
    # One of each is that of `paste_detections`.
    assert (first["traced"], second["traced"]) == (2, 1)
