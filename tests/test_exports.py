"""What packages export: at run time and for type checkers the same, and none of it loads early."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import solov2_jax

ROOT = Path(solov2_jax.__file__).parent
STUBS = {
    ".".join(["solov2_jax", *path.parent.relative_to(ROOT).parts]): path
    for path in sorted(ROOT.rglob("__init__.pyi"))
}


@pytest.mark.parametrize("name", STUBS)
def test_the_stub_says_where_each_export_is(name):
    package = importlib.import_module(name)
    stated = {
        alias.asname: (node.module, alias.name)
        for node in ast.parse(STUBS[name].read_text()).body
        if isinstance(node, ast.ImportFrom) and is_ours(node.module)
        for alias in node.names
    }
    for export, (module, attribute) in stated.items():
        assert getattr(package, export) is getattr(importlib.import_module(module), attribute)
    assert set(dir(package)) - set(vars(package)) == set(stated)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def is_ours(module):
    return module.split(".")[0] == "solov2_jax"


def test_packages_that_users_build_on_export_something():
    wanted = {"", ".data", ".evaluation", ".inference", ".training", ".weights"}
    assert {f"solov2_jax{part}" for part in wanted} <= set(STUBS)


def test_packages_load_nothing_before_it_is_asked_for():
    code = (
        f"import importlib, sys; [importlib.import_module(n) for n in {list(STUBS)}];"
        "print([m for m in sys.modules if m in ('jax', 'numpy', 'flax')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
