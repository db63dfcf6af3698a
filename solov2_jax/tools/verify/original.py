"""The original program of weights, run by the Python that has it, in a process of its own.

The programs beside this module, `*_program.py`, know nothing of this package: they read a
folder (`case.json`, `state.npz`, `image.npy`) and write `original.npz`, or one line of JSON
that says what is missing.
"""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solov2_jax.io import InputError
from solov2_jax.tools.verify.ours import Computed, Detected
from solov2_jax.tools.verify.paddle_program import is_static
from solov2_jax.weights import backbones
from solov2_jax.weights.sources import Weights, read_contents
from solov2_jax.weights.tables import to_mmdet

TIMEOUT = 3600  # seconds


class Original(NamedTuple):
    """A program that can run the weights, and their tensors by its names."""

    program: str  # of `*_program.py`
    state: Mapping[str, np.ndarray]
    described: str
    packages: str  # what pip installs for it


class Unavailable(NamedTuple):
    """Why there is nothing to compare with."""

    reason: str


def find_original(config: Any, weights: Weights, prefix: str = "") -> Original | Unavailable:
    """Returns the program that published the weights, or the nearest there is.

    mmdetection, PaddleDetection, torchvision and timm get the file's tensors under the file's
    own names. AdelaiDet and the paper's code cannot be installed by pip: mmdetection's layers
    stand in for theirs, and get the tensors by the names that our tables give.
    """
    source, path = weights.source, Path(weights.path)
    # The file's tensors by the file's names; a run's folder has none.
    own_names = read_contents(str(path), prefix).tensors if path.is_file() else {}
    if weights.num_classes is None:
        return _of_backbone(source, own_names)
    if source == "paddle":
        packages = 'paddlepaddle "paddledet==2.6.0"'
        described = "PaddleDetection's SOLOv2"
        if is_static(own_names):  # today's PaddlePaddle has no `fluid` to build the graph with
            described += ", its layers of today in the place of its static graph's"
        return Original("paddle", own_names, described, packages)
    if why := _not_in_mmdet(config):
        return Unavailable(f"mmdetection has no such network: {why}")
    packages = "torch mmengine mmcv-lite==2.1.0 mmdet==3.3.0"
    if source == "mmdet" and any(name.startswith("mask_head.") for name in own_names):
        return Original("mmdet", own_names, "mmdetection's SOLOv2", packages)
    state = to_mmdet(weights.flat, config.model.backbone.avg_down)
    described = "mmdetection's layers under the names of our tables"
    return Original("mmdet", state, described, packages)


def _of_backbone(source: str, state: Mapping[str, np.ndarray]) -> Original | Unavailable:
    if source in ("torchvision", "timm", *backbones.TABLES):
        described = "torchvision's or timm's backbone"
        return Original("torch", state, described, "torch torchvision timm")
    return Unavailable(f"no package has a backbone with the weights of source {source}")


def _not_in_mmdet(config: Any) -> str:
    """Returns the key that keeps mmdetection from having the network, "" if none does."""
    model = config.model
    for key, value, known in (
        ("model.backbone.name", model.backbone.name, ("resnet",)),
        ("model.backbone.norm", model.backbone.norm, ("frozen_bn", "sync_bn")),
        ("model.ins_head.norm", model.ins_head.norm, ("gn",)),
        ("model.mask_head.norm", model.mask_head.norm, ("gn",)),
        ("model.dcn.head_bias", model.dcn.head_bias, (False,)),
        ("data.channels", config.data.channels, (3,)),
    ):
        if value not in known:
            return f"{key} = {value!r}"
    return ""


def run_original(
    original: Original, config: Any, image: np.ndarray, folder: Path, python: str
) -> Computed | Unavailable:
    """Returns what the program computes of the network's input [1, h, w, 3].

    Args:
      folder: for the files that go to and fro; empty.
      python: interpreter of the environment that has the program.

    Raises:
      InputError: if the interpreter cannot be started, or the program fails.
    """
    case = case_of(config)
    case["model"]["num_classes"] = 0  # the tensors say it
    tensors: Any = original.state  # names, which are the file's
    np.savez(folder / "state.npz", **tensors)
    np.save(folder / "image.npy", image)
    why = run_program(original.program, case, folder, python)
    if why:
        install = f"pip install {original.packages}"
        return Unavailable(
            f"{original.described}: {why} in {python}. Into that environment, or one that "
            f"--python names: {install}"
        )
    return _read(folder / "original.npz")


def case_of(config: Any) -> dict[str, Any]:
    """Returns what a program is told of the network, as plain JSON data."""
    return {"model": config.model.to_dict(), "test": config.test.to_dict()}


def run_program(program: str, case: Mapping[str, Any], folder: Path, python: str) -> str:
    """Returns what is missing to run a program on a folder, "" after it ran.

    Raises:
      InputError: if the interpreter cannot be started, or the program fails.
    """
    (folder / "case.json").write_text(json.dumps(case))
    script = Path(__file__).with_name(f"{program}_program.py")
    command = [python, str(script), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except OSError as error:
        raise InputError(f"--python {python}: cannot be started ({error.strerror})") from error
    except subprocess.TimeoutExpired:
        raise InputError(f"{program}: not ready after {TIMEOUT} s") from None
    if done.returncode == 0:
        return ""
    if why := _last_reason(done.stdout):
        return why
    lines = done.stderr.strip().splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}"
    raise InputError(f"{program}, run by {python}, failed: {last[:300]}")


def _last_reason(output: str) -> str:
    """Returns what a program said is missing, "" where it did not get that far."""
    for line in reversed(output.splitlines()):
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and isinstance(said.get("missing"), str):
            return said["missing"]
    return ""


def _read(path: Path) -> Computed:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    detected = None
    if "detected/scores" in arrays:
        parts = (arrays.pop(f"detected/{part}") for part in ("labels", "scores", "masks"))
        detected = Detected(*parts)
    return Computed(arrays, detected)
