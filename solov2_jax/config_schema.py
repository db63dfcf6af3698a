"""What a configuration's key may be: its type, range, length, and when it is used.

`configs/base.py` writes a rule beside each default, `fpn.channels = whole(256, low=8)`.
The check, its message and the documentation's table of keys all come from that rule.
NaN and infinity pass none. Nothing here knows a key by name.
"""

import contextvars
import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference

Number = int | float
INT_MAX = 2**31 - 1  # of the devices' counters
# Forms of a text: (regular expression, its description). No file's name has a \0.
ANY_TEXT = (r"[^\0]*", "a text without control codes")
NAME = (r"[^\0]+", "a text that is not empty")
IMPORT_PATH = (r"[\w.]+:\w+", "an import path, 'package.module:name'")

# What scores predictions, see `evaluation.evaluators`.
METRICS = ("auto", "coco", "lvis", "cityscapes", "voc", "boundary", "keypoints")
METRIC_FORM = (f"{'|'.join(METRICS)}|{IMPORT_PATH[0]}", f"one of {METRICS} or {IMPORT_PATH[1]}")

# Keys of `augment` that only 8-bit RGB pictures have a meaning for.
RGB_ONLY = ("saturation", "hue", "jpeg_prob")

# A key's value that is found out when the run starts.
AUTO = "auto"

# Groups that may hold keys of the user's own: they are not locked.
FREE = ("user", "data.providers", "model.backbone.options")
# Old names of keys, while a config file runs that may still set them.
old_names: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("old", default=())


@dataclasses.dataclass(frozen=True)
class Condition:
    """A key is used where another one has (`positive`) or has not one of some values."""

    key: str
    values: tuple[Any, ...]
    positive: bool = True

    def reason(self, flat: Mapping[str, Any]) -> str:
        """Returns why the key has no effect, "" where it has one."""
        value = flat[self.key]
        if (value in self.values) == self.positive:
            return ""
        if not self.positive:
            return f"{self.key} is {value!r}"
        options = " or ".join(repr(v) for v in self.values)
        return f"it is for {self.key} = {options}, and that is {value!r}"


def only(key: str, *values: Any) -> Condition:
    """Returns the condition that `key` has one of the values."""
    return Condition(key, values)


def unless(key: str, *values: Any) -> Condition:
    """Returns the condition that `key` has none of the values."""
    return Condition(key, values, positive=False)


@dataclasses.dataclass(frozen=True)
class KeyRule:
    """The values that a key may have.

    Attributes:
      kind: int, float, str, bool or tuple; a float may be written as a whole number.
      low, high: both included.
      whole_from: of a float: from there on it counts steps and is a whole number; below,
        it is a share of the run.
      above, below: excluded.
      words: texts that a number may be instead, such as "auto".
      meant_for: of a key with words: the key that gets the number which a word replaces,
        unless that key is set.
      form: regular expression of a whole text, with the words that describe it.
      item: of each entry of a tuple.
      length: (fewest, most) entries of a tuple.
      rising: "" | "<" | "<=": how each entry of a tuple relates to the next.
      unique: no entry of a tuple stands twice.
      used: condition under which the key has an effect, or several, which must all hold.
    """

    default: Any
    kind: type
    low: Number | None = None
    high: Number | None = None
    above: Number | None = None
    below: Number | None = None
    whole_from: Number | None = None
    multiple: int = 1
    choices: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()
    meant_for: str = ""
    form: tuple[str, str] = ANY_TEXT
    item: "KeyRule | None" = None
    length: tuple[int, int] = (0, INT_MAX)
    rising: str = ""
    unique: bool = False
    used: Condition | tuple[Condition, ...] = ()

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions of `used`."""
        return (self.used,) if isinstance(self.used, Condition) else self.used

    def error(self, value: Any) -> str:
        """Returns what a value must do and does not, such as "be at least 1", else ""."""
        if self.kind is tuple:
            return self._list_error(value)
        if value in self.words:
            return ""
        if not _is_a(self.kind, value) or self.choices and value not in self.choices:
            return f"be {self.describe()}"
        if self.kind is bool or self.choices:
            return ""
        if self.kind is str:
            return "" if re.fullmatch(self.form[0], value, re.S) else f"be {self.form[1]}"
        if not math.isfinite(value):
            return f"be finite: {self.describe()}"
        for name, holds, words in _BOUNDS:
            bound = getattr(self, name)
            if bound is not None and not holds(value, bound):
                return f"be {words} {_number(bound)}"
        if self.whole_from is not None and value >= self.whole_from and value != int(value):
            return f"be {self.describe()}"
        odd = self.multiple > 1 and value % self.multiple
        return f"be a multiple of {self.multiple}" if odd else ""

    def _list_error(self, value: Any) -> str:
        assert self.item is not None
        few, most = self.length
        if not isinstance(value, Sequence) or isinstance(value, str):
            return f"be {self.describe()}"
        if not few <= len(value) <= most and not (self.empty and not len(value)):
            return f"have {self._how_many()}, and has {len(value)}"
        for entry in value:
            if error := self.item.error(entry):
                wanted = f"be {self.item.describe(plural=True)}"
                wrong = "must be one of these" if error == wanted else f"must {error}"
                return f"{wanted}: {entry!r} {'is none of them' if self.item.choices else wrong}"
        pairs = list(zip(value, value[1:], strict=False))
        if self.rising == "<" and not all(a < b for a, b in pairs):
            return "increase"
        if self.rising == "<=" and not all(a <= b for a, b in pairs):
            return "have its lowest entry first"
        if self.unique and len(set(value)) < len(value):
            return "name each only once"
        return ""

    @property
    def empty(self) -> bool:
        """Whether () is allowed, which then means that there is none."""
        return self.kind is tuple and self.default == ()

    def describe(self, plural: bool = False) -> str:
        """Returns the allowed values in words, for messages and the documentation."""
        if self.kind is tuple:
            assert self.item is not None
            order = {"": "", "<": ", increasing", "<=": ", the lowest first"}[self.rising]
            empty = "(), or " if self.empty and self.length[0] else ""
            items = self.item.describe(plural=True)
            text = f"{empty}a tuple of {self._how_many()}: {items}{order}"
            return f"each {text}" if plural else text
        if self.choices:
            return f"{'each ' if plural else ''}one of {self.choices}"
        if self.kind is bool:
            return "True or False"
        if self.kind is str:
            any_text = "texts" if plural else "a text"
            return any_text if self.form == ANY_TEXT else self.form[1]
        if self.whole_from is not None:
            share, number = ("shares", "whole numbers") if plural else ("a share", "a whole number")
            return f"{share} of the run below 1, or {number} of steps"
        noun = "whole number" if self.kind is int else "number"
        words = "".join(f", or {word!r}" for word in self.words)
        return (f"{noun}s" if plural else f"a {noun}") + self._range() + words

    def _how_many(self) -> str:
        few, most = self.length
        if few == most:
            return f"{few} entries"
        if most == INT_MAX:
            return f"{few} or more entries" if few else "entries"
        return f"{few} to {most} entries"

    def _range(self) -> str:
        parts = [f"a multiple of {self.multiple}"] if self.multiple > 1 else []
        for name, _, words in _BOUNDS:
            bound = getattr(self, name)
            if bound not in (None, INT_MAX):
                parts.append(f"{words} {_number(bound)}")
        return "".join(f", {part}" for part in parts)


_BOUNDS = (
    ("low", operator.ge, "at least"),
    ("above", operator.gt, "above"),
    ("high", operator.le, "at most"),
    ("below", operator.lt, "below"),
)


def _is_a(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _number(value: Number) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def whole(default: int = 0, low: int = 0, high: int = INT_MAX, **options: Any) -> KeyRule:
    """Returns the rule of a whole number."""
    return KeyRule(default, int, low=low, high=high, **options)


def number(default: float = 0.0, low: Number | None = None, **options: Any) -> KeyRule:
    """Returns the rule of a finite number."""
    return KeyRule(default, float, low=low, **options)


def share(default: Number = 0.0, **options: Any) -> KeyRule:
    """Returns the rule of a number from 0 to 1."""
    return KeyRule(default, float, low=0, high=1, **options)


def steps_or_share(default: Number = 0.0, **options: Any) -> KeyRule:
    """Returns the rule of a place in the run: below 1 a share of it, else whole steps."""
    return KeyRule(default, float, low=0, high=INT_MAX, whole_from=1, **options)


def as_steps(place: int | float, steps: int) -> int:
    """Returns a place in a run of so many steps: a share of it below 1, else itself."""
    return round(place * steps) if place < 1 else int(place)


def switch(default: bool, **options: Any) -> KeyRule:
    """Returns the rule of True or False."""
    return KeyRule(default, bool, **options)


def text(default: str = "", form: tuple[str, str] = ANY_TEXT, **options: Any) -> KeyRule:
    """Returns the rule of a text; `form` is (regular expression, its description)."""
    return KeyRule(default, str, form=form, **options)


def choice(default: Any, choices: Sequence[Any], **options: Any) -> KeyRule:
    """Returns the rule of one of some values."""
    return KeyRule(default, type(default), choices=tuple(choices), **options)


def several(default: tuple, item: KeyRule, length: Any = (0, INT_MAX), **options: Any) -> KeyRule:
    """Returns the rule of a tuple.

    Args:
      length: of the tuple, or (fewest, most). Where the default is (), that is allowed
        besides.
    """
    length = (length, length) if isinstance(length, int) else length
    return KeyRule(default, tuple, item=item, length=length, **options)


class Section:
    """A group of keys that is written down: `section.key = rule`, in reading order."""

    def __init__(self) -> None:
        self.__dict__["_entries"] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        self._entries[name] = value

    def __getattr__(self, name: str) -> Any:
        return self._entries[name]

    def rules(self, prefix: str = "") -> dict[str, KeyRule]:
        """Returns {"train.steps": rule, ...}.

        Raises:
          TypeError: for a key whose default stands there without a rule.
        """
        rules = {}
        for name, value in self._entries.items():
            if isinstance(value, Section):
                rules.update(value.rules(f"{prefix}{name}."))
            elif isinstance(value, KeyRule):
                rules[prefix + name] = value
            else:
                raise TypeError(f"{prefix}{name} = {value!r} has no rule: see config_schema.py")
        return rules

    def to_config(self) -> ConfigDict:
        """Returns the defaults, locked but for free groups."""
        config = self._defaults()
        for old in old_names.get():
            set_below(config, old, None)  # settable: ConfigDict does not check None's type
        lock(config)
        return config

    def _defaults(self) -> ConfigDict:
        config = ConfigDict()
        for name, value in self._entries.items():
            config[name] = value._defaults() if isinstance(value, Section) else value.default
            if isinstance(value, KeyRule) and value.words:
                config[name] = NumberOrWord(value.default)
        return config


class NumberOrWord(FieldReference):
    """A config's value that is a number or a word; remembers the last number."""

    number: int | None = None

    def __init__(self, number: int):
        super().__init__(number, field_type=object)  # not int alone, as ConfigDict would have it
        self.number = number

    def set(self, value: Any, type_safe: bool = True) -> None:
        """Sets the value; called for `config.key = value`."""
        if not isinstance(value, str):
            self.number = value
        super().set(value, type_safe)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = state.get("number")


def keep_numbers(config: ConfigDict, rules: Mapping[str, KeyRule]) -> None:
    """Sets the `meant_for` keys of keys whose number a word has replaced, where they are 0."""
    for key, rule in rules.items():
        if rule.meant_for:
            *groups, name = key.split(".")
            node: Any = config
            for part in groups:
                node = node[part]
            meant = rule.meant_for.rpartition(".")
            reference = node.get_ref(name)
            number = getattr(reference, "number", None)
            group: Any = config[meant[0]]
            if reference.get() in rule.words and number is not None and not group[meant[2]]:
                group[meant[2]] = number


def lock(config: ConfigDict) -> None:
    """Locks a config, but for the groups that may hold keys of the user's own."""
    config.lock()
    for path in FREE:
        group: Any = config
        for name in path.split("."):
            group = group.get(name, ConfigDict())  # it may be missing from an older file
        group.unlock()


def set_below(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key, below groups that may be missing."""
    *groups, name = key.split(".")
    node: Any = config
    for group in groups:
        if group not in node:
            node[group] = ConfigDict()
        node = node[group]
    node[name] = value


def wrong_values(
    flat: Mapping[str, Any],
    rules: Mapping[str, KeyRule],
    relations: Sequence[tuple[str, Callable[[Mapping[str, Any]], bool]]] = (),
) -> Iterator[str]:
    """Yields what is wrong, a phrase for each impossible value, then the relations.

    Args:
      flat: {"train.steps": 270000, ...}, every key.
      relations: (sentence, whether it holds); "%(train.steps)s" in the sentence is the
        key's value. They are looked at where each value by itself is possible.
    """
    if missing := [key for key in rules if key not in flat]:
        yield f"{', '.join(missing)} missing; add what configs/base.py has"
        return
    wrong = {key: text for key, rule in rules.items() if (text := rule.error(flat[key]))}
    yield from (f"{key} = {_shown(flat[key])} must {text}" for key, text in wrong.items())
    if not wrong:
        yield from (sentence % flat for sentence, holds in relations if not holds(flat))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
