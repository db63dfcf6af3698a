"""The configuration's keys and their comments in `configs/base.py` as Markdown."""

import ast
import importlib
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from configs import base
from solov2_jax.config import flatten

RULES = base.rules()
_REFERENCE = re.compile(r"\s*\[([A-Z._][A-Z0-9_.{},: ]*)\]\.?$")


@dataclass
class Key:
    """A key: `name` is its place, "train.steps"; `reference` the reference's key."""

    name: str
    value: Any
    text: str
    reference: str


@dataclass
class Section:
    """The keys that are directly below a place; "" is the top."""

    name: str
    text: str
    keys: list[Key] = field(default_factory=list)


def sections(source: str, values: dict[str, Any]) -> list[Section]:
    """Returns the sections of a config file, in its order.

    Args:
      source: of a module with `keys` or `get_config`, in which every key is set by one statement
        and described by a comment above or beside it.
      values: of every key, {"train.steps": 270000, ...}.
    """
    comments, alone = _comments(source)
    found = {"": Section("", "")}
    reference = ""
    for statement, name in _settings(ast.parse(source)):
        text = _comment(statement, comments, alone)
        if name not in values:  # config.train = ConfigDict()
            found[name] = Section(name, text)
            continue
        text, own = _split_reference(text)
        if own.startswith(".."):  # [..SIGMA]: beside the key before
            own = f"{reference.rpartition('.')[0]}.{own[2:]}"
        reference = own or reference
        key = Key(name, values[name], _sentence(text), own)
        found[name.rpartition(".")[0]].keys.append(key)
    return [section for section in found.values() if section.keys]


def _uses(key: Key) -> str:
    """Returns when a key is used, as a sentence."""
    words = []
    for condition in RULES[key.name].conditions:
        values = " or ".join(f"`{value!r}`" for value in condition.values)
        words.append(f"`{condition.key}` is {'' if condition.positive else 'not '}{values}")
    return f" Used where {' and '.join(words)}." if words else ""


def base_sections() -> list[Section]:
    """Returns the sections of `configs/base.py`."""
    source = pathlib.Path(base.__file__).read_text("utf-8")
    return sections(source, flatten(base.get_config()))


def tables() -> str:
    """Returns every key of `configs/base.py`, a table for each section."""
    parts = []
    for section in base_sections():
        title = f"`{section.name}`" if section.name else "The top level"
        rows = [
            f"| `{key.name}`{{ #{key.name} }} | {_code(key.value)} "
            f"| {escape(RULES[key.name].describe())} "
            f"| {escape(key.text)}{_uses(key)}{_in_reference(key)} |"
            for key in section.keys
        ]
        head = ["| key | default | type | |", "|---|---|---|---|"]
        parts += [f"### {title}", escape(section.text), "\n".join([*head, *rows])]
    return "\n\n".join(parts)


def variants() -> str:
    """Returns what every other file of `configs/` changes, a table for each."""
    folder = pathlib.Path(base.__file__).parent
    defaults = {k.name: k.value for s in base_sections() for k in s.keys}
    parts = []
    for path in sorted(folder.glob("*.py")):
        if path.stem in ("__init__", "base"):
            continue
        module = importlib.import_module(f"configs.{path.stem}")
        docstring = (module.__doc__ or "").strip().splitlines()[0]
        parts += [f"### `{path.stem}`", escape(docstring)]
        named = getattr(module, "VARIANTS", None)
        if named is None:
            parts.append(_changes(flatten(module.get_config()), defaults))
            continue
        for name, variant in named.items():
            ap = "no weights published" if variant.ap is None else f"mask AP {variant.ap}"
            parts += [f"#### `{path.stem}:{name}`", escape(f"{variant.source}, {ap}")]
            parts.append(_changes(flatten(module.get_config(name)), defaults))
    return "\n\n".join(parts)


def _changes(values: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Returns the table of the keys whose values are not the defaults."""
    rows = [
        f"| [`{key}`](#{key}) | {_code(values[key])} | {_code(default)} |"
        for key, default in defaults.items()
        if values[key] != default
    ]
    head = ["| key | here | `base.py` |", "|---|---|---|"]
    return "\n".join([*head, *(rows or ["| nothing | | |"])])


def escape(text: str) -> str:
    """Returns plain text as Markdown for a table cell; `code` stays code."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([\\*_<>|\[\]])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def _code(value: Any) -> str:
    return f"`{value!r}`" + ("{ .short }" if len(repr(value)) < 20 else "")


def _in_reference(key: Key) -> str:
    return f"<br>reference: `{key.reference}`" if key.reference else ""


def _comments(source: str) -> tuple[dict[int, str], set[int]]:
    """Returns the comments by line, and the lines that are nothing else."""
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            comments[line] = token.string.lstrip("# ")
            if token.line.lstrip().startswith("#"):
                alone.add(line)
    return comments, alone


def _comment(node: ast.stmt, comments: dict[int, str], alone: set[int]) -> str:
    """Returns the comment above a statement and the one at its end, as one text."""
    first = node.lineno
    while first - 1 in alone:
        first -= 1
    end = node.end_lineno or node.lineno
    lines = [comments[n] for n in range(first, end + 1) if n in comments]
    return " ".join(lines)


def _sentence(text: str) -> str:
    """Returns a comment with a capital and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


def _split_reference(text: str) -> tuple[str, str]:
    """Returns a comment without its bracket, and what is in the bracket."""
    match = _REFERENCE.search(text)
    if not match:
        return text, ""
    return text[: match.start()], match[1]


def _settings(tree: ast.Module) -> Iterator[tuple[ast.Assign, str]]:
    """Yields each `config.a.b = value` of `keys` or `get_config`, with its "a.b"."""
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name in ("keys", "get_config")
        and node.body[1:-1]
    )
    places = {"config": ""}
    for node in body:
        if not isinstance(node, ast.Assign):
            continue
        names = [_place(target, places) for target in node.targets]
        name = next((n for n in names if n), "")
        for target in node.targets:
            if isinstance(target, ast.Name) and name:
                places[target.id] = name
        if name:
            yield node, name


def _place(target: ast.expr, places: dict[str, str]) -> str:
    """Returns "a.b" of `config.a.b`, or of `a.b` where `a` stands for `config.a`."""
    parts = []
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    if not parts or not isinstance(target, ast.Name):
        return ""
    return ".".join(filter(None, [places[target.id], *reversed(parts)]))
