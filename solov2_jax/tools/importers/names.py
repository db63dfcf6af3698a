"""Class names from a file of any of the forms that they come in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def read_names(source: str) -> dict[int, str]:
    """Returns category id -> name; ids count from 1 where the source has none.

    Args:
      source: a text file with a name a line; a YAML file with `names`; a json with
        COCO's `categories`, or a run's classes.json, whose ids are kept; or the names
        themselves, separated by commas.
    """
    suffix = Path(source).suffix.lower()
    if suffix not in (".txt", ".names", ".yaml", ".yml", ".json"):
        return _number([name.strip() for name in source.split(",")], source)
    text = read_text(source)
    if suffix == ".json":
        return _from_json(text, source)
    if suffix in (".yaml", ".yml"):
        return _number(names_of_yaml(read_yaml(source), source), source)
    return _number([line.strip() for line in text.splitlines() if line.strip()], source)


def read_text(path: str | Path) -> str:
    """Returns the file's text, or raises naming the file."""
    try:
        return Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({error}).") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file."""
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as YAML ({message}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a YAML file of keys and values.")
    return content


def names_of_yaml(content: dict[str, Any], path: str) -> list[str]:
    """Returns `names`, a list or a mapping from 0, 1, ..., as a list."""
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise ValueError(
                f"{path}: the keys of `names` are {sorted(names, key=str)}; number the "
                "classes 0, 1, 2, ... without gaps."
            )
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: has no `names`; list the class names there.")
    return [str(name) for name in names]


def _from_json(text: str, path: str) -> dict[int, str]:
    try:
        content = json.loads(text)
        if "categories" in content:
            return {int(c["id"]): str(c["name"]) for c in content["categories"]}
        pairs = zip(content["ids"], content["names"], strict=True)
        return {int(i): str(name) for i, name in pairs}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: has neither COCO's `categories` with id and name nor the `names` "
            f"and `ids` of a run's classes.json ({error!r})."
        ) from None


def _number(names: Sequence[str], source: str) -> dict[int, str]:
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated or "" in names or not names:
        what = f"{repeated} more than once" if repeated else "an empty name"
        raise ValueError(f"{source}: class names: {what}; give every class one name.")
    return dict(enumerate(names, start=1))
