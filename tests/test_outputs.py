"""Files to go on with: outlines that draw the mask again, masks, cut-outs."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_coco
from PIL import Image
from pycocotools import mask as rle
from scipy import ndimage

from solov2_jax.data.annotations import read_instances
from solov2_jax.data.coco import load_coco, read_coco
from solov2_jax.inference.draw import distinct_color, draw_prediction, object_colors
from solov2_jax.inference.prediction import MaskCrops, Prediction, pack
from solov2_jax.io import InputError
from solov2_jax.rle import rle_decode, rle_from_string
from solov2_jax.tools.cli import importers
from solov2_jax.tools.importers.recognise import recognise
from solov2_jax.tools.predict.label_files import cvat_image, label_studio_task
from solov2_jax.tools.predict.output_folder import OutputFolder
from solov2_jax.tools.predict.outputs import (
    LABEL_WRITERS,
    OutputFiles,
    file_word,
    labelme_content,
    open_results,
    parse_formats,
    yolo_lines,
)
from solov2_jax.tools.predict.polygons import join_rings, mask_polygons, ring_area
from solov2_jax.tools.predict.sources import Frame
from solov2_jax.tools.report.pictures import annotated_objects

NAMES = ("cat", "big dog/..")


def from_masks(masks, labels=None):
    """Returns the prediction of some masks, scores falling."""
    masks = np.array(masks, bool)
    packed = MaskCrops([pack(m) for m in masks], masks.shape[1:])  # pyright: ignore
    n = len(masks)
    scores = np.linspace(0.9, 0.5, n).astype(np.float32)
    labels = np.zeros(n, int) if labels is None else np.array(labels)
    return Prediction(masks, packed.boxes(), scores, labels, 0, NAMES)


def blobs(sigma, count, shape=(120, 160), least=40):
    """Returns masks of rough shape, with holes, in several parts."""
    rng = np.random.default_rng(int(sigma * 10))
    masks = []
    while len(masks) < count:
        field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
        numbers, n = ndimage.label(field > 0.2 * field.std())
        sizes = ndimage.sum(np.ones(shape), numbers, range(1, n + 1))
        largest = np.argsort(-sizes)[:2] + 1
        mask = np.isin(numbers, largest)
        if sizes.max() > least:
            masks.append(mask)
    return masks


def drawn(rings, shape):
    """Returns what polygons become where annotations are read: COCO's own drawing."""
    flat = [np.ravel(ring).tolist() for ring in rings]
    merged: Any = rle.merge(rle.frPyObjects(flat, *shape))
    crop = rle_decode(rle_from_string(merged["counts"]), shape)
    return tiny_coco.whole(crop, shape).astype(bool)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(("sigma", "least"), [(6, 0.98), (3, 0.97), (1.2, 0.95)])
def test_yolo_and_labelme_draw_the_mask_again(sigma, least):
    masks = blobs(sigma, 8)
    prediction = from_masks(masks)
    shape = masks[0].shape
    for mask, line in zip(masks, yolo_lines(prediction).splitlines(), strict=True):
        label, *values = line.split()
        points = np.array(values, float).reshape(-1, 2)
        assert label == "0" and points.min() >= 0 and points.max() <= 1
        assert iou(drawn([points * (shape[1], shape[0])], shape), mask) > least
    content = labelme_content(prediction, NAMES, "a.jpg")
    groups = [s["group_id"] for s in content["shapes"]]
    for i, mask in enumerate(masks):
        rings = [s["points"] for s in content["shapes"] if s["group_id"] == i]
        if not rings:  # in one piece
            continue
        assert iou(drawn(rings, shape), mask) > least, i
    assert any(g is not None for g in groups), "no mask had two parts: test more"


def test_the_importers_read_the_labels_back(tmp_path):
    masks = blobs(4, 3)
    prediction = from_masks(masks, [0, 1, 0])
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.png"
    Image.new("RGB", (160, 120)).save(path)
    frame = Frame("a", "a.png", str(path), np.zeros((120, 160, 3), np.uint8))
    out = tmp_path / "out"
    OutputFiles(str(out), ("yolo", "labelme"), NAMES).write(frame, prediction)
    for kind, names in (("yolo", "classes.txt"), ("labelme", "")):
        labels = out / "yolo" / "labels" if kind == "yolo" else out / "labelme"
        arguments = [kind, "--images", str(path.parent), "--labels", str(labels)]
        if names:
            arguments += ["--names", str(out / "yolo" / names)]
        written = tmp_path / f"{kind}.json"
        importers.main([*arguments, "--output", str(written)])
        dataset = load_coco(str(path.parent), str(written))
        found = annotated_objects(dataset, 0)
        assert len(found) == len(masks), kind
        names_found = [dataset.class_names[i] for i in found.labels]
        for name, mask in zip(names_found, np.asarray(found.masks), strict=True):
            best = int(np.argmax([iou(mask, m) for m in masks]))
            assert iou(mask, masks[best]) > 0.95, kind
            assert name == NAMES[prediction.labels[best]], kind


def test_labels_of_all_pictures_come_back_as_the_same_masks(tmp_path):
    """CVAT's XML and Label Studio's json, with objects at the corners, holes and parts."""
    masks = blobs(3, 3, (90, 130))
    corner, everything = np.zeros((90, 130), bool), np.ones((90, 130), bool)
    corner[0, 0] = corner[-1, -1] = True  # runs at both ends, and a long one between
    first = from_masks([*masks, corner, everything], [0, 1, 0, 1, 1])
    nothing = from_masks(np.zeros((0, 90, 130), bool))
    for kind in ("cvat", "label_studio"):
        data = tmp_path / kind / "data ä & co"
        (data / "sub").mkdir(parents=True)
        folder = OutputFolder(str(data))
        files = OutputFiles(folder, (kind,), NAMES)
        (results,) = open_results(folder, (kind,), NAMES).values()
        named = {"sub/a.png": first, 'b "<&.png': nothing, "c.png": first.take(np.array([1]))}
        # Added in another order than the pictures', as several shapes are.
        for number in (1, 0, 2):
            name, prediction = list(named.items())[number]
            Image.new("RGB", (130, 90)).save(data / name)
            image = files.labelled(Frame(name, name, str(data / name)), number)
            results.add(number, [LABEL_WRITERS[kind](prediction, NAMES, image)])
        results.finish()
        (part,) = recognise(str(data))
        assert [i["file_name"] for i in part.content["images"]] == list(named), kind
        table = read_instances(part.content, kind)
        dataset = read_coco(part.images, table)
        for i, prediction in enumerate(named.values()):
            read = annotated_objects(dataset, i)
            assert len(read) == len(prediction), kind
            classes = [dataset.class_names[label] for label in read.labels]
            assert sorted(classes) == sorted(prediction.names), kind
            wanted = {np.packbits(m).tobytes() for m in np.asarray(prediction.masks)}
            assert {np.packbits(m).tobytes() for m in np.asarray(read.masks)} == wanted, kind


def test_label_files_name_frames_by_their_copies_and_refuse_what_xml_cannot_hold(tmp_path):
    prediction = from_masks(np.ones((1, 4, 5), bool))
    files = OutputFiles(str(tmp_path / "out"), ("label_studio",), NAMES)
    frame = Frame("clip_000001", "clip.mp4", "clip.mp4", index=1, stays=False)
    image = files.labelled(frame, 7)
    assert image.file_name == "frames/clip_000001.jpg"
    task = json.loads(label_studio_task(prediction, NAMES, image))
    assert task["data"]["image"] == "/data/local-files/?d=out/frames/clip_000001.jpg"
    assert "big dog" in (tmp_path / "out" / "label_studio_config.xml").read_text()
    with pytest.raises(InputError, match="file name 'a.x01.png' holds characters"):
        cvat_image(prediction, NAMES, replace(image, file_name="a\x01.png"))


def test_outlines_of_squares_are_exact_with_hole_and_second_part():
    mask = np.zeros((60, 70), bool)
    mask[5:50, 5:50], mask[15:30, 20:40], mask[52:58, 3:9] = True, False, True
    (outline, hole), (second,) = mask_polygons(mask[2:, 3:], left=3, top=2)
    assert [ring_area(r) for r in (outline, hole, second)] == pytest.approx(
        [45 * 45, 15 * 20, 6 * 6], abs=0.6
    )
    assert outline.min(0).tolist() == [5, 5] and outline.max(0).tolist() == [50, 50]
    assert len(outline) <= 8, "straight sides need no corners between"
    joined = join_rings([outline, hole, second])
    assert (drawn([joined], mask.shape) == mask).all()


def test_one_pixel_is_one_pixel():
    mask = np.zeros((9, 9), bool)
    mask[4, 6] = True
    assert (drawn(mask_polygons(mask)[0], mask.shape) == mask).all()
    whole = np.ones((6, 7), bool)
    assert (drawn(mask_polygons(whole)[0], whole.shape) == whole).all()


def test_every_format_is_written(tmp_path):
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 10:30, 5:25], masks[1, 20:35, 30:50] = True, True
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    frame = Frame("a", "a.png", str(tmp_path / "in" / "a.png"), image)
    formats = parse_formats(["overlay", "coco", " masks", "cutouts", "yolo", "labelme"])
    out = tmp_path / "deep" / "out"
    writer = OutputFiles(str(out), formats, NAMES)
    prediction = from_masks(masks, [1, 0])
    assert writer.write(frame, prediction) is None
    for i, name in enumerate(("000_big_dog", "001_cat")):
        mask = np.asarray(Image.open(out / "masks" / "a" / f"{name}.png"))
        assert (mask == masks[i]).all()
        x0, y0, x1, y1 = prediction.boxes[i].astype(int)
        cut = np.asarray(Image.open(out / "cutouts" / "a" / f"{name}.png"))
        assert (cut[..., :3] == image[y0:y1, x0:x1]).all() and (cut[..., 3] == 255).all()
    assert (np.asarray(Image.open(out / "a.png")) != image).any()
    assert (out / "yolo" / "classes.txt").read_text().splitlines() == list(NAMES)
    assert '1: "big dog/.."' in (out / "yolo" / "data.yaml").read_text()
    content = json.loads((out / "labelme" / "a.json").read_text())
    named = (out / "labelme" / content["imagePath"]).resolve()
    assert named == (tmp_path / "in" / "a.png").resolve()
    assert (content["imageHeight"], content["imageWidth"]) == (40, 60)
    # A fetched image is gone after the run: its labels need a copy.
    assert not (out / "frames").exists()
    writer.write(replace(frame, stays=False), prediction)
    content = json.loads((out / "labelme" / "a.json").read_text())
    assert content["imagePath"] == "../frames/a.jpg"
    assert (out / "frames" / "a.jpg").is_file()
    # A second run that finds less leaves no mask of the first.
    writer.write(frame, prediction.take(np.array([0])))
    assert [p.name for p in (out / "masks" / "a").iterdir()] == ["000_big_dog.png"]
    writer.write(frame, prediction.take(np.array([], int)))
    assert (out / "yolo" / "labels" / "a.txt").read_text() == ""


def test_masks_that_are_held_packed_give_the_same_files():
    masks = blobs(5, 3)
    plain = from_masks(masks)
    packed = replace(plain, masks=MaskCrops([pack(m) for m in masks], (120, 160)))
    assert yolo_lines(packed) == yolo_lines(plain)
    assert labelme_content(packed, NAMES, "a") == labelme_content(plain, NAMES, "a")


def test_class_names_make_safe_file_names_and_unknown_formats_are_named():
    assert file_word("../../etc/passwd") == "etc_passwd"
    assert file_word("..") == "object" and len(file_word("x" * 500)) == 60
    with pytest.raises(ValueError, match="--write svg: give one or more of overlay"):
        parse_formats(["overlay", "svg"])
    with pytest.raises(ValueError, match="--write : give one"):
        parse_formats([""])


def test_colours_by_class_and_track_stay_and_labels_can_be_hidden():
    masks = np.zeros((3, 60, 90), bool)
    for i in range(3):
        masks[i, 20:50, 30 * i + 2 : 30 * i + 28] = True
    prediction = replace(from_masks(masks, [1, 0, 1]), tracks=np.array([4, 2, 9]))
    by_class = object_colors(prediction, "class")
    assert (by_class[0] == by_class[2]).all() and (by_class[0] != by_class[1]).any()
    alone = prediction.take(np.array([2]))
    assert (object_colors(alone, "class") == by_class[2:]).all()
    assert object_colors(alone, "track").tolist() == [list(distinct_color(9))]
    with pytest.raises(ValueError, match="color_by is 'shape'"):
        object_colors(prediction, "shape")
    with pytest.raises(ValueError, match="need a prediction with tracks"):
        object_colors(replace(prediction, tracks=None), "track")
    image = np.zeros((60, 90, 3), np.uint8)
    bare = draw_prediction(image, prediction, NAMES, "track", labels=False)
    outside = ~masks.any(0)
    assert not bare[outside].any()
    assert (bare[20, 10] == distinct_color(4)).all()
    assert (draw_prediction(image, prediction, NAMES) != bare).any()
