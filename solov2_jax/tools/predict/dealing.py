"""Pictures dealt over several processes, which write one folder together.

Each process predicts and writes its own pictures. The first one alone lists all of them,
reads their sizes, checks and locks the folder, and writes the files about all pictures. They
ask each other now and then, so that a signal to one, or its error, ends all. A single process
does the same with itself, and asks nobody.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from solov2_jax import distributed
from solov2_jax.data.buckets import Bucket
from solov2_jax.data.pixel_format import PixelFormat
from solov2_jax.download import without_secrets
from solov2_jax.io import InputError
from solov2_jax.tools.predict.output_folder import MANIFEST, OutputFolder, ResultsFile, of_process
from solov2_jax.tools.predict.sources import (
    ADDRESSES,
    BrokenFile,
    ImageFiles,
    Names,
    Size,
    Source,
    is_live,
)

ASK_EVERY = 8  # batches, after which the processes ask each other whether to stop


def open_for_all(
    text: str, open_all: Callable[[], list[Source]], threads: int, pixels: PixelFormat
) -> list[Source]:
    """Returns the sources that `--input` names, the same in all processes.

    Args:
      text: of `--input`.
      open_all: opens them; only the first process calls it.
      threads, pixels: of image files.

    Raises:
      AgreedError: for what only one process can read, such as a video.
    """
    opened: list[Source] = []

    def check() -> tuple[list[str], list[tuple[str, str]]]:
        if is_live(text) or text.lower().startswith(ADDRESSES):
            raise InputError(_alone(without_secrets(text), "is read by one process"))
        opened.extend(open_all())
        paths, broken = [], []
        for source in opened:
            if isinstance(source, ImageFiles):
                paths += source.paths
            elif isinstance(source, BrokenFile):
                broken += [(path, source.problem) for path in source.paths]
            else:
                raise InputError(_alone(source.path, "its frames follow from each other"))
        return paths, broken

    paths, broken = distributed.broadcast_from_host0(check)
    if opened:
        return opened
    files = [ImageFiles(paths, threads, Names(), pixels=pixels)] if paths else []
    return [*files, *(BrokenFile(*each) for each in broken)]


def _alone(name: str, why: str) -> str:
    count = distributed.rank()[1]
    return (
        f"--input {name}: {why}, and cannot be dealt over {count} processes; give image files, "
        "or start one process (--distributed=off)"
    )


def deal(shapes: Sequence[Bucket | None], count: int) -> list[list[int]]:
    """Returns the numbers of each process's pictures: about as many pixels, in few shapes.

    Pictures of one shape follow each other and are cut where a share is full, so that all
    processes together compile `count` - 1 programs more than there are shapes, at most.

    Args:
      shapes: padded (height, width) of each picture; None: not known, or it cannot be read.
    """
    order = sorted(range(len(shapes)), key=lambda i: (shapes[i] or (0, 0), i))
    known = [shape[0] * shape[1] for shape in shapes if shape is not None]
    least = min(known, default=1)
    areas = [least if shape is None else shape[0] * shape[1] for shape in shapes]
    costs = np.array([areas[i] for i in order], float)
    middles = np.cumsum(costs) - costs / 2
    owners = np.minimum(middles * count // max(costs.sum(), 1), count - 1)
    return [sorted(i for i, o in zip(order, owners, strict=True) if o == k) for k in range(count)]


@dataclass(frozen=True)
class OwnPart:
    """What one process predicts."""

    sources: list[Source]
    numbers: list[int] | None = None  # of its pictures; None: there is one process, with all
    shapes: frozenset[Bucket] = frozenset()  # padded, of its pictures, as far as known


def own_part(
    sources: Sequence[Source],
    sizes: Sequence[Size] = (),
    padded_shape: Callable[[int, int], Bucket] | None = None,
) -> OwnPart:
    """Returns what this process predicts.

    Args:
      sizes: of all pictures.
      padded_shape: (height, width) -> the shape that pictures are dealt by; None: by number.
    """

    def shape(size: Size) -> Bucket | None:
        try:
            return padded_shape(*size) if padded_shape and size else None
        except InputError:  # fits into none; told when it is read
            return None

    process, count = distributed.rank()
    if count == 1:
        return OwnPart(list(sources))
    total = sum(len(source.paths) for source in sources)
    shapes = [shape(size) for size in sizes] if padded_shape else [None] * total
    numbers = deal(shapes, count)[process]
    parts: list[Source] = []
    first = 0
    for source in sources:
        last = first + len(source.paths)
        own = [i - first for i in numbers if first <= i < last]
        if own and isinstance(source, ImageFiles | BrokenFile):
            parts.append(source.part(own))
        first = last
    return OwnPart(parts, numbers, frozenset(s for i in numbers if (s := shapes[i])))


@contextmanager
def opened_by_all(folder: OutputFolder) -> Iterator[None]:
    """Holds the folder for one run of all processes, see `OutputFolder.opened`.

    Raises:
      AgreedError: if the first one cannot, or not all see the same folder.
    """

    def check(numbers: Sequence[int]) -> None:
        for number in numbers:
            if not os.path.isfile(os.path.join(folder.path, of_process(MANIFEST, number))):
                raise InputError(
                    f"--output {folder.path}: process {folder.process} does not see what process "
                    f"{number} writes there; it must be one folder that all processes see"
                )

    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(folder.opened())

        distributed.broadcast_from_host0(enter)
        with distributed.fail_together():
            if folder.process:
                check([0])
                enter()
        with distributed.fail_together():
            check(() if folder.process else range(folder.num_processes))
        agreed = None
        try:
            yield
        except distributed.AgreedError as error:
            agreed = error
        if folder.process:
            stack.close()
        distributed.barrier("the lists of files have ended")
        if not folder.process:
            with suppress(OSError):  # a full disk; the next run does it
                folder.take_over_lists()
        if agreed is not None:
            raise agreed


class JointReading:
    """Whether the next picture is read: until a signal to any process, or an error of one.

    A process stops at once by its own; the others know a few batches later.

    Args:
      stopped: returns the signal that this process got, 0 for none.
      pictures: of this process.
      every: pictures between two questions.
    """

    def __init__(self, stopped: Callable[[], int], pictures: int, every: int):
        self._stopped, self._every = stopped, every
        self._begun = self._rounds = 0  # pictures, questions
        self._ended = False
        self._all_rounds = max(distributed.gather(-(-pictures // every)))
        self.signal, self.failure = 0, ""  # as known to all: a process's own comes first

    def __call__(self, _: Any = None) -> bool:
        """Returns whether to read on; to be called before each picture."""
        if not self._ended and self._begun % self._every == 0:
            self._ask()
        self._begun += 1
        return not (self._ended or self._stopped())

    def _ask(self) -> None:
        self._rounds += 1
        told = distributed.gather([self.signal or self._stopped(), self.failure])
        self.signal, self.failure = (next(filter(None, x), x[0]) for x in zip(*told, strict=True))
        self._ended = bool(self.signal or self.failure)

    @contextmanager
    def until_all_end(self) -> Iterator[None]:
        """Tells the other processes what the user can fix of what is raised inside.

        A single process raises it.
        """
        process, count = distributed.rank()
        try:
            yield
        except (ValueError, OSError) as error:
            if count == 1:
                raise
            self.failure = f"process {process} of {count}: {error}"
        while not self._ended and self._rounds < self._all_rounds:
            self._ask()


def join(results: Mapping[str, ResultsFile], report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what each process reports, to the first one, which finishes the files about all
    pictures; [] to the others."""
    process, _ = distributed.rank()
    if process:
        for file in results.values():
            file.close()
    parts = {kind: file.parts for kind, file in results.items() if file.is_open}
    told = distributed.gather_to_host0({"parts": parts, "report": report})

    def finish() -> None:
        for number, other in enumerate(told[1:], 1):
            for kind, theirs in other["parts"].items():
                results[kind].take_over(number, theirs)
        for file in results.values():
            file.finish()

    distributed.broadcast_from_host0(finish)
    return [each["report"] for each in told]
