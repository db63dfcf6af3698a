"""What users' files are like: one answer in every command, for each kind of oddity.

Jsons are tried as training (`load_coco`), the doctor (`examine`), evaluation of a file of
predictions (`evaluate_files`) and the record builder (`tfds.examples`) read them.
"""

import json
import os
import socket
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import reported_cases
from PIL import Image
from reported_cases import YOLO, Case
from tiny_coco import annotation, content, encode_mask, write

from solov2_jax.data import image_files, images
from solov2_jax.data.coco import load_coco
from solov2_jax.evaluation.coco import CocoEvaluator
from solov2_jax.evaluation.coco_score import read_ground_truth
from solov2_jax.inference.prediction import Prediction
from solov2_jax.tools.cli.importers import main as import_main
from solov2_jax.tools.doctor.data_report import Settings, examine
from solov2_jax.tools.doctor.grids import Layout
from solov2_jax.tools.report.results_file import evaluate_files
from solov2_jax.tools.tfds import examples

RANGES = ((1, 32), (16, 64), (32, 96), (64, 128), (96, 512))
SETTINGS = Settings(64, 96, Layout((16, 16, 8, 6, 4), RANGES, 0.2), keep_empty=True)


def perfect(path: str) -> list[dict]:
    """Returns predictions that equal the annotations, by the ids of the json."""
    with open(path, "rb") as file:
        values = json.loads(file.read())
    keys = ("image_id", "category_id", "segmentation")
    return [{**{k: a[k] for k in keys}, "score": 0.9} for a in values["annotations"]]


def read_by_all(folder: Path, values, results=None) -> dict[str, float]:
    """Returns what every command makes of a json: the number of objects, and the AP."""
    where, path = write(folder, values)
    train = load_coco(where, path)
    checked = examine((where, path), None, SETTINGS)
    assert len(checked.parts) == 1, checked.findings
    predictions = folder / "results.json"
    predictions.write_text(json.dumps(perfect(path) if results is None else results))
    metrics = evaluate_files(path, str(predictions))
    return {
        "train": len(train.labels),
        "doctor": len(checked.parts[0].objects.image),
        "records": sum(len(e["objects"]) for e in examples(train)),
        "AP": round(metrics["segm/AP"], 6),
    }


def refused_by_all(folder: Path, values) -> str:
    """Returns the one message with which every command refuses a json."""
    where, path = write(folder, values)
    predictions = folder / "results.json"
    predictions.write_text("[]")
    with pytest.raises(ValueError) as train:
        load_coco(where, path)
    with pytest.raises(ValueError) as evaluation:
        evaluate_files(path, str(predictions))
    checked = examine((where, path), None, SETTINGS)
    assert not checked.parts and checked.verdict == "error"
    message = str(train.value)
    assert str(evaluation.value) == message
    assert [f.text for f in checked.findings] == [message]
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def changed(kind="annotations", **changes):
    values = content()
    for record in values[kind]:
        record |= changes
    return values


ALL_READ = {"train": 3, "doctor": 3, "records": 3, "AP": 1.0}


@pytest.mark.parametrize("field", ["iscrowd", "id", "bbox", "area"])
@pytest.mark.parametrize("value", [None, "absent"])
def test_null_is_absent_for_every_optional_field(tmp_path, field, value):
    values = changed(**{field: None})
    if value == "absent":
        for record in values["annotations"]:
            del record[field]
    assert read_by_all(tmp_path, values) == ALL_READ


def test_no_segmentation_is_left_out_and_counted_the_same(tmp_path):
    values = content()
    values["annotations"][0]["segmentation"] = None
    where, path = write(tmp_path, values)
    data = load_coco(where, path)
    truth = read_ground_truth(path)
    assert data.counts["no_segmentation"] == truth.num_without_mask == 1
    assert len(data.labels) == len(truth.annotations) == 2
    assert [o["mask"] for e in examples(data) for o in e["objects"]].count("") == 1


def text_ids():
    """All ids as text, as VIA and others write them."""
    values = content()
    for record in (*values["images"], *values["categories"]):
        record["id"] = str(record["id"])
    for record in values["annotations"]:
        for key in ("image_id", "category_id"):
            record[key] = str(record[key])
        record["id"] = f"f3-000{record['id']}"
    return values


def test_ids_that_are_text_are_read(tmp_path):
    assert read_by_all(tmp_path, text_ids()) == ALL_READ
    data = load_coco(*write(tmp_path, text_ids()))
    assert data.image_ids.tolist() == [7, 3, 9]
    assert data.annotation_ids.tolist() == ["f3-0002", "f3-0003", "f3-0001"]


@pytest.mark.parametrize("base", [2**31, 2**63, 2**64, 10**30, -5])
def test_ids_of_any_size(tmp_path, base):
    values = content()
    for record in (*values["images"], *values["categories"]):
        record["id"] += base
    for record in values["annotations"]:
        record["image_id"] += base
        record["category_id"] += base
        record["id"] += base
    assert read_by_all(tmp_path, values) == ALL_READ
    where, path = write(tmp_path, values)
    data, truth = load_coco(where, path), read_ground_truth(path)
    assert data.image_ids.max() < 2**31 and data.image_ids.min() >= 0
    assert [truth.image_ids[i] for i in data.image_ids.tolist()] == [7 + base, 3 + base, 9 + base]
    assert str(data.annotation_ids[0]) == str(2 + base)


@pytest.mark.parametrize(
    "outline",
    [
        [10, 8, 30, 8, 30, 28, 10, 28],
        [[[10, 8, 30, 8, 30, 28, 10, 28]]],
        [[10, 8], [30, 8], [30, 28], [10, 28]],
        [[[10, 8], [30, 8], [30, 28], [10, 28]]],
    ],
)
def test_flat_and_nested_outlines_are_the_same_object(tmp_path, outline):
    values = changed(segmentation=outline, bbox=None, area=None)
    assert read_by_all(tmp_path, values) == ALL_READ
    truth = read_ground_truth(str(tmp_path / "instances.json"))
    assert [a["area"] for a in truth.annotations] == [400.0] * 3


DAMAGED = {"size": [48, 64], "counts": "~~"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(tmp_path, encoding):
    where, path = write(tmp_path)
    Path(path).write_bytes(json.dumps(content()).encode(encoding))
    assert len(load_coco(where, path).labels) == 3
    results = tmp_path / "r.json"
    results.write_bytes(json.dumps(perfect(path)).encode(encoding))
    assert evaluate_files(path, str(results))["segm/AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(iscrowd=2), "annotation 1: `iscrowd` is 2, not 0 or 1 (3 of 3 are not)"),
        (changed(iscrowd="yes"), 'annotation 1: `iscrowd` is "yes"'),
        (changed(area="big"), 'annotation 1: `area` is "big", not a number of pixels'),
        (changed(area=True), "annotation 1: `area` is true"),
        (changed(area=float("nan")), "annotation 1: `area` is NaN"),
        (changed(bbox=["1", 2, 3, 4]), 'annotation 1: `bbox` is ["1", 2, 3, 4], not four'),
        (changed(bbox=[1, 2, 3, float("inf")]), "`bbox` is [1, 2, 3, Infinity], not four"),
        (changed(bbox=[1, 2, 3, True]), "`bbox` is [1, 2, 3, true], not four"),
        (changed(segmentation=[["1", "2", "3", "4", "5", "6"]]), "must be a list of polygons"),
        (changed(segmentation=[[1, 2, 3, True, 5, 6]]), "must be a list of polygons"),
        (changed(segmentation=[[1, 2, 3, None, 5, 6]]), "must be a list of polygons"),
        (changed(segmentation=[[1, 2, 3, float("nan"), 5, 6]]), "coordinate that is no number"),
        (changed(segmentation=[[1, 2, 3, 10**400, 5, 6]]), "coordinate that is no number"),
        (
            content() | {"annotations": [annotation(6, 7, 5, segmentation=DAMAGED)]},
            "annotation 6: `segmentation` has damaged run lengths",
        ),
        (
            changed(image_id="photo"),
            'annotation 1: `image_id` is "photo", not a whole number (3 of 3',
        ),
        (changed(image_id=[7]), "annotation 1: `image_id` is [7], not"),
        (changed(category_id=1.5), "annotation 1: `category_id` is 1.5, not"),
        (changed(category_id=None), "annotation 1: has no `category_id` (3 of 3 have none)"),
        (
            changed(id=True),
            "annotation at place 0 (from 0): `id` is true, not a whole number",
        ),
        (
            changed("images", height="tall"),
            'image 7: `height` is "tall", not a whole number of at',
        ),
        (changed("images", width=True), "image 7: `width` is true, not"),
        (changed("images", width=float("nan")), "image 7: `width` is NaN, not"),
        (changed("images", height=2**30), "more than 4294967295 pixels"),
        (changed("images", file_name=7), "image 7: `file_name` is 7, not text"),
        (changed("categories", name=None), "category 20: has no `name` (2 of 2"),
        (changed("categories", name=["cat"]), 'category 20: `name` is ["cat"], not text'),
        (changed("categories", name=True), "category 20: `name` is true, not text"),
        (content() | {"annotations": [3]}, "entry 0 of `annotations` (from 0) is 3"),
        (content() | {"images": [None]}, "entry 0 of `images` (from 0) is null"),
        (content() | {"annotations": None}, "has no list `annotations`"),
        ([], "holds a json list, not an object with images"),
        ("[" * 100_000, "cannot be read as json (RecursionError"),
        (json.dumps(content())[:300], "cannot be read as json (JSONDecodeError"),
    ],
)
def test_one_sentence_in_every_command(tmp_path, values, message):
    assert message in refused_by_all(tmp_path, values)


def test_numbers_as_names_and_booleans_as_iscrowd(tmp_path):
    values = changed(iscrowd=False)
    values["categories"][0]["name"] = 20
    assert read_by_all(tmp_path, values) == ALL_READ
    assert load_coco(*write(tmp_path, values)).class_names == ("cat", "20")


def crowds(number: int):
    values = content()
    values["annotations"].append(annotation(4, 9, 5))
    for record in values["annotations"][:number]:
        record["iscrowd"] = 1
    return values


@pytest.mark.parametrize(("number", "level"), [(4, "error"), (3, "warning"), (2, None)])
def test_crowds_that_tools_wrote_are_named(tmp_path, number, level):
    result = examine(write(tmp_path, crowds(number)), None, SETTINGS)
    said = [f for f in result.findings if "iscrowd" in f.text]
    assert [f.level for f in said] == ([level] if level else [])
    if level:
        assert f"{number} of 4 annotations have iscrowd 1" in said[0].text


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("batch 1\\im.png", "batch 1/im.png"),
        ("batch%201/im%C3%A9.png", "batch 1/im\u00e9.png"),
        ("batch%201\\im.png", "batch 1/im.png"),
        ("\u00dcber \u00e9.png", unicodedata.normalize("NFD", "\u00dcber \u00e9.png")),
        (unicodedata.normalize("NFD", "\u00dcber \u00e9.png"), "\u00dcber \u00e9.png"),
        ("./a/../im.png", "im.png"),
    ],
)
def test_files_with_other_spellings_are_found(tmp_path, name, stored):
    values = content()
    values["images"][0]["file_name"] = name
    where, path = write(tmp_path, values)
    file = Path(where, stored)
    file.parent.mkdir(exist_ok=True)
    os.rename(Path(where, "a.png"), file)
    (Path(where) / "a").mkdir(exist_ok=True)
    data = load_coco(where, path)
    assert images.read_image(data.path(0)).shape == (48, 64, 3)
    assert examine((where, path), None, SETTINGS).verdict != "error"
    record = next(iter(examples(data)))
    assert record["image/file_name"] == name and os.path.isfile(record["image"])
    assert os.path.isfile(Path(where, read_ground_truth(path, where).images[7]["file_name"]))


@pytest.mark.parametrize("name", ["../out.png", "sub/../../out.png", "/etc/group", "..\\out.png"])
def test_file_names_stay_in_their_folder(tmp_path, name):
    Image.new("RGB", (64, 48)).save(tmp_path / "out.png")
    values = content()
    values["images"][0]["file_name"] = name
    where, path = write(tmp_path, values)
    with pytest.raises(ValueError, match="leads out of the image folder|are not in") as error:
        load_coco(where, path)
    assert json.dumps(name)[1:-1] in str(error.value) or name in str(error.value)
    assert examine((where, path), None, SETTINGS).verdict == "error"


def test_absolute_names_inside_of_the_folder_are_read(tmp_path):
    values = content()
    values["images"][0]["file_name"] = str(tmp_path / "images" / "a.png")
    assert len(load_coco(*write(tmp_path, values)).labels) == 3


def test_a_missing_file_and_one_like_it(tmp_path):
    values = content()
    values["images"][0]["file_name"] = "A.PNG"
    with pytest.raises(ValueError, match=r"are not in .*A.PNG \(the folder has a.png"):
        load_coco(*write(tmp_path, values))


def test_two_images_of_one_file_are_counted(tmp_path):
    values = content()
    values["images"].append({"id": 12, "file_name": "a.png", "height": 48, "width": 64})
    data = load_coco(*write(tmp_path, values))
    assert data.counts["shared_files"] == 1 and "same file" in data.summary()


# Pictures


def saved(path: Path, orientation: int) -> np.ndarray:
    """Writes a picture with a tag and returns its upright pixels, uint8 [h, w]."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((32, 48), np.uint8)
    stored[:8, :8], stored[-8:, :8] = 255, 128
    options = {"lossless": True} if path.suffix == ".webp" else {"quality": 100}
    options = {} if path.suffix in (".png", ".tif") else options
    Image.fromarray(stored).convert("RGB").save(path, exif=exif, **options)
    turns = {1: 0, 3: 2, 6: 3, 8: 1}
    if orientation in turns:
        return np.rot90(stored, turns[orientation])
    return {2: stored[:, ::-1], 4: stored[::-1], 5: stored.T, 7: stored.T[::-1, ::-1]}[orientation]


@pytest.mark.parametrize("suffix", [".tif", ".jpg", ".png", ".webp", ".avif"])
def test_headers_and_pixels_agree_for_every_orientation(tmp_path, suffix):
    for orientation in range(1, 9):
        path = tmp_path / f"x{orientation}{suffix}"
        upright = saved(path, orientation)
        pixels = images.read_image(path)[..., 0].astype(int)
        header = images.read_header(str(path))
        assert pixels.shape == upright.shape == (header.height, header.width), orientation
        assert np.abs(pixels - upright).mean() < 4, orientation


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_sixteen_bits_are_scaled_from_those_that_are_used(tmp_path, suffix, bits, caplog):
    image_files._said.clear()
    eight = np.linspace(40, 220, 48 * 32).reshape(32, 48).astype(np.uint8)
    path = tmp_path / f"x{suffix}"
    for _ in range(2):
        Image.fromarray(eight.astype(np.uint16) << (bits - 8)).save(path)
        np.testing.assert_array_equal(images.read_image(path)[..., 0], eight)
    assert caplog.text.count("bits, not 16") == (bits != 16)


def sixteen_bit_png(path: Path, values: np.ndarray) -> None:
    """Writes uint16 [h, w, 3], which Pillow does not."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
            for k, d in chunks
        )
    )


def test_dark_sixteen_bit_colours_are_said_once(tmp_path, caplog):
    image_files._said.clear()
    values = np.full((6, 8, 3), 60_000, np.uint16)
    sixteen_bit_png(tmp_path / "full.png", values)
    assert (images.read_image(tmp_path / "full.png") == 60_000 // 256).all()
    assert not caplog.text
    sixteen_bit_png(tmp_path / "twelve.png", values >> 4)
    for _ in range(2):
        images.read_image(tmp_path / "twelve.png")
    assert caplog.text.count("16-bit colours reach only 14 of 255") == 1


def test_of_several_pages_the_first_is_read_and_that_is_said_once(tmp_path, caplog):
    image_files._said.clear()
    pages = [Image.new("RGB", (8, 6), (i * 40, 0, 0)) for i in range(3)]
    for name in ("a.tif", "b.tif", "c.gif"):
        pages[1].save(tmp_path / name, save_all=True, append_images=pages)
        assert images.read_image(tmp_path / name)[0, 0, 0] == 40
        assert images.read_header(str(tmp_path / name)).several
    assert caplog.text.count("several pages or frames") == 1
    assert not images.read_header(str(write(tmp_path)[0]) + "/a.png").several


def test_pipes_sockets_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "b.png"))
        (tmp_path / "c.png").mkdir()
        os.symlink("/dev/zero", tmp_path / "d.png")
        for name, what in (("a", "pipe"), ("b", "pipe"), ("c", "folder"), ("d", "pipe")):
            with pytest.raises(ValueError, match=f"{name}.png: is a {what}"):
                images.read_image(tmp_path / f"{name}.png")


def test_lists_of_images_leave_junk_out_and_end(tmp_path, caplog):
    names = ["a.jpg", "b.JFIF", "sub/c.avif", "sub/d.jp2", "e.pgm"]
    junk = ["._a.jpg", ".ipynb_checkpoints/a.jpg", "__MACOSX/a.jpg", "Thumbs.db", "notes.txt"]
    for name in (*names, *junk, "sub/@eaDir/c.jpg", "movie.mpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "sub" / "loop")
    os.symlink(tmp_path / "sub", tmp_path / "again")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "gone.png", tmp_path / "dangling.png")
    assert images.list_images(tmp_path) == sorted(names)
    assert "pipe.png: left out" in caplog.text and "dangling.png: left out" in caplog.text


def test_suffixes_are_those_of_pillow_and_its_plugins(monkeypatch):
    suffixes = images.image_suffixes()
    assert {".jfif", ".jpe", ".avif", ".webp", ".tiff", ".pgm", ".jp2", ".tga"} <= set(suffixes)
    assert not {".eps", ".pdf", ".mpg", ".h5"} & set(suffixes)
    monkeypatch.setitem(Image.OPEN, "TOY", (None, None))
    monkeypatch.setitem(Image.EXTENSION, ".toy", "TOY")
    assert ".toy" in images.image_suffixes()


def test_the_limit_of_pixels_is_a_setting_and_its_error_names_the_flag(tmp_path, monkeypatch):
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ValueError, match="more than 40 pixels. Raise the limit .*--max_pixels"):
        images.read_image(tmp_path / "x.png")
    monkeypatch.setattr(image_files, "max_pixels", 100)
    assert images.read_image(tmp_path / "x.png").shape == (10, 10, 3)


# Importers


def photo(path: Path, size=(64, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


LINE = "0 0.1 0.1 0.5 0.1 0.5 0.5\n"


def label(path: Path, text: str = LINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def imported(folder: Path, *arguments: str) -> dict:
    """Returns the json that a command writes."""
    out = folder / "out.json"
    import_main([*arguments, f"--output={out}"])
    return json.loads(out.read_text())


def files_of(values: dict) -> list[str]:
    return sorted(i["file_name"] for i in values["images"])


@pytest.mark.parametrize(
    ("yaml", "split", "image", "labels"),
    [
        ("train: ../train/images\n", "train", "train/images", "train/labels"),  # Roboflow
        ("test: ../test/images\n", "test", "test/images", "test/labels"),
        ("train: images/train\n", "train", "images/train", "labels/train"),
        ("path: data\ntrain: images\n", "train", "data/images", "data/labels"),
        ("path: ./\ntrain: images\\train\n", "train", "images/train", "labels/train"),
        ("path: null\ntrain: [images/a, images/b]\n", "train", "images/a", "labels/a"),
        ("train: photos\n", "train", "photos", "photos"),  # labels beside the images
    ],
)
def test_folders_of_a_data_yaml(tmp_path, yaml, split, image, labels):
    photo(tmp_path / image / "x.jpg")
    label(tmp_path / labels / "x.txt")
    if "/b" in yaml:
        photo(tmp_path / "images" / "b" / "y.jpg")
    (tmp_path / "data.yaml").write_text(yaml + "names: [cat]\n")
    values = imported(tmp_path, "yolo", f"--data={tmp_path}/data.yaml", f"--split={split}")
    assert len(values["annotations"]) == 1
    assert files_of(values) == (["a/x.jpg", "b/y.jpg"] if "/b" in yaml else ["x.jpg"])


@pytest.mark.parametrize("line", ["images/train/x.jpg", "./images/train/x.jpg", "absolute"])
def test_a_list_of_files_in_a_data_yaml(tmp_path, line):
    photo(tmp_path / "images/train/x.jpg")
    photo(tmp_path / "images/train/not_listed.jpg")
    label(tmp_path / "labels/train/x.txt")
    line = str(tmp_path / "images/train/x.jpg") if line == "absolute" else line
    (tmp_path / "train.txt").write_text(f"\ufeff{line}\r\n\r\n")
    (tmp_path / "data.yaml").write_text("path: ./\ntrain: train.txt\nnames:\n  0: cat\n")
    assert files_of(imported(tmp_path, "yolo", f"--data={tmp_path}/data.yaml")) == ["x.jpg"]


@pytest.mark.parametrize(
    "names", ["[yes, no, null]", "\n  0: yes\n  1: no\n  2: null", "['yes', \"no\", null ]"]
)
def test_names_are_as_written(tmp_path, names):
    photo(tmp_path / "images" / "x.jfif")
    label(tmp_path / "labels" / "x.txt")
    (tmp_path / "data.yaml").write_bytes(f"\ufefftrain: images\r\nnames: {names}\n".encode())
    values = imported(tmp_path, "yolo", f"--data={tmp_path}/data.yaml")
    assert [c["name"] for c in values["categories"]] == ["yes", "no", "null"]
    assert files_of(values) == ["x.jfif"]


@pytest.mark.parametrize(
    "text",
    [
        "0.000000e+00 1e-1 1e-1 5e-1 1e-1 5e-1 5e-1",
        "\ufeff0\t0.1 0.1\t0.5 0.1 0.5 0.5  \r\n\r\n",
        "0.0 0.1 0.1 0.5 0.1 0.5 0.5",
    ],
)
def test_lines_of_labels(tmp_path, text):
    photo(tmp_path / "images" / "x.jpg")
    photo(tmp_path / "images" / "empty.jpg")
    label(tmp_path / "labels" / "x.txt", text)
    label(tmp_path / "labels" / "empty.txt", "")
    arguments = [f"--images={tmp_path}/images", f"--labels={tmp_path}/labels", "--names=cat"]
    assert len(imported(tmp_path, "yolo", *arguments)["annotations"]) == 1


def test_junk_is_ignored_by_the_importers(tmp_path):
    for name in ("x.jpg", ".ipynb_checkpoints/x.jpg"):
        photo(tmp_path / "images" / name)
        label(tmp_path / "labels" / Path(name).with_suffix(".txt"))
    for name in ("images/._x.jpg", "labels/._x.txt", "labels/.ipynb_checkpoints/x-checkpoint.txt"):
        label(tmp_path / name, "Mac OS X")
    arguments = [f"--images={tmp_path}/images", f"--labels={tmp_path}/labels", "--names=cat"]
    assert files_of(imported(tmp_path, "yolo", *arguments)) == ["x.jpg"]
    points = [[1, 1], [9, 1], [9, 9]]
    shape = {"label": "cat", "points": points, "group_id": None, "shape_type": None}
    record = json.dumps({"imagePath": "x.jpg", "shapes": [shape]})
    for name in ("x.json", ".ipynb_checkpoints/x-checkpoint.json"):
        label(tmp_path / "images" / name, f"\ufeff{record}")
    label(tmp_path / "images" / "._x.json", "Mac OS X")
    values = imported(tmp_path, "labelme", f"--images={tmp_path}/images")
    assert files_of(values) == ["x.jpg"] and len(values["annotations"]) == 1


def test_images_and_masks_in_one_folder(tmp_path):
    photo(tmp_path / "x.jpg")
    mask = np.zeros((48, 64), np.uint8)
    mask[8:20, 8:20] = 1
    Image.fromarray(mask).save(tmp_path / "x.png")
    arguments = [f"--images={tmp_path}", f"--objects={tmp_path}", "--names=cat"]
    values = imported(tmp_path, "masks", *arguments)
    assert files_of(values) == ["x.jpg"]
    assert values["annotations"][0]["segmentation"] == encode_mask(mask > 0)
    photo(tmp_path / "x.bmp")
    with pytest.raises(SystemExit):
        imported(tmp_path, "masks", *arguments)


def test_labels_that_are_nowhere_are_an_error_and_not_empty_images(tmp_path, capsys):
    photo(tmp_path / "images" / "x.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\n")
    with pytest.raises(SystemExit):
        imported(tmp_path, "yolo", f"--data={tmp_path}/data.yaml")
    assert "none of its 1 images has a label file" in capsys.readouterr().err


def test_predictions_of_batches_get_the_ids_of_the_json(tmp_path):
    values = content()
    for record in values["images"]:
        record["id"] += 2**63
    for record in values["annotations"]:
        record["image_id"] += 2**63
    data = load_coco(*write(tmp_path, values))
    evaluator = CocoEvaluator(data.annotation_file, data.category_ids, data.class_names)
    mask = np.zeros((1, 48, 64), bool)
    mask[0, 8:28, 10:30] = True
    evaluator.process(
        Prediction(
            masks=mask,
            boxes=np.array([[10, 8, 30, 28]], np.float32),
            scores=np.array([0.9], np.float32),
            labels=np.array([0]),
            image_id=int(data.image_ids[0]),
        )
    )
    assert [r["image_id"] for r in evaluator.results] == [7 + 2**63]


def test_the_script_of_reported_cases_tells_right_from_wrong(tmp_path):
    photo(tmp_path / "c" / "images" / "x.jpg")
    label(tmp_path / "c" / "labels" / "x.txt")
    (tmp_path / "c" / "data.yaml").write_text("train: images\nnames: [yes]\n")

    def fault(right: str, **changes) -> str:
        return reported_cases.fault(Case("c", YOLO, right, **changes), tmp_path, tmp_path)

    assert fault("1 images .* 1 objects") == fault('"name": "yes"') == ""
    assert fault("2 images").startswith("not said: ")
    assert fault("1 images", code=1).startswith("exit code 0")
    assert fault("1 images", check=lambda printed, out: "no " + out.name[:3]) == "no tmp"


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("nc: 3\nnames: [cat]", "`nc` is 3, but `names` has 1"),
        ("nc: [1]\nnames: [cat]", "`nc` is ['1'], but `names` has 1"),
        ("names: {0: cat, 5: dog}", "without gaps"),
        ("names: cat", "has no `names`"),
        ("names: [[cat]]", "must be a list of texts"),
        ("names: {? [0] : cat}", "cannot be read as YAML"),
    ],
)
def test_a_data_yaml_that_contradicts_itself(tmp_path, capsys, yaml, message):
    photo(tmp_path / "images" / "x.jpg")
    label(tmp_path / "labels" / "x.txt")
    (tmp_path / "data.yaml").write_text(f"train: images\n{yaml}\n")
    with pytest.raises(SystemExit):
        imported(tmp_path, "yolo", f"--data={tmp_path}/data.yaml")
    assert message in capsys.readouterr().err
    (tmp_path / "data.yaml").write_text("train: images\nnc: 1\nnames: [cat]\n")
    assert imported(tmp_path, "yolo", f"--data={tmp_path}/data.yaml")["annotations"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 5}, "`label` is 5, not text"),
        ({"label": None}, "has no `label`"),
        ({"points": "x"}, "`points` must be pairs"),
        ({"shape_type": ["polygon"]}, "`shape_type` ['polygon'] with 3 points"),
        ({"group_id": [1]}, ""),
    ],
)
def test_odd_shapes_of_labelme(tmp_path, capsys, changes, message):
    photo(tmp_path / "x.jpg")
    shape = {"label": "cat", "points": [[1, 1], [20, 1], [20, 20]], "shape_type": "polygon"}
    record = {"imagePath": "x.jpg", "shapes": [{**shape, **changes}, {**shape, **changes}]}
    (tmp_path / "x.json").write_text(json.dumps(record))
    if message:
        with pytest.raises(SystemExit):
            imported(tmp_path, "labelme", f"--images={tmp_path}")
        assert message in capsys.readouterr().err
    else:
        assert len(imported(tmp_path, "labelme", f"--images={tmp_path}")["annotations"]) == 1
