"""SOLOv2 instance segmentation: one command with these parts.

solov2 train --config quickstart --workdir runs/quickstart
solov2 predict --workdir runs/quickstart --input photos --output out
"""

import importlib
import sys

from solov2_jax import __version__

_CLI = "solov2_jax.tools.cli."
# Name: (its function, what it does).
COMMANDS = {
    "train": (_CLI + "train:run", "trains, or resumes a run that was interrupted"),
    "evaluate": (_CLI + "evaluate:run", "scores a run, or files of predictions"),
    "predict": (_CLI + "predict:run", "finds objects in images, videos, streams"),
    "export": (_CLI + "export:run", "writes ONNX, StableHLO, SavedModel, TFLite"),
    "convert": (_CLI + "convert:run", "converts weights of other programs, and ours"),
    "verify": (_CLI + "verify:run", "runs converted weights beside their own program"),
    "benchmark": (_CLI + "benchmark:run", "measures a run's prediction, part by part"),
    "serve": (_CLI + "serve:run", "answers HTTP requests"),
    "hub": (_CLI + "hub:run", "hands a run on by the Hugging Face hub, and fetches one"),
    "doctor": ("solov2_jax.tools.cli.doctor:main", "reports on a data set before training"),
    "import": ("solov2_jax.tools.cli.importers:main", "YOLO, labelme, PNG masks to COCO json"),
    "select": (_CLI + "select:run", "ranks pictures without labels: which to label next"),
    "pseudo": (_CLI + "pseudo:run", "labels pictures by a network, to train on"),
    "view": (_CLI + "view:run", "draws training batches with their targets"),
    "summary": (_CLI + "summary:run", "prints the network as a table"),
    "study": (_CLI + "study:run", "measures which settings help on your data"),
    "tfds": ("solov2_jax.tools.tfds:main", "writes a data set as few large files"),
    "env": (_CLI + "env:run", "prints versions and devices, for an issue report"),
}


def help_text() -> str:
    lines = [f"    {name:<9} {words}" for name, (_, words) in COMMANDS.items()]
    return "\n".join([(__doc__ or "").strip(), "", *lines, "", "solov2 COMMAND --help: its flags."])


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name.lstrip("-") in ("help", "h"):
        print(help_text())
    elif name == "--version":
        print(f"solov2_jax {__version__}")
    elif name not in COMMANDS:
        from solov2_jax.config import suggest

        hint = f"{suggest(name, COMMANDS)} See solov2 --help"
        print(f"error: unknown command {name!r}{hint}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv[:2] = [f"solov2 {name}"]
        module, _, function = COMMANDS[name][0].partition(":")
        getattr(importlib.import_module(module), function)()
