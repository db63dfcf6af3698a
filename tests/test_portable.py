"""Nothing that train, evaluate and predict import exists on Linux alone.

Other systems are not at hand: here the modules and functions that they lack are taken away
in a process of its own, and everything is imported there, one small run is made.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What Windows has not; macOS lacks some of it.
MODULES = ("fcntl", "resource", "termios", "tty", "pwd", "grp", "pty", "syslog", "array_record")
FUNCTIONS = {
    "os": (
        *("fork", "forkpty", "memfd_create", "sched_getaffinity", "getuid", "geteuid", "getgid"),
        *("getloadavg", "mkfifo", "O_DIRECTORY", "O_CLOEXEC", "O_NOFOLLOW", "uname"),
        *("killpg", "getpgid", "setsid", "sysconf", "MFD_CLOEXEC", "getrusage", "chown", "sync"),
    ),
    "signal": ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "pthread_sigmask", "alarm"),
}
# Libraries may ask for what they need where they find POSIX: their own affair, and loaded
# before anything is taken away.
LIBRARIES = (
    *(
        "jax",
        "jax.numpy",
        "jaxlib",
        "flax.linen",
        "optax",
        "orbax.checkpoint",
        "grain",
        "PIL.Image",
    ),
    *("matplotlib.pyplot", "rich.progress", "tensorboardX", "absl.logging", "ml_collections"),
    *("jax.experimental.multihost_utils", "filelock", "psutil", "multiprocessing.resource_tracker"),
)
TAKE_AWAY = f"""
import importlib, json, os, signal, sys
for name in {LIBRARIES!r}:
    importlib.import_module(name)
for name in {MODULES!r}:
    for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        sys.modules[loaded] = None
    sys.modules[name] = None
for module, names in {FUNCTIONS!r}.items():
    for name in names:
        vars(sys.modules[module]).pop(name, None)
# Of this system's own `multiprocessing`, which looked when it was imported.
sys.modules["multiprocessing.resource_tracker"]._HAVE_SIGMASK = False
"""
IMPORT_ALL = """
import pkgutil, solov2_jax
missing = {}
for module in pkgutil.walk_packages(solov2_jax.__path__, "solov2_jax."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        missing[module.name] = str(error)
    except AttributeError as error:
        missing[module.name] = str(error)
print(json.dumps(missing))
"""


def run(code, *, cwd, timeout=300):
    """Returns what the code prints in a process without what is Linux's."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    found = subprocess.run(
        [sys.executable, "-c", TAKE_AWAY + code],
        capture_output=True,
        cwd=cwd,
        env=environment,
        text=True,
        timeout=timeout,
    )
    assert not found.returncode, found.stderr[-4000:]
    return found.stdout


def test_every_module_imports_without_what_is_linux_s(tmp_path):
    assert json.loads(run(IMPORT_ALL, cwd=tmp_path).splitlines()[-1]) == {}


def test_batches_locks_memory_and_files_work_without_it(tmp_path):
    code = """
import pathlib
import numpy as np
import tiny_coco
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import load_coco
from solov2_jax.data.pipeline import Reading, train_batches
from solov2_jax.io import InputError, lock_file, write_text
from solov2_jax.training.hooks import memory_gb

def main():
    dataset = load_coco(*tiny_coco.write(pathlib.Path("data")))
    options = dict(seed=0, num_steps=3, batch_size=2, resize=Resize((64,), 64, ()), flip_prob=0.5)
    read = [
        list(train_batches(dataset, reading=Reading(num_workers=n), **options)) for n in (0, 1)
    ]
    for one, other in zip(*read, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)
    assert 0.01 < memory_gb() < 100
    with lock_file("a.lock", "taken"):
        try:
            with lock_file("a.lock", "taken"):
                raise SystemExit("locked twice")
        except InputError as error:
            print(error)
    assert not os.path.exists("a.lock")
    write_text("x", "a.txt")
    from solov2_jax.tools.predict.output_folder import OutputFolder
    with OutputFolder("out").opened():
        pass
    print("done")

if __name__ == "__main__":
    import multiprocessing
    multiprocessing.set_start_method("spawn", force=True)
    main()
"""
    (tmp_path / "code.py").write_text(TAKE_AWAY + code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    found = subprocess.run(
        [sys.executable, "code.py"],
        capture_output=True,
        cwd=tmp_path,
        env=environment,
        text=True,
        timeout=300,
    )
    assert found.stdout.splitlines()[-2:] == ["taken", "done"], found.stderr[-4000:]


@pytest.mark.parametrize("name", ["uvloop", "array-record"])
def test_requirements_of_one_system_have_markers(name):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines += tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [line for line in lines if line.startswith(name)]
    assert found and all("sys_platform != 'win32'" in line.replace('"', "'") for line in found)
