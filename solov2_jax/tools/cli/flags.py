"""Command-line flags: declared beside a command, parsed by argparse, checked by rules.

A flag's rule is one of `config_schema`'s, as a config key's: its range is in the help
and in the message, and NaN never passes. `--flag=value`, `--flag value` and, for
switches, `--flag`, `--noflag` and `--flag=true` are the same on every command.
"""

import argparse
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from solov2_jax.config import split_overrides, suggest
from solov2_jax.config_schema import KeyRule
from solov2_jax.io import InputError

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Flag:
    """A flag; `value` is what the command line gave it, or the rule's default.

    Args:
      rule: of the value; a tuple's rule reads entries that are separated by commas.
      required: whether it must be given.
      optional: it is None unless it is given.
      repeated: it may be given several times, an entry of the tuple each time.

    Attributes:
      present: whether it was given.
    """

    def __init__(
        self,
        name: str,
        rule: KeyRule,
        help: str,
        *,
        required: bool = False,
        optional: bool = False,
        repeated: bool = False,
    ):
        self.name, self.rule, self.help = name, rule, help
        self.required, self.repeated = required, repeated
        self.default = None if required or optional else rule.default
        self.value: Any = self.default
        self.present = False

    def parse(self, word: str) -> Any:
        """Returns the value of a word; raises `argparse.ArgumentTypeError`."""
        value: Any = word
        if self.rule.kind is tuple and not self.repeated:
            value = tuple(part.strip() for part in word.split(",") if part.strip())
            if self.rule.item and self.rule.item.kind in (int, float):
                value = tuple(_number(part, self.rule.item.kind) for part in value)
        elif self.rule.kind is bool:
            value = _BOOLEANS.get(word.lower(), word)
        elif self.rule.kind in (int, float):
            value = _number(word, self.rule.kind)
        rule = self.rule.item if self.repeated and self.rule.item else self.rule
        if error := rule.error(value):
            raise argparse.ArgumentTypeError(f"={word} must {error}")
        return value

    def lines(self) -> str:
        kind, rule = self.rule.kind, self.rule
        head = f"  --[no]{self.name}" if kind is bool else f"  --{self.name}"
        any_text = kind is str and not rule.choices
        notes = [] if kind in (bool, tuple) or any_text else [rule.describe()]
        if self.required:
            notes.append("required")
        elif self.default not in (None, "", (), False):
            shown = ",".join(self.default) if kind is tuple else self.default
            notes.append(f"default: {shown}")
        if self.repeated:
            notes.append("may be repeated")
        note = f" ({'; '.join(notes)})" if notes else ""
        body = textwrap.fill(self.help + note, 94, break_on_hyphens=False)
        return f"{head}\n{textwrap.indent(body, ' ' * 6)}"


def _number(word: str, kind: type) -> Any:
    """Returns the number that a word is; the word itself, which no rule takes, if none."""
    try:
        return kind(word)
    except ValueError:
        return word


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[^\s/:]+)[^\s:]*: =", r"\1=", message)
        message = re.sub(r"^argument (--[^\s/:]+)[^\s:]*:", r"\1:", message)
        raise InputError(f"{message}; see --help")


class _Switch(argparse.Action):
    """--flag, --noflag, --flag=true."""

    def __call__(self, parser, namespace, values, option_string=None):
        value = True if values is None else values
        negated = option_string == f"--no{self.dest}"
        if negated and values is not None:
            parser.error(f"{option_string} takes no value")
        setattr(namespace, self.dest, value != negated)


def parse(flags: Sequence[Flag], argv: Sequence[str]) -> list[str]:
    """Sets the flags' values; returns the "--config.key=value" arguments.

    Raises:
      InputError: for an unknown or missing flag, or a value outside of its range.
    """
    words, overrides = split_overrides(argv)
    # One dash is enough, but for a negative number.
    words = [re.sub(r"^-(?=[a-zA-Z]\w)", "--", word) for word in words]
    parser = _Parser(add_help=False, allow_abbrev=False)
    for flag in flags:
        options: dict[str, Any] = {"dest": flag.name, "type": flag.parse, "default": None}
        names = [f"--{flag.name}"]
        if flag.rule.kind is bool:
            options |= {"action": _Switch, "nargs": "?"}
            names.append(f"--no{flag.name}")
        elif flag.repeated:
            options["action"] = "append"
        parser.add_argument(*names, **options)
    values, rest = parser.parse_known_args(words)
    if rest:
        raise InputError(_unknown(rest[0], [flag.name for flag in flags]))
    for flag in flags:
        value = getattr(values, flag.name)
        flag.present = value is not None
        flag.value = value if flag.present else flag.default
        if flag.required and not flag.present:
            raise InputError(f"--{flag.name} is missing; see --help")
        if flag.required and flag.value == "":
            raise InputError(f"--{flag.name} is empty; see --help")
    return overrides


def _unknown(word: str, names: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"unknown argument {word!r}; see --help"
    name = word.lstrip("-").partition("=")[0]
    return f"unknown flag --{name}{suggest(name, names).replace('mean ', 'mean --')} See --help"


def help_text(summary: str, groups: Mapping[str, Sequence[Flag]]) -> str:
    """Returns a command's docstring and its flags, a paragraph for each group."""
    parts = [summary.strip()]
    for title, flags in groups.items():
        parts += [title + ":", "\n".join(flag.lines() for flag in flags)]
    return "\n\n".join(parts)
