"""What commands share, run as commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = """
import os, sys
from solov2_jax import cli

def main(overrides):
    started = open("/proc/self/environ").read().split("\\0")
    for place in (started, [f"{k}={v}" for k, v in os.environ.items()]):
        print([x for x in place if x.startswith("MALLOC_ARENA_MAX")])
    print(overrides)

if __name__ == "__main__":
    cli.run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    "arguments, given, started, inherited",
    [
        ([], {}, ["MALLOC_ARENA_MAX=1"], []),
        (["--nokeep_memory"], {}, [], []),
        ([], {"MALLOC_ARENA_MAX": "4"}, ["MALLOC_ARENA_MAX=4"], ["MALLOC_ARENA_MAX=4"]),
    ],
)
def test_a_command_starts_anew_with_the_allocators_settings(
    tmp_path, arguments, given, started, inherited
):
    """And keeps them from its children. What the user set stays, for both."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(script), "--config.seed=3", *arguments],
        env={**clean, **given, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    want = [str(started), str(inherited), str(["--config.seed=3"])]
    assert done.stdout.splitlines() == want
