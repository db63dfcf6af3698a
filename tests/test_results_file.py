"""Files of predictions: read, refused with a reason, scored, compared, expected."""

import copy
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_coco
from test_evaluation_run import TRUTH, squares

from solov2_jax.evaluation.coco_score import read_ground_truth
from solov2_jax.inference.prediction import to_coco_results
from solov2_jax.tools.report.results_file import (
    check_names,
    evaluate_files,
    misses,
    parse_expectations,
    read_results,
)

ROOT = Path(__file__).resolve().parent.parent
SIZES = {7: (48, 64), 3: (64, 48), 9: (40, 40)}


def perfect():
    """Returns results that are the annotations of `tiny_coco`."""
    predictions = [squares(i, SIZES[i]) for i in TRUTH]
    return [r for p in predictions for r in to_coco_results(p, (5, 20))]


@pytest.fixture
def files(tmp_path):
    """An annotation file and a function that writes results and names the file."""
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(tiny_coco.content()))

    def write(results, name="a.json"):
        path = tmp_path / name
        text = results if isinstance(results, str) else json.dumps(results)
        path.write_text(text)
        return str(path)

    return str(annotations), write


def test_scores_a_file_with_only_the_annotations(files, caplog):
    annotations, write = files
    with caplog.at_level("INFO"):
        metrics = evaluate_files(annotations, write(perfect()))
    assert metrics["segm/AP"] == metrics["bbox/AP"] == pytest.approx(1)
    assert math.isnan(metrics["segm/APl"]) and metrics["segm/AP/cat"] == pytest.approx(1)
    assert "3 of 3 images, 3 objects, 3 predictions" in caplog.text


def test_other_forms_of_masks_and_no_boxes(files):
    """Polygons and run lengths that are not compressed, as other tools write them."""
    annotations, write = files
    results = perfect()
    for r in results:
        del r["bbox"]
    results[0]["segmentation"] = tiny_coco.square(10, 8, 20)
    # The 12 x 12 square at (30, 20) of a 48 x 64 image, column by column.
    counts = [30 * 48 + 20] + [12, 36] * 11 + [12]
    counts.append(48 * 64 - sum(counts))
    results[1]["segmentation"] = {"size": [48, 64], "counts": counts}
    assert evaluate_files(annotations, write(results))["segm/AP"] == pytest.approx(1)
    truth = read_ground_truth(annotations)
    read = read_results(write(results), truth)
    assert [r["bbox"] for r in read] == [
        [10, 8, 20, 20],
        [30, 20, 12, 12],
        [10, 8, 20, 20],
    ]


def spoil(**changes):
    """Returns the perfect results with fields of the second one replaced."""
    results = copy.deepcopy(perfect())
    results[1] |= changes
    return [{k: v for k, v in r.items() if v is not None} for r in results]


def runs(size, counts):
    return {"size": size, "counts": counts}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ("[{", "cannot be read as json"),
        ('{"annotations": []}', "is an instances json, not a list of results"),
        ("[3]", "entry 0 is 3, not an object"),
        (spoil(score=None), r"entry 1 \(image 7\): has no `score` \(1 of 3"),
        (spoil(segmentation=None), "no `segmentation`"),
        (spoil(image_id=12345), "`image_id` that .* has not: 12345 .there are 3, 7, 9"),
        (spoil(image_id="seven"), 'entry 1: `image_id` is "seven", not a whole number'),
        (spoil(image_id=True), "entry 1: `image_id` is true, not"),
        (spoil(category_id=1), "`category_id` that .* has not: 1 .*not places in a"),
        (spoil(score="high"), r"entry 1 \(image 7\): `score` is \"high\", not a finite number"),
        (spoil(score=float("nan")), "`score` is NaN, not a finite number"),
        (spoil(bbox=[1, 2, 3]), "`bbox` is .1, 2, 3., not four numbers .x, y, width, height."),
        (spoil(segmentation=runs([64, 48], "abc")), "size .64, 48., but its image is .48"),
        (spoil(segmentation=runs([48, 64], "~~")), "entry 1 .* has damaged run lengths"),
        (spoil(segmentation=runs([48, 64], "11")), "do not cover the image's 3072"),
        (spoil(segmentation={"size": [48, 64]}), "needs `counts`"),
        (spoil(segmentation=[[1, 2, 3, 4]]), "no polygon of 3 points or more"),
        ("[" * 3000, "cannot be read as json"),
        ("[" * 100_000 + "]" * 100_000, "cannot be read as json"),
        ('"results"', "is something else, not a list of results"),
        ([None], "entry 0 is null, not an object"),
        (spoil(score=True), "entry 1 .*`score` is true, not a finite number"),
        (spoil(score=float("inf")), "`score` is Infinity, not a finite number"),
        (spoil(score=[0.5]), "`score` is .0.5., not a finite number"),
        (spoil(score=10**400), "entry 1 .*`score`"),
        (spoil(image_id=7.5), "entry 1: `image_id` is 7.5, not a whole number"),
        (spoil(image_id=[7]), "`image_id` is .7., not a whole number"),
        (spoil(category_id={}), "`category_id` is {}, not a whole number"),
        (spoil(bbox="all"), "entry 1 .*`bbox`"),
        (spoil(bbox=[0, 0, float("nan"), 1]), "entry 1 .*`bbox`"),
        (spoil(segmentation="abc"), "entry 1 .*`segmentation`"),
        (spoil(segmentation=[]), "entry 1 .*"),
        (spoil(segmentation=[["a"] * 6]), "entry 1 .*"),
        (spoil(segmentation=[[1e300] * 6]), "entry 1 .*"),
        (spoil(segmentation=runs([48, 64], [1, 2, 3])), "add up to 6, not to 48 x 64"),
        (spoil(segmentation=runs([48, 64], [-5, 3077])), "entry 1 .*"),
        (spoil(segmentation=runs([48, 64], [2**80])), "entry 1 .*"),
        (spoil(segmentation=runs("48x64", "11")), "entry 1 .*"),
    ],
)
def test_bad_results_are_one_clear_error(files, results, message):
    annotations, write = files
    with pytest.raises(ValueError, match=message):
        evaluate_files(annotations, write(results))


def test_no_results_and_repeated_ones(files, caplog):
    annotations, write = files
    with caplog.at_level("INFO"):
        assert evaluate_files(annotations, write([]))["segm/AP"] == 0
    assert "AP is 0: there is not one prediction" in caplog.text
    # A second detection of the same object is a wrong one, after the right one.
    again = [r | {"score": 0.1} for r in perfect()]
    metrics = evaluate_files(annotations, write([*perfect(), *again]))
    assert metrics["segm/AP"] == pytest.approx(1)
    null_box = [r | {"bbox": None} for r in perfect()]
    assert evaluate_files(annotations, write(null_box))["bbox/AP"] == pytest.approx(1)


def test_data_without_objects_is_undefined_everywhere(files, tmp_path, caplog):
    annotations, write = files
    content = json.loads(Path(annotations).read_text())
    Path(annotations).write_text(json.dumps(content | {"annotations": []}))
    out = tmp_path / "out"
    with caplog.at_level("INFO"):
        metrics = evaluate_files(annotations, write(perfect()), out_dir=str(out), report=True)
    assert all(math.isnan(value) for value in metrics.values())
    written = json.loads((out / "metrics.json").read_text())
    assert set(written.values()) == {None, 3}  # 3 images, 3 predictions
    page = (out / "report" / "report.html").read_text("utf-8")
    for text in (caplog.text, page):
        assert "AP is undefined: the 3 evaluated images have no annotated object" in text
        assert "AP is 0" not in text and "AP50 is 0" not in text
    assert ">nan<" not in page


def test_a_folder_that_cannot_be_made_and_a_device(files):
    annotations, write_results = files
    results = write_results(perfect())
    with pytest.raises(ValueError, match="/dev/null: this folder cannot be made"):
        evaluate_files(annotations, results, out_dir="/dev/null")
    for paths in (("/dev/zero", results), (annotations, "/dev/zero")):
        with pytest.raises(ValueError, match="/dev/zero: is a device, not a file"):
            evaluate_files(*paths)


def test_bad_paths_and_options(files, tmp_path):
    annotations, write = files
    path = write(perfect())
    with pytest.raises(ValueError, match="no such file of predictions"):
        evaluate_files(annotations, str(tmp_path / "none.json"))
    new = tmp_path / "new"
    with pytest.raises(ValueError, match="no such annotation file"):
        evaluate_files(str(tmp_path / "none.json"), path, out_dir=str(new))
    with pytest.raises(ValueError, match="no such file of predictions"):
        evaluate_files(annotations, path, against=str(tmp_path / "none.json"), out_dir=str(new))
    assert not new.exists()
    with pytest.raises(ValueError, match="a.json: holds a json list, not an object"):
        evaluate_files(path, path)
    with pytest.raises(ValueError, match="--report with --predictions needs --output"):
        evaluate_files(annotations, path, report=True)
    with pytest.raises(ValueError, match="no such folder of images"):
        evaluate_files(annotations, path, images=str(tmp_path / "none"))


def test_comparison_names_what_changed(files, tmp_path, caplog):
    annotations, write = files
    worse = perfect()
    worse[1]["category_id"] = 5  # the second square of image 7 as a cat
    out = tmp_path / "out"
    with caplog.at_level("INFO"):
        evaluate_files(
            annotations,
            write(perfect()),
            against=write(worse, "b.json"),
            out_dir=str(out),
        )
    # Cats are found all the same: the false one has no better score, but comes later.
    assert "1 of 2 classes differ in mask AP" in caplog.text
    assert "1 of 3 images differ in F1" in caplog.text
    assert "  1.000   0.500   +0.500  2, 0 and 1, 1 of 2; a.png" in caplog.text
    with (out / "comparison.csv").open() as file:
        rows = {r["metric or class"]: r for r in csv.DictReader(file)}
    assert float(rows["segm/AP"]["a"]) == pytest.approx(1)
    assert float(rows["dog"]["a - b"]) == pytest.approx(1 - 51 / 101)
    with (out / "comparison_images.csv").open() as file:
        images = list(csv.DictReader(file))
    assert [images[0][k] for k in ("file", "right a", "missed b")] == [
        "a.png",
        "2",
        "1",
    ]
    assert json.loads((out / "metrics.json").read_text())["num_predictions"] == 3


def test_expectations():
    texts = ["segm/AP=0.42+-0.02", "bbox/AP50 = 0.5±1e-1"]
    found = parse_expectations(texts)
    assert [(e.metric, e.value, e.tolerance) for e in found] == [
        ("segm/AP", 0.42, 0.02),
        ("bbox/AP50", 0.5, 0.1),
    ]
    assert misses(found, {"segm/AP": 0.44, "bbox/AP50": 0.4}) == []
    assert misses(found, {"segm/AP": 0.4401, "bbox/AP50": math.nan}) == [
        "segm/AP is 0.4401, expected 0.42 +- 0.02",
        "bbox/AP50 is undefined (nothing of that kind is annotated), expected 0.5 +- 0.1",
    ]
    check_names(found, ["segm/AP", "bbox/AP50"])
    with pytest.raises(ValueError, match="no such metric; did you mean segm/AP50"):
        check_names(parse_expectations(["segm/AP5=0.4+-0.1"]), ["segm/AP50", "bbox/AP"])
    with pytest.raises(ValueError, match=r"bbox/AP50=.* no such metric\.$"):
        check_names(found, ["segm/AP", "segm/APs"])


@pytest.mark.parametrize(
    "text",
    ["segm/AP", "segm/AP=0.4", "segm/AP=a+-0.1", "AP=1+--1", "AP=nan+-1", "=1+-1"],
)
def test_expectations_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="write METRIC=VALUE.-TOLERANCE"):
        parse_expectations([text])


def command(*arguments):
    return subprocess.run(
        [sys.executable, "evaluate.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_exit_codes(files):
    annotations, write = files
    given = ("--annotations", annotations, "--predictions", write(perfect()))
    good = command(*given, "--expect=segm/AP=1+-0.01", "--expect=segm/AP/dog=1+-0")
    assert good.returncode == 0 and "segm/AP 1.0000" in good.stdout, good.stderr
    bad = command(*given, "--expect=segm/AP=1+-0.01", "--expect=bbox/AP=0.4+-0.1")
    assert bad.returncode == 1
    assert bad.stderr == "unexpected: bbox/AP is 1.0000, expected 0.4 +- 0.1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --workdir (of a training run), or --predictions"),
        (("--predictions", "a.json"), "--predictions needs --annotations"),
        (
            ("--predictions", "a.json", "--workdir", "w", "--annotations", "i"),
            "--predictions goes without --workdir and --config",
        ),
        (
            ("--predictions", "a.json", "--annotations", "i", "--tta=flip"),
            "--predictions goes without --workdir and --config, --weights, --model, --data and "
            "what belongs to them: --tta",
        ),
        (("--workdir", "hf:a/b", "--report"), "--report needs --output"),
        (("--workdir", "w", "--against", "b"), "--against goes with --predictions"),
        (("--workdir", "w", "--max_detections=300"), "--max_detections goes with"),
        (("--workdir", "w", "--expect", "AP"), "--expect=AP: cannot be read"),
    ],
)
def test_wrong_flags_are_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
