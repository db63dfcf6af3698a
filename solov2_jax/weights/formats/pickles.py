"""A pickle reader that executes nothing.

Pickle is a small stack language whose GLOBAL opcode names Python functions and whose
REDUCE opcode calls them: unpickling a stranger's file runs a stranger's program. Here
the opcodes are interpreted by this module. A global name is looked up in a table
that the caller gives, never imported, and only the table's own builders are called.
Every other name and every other opcode is refused by name.

Memory is bounded by the file: no read goes past its end, and whatever builders copy
is charged to a budget (`Machine.charge`).

Source: Python's Lib/pickletools.py for the opcodes' meaning.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, no_type_check

_LINE = 1 << 16  # bytes of the longest text argument


class UnsafePickle(ValueError):
    """The file asks for something that weights do not need."""


@dataclass(frozen=True)
class Marker:
    """A global that may be mentioned (a type, say) but not called."""

    name: str


@dataclass(frozen=True)
class Record:
    """An object of a class that may be present; neither built nor looked into."""

    name: str


class Buildable:
    """A value that a BUILD opcode may complete."""

    def build(self, state: Any, machine: "Machine") -> None:
        """Takes the pickled state."""
        raise NotImplementedError


Builder = Callable[["Machine", tuple], Any]
Symbols = Mapping[str, Builder | Marker]


def record(name: str) -> Builder:
    """Returns a builder of records, for harmless objects that are not weights."""
    return lambda machine, args: Record(name)


@no_type_check
class _Bounded:
    """A file for pickletools whose reads never exceed what is there."""

    def __init__(self, file: BufferedIOBase, size: int):
        self._file, self._size = file, size

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        left = self._size - self._file.tell()
        if not 0 <= count <= left:
            raise UnsafePickle(f"a value of {count} bytes is declared, {left} are left")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(_LINE)


_MARK = object()
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
    "SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_IGNORED = frozenset(("PROTO", "FRAME"))


@no_type_check
def check_key(key: Any) -> None:
    """Refuses dict keys and set members other than scalars: a deeply nested tuple
    would overflow the interpreter's stack when hashed."""
    if not isinstance(key, str | int | float | bytes | None):
        raise UnsafePickle(f"a key of type {_describe(key)}: refused")


@no_type_check
def _describe(value: Any) -> str:
    """Returns a name for a message; never the value, which may be huge or deep."""
    return value.name if isinstance(value, Marker | Record) else type(value).__name__


@no_type_check
class Machine:
    """Interprets one pickle from a file.

    Args:
      symbols: what may be named, "module.name" -> builder or marker.
      persistent: turns a persistent id (torch's storages) into a value.
      budget: bytes or items that builders may copy in all.
    """

    def __init__(
        self,
        symbols: Symbols,
        persistent: Callable[[Any], Any] | None = None,
        budget: int = 0,
    ):
        self._symbols, self._persistent = symbols, persistent
        self._budget = budget
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._named: dict[int, str] = {}  # id of a builder -> its global name

    def charge(self, amount: int) -> None:
        """Refuses files that make a little data into a lot."""
        self._budget -= amount
        if self._budget < 0:
            raise UnsafePickle("the file copies its contents more often than weights do")

    def load(self, file: BufferedIOBase, size: int) -> Any:
        """Returns the pickled value; the file then stands behind it.

        Raises UnsafePickle (a ValueError) on anything but plain data.
        """
        operations = pickletools.genops(_Bounded(file, size))  # type: ignore[arg-type]
        try:
            for opcode, argument, _ in operations:
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except (IndexError, KeyError, TypeError) as error:
            raise UnsafePickle(f"malformed pickle ({error!r})") from error
        raise UnsafePickle("malformed pickle (no end)")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in _PUTS:
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in _GETS:
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            self._push_symbol(argument.replace(" ", "."))
        elif name not in _IGNORED:
            handler = _HANDLERS.get(name)
            if handler is None:
                raise UnsafePickle(f"the file uses the pickle operation {name}: refused")
            handler(self)

    def _pop_mark(self) -> list[Any]:
        """Returns the values above the topmost mark, taken off with the mark."""
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                values = stack[index + 1 :]
                del stack[index:]
                return values
        raise UnsafePickle("malformed pickle (no mark)")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise UnsafePickle("malformed pickle (items of what is no dict)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            check_key(key)
            if key in target:
                raise UnsafePickle(f"duplicate key {str(key)[:80]!r}")
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise UnsafePickle("malformed pickle (appends to what is no list)")
        target.extend(items)

    def _push_symbol(self, name: str) -> None:
        symbol = self._symbols.get(name)
        if symbol is None:
            raise UnsafePickle(
                f"the file names {name!r}, which is not a tensor, array, plain "
                "container or number: refused, nothing was executed"
            )
        if not isinstance(symbol, Marker):
            self._named[id(symbol)] = name
        self._stack.append(symbol)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_symbol(f"{module}.{name}")

    def _call(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if id(function) not in self._named or not isinstance(args, tuple):
            raise UnsafePickle(f"the file calls a {_describe(function)}: refused")
        try:
            self._stack.append(function(self, args))
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            name = self._named[id(function)]
            raise UnsafePickle(f"malformed {name} in the file ({error})") from error

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Buildable):
            target.build(state, self)
        elif not isinstance(target, (dict, Record)):
            # A dict's or record's state is attributes, which nobody reads here.
            what = _describe(target)
            raise UnsafePickle(f"the file sets attributes of a {what}: refused")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise UnsafePickle("the file refers to data outside itself: refused")
        self._stack.append(self._persistent(self._stack.pop()))

    def _add_items(self) -> None:
        items = self._pop_mark()
        if not isinstance(self._stack[-1], set):
            raise UnsafePickle("malformed pickle (adds to what is no set)")
        for item in items:
            check_key(item)
        self._stack[-1].update(items)

    def _pair_up(self) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self._set_items(items)

    def _pop_two(self) -> list[Any]:
        value, key = self._stack.pop(), self._stack.pop()
        return [key, value]


_HANDLERS: dict[str, Callable[[Machine], Any]] = {
    "MARK": lambda m: m._stack.append(_MARK),
    "POP": lambda m: m._stack.pop(),
    "POP_MARK": lambda m: m._pop_mark(),
    "DUP": lambda m: m._stack.append(m._stack[-1]),
    "TUPLE": lambda m: m._stack.append(tuple(m._pop_mark())),
    "LIST": lambda m: m._stack.append(m._pop_mark()),
    "DICT": Machine._pair_up,
    "APPEND": lambda m: m._append([m._stack.pop()]),
    "APPENDS": lambda m: m._append(m._pop_mark()),
    "SETITEM": lambda m: m._set_items(m._pop_two()),
    "SETITEMS": lambda m: m._set_items(m._pop_mark()),
    "ADDITEMS": Machine._add_items,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._call,
    "NEWOBJ": Machine._call,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent_id,
}
