"""A pickle reader that executes nothing.

Pickle is a small stack language whose GLOBAL opcode names Python functions and whose
REDUCE opcode calls them: unpickling a stranger's file runs a stranger's program. Here
the opcodes are interpreted by this module. A global name is looked up in a table
that the caller gives, never imported, and only the table's own builders are called.
Every other name and every other opcode is refused by name.

Memory and time are bounded by the file's size: no read goes past its end, the number of
operations is limited, whatever builders copy is charged to a budget
(`RestrictedUnpickler.charge`), and nobody hashes or prints what a file has nested.
`pickle.Unpickler` with a `find_class` of its own can promise none of this; the figures
are in docs/dependencies.md.

`no_type_check`: called once per opcode, too often for the type checks that the tests
add to every call.

Source: Python's Lib/pickletools.py for the opcodes' meaning.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, no_type_check

from solov2_jax.io import reason
from solov2_jax.weights.array_files import WeightsError

# No object that one opcode makes takes more than 256 bytes: 64 MiB and 8 times the file.
_MIN_OPERATIONS = 1 << 18
_BYTES_PER_OPERATION = 32
_MAX_LINE = 1 << 16  # bytes of the longest text argument
_MAX_KEY = 1024  # characters
_MAX_COUNT = 1 << 62


@dataclass(frozen=True)
class OpaqueObject:
    """An object of a class that may be present; neither built nor looked into."""

    name: str


class Stateful:
    """A value that a BUILD opcode completes."""

    def set_state(self, state: Any, unpickler: "RestrictedUnpickler") -> None:
        """Takes the pickled state."""


# (unpickler, arguments of the call) -> value; None: the name may be mentioned, a type
# say, but not called.
Builder = Callable[["RestrictedUnpickler", tuple], Any] | None


@dataclass(frozen=True)
class AllowedGlobal:
    """A global that the table has."""

    name: str
    build: Builder


def opaque(name: str) -> Builder:
    """Returns a builder of opaque objects, for harmless ones that are not weights."""
    return lambda unpickler, args: OpaqueObject(name)


@no_type_check
class _BoundedFile:
    """A file for pickletools whose reads never exceed what is there."""

    def __init__(self, file: BufferedIOBase, size: int):
        self._file, self._size = file, size

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        left = self._size - self._file.tell()
        if not 0 <= count <= left:
            raise WeightsError(f"a value of {count} bytes is declared, {left} are left")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(_MAX_LINE)


_MARK = object()
_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
    "SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)


@no_type_check
def as_key(value: Any) -> str | bytes:
    """Returns a dict key or set member whose hash the file cannot choose.

    Text and bytes stay, whose hashes are salted; numbers become text such as "int 3":
    integers that collide would take hours. Nothing here looks a number up. A nested
    tuple is refused: hashing it may take exponential time.
    """
    if isinstance(value, str | bytes):
        if len(value) > _MAX_KEY:
            raise WeightsError(f"a key of {len(value)} characters: refused")
        return value
    if isinstance(value, int) and not -(1 << 64) < value < 1 << 64:
        raise WeightsError("a key of more than 64 bits: refused")
    if isinstance(value, int | float | None):
        return f"{type(value).__name__} {value!r}"
    raise WeightsError(f"a key of type {_describe(value)}: refused")


@no_type_check
def as_count(value: Any) -> int:
    """Returns a size, offset or stride; refuses what no file could hold."""
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise WeightsError(f"a size that is not a count ({type(value).__name__}): refused")
    return value


@no_type_check
def as_text(value: Any, limit: int = 256) -> str:
    """Returns short text; anything else is refused without being printed."""
    value = value.decode("latin-1") if isinstance(value, bytes) else value
    if not isinstance(value, str) or len(value) > limit:
        raise WeightsError(f"a name that is not a short string ({_describe(value)}): refused")
    return value


@no_type_check
def _describe(value: Any) -> str:
    """Returns a name for a message; never the value, which may be huge or deep."""
    named = isinstance(value, AllowedGlobal | OpaqueObject)
    return value.name if named else type(value).__name__


@no_type_check
class RestrictedUnpickler:
    """Interprets one pickle from a file.

    Args:
      symbols: what may be named, "module.name" -> builder, or None for a type.
      persistent: turns a persistent id (torch's storages) into a value.
    """

    def __init__(
        self, symbols: Mapping[str, Builder], persistent: Callable[[Any], Any] | None = None
    ):
        self._symbols, self._persistent = symbols, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._budget = self._operations = 0

    def charge(self, amount: int) -> None:
        """Refuses files that make a little data into a lot; `amount` in bytes."""
        self._budget -= amount
        if self._budget < 0:
            raise WeightsError("the file duplicates its data more than weights files do")

    def load(self, file: BufferedIOBase, size: int) -> Any:
        """Returns the pickled value; the file, of `size` bytes, then stands behind it.

        Raises WeightsError on anything but plain data.
        """
        self._budget = 2 * size + 2**20
        self._operations = _MIN_OPERATIONS + size // _BYTES_PER_OPERATION
        count = 0
        bounded: Any = _BoundedFile(file, size)
        try:
            for opcode, argument, _ in pickletools.genops(bounded):
                if opcode.name == "STOP":
                    return self._stack.pop()
                count += 1
                if count > self._operations:
                    raise WeightsError(f"more than {self._operations} small objects: refused")
                handler = _HANDLERS.get(opcode.name)
                if handler is None:
                    raise WeightsError(f"the file uses the pickle operation {opcode.name}: refused")
                handler(self, argument)
        except WeightsError:
            raise
        except Exception as error:
            raise WeightsError(f"malformed pickle ({reason(error)})") from error
        raise WeightsError("malformed pickle (no end)")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _put(self, place: int | None) -> None:
        place = len(self._memo) if place is None else place
        if not 0 <= place <= self._operations:  # writers count from 0 or 1
            raise WeightsError("malformed pickle (a memo index out of range)")
        self._memo[place] = self._stack[-1]

    def _pop_mark(self) -> list[Any]:
        """Returns the values above the topmost mark, taken off with the mark."""
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                values = stack[index + 1 :]
                del stack[index:]
                return values
        raise WeightsError("malformed pickle (no mark)")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise WeightsError("malformed pickle (items of something other than a dict)")
        fill_dict(target, zip(items[::2], items[1::2], strict=True))

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise WeightsError("malformed pickle (appends to something other than a list)")
        target.extend(items)

    def _push_symbol(self, name: str) -> None:
        if name not in self._symbols:
            raise WeightsError(
                f"the file names {name[:120]!r}, which is not a tensor, array, plain "
                "container or number: refused, nothing was executed"
            )
        self._stack.append(AllowedGlobal(name, self._symbols[name]))

    def _stack_global(self, _: None) -> None:
        name, module = as_text(self._stack.pop()), as_text(self._stack.pop())
        self._push_symbol(f"{module}.{name}")

    def _call(self, _: None) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        build = function.build if isinstance(function, AllowedGlobal) else None
        if build is None or not isinstance(args, tuple):
            raise WeightsError(f"the file calls a {_describe(function)}: refused")
        try:
            self._stack.append(build(self, args))
        except WeightsError as error:
            raise WeightsError(f"malformed {function.name} in the file ({error})") from error
        except Exception as error:
            message = f"malformed {function.name} in the file ({reason(error)})"
            raise WeightsError(message) from error

    def _build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Stateful):
            target.set_state(state, self)
        elif not isinstance(target, dict | OpaqueObject):
            # The state of a dict or an opaque object is attributes, which nobody reads.
            what = _describe(target)
            raise WeightsError(f"the file sets attributes of a {what}: refused")

    def _persistent_id(self, _: None) -> None:
        if self._persistent is None:
            raise WeightsError("the file refers to data outside itself: refused")
        self._stack.append(self._persistent(self._stack.pop()))

    def _add_items(self, _: None) -> None:
        items = self._pop_mark()
        if not isinstance(self._stack[-1], set):
            raise WeightsError("malformed pickle (adds to something other than a set)")
        self._stack[-1].update(map(as_key, items))

    def _make_dict(self, _: None) -> None:
        items = self._pop_mark()
        self._push({})
        self._set_items(items)

    def _set_item(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _make_tuple(self, count: int) -> None:
        self._stack[-count:] = [tuple(self._stack[-count:])]


# By the name of the operation, called with its argument.
_HANDLERS: dict[str, Callable[[RestrictedUnpickler, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda u, _: None),
    **dict.fromkeys(_LITERALS, RestrictedUnpickler._push),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), RestrictedUnpickler._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda u, place: u._push(u._memo[place])),
    "NONE": lambda u, _: u._push(None),
    "NEWTRUE": lambda u, _: u._push(True),
    "NEWFALSE": lambda u, _: u._push(False),
    "EMPTY_LIST": lambda u, _: u._push([]),
    "EMPTY_DICT": lambda u, _: u._push({}),
    "EMPTY_TUPLE": lambda u, _: u._push(()),
    "EMPTY_SET": lambda u, _: u._push(set()),
    "MARK": lambda u, _: u._push(_MARK),
    "POP": lambda u, _: u._stack.pop(),
    "POP_MARK": lambda u, _: u._pop_mark(),
    "DUP": lambda u, _: u._push(u._stack[-1]),
    "TUPLE": lambda u, _: u._push(tuple(u._pop_mark())),
    "TUPLE1": lambda u, _: u._make_tuple(1),
    "TUPLE2": lambda u, _: u._make_tuple(2),
    "TUPLE3": lambda u, _: u._make_tuple(3),
    "LIST": lambda u, _: u._push(u._pop_mark()),
    "DICT": RestrictedUnpickler._make_dict,
    "APPEND": lambda u, _: u._append([u._stack.pop()]),
    "APPENDS": lambda u, _: u._append(u._pop_mark()),
    "SETITEM": RestrictedUnpickler._set_item,
    "SETITEMS": lambda u, _: u._set_items(u._pop_mark()),
    "ADDITEMS": RestrictedUnpickler._add_items,
    "GLOBAL": lambda u, name: u._push_symbol(name.replace(" ", ".")),
    "STACK_GLOBAL": RestrictedUnpickler._stack_global,
    "REDUCE": RestrictedUnpickler._call,
    "NEWOBJ": RestrictedUnpickler._call,
    "BUILD": RestrictedUnpickler._build,
    "BINPERSID": RestrictedUnpickler._persistent_id,
}


@no_type_check
def fill_dict(target: dict, pairs: Any) -> None:
    """Adds pairs to a dict; refuses a key that is there already."""
    for key, value in pairs:
        key = as_key(key)
        if key in target:
            raise WeightsError(f"duplicate key {str(key)[:80]!r}")
        target[key] = value
