"""The layers of docs/architecture.md, read from the source: imports point down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "solov2_jax"
MAX_LINES = 350

# A module may import from layers with a smaller number, and from its own folder.
LAYERS = {
    "": 0,  # the package's own __init__: nothing but its docstring and version
    "structs": 1,
    "config_rules": 0,
    "config": 1,
    "processes": 1,
    "session": 1,
    "data": 2,
    "ops": 2,
    "nms": 2,
    "models": 3,
    "targets": 3,
    "heatmaps": 3,
    "losses": 3,
    "postprocess": 3,
    "paste": 3,
    "weights": 4,
    "training": 5,
    "inference": 5,
    "evaluation": 5,
    "export": 6,
    "serving": 6,
    "cli": 6,
    "process_flags": 6,
    "view_flags": 6,
    "summary": 6,
    "commands": 7,
}
SCRIPTS_LAYER = 8
# The folders of this layer know each other (training evaluates, prediction restores
# a checkpoint); their modules still form no circle, see `cycle_errors`.
OPEN_LAYER = 5
# Worker processes and offline evaluation stay light: no JAX, also not indirectly.
JAX_FREE = ("data", "evaluation.coco", "evaluation.offline", "evaluation.report")
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax", "jaxtyping"}
# Only here is a ConfigDict made. Who takes a whole config, a `build_*` or `load_*`
# function, reads its attributes and needs no import for that.
CONFIG_MODULES = {"config"}


def imports(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Returns the dotted names that `module` imports, anywhere in its source.

    `from a import b` gives a.b, because b may be a module; relative imports are
    resolved against `module`.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:keep], *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_at_load(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Returns what runs when the module is imported: nothing inside functions."""
    top = ast.Module(body=[], type_ignores=[])
    pending = list(getattr(tree, "body", []))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            top.body.append(node)
        pending.extend(ast.iter_child_nodes(node))
    return imports(top, module, is_package)


def load_sources() -> dict[str, tuple[str, bool]]:
    """Returns {dotted module: (source, is a package)} of the package and scripts."""
    sources = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        sources[name] = (path.read_text(), is_package)
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "configs").glob("*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        sources[name] = (path.read_text(), False)
    return sources


def part(module: str) -> str:
    """Returns the name in LAYERS that a module of the package belongs to."""
    return module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


def layer_errors(sources: dict[str, tuple[str, bool]]) -> list[str]:
    errors = []
    for module, (source, is_package) in sources.items():
        inside = module == PACKAGE or module.startswith(PACKAGE + ".")
        if inside and part(module) not in LAYERS:
            errors.append(f"{module}: no layer; add it to LAYERS in this test")
            continue
        here = LAYERS[part(module)] if inside else SCRIPTS_LAYER
        for name in sorted(imports(ast.parse(source), module, is_package)):
            own = name == PACKAGE or name.startswith(PACKAGE + ".")
            if not own:
                if inside and name.split(".")[0] in ("configs", "train", "evaluate"):
                    errors.append(f"{module} imports {name}, which is above it")
                continue
            there = part(name)
            if there not in LAYERS:
                # `from solov2_jax import __version__`, or a module without a layer
                there = "" if name.count(".") == 1 else there
            same = inside and there == part(module)
            if not same and LAYERS.get(there, SCRIPTS_LAYER) > here:
                errors.append(f"{module} imports {name}, which is above it")
            beside = inside and not same and LAYERS.get(there) == here
            if beside and here != OPEN_LAYER:
                errors.append(f"{module} imports {name}, which is beside it")
    return errors


def cycle_errors(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """Returns circles of modules that import each other while they are loaded."""
    graph = {}
    for module, (source, is_package) in sources.items():
        names = imports_at_load(ast.parse(source), module, is_package)
        owners = {n if n in sources else n.rpartition(".")[0] for n in names}
        graph[module] = sorted((owners & sources.keys()) - {module})
    errors, finished = [], set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            circle = [*path[path.index(module) :], module]
            errors.append(f"a circle of imports: {' -> '.join(circle)}")
        elif module not in finished:
            for name in graph[module]:
                visit(name, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())
    return errors


def closure(module: str, sources: dict[str, tuple[str, bool]]) -> dict[str, str]:
    """Returns {imported name: module that imports it}, through our own modules.

    Importing a.b.c also runs a/__init__ and a.b/__init__.
    """
    found: dict[str, str] = {}
    done, pending = set(), [module]
    while pending:
        current = pending.pop()
        if current in done or current not in sources:
            continue
        done.add(current)
        source, is_package = sources[current]
        parts = current.split(".")
        pending.extend(".".join(parts[:i]) for i in range(1, len(parts)))
        for name in imports(ast.parse(source), current, is_package):
            found.setdefault(name, current)
            pending.extend([name, name.rpartition(".")[0]])
    return found


def jax_errors(sources: dict[str, tuple[str, bool]]) -> list[str]:
    errors = []
    for module in sources:
        short = module.removeprefix(PACKAGE + ".")
        if not any(short == m or short.startswith(m + ".") for m in JAX_FREE):
            continue
        errors += [
            f"{module} imports {name} (in {where}), but must work without JAX"
            for name, where in closure(module, sources).items()
            if name.split(".")[0] in JAX_PACKAGES
        ]
    return errors


def third_party_errors(sources: dict[str, tuple[str, bool]]) -> list[str]:
    errors = []
    for module, (source, is_package) in sources.items():
        tree = ast.parse(source)
        for name in imports_at_load(tree, module, is_package):
            if name.split(".")[0] in ("tensorflow", "tensorflow_datasets"):
                errors.append(f"{module} imports {name} when it is loaded")
        inside = module.startswith(PACKAGE + ".")
        if inside and part(module) not in CONFIG_MODULES:
            for name in imports(tree, module, is_package):
                if name.split(".")[0] == "ml_collections":
                    errors.append(f"{module} imports ml_collections: unpack the config")
    return errors


def size_errors(sources: dict[str, tuple[str, bool]]) -> list[str]:
    return [
        f"{module}: {source.count(chr(10))} lines, more than {MAX_LINES}: split by noun"
        for module, (source, _) in sources.items()
        if source.count("\n") > MAX_LINES
    ]


@pytest.mark.parametrize(
    "check", [layer_errors, cycle_errors, jax_errors, third_party_errors, size_errors]
)
def test_source_keeps_the_layers(check):
    sources = load_sources()
    assert f"{PACKAGE}.structs" in sources and f"{PACKAGE}.data" in sources
    assert not check(sources), "\n".join(check(sources))


BAD = {
    "solov2_jax": ("", True),
    "solov2_jax.structs": ("from jaxtyping import Array", False),
    "solov2_jax.models": ("", True),
    "solov2_jax.data": ("", True),
    "solov2_jax.data.buckets": ("from solov2_jax.structs import Batch", False),
    "solov2_jax.evaluation": ("", True),
    "solov2_jax.evaluation.coco": ("import numpy", False),
    "solov2_jax.evaluation.b": ("from solov2_jax.inference.a import f", False),
}


@pytest.mark.parametrize(
    ("check", "module", "source", "message"),
    [
        (layer_errors, "models.fpn", "from solov2_jax.losses import f", "beside"),
        (layer_errors, "models.fpn", "from solov2_jax import training", "above"),
        (layer_errors, "models.fpn", "from ..training import loop", "above"),
        (layer_errors, "losses", "def f():\n  import solov2_jax.inference", "above"),
        (layer_errors, "losses", "from configs import base", "above"),
        (layer_errors, "helpers", "", "no layer"),
        (cycle_errors, "inference.a", "from solov2_jax.evaluation import b", "circle"),
        (jax_errors, "data.masks", "import jax.numpy as jnp", "without JAX"),
        (jax_errors, "data.masks", "from . import sizes", "without JAX"),
        (jax_errors, "evaluation.coco", "from flax import struct", "without JAX"),
        (third_party_errors, "data.tfds", "import tensorflow as tf", "is loaded"),
        (
            third_party_errors,
            "data.tfds",
            "try:\n  import tensorflow_datasets\nexcept ImportError:\n  raise",
            "is loaded",
        ),
        (third_party_errors, "losses", "import ml_collections", "unpack"),
        (size_errors, "losses", "x = 1\n" * (MAX_LINES + 1), "split"),
    ],
)
def test_a_bad_source_is_found(check, module, source, message):
    errors = check(BAD | {f"solov2_jax.{module}": (source, False)})
    assert any(message in error and module in error for error in errors), errors


def test_a_good_source_passes():
    good = {
        "solov2_jax": ('__version__ = "1"', True),
        "solov2_jax.structs": ("import jax", False),
        "solov2_jax.ops": ("import jax", False),
        "solov2_jax.models": ("from solov2_jax.models.fpn import FPN", True),
        "solov2_jax.models.fpn": ("from solov2_jax import ops, structs", False),
        "solov2_jax.weights.load": ("import safetensors", False),
        "solov2_jax.training.loop": (
            "from solov2_jax import __version__, losses\n"
            "from solov2_jax.weights.load import load_weights\n"
            "from solov2_jax.training import hooks",
            False,
        ),
        "solov2_jax.losses": ("from .structs import Outputs", False),
        "solov2_jax.tools.tfds": ("def f():\n  import tensorflow_datasets", False),
        "train": ("from solov2_jax.training.loop import train", False),
    }
    for check in (
        layer_errors,
        cycle_errors,
        jax_errors,
        third_party_errors,
        size_errors,
    ):
        assert not check(good)
