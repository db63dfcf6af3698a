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


def run(cache):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment.pop("JAX_ENABLE_COMPILATION_CACHE", None)
    command = [sys.executable, "-c", PROGRAM]
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
