"""The programs we are compared with, in a Python environment of their own.

    python benchmarks/peer.py                      # makes .cache/peer
    python benchmarks/peer.py --peer_dir FOLDER    # another place

mmdetection's SOLOv2 (PyTorch) runs eagerly, with channels last, with its batch norms
folded, or compiled; its network alone also in ONNX Runtime and OpenVINO. `plain` is a
transcription of the network and its loss to bare torch functions, `torch_plain.py`.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / ".cache" / "peer"
# Two steps: torch asks for a newer setuptools than the one that still has the
# pkg_resources which mmengine imports.
PACKAGES = [
    "torch==2.13.0",
    "numpy<2",
    "opencv-python-headless<4.12",
    "mmengine==0.10.7",
    "mmcv-lite==2.1.0",
    "mmdet==3.3.0",
    "onnx==1.23.2",
    "onnxruntime==1.32.0",
    "openvino==2026.4.1",
]
LATER = ["--no-deps", "setuptools<70", "numpy<2"]

# Form -> its name in results. Of torch's forms, NCHW is what "eager" is.
NAMES = {
    "eager": "mmdetection",
    "channels_last": "mmdetection, channels last",
    "fused": "mmdetection, channels last, norms folded",
    "compile": "mmdetection, torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "plain": "plain torch",
    "plain_channels_last": "plain torch, channels last",
    "plain_compile": "plain torch, torch.compile",
}
RUNTIMES = ("onnxruntime", "openvino")
INFERENCE = ("eager", "channels_last", "fused", "compile", *RUNTIMES)
TRAINING = ("eager", "channels_last", "plain", "plain_channels_last", "plain_compile")
POSTPROCESSING = ("eager", "channels_last")


def add_arguments(parser: argparse.ArgumentParser, forms: tuple[str, ...]) -> None:
    """Adds which peers, and where they are installed."""
    parser.add_argument("--peers", nargs="*", choices=forms, default=["channels_last"])
    parser.add_argument("--peer_dir", type=Path, default=DEFAULT)


def program(form: str, kind: str, case: Path, args: Any) -> harness.Program:
    """Returns the worker of a peer; what keeps a compiled form from it is recorded."""
    python = interpreter(args.peer_dir)
    script = "onnx_side.py" if form in RUNTIMES else "torch_side.py"
    if form in RUNTIMES and kind != "network":
        raise SystemExit(f"error: {form} runs the network alone, not {kind!r}")
    if form in RUNTIMES and not (case / "network.onnx").exists():
        export = [python, HERE / "torch_side.py", "export", "--case", case]
        subprocess.run(list(map(str, export)), check=True, stdout=sys.stderr)
    command = [python, HERE / script, kind, "--form", form, "--case", case]
    optional = form.endswith("compile")
    return harness.Program(NAMES[form], list(map(str, command)), optional=optional)


def interpreter(folder: Path) -> Path:
    """Returns the environment's Python, or says how to make one."""
    python = folder / "bin" / "python"
    if not python.exists():
        raise SystemExit(
            f"error: no peer environment in {folder}: run `python benchmarks/peer.py "
            f"--peer_dir {folder}`, or give --peers no name to measure ours alone"
        )
    return python


def main() -> None:
    """Makes the environment and tries it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer_dir", type=Path, default=DEFAULT)
    folder = parser.parse_args().peer_dir
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    for packages in (PACKAGES, LATER):
        subprocess.run([python, "-m", "pip", "install", *packages], check=True)
    subprocess.run([python, HERE / "torch_side.py", "--help"], check=True)


if __name__ == "__main__":
    main()
