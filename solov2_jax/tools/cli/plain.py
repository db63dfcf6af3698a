"""What the commands of the data folder share: they run without JAX and absl's app."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def command(main: Callable[P, R]) -> Callable[P, R]:
    """Returns `main` whose user's errors end in a line `error: ...`, exit code 2."""

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)

    return guarded
