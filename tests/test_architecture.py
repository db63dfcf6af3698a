"""The two rings and the layers of docs/architecture.md, read from the source.

The core (`solov2_jax/` without `tools/`) never imports the tools, and inside it imports
point down only. Imports within functions count as much as those at the top of a file.
"""

import ast
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TOOLS = "solov2_jax", "solov2_jax.tools"

# A module of the core may import from parts with a smaller number, and from its own.
LAYERS = {
    "": 0,  # the package's __init__: exports by name, imported on first use
    "io": 0,
    "structs": 0,
    "logging": 1,
    "progress": 1,
    "download": 1,
    "classes": 1,
    "cluster": 1,
    "distributed": 1,
    "lease": 1,
    "config_schema": 1,
    "user_code": 1,
    "rle": 1,
    "ops": 1,
    "nms": 1,
    "platforms": 1,
    "storage": 2,
    "stored": 2,
    "config_files": 1,
    "config": 2,
    "data": 2,
    "models": 2,
    "targets": 2,
    "pair_losses": 2,
    "box_losses": 3,
    "mask_losses": 3,
    "distillation": 3,
    "losses": 2,
    "postprocess": 3,
    "paste": 2,
    "semantic": 3,
    "heatmaps": 1,
    "keypoints": 2,
    "weights": 3,
    "checkpoint_parts": 3,
    "checkpoint": 4,
    "pretrained": 5,
    "inference": 6,
    "evaluation": 7,
    "training": 8,
}
# Worker processes, the check of a data set and imports stay light: no JAX, also not
# indirectly.
JAX_FREE = (
    "io",
    "rle",
    "data",
    "evaluation.coco_score",
    "tools.cli.doctor",
    "tools.cli.importers",
    "tools.doctor",
    "tools.importers",
    "tools.synthetic",
)
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Imported when used: they are slow, or extras.
LAZY_PACKAGES = {"tensorflow", "tensorflow_datasets"}
# Only there is a ConfigDict made; who takes a config reads its attributes.
CONFIG_MODULES = {"config", "config_schema"}

# `python -m solov2_jax` is a command, as the scripts are.
COMMAND = "solov2_jax.__main__"
MAX_FILE, MAX_FUNCTION = 420, 60
# Longer functions, up to 80 lines: a signature with its documentation, or a list of
# steps that reads best in one piece.
LONG_FUNCTIONS = {
    "solov2_jax.postprocess.detect",
    "solov2_jax.data.pipeline.train_batches",
    "solov2_jax.training.loss.build_loss",
    "solov2_jax.tools.serving.app.make_app",
    "solov2_jax.tools.doctor.grids.advise",
}
MAX_LONG_FUNCTION = 105
# Lines of Python.
BUDGETS = {"core": 27_500, "tools": 21_300, "benchmarks": 5_150}
# What errors that are still there begin with.
KNOWN: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A module, script, notebook or page, as the checks see it."""

    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


Sources = dict[str, Source]  # by dotted name; of a notebook or page, by path


def load_sources() -> Sources:
    """Returns the modules of the package, and the scripts, configs and benchmarks."""
    sources = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        sources[name] = Source(path.read_text(), is_package)
    for folder in (".", "configs", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            sources[name] = Source(path.read_text())
    return sources


def load_snippets() -> Sources:
    """Returns the Python of notebooks and of the documentation."""
    snippets = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        code = re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M)
        snippets[path.relative_to(ROOT).as_posix()] = Source(code)
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
    for path in sorted(pages):
        blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)
        for number, block in enumerate(blocks):
            snippets[f"{path.relative_to(ROOT).as_posix()}, block {number + 1}"] = Source(block)
    return snippets


# --- What a source imports -----------------------------------------------------------


@cache
def imports(source: Source, module: str, at_load: bool = False) -> frozenset[str]:
    """Returns the dotted names that a module imports.

    `from a import b` gives a.b, because b may be a module; relative imports are
    resolved against `module`.

    Args:
      at_load: only what is imported with the module: nothing inside functions.
    """
    names = set()
    for node in outside_functions(source.tree) if at_load else ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + source.is_package
                base = ".".join([*parts[:keep], *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(names)


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from outside_functions(child)


def owner(name: str, sources: Sources) -> str:
    """Returns the module that a dotted name is, or is in; "" for a foreign one."""
    while name and name not in sources:
        name = name.rpartition(".")[0]
    return name


def part(module: str) -> str:
    """Returns the name in LAYERS of a module of the core."""
    return module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def own(sources: Sources, package: str = PACKAGE) -> Sources:
    return {name: source for name, source in sources.items() if is_inside(name, package)}


# --- The checks: each returns what is wrong ------------------------------------------


def ring_errors(sources: Sources) -> list[str]:
    """The core knows neither the tools nor what is above the package."""
    errors = []
    above = {name.split(".")[0] for name in sources} - {PACKAGE}
    for module, source in own(sources).items():
        names = sorted(imports(source, module))
        errors += [f"{module} imports {name}" for name in names if name.split(".")[0] in above]
        if is_inside(module, TOOLS) or module == COMMAND:
            continue
        errors += [f"{module} imports {name}, a tool" for name in names if is_inside(name, TOOLS)]
        if module == PACKAGE:  # the public face names what it exports, of both rings
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if TOOLS in node.value and not is_docstring(node, source.tree):
                    errors.append(f"{module} names a tool in a string: {node.value[:60]!r}")
    return errors


def is_docstring(constant: ast.Constant, tree: ast.Module) -> bool:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    return any(isinstance(b[0], ast.Expr) and b[0].value is constant for b in bodies)


def layer_errors(sources: Sources) -> list[str]:
    """Within the core, imports point down only."""
    errors = []
    for module, source in own(sources).items():
        if is_inside(module, TOOLS) or module == COMMAND:
            continue
        if part(module) not in LAYERS:
            errors.append(f"{module}: no layer; add it to LAYERS in this test")
            continue
        for name in sorted(imports(source, module)):
            target = part(owner(name, sources))
            if not is_inside(name, PACKAGE) or is_inside(name, TOOLS) or target == part(module):
                continue
            if target and LAYERS.get(target, 99) >= LAYERS[part(module)]:
                errors.append(f"{module} imports {name}, which is not below it")
    return errors


def circle_errors(sources: Sources) -> list[str]:
    """Neither modules nor packages import each other in a circle."""
    modules: dict[str, set[str]] = defaultdict(set)
    packages: dict[str, set[str]] = defaultdict(set)
    for module, source in own(sources).items():
        targets = {owner(name, sources) for name in imports(source, module)} - {module, ""}
        # A package's __init__ exports what its modules hold.
        modules[module] |= {t for t in targets if not is_inside(module, t)}
        packages[folder(module)] |= {folder(target) for target in targets} - {folder(module)}
    graphs = (("modules", modules), ("packages", packages))
    return [error for kind, graph in graphs for error in circles(kind, graph)]


def folder(module: str) -> str:
    """Returns the part of the package, or the tool, that a module belongs to."""
    return ".".join(module.split(".")[: 3 if is_inside(module, TOOLS) else 2])


def circles(kind: str, graph: dict[str, set[str]]) -> list[str]:
    errors: list[str] = []
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = [*path[path.index(name) :], name]
            errors.append(f"a circle of {kind}: {' -> '.join(circle)}")
        elif name not in finished:
            for target in sorted(graph.get(name, ())):
                visit(target, (*path, name))
            finished.add(name)

    for name in sorted(graph):
        visit(name, ())
    return errors


def jax_errors(sources: Sources) -> list[str]:
    """What must work without JAX imports nothing that imports it when it is loaded."""
    errors = []
    for module in own(sources):
        short = module.removeprefix(PACKAGE + ".")
        if not any(is_inside(short, name) for name in JAX_FREE):
            continue
        where: dict[str, str] = {}
        pending = [(module, name) for name in imports(sources[module], module)]
        while pending:
            importer, name = pending.pop()
            if name in where:
                continue
            where[name] = importer
            target = owner(name, sources)
            if is_inside(target, PACKAGE):
                # Importing a.b.c also runs a/__init__ and a.b/__init__.
                steps = target.split(".")
                packages = [".".join(steps[: i + 1]) for i in range(len(steps))]
                pending += [
                    (p, n)
                    for p in packages
                    if p in sources
                    for n in imports(sources[p], p, at_load=True)
                ]
        errors += [
            f"{module} needs {name} (in {importer}), but must work without JAX"
            for name, importer in where.items()
            if name.split(".")[0] in JAX_PACKAGES
        ]
    return errors


def third_party_errors(sources: Sources) -> list[str]:
    errors = []
    for module, source in sources.items():
        for name in imports(source, module, at_load=True):
            if name.split(".")[0] in LAZY_PACKAGES:
                errors.append(f"{module} imports {name} when it is loaded")
        if is_inside(module, PACKAGE) and part(module) not in CONFIG_MODULES:
            for name in imports(source, module):
                if name.split(".")[0] == "ml_collections":
                    errors.append(f"{module} imports ml_collections: unpack the config")
    return errors


def class_name_errors(sources: Sources) -> list[str]:
    """No two classes of the package have one name."""
    places = defaultdict(list)
    for module, source in own(sources).items():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    return [f"class {n} is in {' and '.join(p)}" for n, p in places.items() if len(p) > 1]


def size_errors(sources: Sources) -> list[str]:
    errors = []
    for module, source in sources.items():
        if module.startswith("configs."):  # a list of keys is as long as it is
            continue
        if source.text.count("\n") > MAX_FILE:
            errors.append(f"{module} is longer than {MAX_FILE} lines: split it by noun")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name, lines = f"{module}.{node.name}", (node.end_lineno or 0) - node.lineno + 1
                limit = MAX_LONG_FUNCTION if name in LONG_FUNCTIONS else MAX_FUNCTION
                if lines > limit:
                    errors.append(f"{name} is longer than {limit} lines")
    return errors


def packing_errors(sources: Sources) -> list[str]:
    """`f(*(a, b))` and `f(*given)` of a tuple that was packed above hide parameters."""
    errors = []
    for module, source in sources.items():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call):
                for argument in node.args:
                    packed = isinstance(argument, ast.Starred)
                    if packed and isinstance(argument.value, ast.Tuple | ast.List):
                        if not any(isinstance(e, ast.Starred) for e in argument.value.elts):
                            errors.append(f"{module} packs arguments: {ast.unparse(node)[:60]}")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                errors += [f"{module} packs arguments: {call}" for call in packed_calls(node)]
    return errors


def packed_calls(function: ast.AST) -> list[str]:
    """Returns calls f(*name) of names that the function assigns a tuple to, as text."""
    tuples = set()
    for node in ast.walk(function):
        # A pair is a size or a shape.
        packs = isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        if packs and len(node.value.elts) > 2:
            tuples |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return [
        ast.unparse(node)[:60]
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        for argument in node.args
        if isinstance(argument, ast.Starred)
        and isinstance(argument.value, ast.Name)
        and argument.value.id in tuples
    ]


def name_errors(users: Sources, sources: Sources) -> list[str]:
    """Whatever a user imports from the package exists."""
    errors = []
    for user, source in users.items():
        for name in sorted(imports(source, user)):
            module = owner(name, sources)
            if not is_inside(name, PACKAGE) or module == name:
                continue
            rest = name.removeprefix(module + ".")
            if "." in rest or rest not in names_of(sources[module]):
                errors.append(f"{user} imports {name}, which does not exist")
    return errors


def names_of(source: Source) -> set[str]:
    """Returns the names that a module has: defined, imported, or exported lazily."""
    names = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and source.is_package:
            names.add(node.value)
    return names


CHECKS: tuple[Callable[[Sources], list[str]], ...] = (
    ring_errors,
    layer_errors,
    circle_errors,
    jax_errors,
    third_party_errors,
    class_name_errors,
    size_errors,
    packing_errors,
)


def unknown(errors: list[str]) -> list[str]:
    return [error for error in errors if not error.startswith(KNOWN)]


@pytest.fixture(scope="module")
def sources() -> Sources:
    loaded = load_sources()
    assert {"solov2_jax.structs", "solov2_jax.tools", "train", "configs.base"} <= loaded.keys()
    assert {"predict", "evaluate", "export", "convert", "serve"} <= loaded.keys()
    return loaded


@pytest.mark.parametrize("check", CHECKS)
def test_the_source_keeps_the_rules(check, sources):
    errors = unknown(check(sources))
    assert not errors, "\n".join(errors)


def test_what_scripts_notebooks_and_pages_import_exists(sources):
    snippets = load_snippets()
    assert any(name.endswith(".ipynb") for name in snippets)
    users = {n: s for n, s in sources.items() if not is_inside(n, PACKAGE)} | snippets
    errors = unknown(name_errors(users, sources))
    assert not errors, "\n".join(errors)


def test_what_an_expert_looks_for_is_found_at_one_try(sources):
    page = (ROOT / "docs" / "architecture.md").read_text()
    row = r"^\| ([^|`]+) \| `(solov2_jax/[\w/]+\.py)` \| `(\w+)` \| `([^`]+)` \|$"
    rows = re.findall(row, page, re.M)
    assert len(rows) >= 15
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / PACKAGE).rglob("*.py")}
    for word, path, name, searched in rows:
        assert re.search(rf"^\s*(def|class) {name}\b", texts[path], re.M), word
        if searched.endswith(".py"):
            hits = [p for p in texts if p.endswith(f"/{searched}")]
        else:
            tried = re.compile(searched.replace("(", r"\("), re.I | re.M)
            hits = [p for p, text in texts.items() for _ in tried.findall(text)]
        assert path in hits and len(hits) <= 20, f"{word}: {searched} finds {hits}"


def test_the_modules_themselves_import_what_exists(sources):
    errors = unknown(name_errors(own(sources), sources))
    assert not errors, "\n".join(errors)


def test_lines_of_the_rings(sources):
    lines = dict.fromkeys(BUDGETS, 0)
    for module, source in sources.items():
        ring = "tools" if is_inside(module, TOOLS) else "core" if is_inside(module, PACKAGE) else ""
        ring = "benchmarks" if module.startswith("benchmarks.") else ring
        if ring:
            lines[ring] += source.text.count("\n")
    over = {ring: n for ring, n in lines.items() if n > BUDGETS[ring]}
    assert not over, f"lines {over}, budgets {BUDGETS}"


# --- The checks find what they are for -----------------------------------------------

GOOD = {
    "solov2_jax": Source('__version__ = "1"\n_EXPORTS = {"train": "x"}', True),
    "solov2_jax.io": Source("import json\ndef write_json(): ..."),
    "solov2_jax.structs": Source("import jax\nclass Batch: ..."),
    "solov2_jax.ops": Source("import jax"),
    "solov2_jax.losses": Source("from .structs import Batch"),
    "solov2_jax.models": Source("from solov2_jax.models.fpn import FPN", True),
    "solov2_jax.models.fpn": Source("from solov2_jax import ops, structs\nclass FPN: ..."),
    "solov2_jax.data": Source("", True),
    "solov2_jax.data.buckets": Source("import numpy"),
    "solov2_jax.inference": Source("", True),
    "solov2_jax.inference.predictor": Source("from solov2_jax import models, __version__"),
    "solov2_jax.training": Source("", True),
    "solov2_jax.training.loop": Source("import optax\ndef train():\n  from solov2_jax import io"),
    "solov2_jax.tools": Source("", True),
    "solov2_jax.tools.doctor": Source('"""Docs of solov2_jax.tools."""', True),
    "solov2_jax.tools.cli": Source("def f():\n  import tensorflow_datasets", True),
    "solov2_jax.tools.cli.train": Source("from solov2_jax.training import loop"),
    "train": Source("from solov2_jax.tools.cli.train import loop\nf(*rows, *(1, *rows))"),
    "configs.base": Source('CHECKS = ("solov2_jax.tools.doctor:check",)'),
}


def test_a_good_source_passes():
    for check in CHECKS:
        assert not check(GOOD)
    assert not name_errors(GOOD, GOOD)


@pytest.mark.parametrize(
    ("check", "module", "text", "message"),
    [
        (ring_errors, "losses", "def f():\n  import solov2_jax.tools.doctor", "a tool"),
        (ring_errors, "losses", "from .tools import doctor", "a tool"),
        (ring_errors, "losses", 'x = "solov2_jax.tools.doctor:f"', "in a string"),
        (ring_errors, "tools.doctor.x", "from configs import base", "imports configs.base"),
        (layer_errors, "losses", "from solov2_jax.models import fpn", "not below"),
        (layer_errors, "models.heads", "def f():\n  from ..training import loop", "not below"),
        (layer_errors, "helpers", "", "no layer"),
        (circle_errors, "ops", "def f():\n  from solov2_jax.models import fpn", "of modules"),
        (circle_errors, "models.x", "from solov2_jax.inference import a", "of packages"),
        (circle_errors, "training.b", "import solov2_jax.tools.cli.train", "of packages"),
        (jax_errors, "data.masks", "import jax.numpy as jnp", "without JAX"),
        (jax_errors, "data.masks", "def f():\n  from flax import struct", "without JAX"),
        (jax_errors, "tools.doctor.x", "from solov2_jax import ops", "without JAX"),
        (third_party_errors, "data.tfds", "import tensorflow as tf", "is loaded"),
        (third_party_errors, "data.x", "try:\n  import tensorflow\nexcept E: ...", "is loaded"),
        (third_party_errors, "losses", "import ml_collections", "unpack"),
        (class_name_errors, "ops", "class Batch: ...", "class Batch"),
        (size_errors, "losses", "x = 1\n" * (MAX_FILE + 1), "split"),
        (size_errors, "losses", "def f():\n" + "  x = 1\n" * MAX_FUNCTION, "losses.f is longer"),
        (packing_errors, "losses", "f(*(a, b))", "packs"),
        (packing_errors, "losses", "log.info('', *[a, b])", "packs"),
        (packing_errors, "losses", "def g():\n  given = a, b, c\n  return f(*given)", "packs"),
    ],
)
def test_a_bad_source_is_found(check, module, text, message):
    sources = GOOD | {
        "solov2_jax.inference.a": Source("from solov2_jax.models import fpn"),
        f"solov2_jax.{module}": Source(text),
    }
    errors = check(sources)
    assert any(message in error for error in errors), errors


@pytest.mark.parametrize(
    "text",
    [
        "from solov2_jax.io import read_jsn",
        "from solov2_jax.iox import write_json",
        "def f():\n  import solov2_jax.data.bucket",
        "from solov2_jax import trian",
    ],
)
def test_a_name_that_does_not_exist_is_found(text):
    assert "does not exist" in str(name_errors({"page.md": Source(text)}, GOOD))
