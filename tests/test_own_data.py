"""A folder as some program exported it -> training and validation data."""

import base64
import io
import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from solov2_jax.data.annotations import read_instances
from solov2_jax.data.coco import read_coco
from solov2_jax.io import InputError
from solov2_jax.tools.importers.instances import Instances
from solov2_jax.tools.importers.label_studio import decode_brush, import_tasks
from solov2_jax.tools.importers.merge import Options, merge
from solov2_jax.tools.importers.parts import by_name, find_picture
from solov2_jax.tools.importers.recognise import recognise, split_of
from solov2_jax.tools.importers.via import import_via

HEIGHT, WIDTH, NUMBER = 40, 48, 12
NAMES = ("cat", "dog")
# Of each image: (class, x, y, side). Squares, whose pixels every format agrees on.
SQUARES = {
    f"{n:02}.png": [(int(n % 3 == 0), 4, 4, 10), (0, 20, 6, 8 + n % 4)][: n % 3 or 2]
    for n in range(NUMBER)
}


def corners(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def pictures(folder: Path, names=tuple(SQUARES)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90)).save(folder / name)


def coco(path: Path, names=tuple(SQUARES), above="") -> None:
    instances = Instances(dict(enumerate(NAMES, start=1)))
    for name in names:
        instances.add_image(name, HEIGHT, WIDTH)
        for kind, x, y, side in SQUARES[name]:
            instances.add_polygons(kind + 1, [np.array(corners(x, y, side), float)])
    content = instances.content()
    if above:
        for category in content["categories"]:
            category["supercategory"] = above
        content["categories"].insert(0, {"id": 0, "name": above, "supercategory": "none"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


FIRST, LAST = tuple(SQUARES)[:9], tuple(SQUARES)[9:]


def as_roboflow(folder):
    for split, names in (("train", FIRST), ("valid", LAST)):
        pictures(folder / split, names)
        coco(folder / split / "_annotations.coco.json", names, above="animals")


def as_official_coco(folder):
    for split, names in (("train2017", FIRST), ("val2017", LAST)):
        pictures(folder / split, names)
        coco(folder / "annotations" / f"instances_{split}.json", names)
    (folder / "annotations" / "captions_val2017.json").write_text("{}")


def as_bare_coco(folder):
    pictures(folder / "images")
    coco(folder / "labels.json")


def as_yolo(folder):
    for split, names in (("train", FIRST), ("val", LAST)):
        pictures(folder / "images" / split, names)
        labels = folder / "labels" / split
        labels.mkdir(parents=True)
        for name in names:
            lines = []
            for kind, *square in SQUARES[name]:
                points = np.array(corners(*square)) / [WIDTH, HEIGHT]
                lines.append(" ".join(map(str, [kind, *points.ravel().tolist()])))
            (labels / name).with_suffix(".txt").write_text("\n".join(lines))
    yaml = "train: images/train\nval: images/val\ntest: images/test\nnames: [cat, dog]\n"
    (folder / "data.yaml").write_text(yaml)


def as_yolo_without_yaml(folder):
    as_yolo(folder)
    (folder / "data.yaml").unlink()
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "notes.json").write_text('{"categories": []}')


def as_labelme(folder):
    pictures(folder)
    for name, squares in SQUARES.items():
        shapes = [{"label": NAMES[k], "points": corners(*square)} for k, *square in squares]
        record = {"imagePath": name, "shapes": shapes}
        (folder / name).with_suffix(".json").write_text(json.dumps(record))


def as_masks(folder):
    pictures(folder / "JPEGImages")
    for part in ("SegmentationObject", "SegmentationClass"):
        (folder / part).mkdir()
        for name, squares in SQUARES.items():
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            for number, (kind, x, y, side) in enumerate(squares, start=1):
                value = number if part == "SegmentationObject" else kind + 1
                mask[y : y + side, x : x + side] = value
            Image.fromarray(mask).save(folder / part / name)
    (folder / "classes.txt").write_text("cat\ndog\n")


def as_via(folder):
    for split, names in (("train", FIRST), ("val", LAST)):
        pictures(folder / split, names)
        records = {}
        for name in names:
            regions = []
            for kind, *square in SQUARES[name]:
                x, y = np.array(corners(*square)).T.tolist()
                shape = {"name": "polygon", "all_points_x": x, "all_points_y": y}
                attributes = {"animal": NAMES[kind]}
                regions.append({"shape_attributes": shape, "region_attributes": attributes})
            # Version 1 numbers the regions, version 2 lists them.
            listed = dict(enumerate(regions)) if split == "val" else regions
            records[name] = {"filename": name, "regions": listed}
        (folder / split / "via_region_data.json").write_text(json.dumps(records))


def as_cvat(folder):
    pictures(folder / "images" / "default")
    images = []
    for name, squares in SQUARES.items():
        shapes = []
        for number, (kind, x, y, side) in enumerate(squares):
            if number == 0:
                points = ";".join(f"{a},{b}" for a, b in corners(x, y, side))
                shapes.append(f'<polygon label="{NAMES[kind]}" points="{points}"/>')
            else:
                box = f'left="{x}" top="{y}" width="{side}" height="{side}"'
                shapes.append(f'<mask label="{NAMES[kind]}" rle="0, {side * side}" {box}/>')
        size = f'width="{WIDTH}" height="{HEIGHT}"'
        shapes.append('<points label="cat" points="1,1"/>')
        images.append(f'<image id="1" name="{name}" {size}>{"".join(shapes)}</image>')
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    meta = f"<version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
    text = f"<annotations>{meta}{''.join(images)}</annotations>"
    (folder / "annotations.xml").write_text(text)


def brush(mask: np.ndarray) -> list[int]:
    """Returns a mask in Label Studio's run lengths, a block of eight bits' length a run."""
    values = np.repeat(mask.ravel().astype(int) * 255, 4)
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{n - 1:04b}" for n in (3, 4, 8, 16))
    start = 0
    while start < len(values):
        end = start
        while end < len(values) and values[end] == values[start]:
            end += 1
        bits += f"1{3:02b}{end - start - 1:016b}{values[start]:08b}"
        start = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def as_label_studio(folder):
    pictures(folder / "images")
    tasks = []
    for number, (name, squares) in enumerate(SQUARES.items()):
        results = []
        for i, (kind, x, y, side) in enumerate(squares):
            size = {"original_width": WIDTH, "original_height": HEIGHT}
            if i == 0:
                points = (np.array(corners(x, y, side)) * 100 / [WIDTH, HEIGHT]).tolist()
                value = {"points": points, "polygonlabels": [NAMES[kind]]}
                results.append({"type": "polygonlabels", "value": value, **size})
            else:
                mask = np.zeros((HEIGHT, WIDTH), bool)
                mask[y : y + side, x : x + side] = True
                value = {"format": "rle", "rle": brush(mask), "brushlabels": [NAMES[kind]]}
                results.append({"type": "brushlabels", "value": value, **size})
        data = {"image": f"/data/upload/1/0a1b2c3d-{name}"}
        tasks.append({"id": number, "data": data, "annotations": [{"result": results}]})
    (folder / "project.json").write_text(json.dumps(tasks))


def as_supervisely(folder):
    meta = {"classes": [{"title": name, "shape": "any"} for name in NAMES]}
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_text(json.dumps(meta))
    for split, names in (("train", FIRST), ("val", LAST)):
        pictures(folder / split / "img", names)
        (folder / split / "ann").mkdir()
        for name in names:
            objects = []
            for i, (kind, x, y, side) in enumerate(SQUARES[name]):
                record: dict[str, Any] = {"classTitle": NAMES[kind], "geometryType": "polygon"}
                if i == 0:
                    record["points"] = {"exterior": corners(x, y, side), "interior": []}
                else:
                    buffer = io.BytesIO()
                    Image.new("1", (side, side), 1).save(buffer, "PNG")
                    data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
                    record["geometryType"] = "bitmap"
                    record["bitmap"] = {"origin": [x, y], "data": data}
                objects.append(record)
            path = folder / split / "ann" / f"{name}.json"
            path.write_text(json.dumps({"objects": objects}))


WRITERS = (
    *(as_roboflow, as_official_coco, as_bare_coco, as_yolo, as_labelme, as_masks),
    *(as_via, as_cvat, as_label_studio, as_supervisely, as_yolo_without_yaml),
)
WANTED = Counter(
    (name, NAMES[kind], side * side) for name, o in SQUARES.items() for kind, _, _, side in o
)


def found(content) -> Counter:
    """Returns the objects: (file name without folders, class, pixels)."""
    table = read_instances(content)
    names = list(table.categories.values())
    objects = Counter()
    for a, record in zip(range(len(table.ids)), content["annotations"], strict=True):
        file = table.file_names[table.image[a]].rpartition("/")[2]
        objects[file, names[table.label[a]], round(record["area"])] += 1
    return objects


@pytest.mark.parametrize("writer", WRITERS)
def test_every_disguise_holds_the_same_images_and_objects(tmp_path, writer):
    writer(tmp_path)
    parts = recognise(str(tmp_path))
    merged = merge({str(tmp_path): parts}, Options())
    train, val = merged.contents
    assert len(train["images"]) + len(val["images"]) == NUMBER and val["images"]
    assert found(train) + found(val) == WANTED
    assert [c["name"] for c in train["categories"]] == list(NAMES)
    for images, content in zip(merged.images, merged.contents, strict=True):
        assert not len(read_coco(images, read_instances(content)).missing)
    # A part for validation is taken where there is one.
    if {p.split for p in parts} > {"train"}:
        assert {i["file_name"].rpartition("/")[2] for i in val["images"]} == set(LAST)
        assert not any("split off" in line for line in merged.lines)
    else:
        assert any("has no validation part" in line for line in merged.lines)


def test_files_that_are_right_already_are_used_as_they_are(tmp_path):
    as_official_coco(tmp_path)
    merged = merge({"a": recognise(str(tmp_path))}, Options())
    assert [Path(f).name for f in merged.files] == [
        "instances_train2017.json",
        "instances_val2017.json",
    ]
    assert merge({"a": recognise(str(tmp_path))}, Options(classes=("cat",))).files == ("", "")


def test_the_split_is_a_function_of_seed_and_names_and_has_every_class(tmp_path):
    as_bare_coco(tmp_path)
    parts = recognise(str(tmp_path))

    def validation(options, order=1):
        content = {**parts[0].content, "images": parts[0].content["images"][::order]}
        part = type(parts[0])("COCO", "", parts[0].images, content)
        val = merge({"a": [part]}, options).contents[1]
        return {i["file_name"] for i in val["images"]}, {
            a["category_id"] for a in val["annotations"]
        }

    names, classes = validation(Options())
    assert len(names) in (2, 3) and classes == {1, 2}
    assert validation(Options(), order=-1)[0] == names
    assert any(validation(Options(seed=seed))[0] != names for seed in (1, 2, 3))
    # In pairs: 00 01, 02 03, ...
    assert len(validation(Options(group=r"^(0|1)"))[0]) in (10, 2)
    with pytest.raises(InputError, match="1 group cannot be split"):
        validation(Options(group="(p)ng"))
    with pytest.raises(InputError, match="no regular expression"):
        validation(Options(group="("))


def test_several_folders_are_merged_by_class_name(tmp_path):
    as_roboflow(tmp_path / "a")
    as_yolo(tmp_path / "b")
    yaml = (tmp_path / "b" / "data.yaml").read_text().replace("cat, dog", "horse, cat")
    (tmp_path / "b" / "data.yaml").write_text(yaml)
    places = [str(tmp_path / name) for name in "ab"]
    merged = merge({p: recognise(p) for p in places}, Options())
    train, val = merged.contents
    assert len(train["images"]) == 18 and len(val["images"]) == 6
    kinds = Counter(name for _, name, _ in (found(train) + found(val)).elements())
    per_class = Counter(NAMES[o[0]] for objects in SQUARES.values() for o in objects)
    assert kinds == {
        "cat": per_class["cat"] + per_class["dog"],
        "dog": per_class["dog"],
        "horse": per_class["cat"],
    }
    text = "\n".join(merged.lines)
    assert "class 'animals'" in text or "class animals has no object" in text
    assert "merged by name" in text
    one = merge({p: recognise(p) for p in places}, Options(single_class=True)).contents[0]
    assert one["categories"] == [{"id": 1, "name": "object"}]
    some = merge({p: recognise(p) for p in places}, Options(classes=("dog",)))
    assert {name for _, name, _ in found(some.contents[0])} == {"dog"}
    assert "classes left out, with their objects: cat, horse" in "\n".join(some.lines)
    with pytest.raises(
        InputError, match="--classes: dig: there is no such class; did you mean dog"
    ):
        merge({p: recognise(p) for p in places}, Options(classes=("dig",)))


def test_masks_of_one_value_are_parted_into_regions(tmp_path):
    pictures(tmp_path / "images", ("a.png",))
    (tmp_path / "masks").mkdir()
    mask = Image.new("L", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(mask)
    draw.rectangle((2, 2, 8, 8), 255)
    draw.rectangle((20, 20, 29, 29), 255)
    mask.save(tmp_path / "masks" / "a.png")
    (part,) = recognise(str(tmp_path))
    assert [a["area"] for a in part.content["annotations"]] == [49, 100]
    assert any("each connected region is an object" in note for note in part.notes)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("_annotations.valid", "val"),
        ("instances_val2017", "val"),
        ("Training", "train"),
        ("test-set", "test"),
        ("dev", "val"),
        ("retrained", ""),
        ("instances_default", ""),
        ("latest", ""),
    ],
)
def test_which_part_a_name_says(name, split):
    assert split_of(name) == split


def refused(place, **options) -> str:
    with pytest.raises(InputError) as error:
        merge({str(place): recognise(str(place))}, Options(**options))
    return str(error.value)


def test_bad_data_is_one_error_that_names_the_place(tmp_path):
    assert "there is no such folder" in refused(tmp_path / "none")
    pictures(tmp_path / "plain")
    assert "holds no annotations of a known format, only 00.png" in refused(tmp_path / "plain")
    as_roboflow(tmp_path / "a")
    (tmp_path / "a" / "train").rename(tmp_path / "train")
    assert "has no training part, only val" in refused(tmp_path / "a")
    (tmp_path / "train").rename(tmp_path / "a" / "train")
    (tmp_path / "a" / "train" / "03.png").unlink()
    assert "1 of 9 images are not in" in refused(tmp_path / "a")
    as_bare_coco(tmp_path / "b")
    (tmp_path / "b" / "images").rename(tmp_path / "b" / "elsewhere")
    assert recognise(str(tmp_path / "b"))[0].images == str(tmp_path / "b" / "elsewhere")
    (tmp_path / "b" / "elsewhere").rename(tmp_path / "moved")
    assert "its images, such as 00.png, are neither beside it" in refused(tmp_path / "b")
    (tmp_path / "data.zip").write_bytes(b"PK")
    assert "unpack an archive" in refused(tmp_path / "data.zip")
    as_yolo_without_yaml(tmp_path / "d")
    (tmp_path / "d" / "classes.txt").unlink()
    assert "the classes of YOLO's labels have no names" in refused(tmp_path / "d")
    as_masks(tmp_path / "c")
    (tmp_path / "c" / "classes.txt").unlink()
    assert "have no names; write them" in refused(tmp_path / "c")


def test_a_damaged_brush_is_refused():
    data = brush(np.eye(4, dtype=bool))
    assert decode_brush(data).reshape(4, 4, 4)[..., 3].tolist() == (np.eye(4) * 255).tolist()
    with pytest.raises(ValueError, match="end early"):
        decode_brush(data[:-4])


def test_a_pipe_named_like_an_annotation_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "instances.json")
    assert "holds no annotations of a known format" in refused(tmp_path)


def test_pictures_of_one_name_are_told_apart_or_named(tmp_path):
    places = by_name(["a/1.png", "b/1.png", "2.png", "c/2.png"])
    for stated, wanted in (
        ("b/1.png", "b/1.png"),
        ("C:\\data\\a\\1.png", "a/1.png"),
        ("2.png", "2.png"),
        ("https://host/c/2.png", "c/2.png"),
        ("3.png", None),
        ("", None),
    ):
        assert find_picture(places, stated, "x.json") == wanted
    with pytest.raises(InputError, match=r"x.json: 1.png may be .*a/1.png.*b/1.png"):
        find_picture(places, "1.png", "x.json")
    # The json of VIA and of Label Studio: each picture with its own object.
    shades = {"a": 40, "b": 90}
    for name, shade in shades.items():
        (tmp_path / name).mkdir()
        Image.new("L", (WIDTH + shade, HEIGHT), shade).save(tmp_path / name / "1.png")
    shape = {"name": "rect", "x": 1, "y": 1, "width": 5, "height": 5}
    regions = [{"shape_attributes": shape, "region_attributes": {"class": "cell"}}]
    records = {n: {"filename": f"{n}/1.png", "regions": regions} for n in shades}
    instances, _ = import_via(records, str(tmp_path), "via.json")
    sizes = {image["file_name"]: image["width"] for image in instances.images}
    assert sizes == {f"{n}/1.png": WIDTH + shade for n, shade in shades.items()}
    tasks = [
        {"id": i, "data": {"image": f"/data/{n}/0a1b2c3d-1.png"}, "annotations": []}
        for i, n in enumerate(shades)
    ]
    _, instances, _ = import_tasks(tasks, tmp_path / "tasks.json")
    assert [image["file_name"] for image in instances.images] == ["a/1.png", "b/1.png"]
