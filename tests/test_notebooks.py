"""The notebooks: clean as committed, and executed from top to bottom on small data.

Each gets a kernel of its own, in one folder: the first one's run is what the others
look at.
"""

import ast
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_docs import code, is_key

from solov2_jax.checkpoint import list_steps

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {"STEPS": 30, "NUM_TRAIN": 24, "NUM_VAL": 8}
SECONDS = 1800  # of a cell, at most: machines may be busy

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, nbformat.NO_CONVERT)


def parameters_cell(notebook):
    (index,) = [
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    ]
    return index


def execute(name, folder, **parameters):
    """Returns the executed notebook, whose parameters had these values."""
    notebook = read(ROOT / "notebooks" / name)
    place = parameters_cell(notebook)
    tree = ast.parse(notebook.cells[place].source)
    known = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert parameters.keys() <= known
    lines = [f"{key} = {value!r}" for key, value in parameters.items()]
    given = nbformat.v4.new_code_cell("\n".join(lines))
    notebook.cells.insert(place + 1, given)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        startup_timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    # The checkout, also where another solov2_jax is installed, or none.
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    return notebook


def outputs(notebook, cell_id):
    """Returns the text below a cell and the number of its pictures."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    text, pictures = "", 0
    for output in cell.outputs:
        data = output.get("data", {})
        pictures += "image/png" in data
        text += output.get("text", "") + data.get("text/plain", "")
    return text, pictures


def complaints(notebook):
    """Returns what was written to standard error, and errors."""
    return [
        output.get("text", output.get("evalue", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stderr" or output.output_type == "error"
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


def test_train_on_your_data(folder):
    done = execute("train_on_your_data.ipynb", folder, MORE_STEPS=2, **SMALL)
    assert not complaints(done)
    run = folder / "runs" / "notebook"
    steps = SMALL["STEPS"]
    assert list_steps(run) == [steps, steps + 2]
    assert (run / "eval" / "report" / "report.html").is_file()
    text, _ = outputs(done, "train")
    assert f"step 20/{steps}" in text and "segm/AP" in text, "the log is shown"
    assert f"resumed {run} at step {steps}" in outputs(done, "resume")[0]
    assert "training may start" in outputs(done, "doctor")[0]
    for cell in ("view", "curves", "evaluate-pictures", "predict", "resume"):
        assert outputs(done, cell)[1] == 1, cell


def test_predict(folder):
    done = execute("predict.ipynb", folder, SCORE=0.1, **SMALL)
    assert not complaints(done)
    written = folder / "outputs" / "notebook"
    assert json.loads((written / "predictions.json").read_text())
    assert len([*written.glob("*.png"), *written.glob("*.jpg")]) == SMALL["NUM_VAL"]
    assert (written / "weights.safetensors").is_file()
    for cell in ("one", "batch", "threshold", "overlays", "tiles"):
        assert outputs(done, cell)[1] == 1, cell
    assert "counts" in outputs(done, "coco")[0]


def test_from_detectron2(folder):
    done = execute("from_detectron2.ipynb", folder, SCORE=0.1, **SMALL)
    assert not complaints(done)
    written = folder / "outputs" / "from_detectron2"
    names = {"adelaidet.pth", "back.pth", "converted.safetensors"}
    assert {path.name for path in written.iterdir()} == names
    assert "adelaidet: " in outputs(done, "read")[0]
    assert outputs(done, "predict")[1] == 1
    assert "the same scores and masks" in outputs(done, "same")[0]
    assert "equal bit for bit" in outputs(done, "back")[0]

    # With a file of one's own, there need not be a run.
    (images,) = (folder / "datasets" / "shapes").glob("*/val")
    given = {"PTH": str(written / "back.pth"), "IMAGES": str(images)}
    config = str(folder / "runs" / "notebook" / "config.json")
    where = {"WORKDIR": "none", "OUTPUT": "given", "CONFIG": config}
    done = execute("from_detectron2.ipynb", folder, **given, **where, SCORE=0.1)
    assert not complaints(done) and not (folder / "none").exists()
    assert (folder / "given" / "converted.safetensors").is_file()
    assert outputs(done, "predict")[1] == 1


@by_name
def test_a_notebook_is_committed_without_its_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert nbformat.writes(notebook) + "\n" == path.read_text("utf-8"), "reformat it"
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z0-9-]+", cell.id), "an id that says what the cell is"
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@by_name
def test_the_first_cell_installs(path):
    first = read(path).cells[0]
    assert first.cell_type == "code"
    assert "%pip install" in first.source and "SOURCE" in first.source
    assert first.source == read(NOTEBOOKS[0]).cells[0].source, "all install alike"


@by_name
def test_a_notebook_only_calls(path):
    """No function, class or loop over pixels: those belong into the package."""
    for cell in read(path).cells[1:]:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            kinds = ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.While
            assert not [node for node in ast.walk(tree) if isinstance(node, kinds)]
            assert len(cell.source.splitlines()) <= 25


@by_name
def test_what_a_notebook_names_exists(path):
    notebook = read(path)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        assert (path.parent / file).is_file(), target
        titles = re.findall(r"^#+ (.*)$", (path.parent / file).read_text(), flags=re.M)
        anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
        assert not anchor or anchor in anchors, target
    groups = "(augment|data|eval|init_from|input|model|optim|targets|test|train)"
    keys = [n for n in code(text) if re.fullmatch(rf"{groups}(\.[a-z_0-9]+)+", n)]
    assert [key for key in keys if not is_key(key)] == []
    for override in re.findall(r"--config\.([a-z_.0-9]+)", json.dumps(notebook)):
        assert is_key(override.rstrip(".")), override
