"""Other formats -> COCO: what goes out comes back, and bad files are named."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_coco import annotation, content, square, whole, write

from solov2_jax.data.coco import CocoDataset, load_coco
from solov2_jax.data.rasterize import draw_object
from solov2_jax.tools.cli.importers import main
from solov2_jax.tools.importers.instances import read_names
from solov2_jax.tools.importers.recognise import recognise
from solov2_jax.tools.importers.yolo import files_of_folders, import_yolo
from solov2_jax.tools.synthetic.shapes import ShapesSettings, write_shapes

ROOT = Path(__file__).resolve().parent.parent
Objects = list[tuple[str, str, np.ndarray]]


def objects(dataset: CocoDataset) -> Objects:
    """Returns (file, class, mask) of every object."""
    found = []
    for i in range(len(dataset)):
        size = int(dataset.heights[i]), int(dataset.widths[i])
        for a in range(dataset.start[i], dataset.start[i + 1]):
            crop = draw_object(dataset.segmentations, a, size)
            name = dataset.class_names[dataset.labels[a]]
            found.append((str(dataset.file_names[i]), name, whole(crop, size)))
    return found


def key(item: tuple[str, str, np.ndarray]) -> tuple:
    return item[0], item[1], item[2].tobytes()


def assert_same(a: CocoDataset, b: CocoDataset) -> None:
    """The same images, classes and masks, in any order."""
    assert a.class_names == b.class_names
    assert sorted(a.file_names) == sorted(b.file_names)
    for x, y in zip(sorted(objects(a), key=key), sorted(objects(b), key=key), strict=True):
        assert x[:2] == y[:2]
        np.testing.assert_array_equal(x[2], y[2])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> CocoDataset:
    """Generated scenes: polygons and run lengths, objects in parts, empty images."""
    root = tmp_path_factory.mktemp("shapes")
    settings = ShapesSettings(num_train=12, num_val=1, height=64, width=80, empty_fraction=0.2)
    folder = write_shapes(str(root), settings)
    return load_coco(f"{folder}/train", f"{folder}/instances_train.json")


def boxes_only(folder: Path) -> CocoDataset:
    """Returns images of several sizes, one in a subfolder, with polygons."""
    return load_coco(*write(folder))


def to_yolo(dataset: CocoDataset, labels: Path) -> None:
    for i, name in enumerate(dataset.file_names.tolist()):
        size = [dataset.widths[i], dataset.heights[i]]
        lines = []
        for a in range(dataset.start[i], dataset.start[i + 1]):
            (polygon,) = dataset.segmentations.polygons(a)
            values = (polygon.reshape(-1, 2) / size).ravel()
            lines.append(f"{dataset.labels[a]} " + " ".join(f"{v:.9f}" for v in values.tolist()))
        path = labels / Path(name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines:
            path.write_text("\n".join(lines) + "\n")


def test_yolo_comes_back(tmp_path):
    data = boxes_only(tmp_path)
    to_yolo(data, tmp_path / "labels")
    yaml = tmp_path / "data.yaml"
    yaml.write_text("train: images\nnames:\n  0: cat\n  1: dog\n")
    out = tmp_path / "out" / "train.json"
    main(["yolo", f"--data={yaml}", f"--output={out}"])
    again = load_coco(data.image_root, str(out))
    assert_same(data, again)
    np.testing.assert_allclose(np.sort(again.boxes, 0), np.sort(data.boxes, 0), atol=2e-3)
    assert again.category_ids == (1, 2)
    other = tmp_path / "other.json"
    main(
        ["yolo", f"--images={data.image_root}", f"--labels={tmp_path}/labels"]
        + ["--names=cat,dog", f"--output={other}"]
    )
    assert other.read_text() == out.read_text()


def encode(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def to_labelme(dataset: CocoDataset, folder: Path) -> None:
    """Writes polygons as shapes of one group, run lengths as masks of their box."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(dataset.file_names.tolist()):
        size = int(dataset.heights[i]), int(dataset.widths[i])
        shapes = []
        for a in range(dataset.start[i], dataset.start[i + 1]):
            base = {"label": dataset.class_names[dataset.labels[a]], "group_id": None}
            polygons = dataset.segmentations.polygons(a)
            for polygon in polygons:
                points = polygon.reshape(-1, 2).tolist()
                group = a if len(polygons) > 1 else None
                shape = {"shape_type": "polygon", "points": points, "group_id": group}
                shapes.append(base | shape)
            if not polygons:
                crop = draw_object(dataset.segmentations, a, size)
                assert crop is not None
                h, w = crop.pixels.shape
                corner = [crop.left, crop.top]
                ends = [corner, [crop.left + w - 1, crop.top + h - 1]]
                mask = {"points": ends, "mask": encode(crop.pixels)}
                shapes.append(base | {"shape_type": "mask"} | mask)
        record = {"imagePath": f"..\\images\\{name}", "shapes": shapes}
        record |= {"imageHeight": size[0], "imageWidth": size[1], "imageData": None}
        (folder / f"{Path(name).stem}.json").write_text(json.dumps(record))


def test_labelme_comes_back(tmp_path, shapes, capsys):
    (tmp_path / "images").symlink_to(shapes.image_root)
    to_labelme(shapes, tmp_path / "json")
    some = sorted((tmp_path / "json").glob("*.json"))[0]
    record = json.loads(some.read_text())
    extra = {"points": [[1, 1]], "group_id": None}
    record["shapes"] += [extra | {"label": "star", "shape_type": "point"}]
    record["shapes"] += [extra | {"label": "__ignore__", "shape_type": "polygon"}]
    some.write_text(json.dumps(record))
    out = tmp_path / "train.json"
    arguments = ["labelme", f"--images={tmp_path}/images", f"--labels={tmp_path}/json"]
    main([*arguments, "--ignore=__ignore__", f"--output={out}"])
    again = load_coco(str(tmp_path / "images"), str(out))
    assert sorted(again.class_names) == sorted(shapes.class_names)
    main(
        [*arguments, "--ignore=__ignore__", f"--names={shapes.annotation_file}"]
        + [f"--output={out}"]
    )
    again = load_coco(str(tmp_path / "images"), str(out))
    assert_same(shapes, again)
    assert again.category_ids == shapes.category_ids
    said = capsys.readouterr().out
    assert "1 shapes left out: shape_type point" in said
    assert "1 shapes left out: label __ignore__" in said


def test_labelme_rectangle_circle_and_group(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    shapes = [
        {"label": "a", "shape_type": "rectangle", "points": [[30, 5], [10, 15]]},
        {"label": "a", "shape_type": "circle", "points": [[30, 20], [30, 30]]},
        {"label": "b", "group_id": 1, "points": [[1, 1], [6, 1], [6, 6], [1, 6]]},
        {"label": "b", "group_id": 1, "points": [[9, 1], [12, 1], [12, 6], [9, 6]]},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": shapes}))
    main(["labelme", f"--images={tmp_path}", f"--output={tmp_path}/out/x.json"])
    data = load_coco(str(tmp_path), str(tmp_path / "out" / "x.json"))
    rectangle, circle, pair = (mask for _, _, mask in objects(data))
    assert rectangle.sum() == 200 and rectangle[5:15, 10:30].all()
    assert abs(circle.sum() - np.pi * 100) < 8  # half a pixel around the edge
    assert pair.sum() == 25 + 15
    assert data.class_names == ("a", "b")


def to_png(dataset: CocoDataset, folder: Path, palette: bool) -> None:
    """Writes SegmentationObject and SegmentationClass; later objects lie on top."""
    for kind in ("object", "class"):
        (folder / kind).mkdir(parents=True)
    for i, name in enumerate(dataset.file_names.tolist()):
        size = int(dataset.heights[i]), int(dataset.widths[i])
        numbers, kinds = np.zeros(size, np.uint16), np.zeros(size, np.uint8)
        for a in range(dataset.start[i], dataset.start[i + 1]):
            crop = draw_object(dataset.segmentations, a, size)
            mask = whole(crop, size) > 0
            numbers[mask] = a - dataset.start[i] + 1 + (0 if palette else 300)
            kinds[mask] = dataset.category_ids[dataset.labels[a]]
        for kind, values in (("object", numbers), ("class", kinds)):
            if palette or kind == "class":
                image = Image.fromarray(values.astype(np.uint8))
                image.putpalette(np.random.default_rng(0).bytes(768))
            else:
                image = Image.fromarray(values)
            image.save(folder / kind / f"{Path(name).stem}.png")


@pytest.mark.parametrize("palette", [True, False])
def test_png_masks_come_back(tmp_path, shapes, palette):
    to_png(shapes, tmp_path, palette)
    out = tmp_path / "train.json"
    main(
        ["masks", f"--images={shapes.image_root}", f"--objects={tmp_path}/object"]
        + [f"--classes={tmp_path}/class", f"--names={shapes.annotation_file}"]
        + [f"--output={out}"]
    )
    assert_same(shapes, load_coco(shapes.image_root, str(out)))


def test_void_and_one_class(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg")
    values = np.zeros((6, 8), np.uint8)
    values[:2], values[3], values[5] = 1, 255, 7
    (tmp_path / "m").mkdir()
    Image.fromarray(values).save(tmp_path / "m" / "a.png")
    arguments = ["masks", f"--images={tmp_path}", f"--objects={tmp_path}/m"]
    out = tmp_path / "x.json"
    main([*arguments, "--names=cell", f"--output={out}"])
    assert len(load_coco(str(tmp_path), str(out)).labels) == 3
    main([*arguments, "--names=cell", "--void=255", f"--output={out}"])
    data = load_coco(str(tmp_path), str(out))
    assert [int(m.sum()) for _, _, m in objects(data)] == [16, 8]


def test_names_of_every_source(tmp_path):
    def file(name: str, text: str) -> dict[int, str]:
        (tmp_path / name).write_text(text)
        return read_names(str(tmp_path / name))

    cats = {1: "cat", 2: "dog"}
    assert read_names("cat, dog") == cats
    assert file("a.txt", "\ufeffcat\ndog\n\n") == cats
    assert file("a.yaml", "names: [cat, dog]") == cats
    assert file("a.yml", "names: {1: dog, 0: cat}") == cats
    categories = [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]
    assert file("a.json", json.dumps({"categories": categories})) == {
        4: "cat",
        9: "dog",
    }
    classes = json.dumps({"names": ["cat", "dog"], "ids": [4, 9]})
    assert file("classes.json", classes) == {4: "cat", 9: "dog"}
    for ids, names, message in (
        ([1, 2], ["cat", "cat"], "more than once"),
        ([1, 1], ["cat", "dog"], "an id more than once"),
        ([1, 2.5], ["cat", "dog"], "an id is no whole number"),
        ([1, 2], ["cat", 7], "a name no text"),
        ([1, 2], ["cat", ""], "an empty name"),
    ):
        categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
        for values in ({"names": names, "ids": ids}, {"categories": categories}):
            with pytest.raises(ValueError, match=f"a.json: .*{message}"):
                file("a.json", json.dumps(values))
    with pytest.raises(ValueError, match="b.txt: no such file"):
        read_names(str(tmp_path / "b.txt"))
    with pytest.raises(ValueError, match="more than once"):
        read_names("cat,cat")
    with pytest.raises(ValueError, match=r"`names` are \[0, 2\]"):
        file("a.yml", "names: {0: dog, 2: cat}")
    with pytest.raises(ValueError, match="a.json: cannot be read as COCO"):
        file("a.json", "{}")


def fail(capsys, *arguments: str) -> str:
    """Returns the one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


TRIANGLE = "0 0.1 0.1 0.5 0.1 0.5 0.5\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.2 0\n", "line 1: the box .* covers nothing of its image of 48 x 64"),
        (TRIANGLE + "0 0.1 0.1 0.5 0.1\n0 1 2 3", "line 3: 3 numbers"),
        ("0 0.1 0.1 0.5 0.1 0.5\n", "line 1: 5 numbers after the class"),
        (TRIANGLE + "\n2 0 0 0 1 1 1\n", "line 3: class 2, but there are 2 names"),
        ("0 10 10 50 10 50 50\n", "must be shares .* 10 to 50"),
        ("cat 0.1 0.1 0.5 0.1 0.5 0.5\n", "is not `class x1 y1 x2 y2 ...`"),
        ("0 nan 0.1 0.5 0.1 0.5 0.5\n", "must be shares"),
    ],
)
def test_a_bad_yolo_line_is_named(tmp_path, capsys, text, message):
    images, _ = write(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text(text)
    names = ["--names=cat,dog", f"--output={tmp_path}/x.json"]
    said = fail(capsys, "yolo", f"--images={images}", f"--labels={tmp_path}/labels", *names)
    assert "labels/a.txt: line" in said
    assert re.search(message, said), said
    assert not (tmp_path / "x.json").exists()


def test_yolo_labels_without_image_and_wrong_folders(tmp_path, capsys):
    images, _ = write(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "zebra.txt").write_text(TRIANGLE)
    out = f"--output={tmp_path}/x.json"
    folders = [f"--images={images}", f"--labels={tmp_path}/labels"]
    said = fail(capsys, "yolo", *folders, "--names=cat", out)
    assert "1 of 1 label files have no image" in said and "zebra.txt" in said
    said = fail(capsys, "yolo", folders[0], "--labels=/nowhere", "--names=c", out)
    assert "/nowhere: no such folder" in said
    assert "--names: give" in fail(capsys, "yolo", *folders, out)
    yaml = tmp_path / "data.yaml"
    yaml.write_text("train: pictures\nnames: [cat]\n")
    said = fail(capsys, "yolo", f"--data={yaml}", out)
    assert "data.yaml: `train` is pictures, but there is no folder" in said
    said = fail(capsys, "yolo", f"--data={yaml}", "--split=val", out)
    assert "no folder of images under `val`; there are ['train']" in said


def shape(**changes) -> dict:
    points = {"points": [[1, 1], [9, 1], [9, 9]]}
    return {"label": "cat", "shape_type": "polygon"} | points | changes


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"shapes": [shape(label="lion")]}, "shape 0: `label` 'lion' is not among"),
        ({"shapes": [shape(), shape(points=[[1, 2]])]}, "shape 1: .* with 1 points"),
        ({"shapes": [shape(points="x")]}, "shape 0: `points` must be pairs"),
        ({"shapes": [shape(shape_type="blob")]}, "`shape_type` 'blob'"),
        (
            {"shapes": [shape(shape_type="mask", points=[[0, 0], [5, 5]])]},
            "shape 0: `mask`: cannot be read as a PNG in base64",
        ),
        (
            {
                "shapes": [
                    shape(
                        shape_type="mask",
                        points=[[60, 0], [70, 3]],
                        mask=encode(np.ones((4, 11))),
                    )
                ]
            },
            "mask of 4 x 11 pixels at 60, 0 leaves the image of 48 x 64",
        ),
        ({"shapes": [{"points": []}]}, "shape 0: has no `label`"),
        ({"imageHeight": 10, "imageWidth": 64}, r"are \(10, 64\), but .* is 48 x 64"),
        ({"imagePath": "z.png"}, "a.json: `imagePath` z.png: there is neither"),
        ({"shapes": 3}, "a.json: has no list `shapes`"),
    ],
)
def test_a_bad_labelme_file_is_named(tmp_path, capsys, record, message):
    images, _ = write(tmp_path)
    content = {"imagePath": "../images/a.png", "shapes": []} | record
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.json").write_text(json.dumps(content))
    said = fail(
        capsys,
        "labelme",
        f"--images={images}",
        f"--labels={tmp_path}/json",
        "--names=cat",
        f"--output={tmp_path}/x.json",
    )
    assert "json/a.json" in said
    assert re.search(message, said), said


def test_a_bad_png_mask_is_named(tmp_path, capsys):
    images, _ = write(tmp_path)
    for folder in ("m", "c"):
        (tmp_path / folder).mkdir()

    def run(objects, classes=None, names="cat"):
        Image.fromarray(objects).save(tmp_path / "m" / "a.png")
        extra = []
        if classes is not None:
            Image.fromarray(classes).save(tmp_path / "c" / "a.png")
            extra = [f"--classes={tmp_path}/c"]
        return fail(
            capsys,
            "masks",
            f"--images={images}",
            f"--objects={tmp_path}/m",
            *extra,
            f"--names={names}",
            f"--output={tmp_path}/x.json",
        )

    good = np.ones((48, 64), np.uint8)
    said = run(np.zeros((48, 64, 3), np.uint8))
    assert "m/a.png: is a picture of mode RGB" in said
    assert "is 48 x 60, but its image a.png is 48 x 64" in run(good[:, :60].copy())
    assert "2 class names, but no --classes" in run(good, names="cat,dog")
    halves = good.copy()
    halves[:20] = 2
    said = run(good, halves, "cat,dog")
    assert "object 1: its pixels have the classes [1, 2]" in said
    said = run(good, good * 9, "cat,dog")
    assert "is of class 9, which has no name; there are 1 (cat), 2 (dog)" in said
    Image.fromarray(good).save(tmp_path / "m" / "lion.png")
    assert "1 of 2 masks have no image" in run(good)


def test_sizes_are_those_after_the_exif_orientation(tmp_path):
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    picture.save(tmp_path / "images" / "a.jpg", exif=exif)
    (tmp_path / "labels" / "a.txt").write_text(TRIANGLE)
    out = tmp_path / "x.json"
    main(
        ["yolo", f"--images={tmp_path}/images", f"--labels={tmp_path}/labels"]
        + ["--names=cat", f"--output={out}"]
    )
    data = load_coco(str(tmp_path / "images"), str(out))
    assert (data.heights[0], data.widths[0]) == (40, 20)
    np.testing.assert_allclose(data.boxes[0], [2, 4, 10, 20], atol=1e-3)


def test_the_command_needs_no_jax(tmp_path):
    values = content() | {"annotations": [annotation(1, 7, 5, segmentation=square(4, 4, 9))]}
    data = load_coco(*write(tmp_path, values))
    to_yolo(data, tmp_path / "labels")
    script = (
        "import sys; sys.modules['jax'] = None\n"
        "from solov2_jax.tools.cli.importers import main\n"
        f"main(['yolo', '--images={data.image_root}', '--labels={tmp_path}/labels', "
        f"'--names=cat,dog', '--output={tmp_path}/x.json'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 objects of 2 classes" in done.stdout


def test_yolo_labels_are_found_whatever_the_case_of_their_ending(tmp_path):
    images, _ = write(tmp_path)
    (tmp_path / "labels" / "sub").mkdir(parents=True)
    (tmp_path / "labels" / "a.TXT").write_text(TRIANGLE)
    (tmp_path / "labels" / "sub" / "b.txt").write_text(TRIANGLE + TRIANGLE)
    files = files_of_folders(str(images), str(tmp_path / "labels"))
    found = import_yolo(files, {1: "cat"})
    assert [a["image_id"] for a in found.annotations] == [1, 3, 3]


def test_yolo_boxes_have_no_outline(tmp_path, capsys):
    images, _ = write(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text(TRIANGLE + "1 0.5 0.5 0.25 0.5\n1 0 0 0.5 0.5\n")
    out = tmp_path / "x.json"
    folders = [f"--images={images}", f"--labels={tmp_path}/labels"]
    main(["yolo", *folders, "--names=cat,dog", f"--output={out}"])
    assert "2 objects have a box and no segmentation" in capsys.readouterr().out
    outline, box, corner = json.loads(out.read_text())["annotations"]
    assert outline["segmentation"] and not box["segmentation"]
    assert box["bbox"] == [24, 12, 16, 24] and corner["bbox"] == [0, 0, 16, 12]
    assert [outline["category_id"], box["category_id"]] == [1, 2]


VOC_OBJECT = """<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin>
<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>{}</object>"""


def write_voc(folder, objects, size=(48, 64), stem="a"):
    """Writes one of VOC's XML files; objects are (name, xmin, ymin, xmax, ymax, more)."""
    folder.mkdir(parents=True, exist_ok=True)
    inner = "".join(VOC_OBJECT.format(*(*o, "")[:6]) for o in objects)
    (folder / f"{stem}.xml").write_text(
        f"<annotation><filename>{stem}.png</filename><size><width>{size[1]}</width>"
        f"<height>{size[0]}</height><depth>3</depth></size>{inner}</annotation>"
    )


def test_voc_boxes_count_from_one_unless_one_starts_at_zero(tmp_path, capsys):
    images, _ = write(tmp_path)
    labels, out = tmp_path / "Annotations", tmp_path / "x.json"
    polygon = "<polygon><x1>1</x1><y1>2</y1><x2>9</x2><y2>2</y2><x3>9</x3><y3>8</y3></polygon>"
    write_voc(labels, [("dog", 11, 9, 30, 28), ("chat é", 1, 1, 64, 48, polygon)])
    write_voc(labels / "sub", [("dog", 5, 5, 6, 6)], ("\n 64 ", "48.0"), "b")
    main(["voc", f"--images={images}", f"--labels={labels}", f"--output={out}"])
    assert "1 images have no XML file: left out" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert [i["file_name"] for i in content["images"]] == ["a.png", "sub/b.png"]
    assert [c["name"] for c in content["categories"]] == ["chat é", "dog"]
    box, drawn, small = content["annotations"]
    assert box["bbox"] == [10, 8, 20, 20] and not box["segmentation"] and box["area"] == 400
    assert drawn["segmentation"] == [[1, 2, 9, 2, 9, 8]] and small["bbox"] == [4, 4, 2, 2]
    write_voc(labels, [("dog", 0, 9, 30, 28)])
    main(["voc", f"--images={images}", f"--labels={labels}", f"--output={out}"])
    assert json.loads(out.read_text())["annotations"][0]["bbox"] == [0, 9, 30, 19]


@pytest.mark.parametrize(
    ("objects", "size", "stem", "message"),
    [
        ([("dog", 5, 5, 5, 2)], (48, 64), "a", "object 0: the box .* covers nothing"),
        ([("dog", 5, 5, "x", 9)], (48, 64), "a", "object 0 .dog.: needs `bndbox`"),
        ([("", 5, 5, 9, 9)], (48, 64), "a", "object 0: has no `name`"),
        ([("dog", 5, 5, 9, 9)], (64, 48), "a", "the image is 64 x 48 there, but a.png is 48 x 64"),
        ([("dog", 5, 5, 9, 9)], (48, 64), "zebra", "its image, zebra.png, is not in"),
        ([], (48, 64), "a", "none of its 1 XML files has an object"),
    ],
)
def test_a_bad_voc_file_is_named(tmp_path, capsys, objects, size, stem, message):
    images, _ = write(tmp_path)
    write_voc(tmp_path / "xml", objects, size, stem)
    arguments = [f"--images={images}", f"--labels={tmp_path}/xml", f"--output={tmp_path}/x.json"]
    said = fail(capsys, "voc", *arguments)
    assert re.search(message, said), said
    assert not (tmp_path / "x.json").exists()


def test_voc_folders_are_recognised_with_their_parts(tmp_path):
    images, _ = write(tmp_path / "voc")
    Path(images).rename(tmp_path / "voc" / "JPEGImages")
    (tmp_path / "voc" / "instances.json").unlink()
    labels = tmp_path / "voc" / "Annotations"
    write_voc(labels, [("dog", 11, 9, 30, 28)])
    write_voc(labels / "sub", [("cat", 5, 5, 6, 6)], (64, 48), "b")
    write_voc(labels, [], (40, 40), "c")
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "val.txt").write_text("b  1\n")
    train, val = recognise(str(tmp_path / "voc"))
    assert (train.split, val.split, train.kind) == ("train", "val", "Pascal VOC")
    assert [i["file_name"] for i in train.content["images"]] == ["a.png", "c.png"]
    assert len(val.content["annotations"]) == 1
    assert val.content["categories"] == train.content["categories"]
