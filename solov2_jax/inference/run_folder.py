"""What the folder of a training run says about its network: config and classes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solov2_jax.config import load_config


def load_workdir_config(
    workdir: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> Any:
    """Returns the config that a run was made with, with overrides applied."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{workdir} is not the folder of a run: it has no config.json. Give the "
            "--workdir that train.py was given"
        )
    return load_config(str(path), overrides)


def read_classes(workdir: str | os.PathLike[str]) -> tuple[list[str], list[int]]:
    """Returns the class names and category ids of a run."""
    path = Path(workdir) / "classes.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        return list(content["names"]), [int(i) for i in content["ids"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: cannot be read as {{"names": [...], "ids": [...]}} ({error}); '
            "start train.py again with the same --workdir, which writes it"
        ) from error
