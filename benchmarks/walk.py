r"""Prints the walk of a reader from a command to a function: our frames on its stack.

    python benchmarks/walk.py solov2_jax/ops.py:dynamic_conv train.py --config quickstart \
        --workdir W
    python benchmarks/walk.py solov2_jax/inference/predictor.py:Predictor.detect \
        predict.py --workdir W --input a.jpg --output OUT

The command runs under a profiler until the function is called for the first time, in whichever
thread, and ends there. A hop is a function of the repository on the stack then, a closure one
that was made within another. A return is a function that took the config and had returned by
then.
"""

import os
import runpy
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = str(Path(__file__).resolve().parent.parent)


def walk(target: str, command: list[str]) -> None:
    """Runs a script until the target, FILE:QUALNAME, is called, and prints the walk."""
    returned: set[tuple[str, str]] = set()

    def place(code: CodeType) -> tuple[str, str]:
        return os.path.relpath(code.co_filename, ROOT), code.co_qualname

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(ROOT):
            return
        if event == "call" and ":".join(place(code)) == target:
            sys.setprofile(None)
            report(frame)
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if event == "return" and "config" in arguments:
            returned.add(place(code))

    def report(frame: FrameType | None) -> None:
        stack: list[tuple[str, str]] = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(ROOT) and frame.f_code.co_filename != __file__:
                stack.append(place(frame.f_code))
            frame = frame.f_back
        print("\n".join(f"{file} {name}" for file, name in reversed(stack)))
        closures = sum("<locals>" in name for _, name in stack)
        passed = returned - set(stack)
        files, of_returns = ({file for file, _ in places} for places in (stack, passed))
        print(f"{len(files)} files, {len(stack)} hops, of them {closures} closures")
        print(f"{len(passed)} returns, in {len(of_returns)} files", flush=True)
        os._exit(0)

    # Without the restart, which would leave the profiler behind.
    sys.argv = [*command, "--nokeep_memory"]
    sys.path.insert(0, ROOT)
    threading.setprofile(look)
    sys.setprofile(look)
    runpy.run_path(str(Path(ROOT, command[0])), run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    walk(sys.argv[1], sys.argv[2:])
