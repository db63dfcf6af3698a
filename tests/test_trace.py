"""Where a traced step spends its time, read back from the trace's file."""

import subprocess
import sys

import pytest

from solov2_jax.io import InputError
from solov2_jax.tools.trace import format_table, main, read_trace, scope_of

# In a process of its own: a trace holds every program that its process has compiled.
TRACED = """
import sys, jax, jax.numpy as jnp

def loss(x):
    with jax.named_scope("sines"):
        y = jnp.sin(x) @ x
    with jax.named_scope("cosines"):
        return jnp.sum(jnp.cos(y) @ y)

step = jax.jit(jax.grad(loss))
x = jnp.ones((300, 300))
jax.block_until_ready(step(x))
jax.profiler.start_trace(sys.argv[1])
for number in range(2):
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
        jax.block_until_ready(step(x))
jax.profiler.stop_trace()
"""


def test_named_scopes_are_read_from_a_trace(tmp_path):
    subprocess.run([sys.executable, "-c", TRACED, str(tmp_path)], check=True, capture_output=True)
    spent, steps = read_trace(tmp_path)
    assert steps == 2 and all(time >= 0 for time in spent.values())
    assert {"sines", "cosines (backward)"} <= spent.keys(), spent
    table = format_table(spent, steps).splitlines()
    assert table[0] == "| scope | ms per step | share |" and table[-1].startswith("| `others`")


def test_names_of_transformations_are_left_out():
    name = "jit(step)/jvp(backbone)/res2_0/conv1/conv_general_dilated"
    assert scope_of(name, 1) == "backbone" and scope_of(name, 2) == "backbone/res2_0"
    back = "jit(step)/transpose(jvp(backbone))/res2_0/conv1/conv_general_dilated"
    assert scope_of(back, 1) == "backbone (backward)"
    assert scope_of("", 1) == "(no scope)"


def test_a_folder_without_a_trace_and_a_damaged_one(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "no trace" in capsys.readouterr().err
    with pytest.raises(InputError, match="no trace .*train.profile_steps"):
        read_trace(tmp_path)
    (tmp_path / "a.xplane.pb").write_bytes(b"\x0a\xff\xff\xff")
    with pytest.raises(InputError, match="a.xplane.pb: cannot be read as a trace"):
        read_trace(tmp_path)
