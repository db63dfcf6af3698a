r"""Hands a trained run on by the Hugging Face hub, and fetches one.

    solov2 hub push runs/mine USER/REPO --licence apache-2.0
    solov2 hub push runs/mine USER/REPO --output folder
    solov2 hub pull USER/REPO --output runs/theirs

push writes weights (safetensors), config, classes and a model card with what was measured
into a new commit; with --output into a folder, and nothing leaves this machine. Paths and
the keys of config.user stay here. It needs a token: HF_TOKEN, or `hf auth login`.
What is pulled is used as --workdir, or without pulling: `--workdir hf:USER/REPO`.

Exit code 0: done; 2: an error that the one line `error: ...` explains.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from solov2_jax.config_schema import switch, text
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app
from solov2_jax.tools.cli.flags import Flag

_CHECKPOINT = Flag("checkpoint", text(), "last, best or a step. Default: the best, else the last.")
_LICENCE = Flag(
    "licence",
    text("", form=(r"[\w.+-]*", "a name such as apache-2.0")),
    "Of your weights, as the hub spells it, such as apache-2.0 or cc-by-4.0.",
)
_DATASET = Flag("dataset", text(), "What your data is called, for the model card.")
_PRIVATE = Flag("private", switch(False), "A repository that is made is private.")
_OUTPUT = Flag("output", text(), "Folder to write: push then sends nothing, pull copies there.")
FLAGS = (_CHECKPOINT, _LICENCE, _DATASET, _PRIVATE, _OUTPUT)
_FORMS = {"push": ("WORKDIR", "USER/REPO"), "pull": ("USER/REPO",)}


def run(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    names: list[str] = []
    while words and not words[0].startswith("-"):
        names.append(words.pop(0))

    def main(overrides: list[str]) -> None:
        if overrides:
            raise InputError(f"{overrides[0]}: this command has no config")
        _work(names)

    # The help is this module's.
    main.__module__ = __name__
    app.run(main, FLAGS, argv=words)


def _work(names: list[str]) -> None:
    kind, *rest = names or [""]
    if kind not in _FORMS or len(rest) != len(_FORMS[kind]):
        forms = " or ".join(f"`solov2 hub {k} {' '.join(f)}`" for k, f in _FORMS.items())
        raise InputError(f"write {forms}, flags after that; see --help")
    for flag in FLAGS[:4] if kind == "pull" else ():
        if flag.present:
            raise InputError(f"--{flag.name} is for push; see --help")
    from solov2_jax.tools.sharing import share

    if kind == "pull":
        print(f"pulled to {share.pull(rest[0], _OUTPUT.value)}")
        return
    workdir, repo = rest
    options = share.PushOptions(_CHECKPOINT.value, _LICENCE.value, _DATASET.value)
    if not _LICENCE.value:
        print("no --licence: the model card says nothing about the use of these weights")
    if _OUTPUT.value:
        folder = Path(_OUTPUT.value)
        share.check_new(folder)
        share.write_pretrained(workdir, folder, repo, options)
        print(f"written to {folder}; nothing was sent")
        return
    print(f"pushed: {share.push(workdir, repo, options, private=_PRIVATE.value)}")
