"""Class names from a file of any of the forms that they come in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from solov2_jax.io import InputError, read_json, reading


def read_names(source: str) -> dict[int, str]:
    """Returns category id -> name; ids count from 1 where the source has none.

    Args:
      source: a text file with a name a line; a YAML file with `names`; a json with
        COCO's `categories`, or a run's classes.json, whose ids are kept; or the names
        themselves, separated by commas.
    """
    suffix = Path(source).suffix.lower()
    if suffix in (".yaml", ".yml"):
        return number_names(names_of_yaml(read_yaml(source), source), source)
    if suffix == ".json":
        return _from_json(source)
    if suffix in (".txt", ".names"):
        lines = read_text(source).splitlines()
        return number_names([line.strip() for line in lines if line.strip()], source)
    return number_names([name.strip() for name in source.split(",")], source)


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, or UTF-16 as Windows programs write it."""
    with reading(path, "text", "Save it as UTF-8."):
        data = Path(path).read_bytes()
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file; its values stay text, as they are written."""
    text = read_text(path)
    with reading(path, "YAML"):
        content = yaml.load(text, yaml.BaseLoader)  # "no", "1.0", "null" are names
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a YAML file of keys and values.")
    return content


def names_of_yaml(content: dict[str, Any], path: str) -> list[str]:
    """Returns `names`, a list or a mapping from 0, 1, ..., as a list."""
    names = content.get("names")
    if isinstance(names, dict):
        numbers = [int(key) if key.isdecimal() else key for key in names]
        if set(numbers) != set(range(len(names))):
            raise InputError(
                f"{path}: the keys of `names` are {sorted(numbers, key=str)}; number the "
                "classes 0, 1, 2, ... without gaps."
            )
        names = [name for _, name in sorted(zip(numbers, names.values(), strict=True))]
    if not isinstance(names, list) or not names:
        raise InputError(f"{path}: has no `names`; list the class names there.")
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: `names` must be a list of texts; put quotes around them.")
    return [name.strip() for name in names]


def _from_json(path: str) -> dict[int, str]:
    kind = "COCO's `categories` with id and name, or the `names` and `ids` of a classes.json"
    content = read_json(path, "json")
    with reading(path, kind):
        if "categories" in content:
            return {int(c["id"]): str(c["name"]) for c in content["categories"]}
        pairs = zip(content["ids"], content["names"], strict=True)
        return {int(i): str(name) for i, name in pairs}


def number_names(names: Sequence[str], source: str) -> dict[int, str]:
    """Returns the names with ids from 1, or raises if two are equal or one is empty."""
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated or "" in names or not names:
        what = f"{repeated} more than once" if repeated else "an empty name"
        raise InputError(f"{source}: class names: {what}; give every class one name.")
    return dict(enumerate(names, start=1))
