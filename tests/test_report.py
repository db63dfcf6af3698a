"""The report: everything inside one page, and the numbers behind it in files."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_coco
from PIL import Image
from test_evaluation_run import Oracle, batches_of, evaluate
from test_results_file import files, perfect  # noqa: F401 (a fixture)

from solov2_jax.evaluation.coco import json_metrics
from solov2_jax.tools.report.page import report_writer
from solov2_jax.tools.report.pictures import from_records
from solov2_jax.tools.report.results_file import evaluate_files


def table(folder, name):
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture
def wrong(files):  # noqa: F811
    """An annotation file and results with a class error and a miss."""
    annotations, write = files
    content = json.loads(Path(annotations).read_text())
    content["categories"][0]["name"] = "<dog & co>"
    Path(annotations).write_text(json.dumps(content))
    results = perfect()[:2]
    results[1]["category_id"] = 5
    return annotations, write(results)


def test_page_holds_everything(wrong, tmp_path):
    out = tmp_path / "out"
    evaluate_files(*wrong, out_dir=str(out), report=True)
    page = (out / "report" / "report.html").read_text("utf-8")
    # Nothing is fetched: every source is inside, and there are no links.
    sources = re.findall(r'src="([^"]{0,20})', page)
    assert len(sources) == 6 + 2
    assert all(s.startswith("data:image/") for s in sources)
    assert not re.search(r"https?://|@import|<link|<script src", page)
    # Names from the annotations are text, not markup.
    assert "&lt;dog &amp; co&gt;" in page and "<dog" not in page
    assert "APl is undefined: no annotated object is larger than 96 x 96 pixels" in page
    for name in ("errors", "curves", "classes", "confusion", "sizes", "calibration"):
        picture = Image.open(out / "report" / "charts" / f"{name}.png")
        assert picture.width > 300 and len(picture.getcolors(10**6)) > 10


def test_tables_hold_the_metrics(wrong, tmp_path):
    out = tmp_path / "out"
    metrics = evaluate_files(*wrong, out_dir=str(out), report=True)
    folder = out / "report"
    values = {name: float(v) if v else None for name, v in table(folder, "metrics")[1:]}
    assert values == json_metrics(metrics)
    errors = {row[0]: int(row[1]) for row in table(folder, "errors")[1:]}
    assert errors["class"] == errors["missed"] == 1 and sum(errors.values()) == 2
    head, *rows = table(folder, "confusion")
    assert head[1:] == ["cat", "<dog & co>", "missed"]
    assert [r[1:] for r in rows] == [["1", "0", "0"], ["1", "0", "1"], ["0", "0", "0"]]
    images = {r[0]: r[1:5] for r in table(folder, "images")[1:]}
    assert images == {
        "3": ["1", "0", "0", "1"],
        "7": ["2", "1", "1", "1"],
        "9": ["0", "0", "0", "0"],
    }
    # The worst first; images without a mistake are not shown.
    gallery = sorted(p.name for p in (folder / "gallery").iterdir())
    assert gallery == ["3.jpg", "7.jpg"]
    page = (folder / "report.html").read_text("utf-8")
    assert page.index("sub/b.png: 1 objects") < page.index("a.png: 2 objects")


def test_report_of_a_run_shows_the_images_and_the_time(tmp_path):
    dataset = tiny_coco.load(tmp_path)

    class Half(Oracle):
        def predict_batch(self, batch):
            return [p.above(0.7 if p.image_id == 7 else 1.0) for p in self.all(batch)]

        def all(self, batch):
            return super().predict_batch(batch)

    out = tmp_path / "eval"
    evaluate(Half(), dataset, batches_of(dataset), out, reports=[report_writer("tiny, best")])
    page = (out / "report" / "report.html").read_text("utf-8")
    assert "<h1>tiny, best</h1>" in page and "ms per image" in page
    picture = np.asarray(Image.open(out / "report" / "gallery" / "3.jpg"))
    # Truth left, nothing predicted right: enlarged, with the noise of the image.
    assert picture.shape[0] == 4 * 64 and picture[:, 200:].std() > 30
    # A second report replaces the first one's pictures.
    evaluate(Oracle(), dataset, batches_of(dataset), out, reports=[report_writer("tiny, best")])
    assert list((out / "report" / "gallery").iterdir()) == []
    assert "Every object was found" in (out / "report" / "report.html").read_text()


def test_records_become_a_prediction():
    found = from_records(perfect()[:2], {5: 0, 20: 1}, 7, (48, 64))
    assert found.boxes.tolist() == [[10, 8, 30, 28], [30, 20, 42, 32]]
    assert found.labels.tolist() == [0, 1] and np.asarray(found.masks).sum() == 400 + 144
    assert len(from_records([], {}, 7, (48, 64))) == 0
