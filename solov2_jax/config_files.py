"""Where a config file is, by its path or a shipped one's name, and its module."""

import importlib.util
import pathlib
import re
import sys
import types

from solov2_jax.io import InputError


def shipped_configs() -> pathlib.Path:
    """Returns the folder of the configs that come with the package.

    In an installed package it is inside of it, in the sources beside it.
    """
    package = pathlib.Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def split_variant(path: str) -> tuple[str, str]:
    """Returns (path, variant) of "configs/zoo.py:mmdet_r101_dcn"; a file's own name wins."""
    before, colon, variant = path.rpartition(":")
    is_path = not colon or len(before) < 2 or pathlib.Path(path).is_file()  # C:\\ is no variant
    return (path, "") if is_path or not re.fullmatch(r"\w+", variant) else (before, variant)


def find_config(path: str) -> pathlib.Path:
    """Returns the file that a path or a shipped config's name means."""
    file = pathlib.Path(path)
    if file.is_file():
        return file
    shipped = shipped_configs() / f"{file.stem}.py"
    by_name = file.suffix in ("", ".py") and file.parent.name in ("", "configs")
    if by_name and not file.is_absolute() and shipped.is_file():
        return shipped
    raise ValueError(f"config file {path}: no such file{_listing(file)}")


def _listing(file: pathlib.Path) -> str:
    folder = file.parent if file.parent.name and file.parent.is_dir() else None
    folder = folder or shipped_configs()
    names = sorted(p.name for p in folder.glob("*.py") if not p.name.startswith("_"))
    return f"; in {folder}/ there are {', '.join(names)}" if names else ""


def run_config(file: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("solov2_config", file)
    if spec is None or spec.loader is None:
        raise InputError(f"config file {file}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bind_configs(folder: pathlib.Path) -> None:
    """Makes `from configs import base` work in a config file, wherever it lies.

    It gives the `base` of the file's own folder if there is one, else the shipped one.
    """
    if not (folder / "base.py").is_file() or not (folder / "__init__.py").is_file():
        folder = shipped_configs()
    init = folder / "__init__.py"
    known = sys.modules.get("configs")
    if known is not None and getattr(known, "__file__", None) == str(init):
        return
    spec = importlib.util.spec_from_file_location(
        "configs", init, submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
        del sys.modules[name]
    sys.modules["configs"] = package
    spec.loader.exec_module(package)
