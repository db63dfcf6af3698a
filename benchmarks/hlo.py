"""Reads a compiled program's text (HLO): branches, loops, convolutions, what devices send.

The text is the optimised program's, `jax.stages.Compiled.as_text()`, of any platform.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

COLLECTIVES = "all-reduce all-gather reduce-scatter collective-permute all-to-all".split()

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?)?")
# "%name = (f32[3,4]{1,0:T(8,128)}, s32[]) opcode(%a, %b), attribute=..."
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{")
_CALLED = re.compile(r"(\w+)=\{?((?:%[\w.-]+(?:, )?)+)")
# They move nothing: names for what is there, and control flow, whose insides are counted.
_FREE = set(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id replica-id opt-barrier async-start async-update".split()
)
# cuDNN's calls: which of input (0), filter (1) and output (2) the first operand, the second and
# the result are; the labels of their dimensions are always those of the forward convolution.
_ROLES = {"BackwardFilter": (0, 2, 1), "BackwardInput": (2, 1, 0)}


class Array(NamedTuple):
    """Type, sides, and the dimensions from the one that varies fastest in memory on."""

    dtype: str
    dims: tuple[int, ...]
    minor: tuple[int, ...]
    on_chip: bool = False  # in a TPU core's own memory

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits // 8

    @property
    def moved(self) -> int:
        """Bytes that cross the memory's pins when it is read or written once."""
        return 0 if self.on_chip else self.nbytes


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    arrays: tuple[Array, ...]  # its result's
    opcode: str
    operands: tuple[str, ...]
    text: str  # operands and attributes

    @property
    def target(self) -> str:
        """What a custom call calls, "" for everything else."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found[1] if found and self.opcode == "custom-call" else ""

    @property
    def is_convolution(self) -> bool:
        """Whether it is one, and not an operation with one inside."""
        return self.opcode == "convolution" or self.target.startswith("__cudnn$conv")

    @property
    def is_free(self) -> bool:
        """Whether it does nothing by itself."""
        return self.opcode in _FREE or self.opcode.endswith("-done")

    @property
    def kind(self) -> str:
        """The opcode; of both halves of an asynchronous one, that of the first alone."""
        return self.opcode.removesuffix("-start")

    def called(self) -> dict[str, list[str]]:
        """Returns the computations that it names, by attribute."""
        return {key: re.findall(r"%([\w.-]+)", names) for key, names in _CALLED.findall(self.text)}


def _arrays(text: str) -> tuple[Array, ...]:
    def ints(numbers: str) -> tuple[int, ...]:
        return tuple(int(n) for n in numbers.split(",") if n)

    return tuple(
        Array(dtype, ints(d), ints(m), "T(" in tiles and "S(1)" in tiles)
        for dtype, d, m, tiles in _ARRAY.findall(text)
    )


class Program:
    """Computations by name, and how often those run that are not inside an operation.

    Attributes:
      instructions: by name.
      runs: {computation: times}; a loop whose trips the data decide counts once, and so does
        each branch of a conditional.
      looped: the computations inside a loop.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = collections.defaultdict(list)
        self.instructions: dict[str, Instruction] = {}
        current = entry = ""
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if header := _COMPUTATION.match(line):
                current = header[2]
                entry = current if header[1] else entry
            elif match := _INSTRUCTION.match(line):
                operands = tuple(re.findall(r"%([\w.-]+)", match[4].partition("), ")[0]))
                read = Instruction(match[1], _arrays(match[2]), match[3], operands, match[4])
                self.computations[current].append(read)
                self.instructions[read.name] = read
        self.runs: collections.Counter[str] = collections.Counter()
        self.looped: set[str] = set()
        self._enter(entry, 1, looped=False)

    def _enter(self, name: str, times: int, looped: bool) -> None:
        self.runs[name] += times
        self.looped |= {name} if looped else set()
        for each in self.computations[name]:
            called = each.called()
            if each.opcode == "while":
                self._enter(called["body"][0], times * (self.trips(each) or 1), looped=True)
            elif each.opcode in ("conditional", "call", "async-start"):
                for inner in sum(called.values(), []):
                    self._enter(inner, times, looped)

    def trips(self, loop: Instruction) -> int | None:
        """Returns how often a loop runs, None where the data decide.

        Where the compiler has not noted it, the condition tells: a counter, which begins at 0,
        below a constant.
        """
        if found := re.search(r"known_trip_count\W+n\W+(\d+)", loop.text):
            return int(found[1])
        for each in self.computations[loop.called()["condition"][0]]:
            for name in each.operands if "direction=LT" in each.text else ():
                last = self.instructions[name]
                if last.opcode == "constant" and last.arrays[0].dtype == "s32":
                    return int(last.text.partition(")")[0])
        return None

    def executed(self) -> Iterator[tuple[Instruction, str]]:
        """Yields the operations as the device gets them, with their computation."""
        for name in self.runs:
            yield from ((each, name) for each in self.computations[name])

    def moved(self, each: Instruction) -> int:
        """Returns the bytes of an operation's operands and result.

        Of what is only sliced, or updated in place, the bytes of the slices; of what a TPU
        keeps on the chip, none.
        """
        if each.is_free:
            return 0
        if each.opcode in ("copy-start", "slice-start"):  # from, to: either comes first
            ends = each.arrays[:2]
            return min(x.nbytes for x in ends) * sum(not x.on_chip for x in ends)
        operands = [self.instructions[name] for name in each.operands if name in self.instructions]
        if each.opcode == "fusion":
            inner = self.computations[each.called()["calls"][0]]
        else:  # as if it were alone in a fusion
            inner = [x._replace(opcode="parameter", text=f"{i})") for i, x in enumerate(operands)]
            inner.append(each)
        size, written = 0, sum(array.moved for array in each.arrays)
        for place in (x for x in inner if x.opcode == "parameter"):
            whole = sum(array.moved for array in place.arrays)
            if not whole:
                continue
            read, in_place = self._slices(place.name, inner)
            if in_place:  # the result is the operand but for the update
                written += in_place - whole
            size += whole if read is None else read
        return size + max(written, 0)

    def _slices(self, name: str, inner: list[Instruction]) -> tuple[int | None, int]:
        """Returns (bytes that slices of an array read, None: all; bytes that are updated in it)."""
        read, updated = 0, 0
        for user in (x for x in inner if name in x.operands):
            if user.opcode in ("bitcast", "convert"):
                more, changed = self._slices(user.name, inner)
            elif user.operands[0] != name:  # an index, or what is put in
                return None, 0
            elif user.opcode in ("dynamic-slice", "slice"):
                more, changed = user.arrays[0].moved, 0
            elif user.opcode == "dynamic-update-slice":
                more, changed = 0, self.instructions[user.operands[1]].arrays[0].moved
            else:
                return None, 0
            if more is None:
                return None, 0
            read, updated = read + more, updated + changed
        return read, updated

    @functools.cached_property
    def convolutions(self) -> list[Instruction]:
        """The convolutions, those inside other operations too."""
        return [x for x in self.instructions.values() if x.is_convolution]

    def convolves(self, each: Instruction) -> bool:
        """Returns whether an operation is a convolution, or has one inside."""
        inner = (x for name in sum(each.called().values(), []) for x in self.computations[name])
        return each.is_convolution or (each.opcode not in _FREE and any(map(self.convolves, inner)))


def read_program(text: str) -> dict[str, Any]:
    """Returns what a program holds.

    "conditionals": their number; "loops": the trips of each, None where the data decide;
    "convolutions": see `read_convolutions`; "collectives": see `read_collectives`; "host": what
    is sent to the host or fetched, by kind; "operations": those that run, in loops each time;
    "moved": bytes of their operands and results, of "convolutions", "in_loops" and "other" ones;
    see `Program.moved`.
    """
    program = Program(text)
    everything = list(program.instructions.values())
    moved, operations = {"convolutions": 0, "other": 0, "in_loops": 0}, 0
    for each, computation in program.executed():
        size, times = program.moved(each), program.runs[computation]
        part = "in_loops" if computation in program.looped else "other"
        moved["convolutions" if program.convolves(each) else part] += size * times
        on_chip = not each.is_free and any(array.on_chip for array in each.arrays)
        operations += times * (size > 0 or on_chip)
    loops = [program.trips(each) for each in everything if each.opcode == "while"]
    return {
        "conditionals": sum(each.opcode == "conditional" for each in everything),
        "loops": sorted(loops, key=lambda n: n or 0),
        "convolutions": read_convolutions(program),
        "collectives": read_collectives(text),
        "host": dict(collections.Counter(filter(None, map(_host_transfer, everything)))),
        "operations": operations,
        "moved": moved,
    }


def _host_transfer(each: Instruction) -> str:
    """Returns what an instruction sends to the host or fetches, "" if it does not."""
    to_host = "is_host_transfer=true" in each.text and each.opcode in ("send", "recv")
    if each.opcode in ("infeed", "outfeed") or to_host or "callback" in each.target:
        return each.target or each.opcode
    return ""


def read_convolutions(program: Program) -> dict[str, Any]:
    """Returns the number of convolutions, by types and by order of dimensions in memory.

    "layouts" are such as "b01f_o01i->b01f": input, filter and output, the dimension that varies
    fastest last; "types" such as "bf16->f32", of the operands and the result; "unaligned"
    counts the features, on either side, that are no multiple of eight.
    """
    types, layouts, unaligned = (collections.Counter[str]() for _ in range(3))
    for each in program.convolutions:
        labels = re.split("_|->", re.search(r"dim_labels=([\w>-]+)", each.text)[1])
        role = next((r for name, r in _ROLES.items() if name in each.target), (0, 1, 2))
        left, right = (program.instructions[name].arrays[0] for name in each.operands[:2])
        placed = dict(zip(role, (left, right, each.arrays[0]), strict=True))
        types[f"{left.dtype}->{each.arrays[0].dtype}"] += 1
        orders = []
        for i, label in enumerate(labels):
            array = placed[i]
            orders.append("".join(label[d] for d in reversed(array.minor)))
            channels = [n for n, name in zip(array.dims, label, strict=True) if name in "fio"]
            unaligned.update(str(n) for n in channels if n % 8)
        layouts["{}_{}->{}".format(*orders)] += 1
    found = {"types": dict(types), "layouts": dict(layouts), "unaligned": dict(unaligned)}
    return {"number": len(program.convolutions), **found}


def read_collectives(text: str) -> list[dict[str, Any]]:
    """Returns operations between devices in a program's text, summed by kind.

    Several arrays in one operation mean that the compiler combined them. "types" are bytes by
    type; "in_loops" the operations inside a loop, whose bytes count once.
    """
    program, sums = Program(text), {}
    for name in program.computations:
        for each in program.computations[name]:
            if each.kind not in COLLECTIVES:
                continue
            row: dict[str, Any] = {"kind": each.kind, "types": {}, "operations": 0}
            row = sums.setdefault(each.kind, row | {"in_loops": 0, "arrays": 0, "bytes": 0})
            row["operations"] += 1
            row["in_loops"] += name in program.looped
            row["arrays"] += len(each.arrays)
            for array in each.arrays:
                row["bytes"] += array.nbytes
                row["types"][array.dtype] = row["types"].get(array.dtype, 0) + array.nbytes
    return list(sums.values())
