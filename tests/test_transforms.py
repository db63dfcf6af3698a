"""Reading, resizing and flipping images and boxes, as the reference's loader does."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from plain_masks import plain_center, plain_stride4

from solov2_jax.data import images, transforms
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import load_coco
from solov2_jax.data.pipeline import eval_batches, train_batches


def test_shortest_edge_sizes(golden):
    for case in json.loads(str(golden("data")["json_resize_shortest_edge"])):
        size = transforms.shortest_edge_sizes(case["h"], case["w"], case["short"], case["max"])
        assert size.tolist() == case["out"]


def test_a_thin_image_keeps_a_pixel():
    assert transforms.shortest_edge_sizes(1, 5000, 800, 1333).tolist() == [1, 1333]


@pytest.mark.parametrize("size", [(40, 61), (33, 90), (100, 150), (60, 90)])
def test_resize_is_pils(golden, size):
    arrays = golden("data")
    out = transforms.resize_image(arrays["pil_in"], *size)
    np.testing.assert_array_equal(out, arrays[f"pil_out_{size[0]}x{size[1]}"])


@given(
    st.tuples(*[st.integers(1, 70)] * 4),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
)
def test_a_picture_is_written_as_arrays_would_be(sizes, seed, flip, bgr):
    """Whatever the size, the flip and the order of the channels: equal in every bit."""
    old, new = sizes[:2], sizes[2:]
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 256, (*old, 3), dtype=np.uint8)
    expected = transforms.resize_image(array, *new)
    expected = expected[:, ::-1] if flip else expected
    expected = expected[..., ::-1] if bgr else expected
    padded = np.full((new[0] + 2, new[1] + 3, 3), 7, np.uint8)
    out = padded[: new[0], : new[1]]
    affine = transforms.affine_image(Image.fromarray(array)).affine.resized(new)
    view = transforms.AffineImage(Image.fromarray(array), affine.flipped() if flip else affine)
    view.write(out, bgr)
    np.testing.assert_array_equal(out, expected)
    assert (padded[new[0] :] == 7).all() and (padded[:, new[1] :] == 7).all()


@pytest.fixture
def mapper(tmp_path, golden):
    """The reference's mapper's input as a COCO folder."""
    arrays = golden("data")
    image = arrays["mapper_input"]
    Image.fromarray(image).save(tmp_path / "image.png")
    records = json.loads(str(arrays["json_mapper_annotations"]))
    content = {
        "images": [{"id": 1, "file_name": "image.png", "height": 200, "width": 300}],
        "annotations": [{**r, "id": i + 1, "image_id": 1} for i, r in enumerate(records)],
        "categories": [{"id": i, "name": f"c{i}"} for i in range(3)],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return load_coco(str(tmp_path), str(path)), arrays


@pytest.mark.parametrize(
    ("name", "short", "flip"),
    [("noflip", 256, 0.0), ("flip", 256, 1.0), ("flip_down", 150, 1.0)],
)
def test_whole_mapper(mapper, name, short, flip):
    data, arrays = mapper
    batches = train_batches(
        data,
        seed=0,
        num_steps=1,
        batch_size=1,
        resize=Resize((short,), 384),
        flip_prob=flip,
        channel_order="BGR",
    )
    (batch,) = batches
    count, height, width = arrays[f"mapper_{name}_mask_shape"]
    assert batch["image_size"].tolist() == [[height, width]]
    valid = batch["valid"][0]
    assert valid.sum() == count and valid[:count].all()
    boxes, expected = batch["boxes"][0][:count], arrays[f"mapper_{name}_boxes"]
    np.testing.assert_array_equal(boxes[:8], expected[:8])
    # The ninth box was given as integers, which the reference cuts after the resize.
    np.testing.assert_allclose(boxes[8], expected[8], atol=1)
    np.testing.assert_array_equal(batch["labels"][0][:count], arrays[f"mapper_{name}_classes"])
    if f"mapper_{name}_image" in arrays:
        expected = arrays[f"mapper_{name}_image"].transpose(1, 2, 0)
        np.testing.assert_array_equal(batch["image"][0][:height, :width], expected)
    packed = arrays[f"mapper_{name}_masks"]
    full = np.unpackbits(packed, axis=-1)[..., :width]
    check_masks(batch, full)


def check_masks(batch, full):
    """Stride-4 masks and centres are those of the reference's full masks."""
    for i in range(len(full)):
        expected = np.zeros(batch["masks"].shape[2:], np.uint8)
        small = plain_stride4(full[i])
        expected[: small.shape[0], : small.shape[1]] = small
        np.testing.assert_array_equal(batch["masks"][0, i], expected)
        np.testing.assert_array_equal(batch["centers"][0, i], plain_center(full[i]))


def save(path: Path, mode: str, **options) -> np.ndarray:
    """Writes a picture of this mode and returns the RGB that it should give."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    grey = np.repeat(rgb[..., :1], 3, axis=-1)
    if mode == "L":
        Image.fromarray(rgb[..., 0]).save(path)
        return grey
    if mode == "16":
        low = rng.integers(0, 256, (6, 9)).astype(np.uint16)
        Image.fromarray(rgb[..., 0].astype(np.uint16) * 256 + low).save(path)
        return grey
    if mode == "RGBA":
        alpha = rng.integers(0, 256, (6, 9, 1), dtype=np.uint8)
        Image.fromarray(np.concatenate([rgb, alpha], axis=-1)).save(path)
        return rgb
    if mode == "LA":
        alpha = rng.integers(0, 256, (6, 9), dtype=np.uint8)
        Image.fromarray(np.stack([rgb[..., 0], alpha], axis=-1)).save(path)
        return grey
    if mode == "P":
        image = Image.fromarray(rgb).quantize(256)
        image.save(path, transparency=bytes(range(200)))
        return np.asarray(image.convert("RGB"))
    if mode == "1":
        bits = Image.fromarray(rgb[..., 0]).convert("1")
        bits.save(path)
        return np.asarray(bits.convert("RGB"))
    Image.fromarray(rgb).save(path, **options)
    return rgb


@pytest.mark.parametrize("mode", ["RGB", "L", "16", "RGBA", "LA", "P", "1"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    expected = save(tmp_path / "x.png", mode)
    np.testing.assert_array_equal(images.read_image(str(tmp_path / "x.png")), expected)


def test_cmyk(tmp_path):
    flat = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    flat.save(tmp_path / "x.jpg")
    pixel = images.read_image(str(tmp_path / "x.jpg"))[4, 4]
    assert np.abs(pixel.astype(int) - [0, 255, 255]).max() < 4  # JPEG's rounding


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn clockwise to view
    expected = save(tmp_path / "x.png", "RGB", exif=exif)
    image = images.read_image(str(tmp_path / "x.png"))
    np.testing.assert_array_equal(image, np.rot90(expected, -1))
    with pytest.raises(ValueError, match="is 9 x 6 .*says 6 x 9.* EXIF"):
        images.open_sized(str(tmp_path / "x.png"), 6, 9, "instances.json")


def test_size_of_the_json_is_checked(tmp_path):
    save(tmp_path / "x.png", "RGB")
    with pytest.raises(ValueError, match=r"x.png: is 6 x 9 .* says 7 x 9\. Correct"):
        images.open_sized(str(tmp_path / "x.png"), 7, 9, "instances.json")


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.05])
@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_truncated_picture(tmp_path, name, keep):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match=f"{name}.*(truncated|not an image)"):
        images.read_image(str(path))


def test_other_unreadable_files(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_text("")
    for name, what in (("text.jpg", "not an image"), ("empty.jpg", "empty, 0 bytes")):
        with pytest.raises(ValueError, match=f"{name}: is {what}"):
            images.read_image(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"none.jpg: no such image"):
        images.read_image(str(tmp_path / "none.jpg"))
    with pytest.raises(ValueError, match="is a folder"):
        images.read_image(str(tmp_path))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="floating-point"):
        images.read_image(str(tmp_path / "x.tif"))


def test_too_many_pixels(tmp_path, monkeypatch):
    save(tmp_path / "x.png", "RGB")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 53)
    with pytest.raises(ValueError, match=r"x.png: has more than 53 pixels"):
        images.read_image(str(tmp_path / "x.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"x.png: has more than 20 pixels"):
        images.read_image(str(tmp_path / "x.png"))


@pytest.mark.parametrize("shape", [(40, 1), (1, 40)])
def test_one_pixel_wide_image(tmp_path, shape):
    h, w = shape
    pixels = np.arange(120, dtype=np.uint8).reshape(h, w, 3)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    polygon = [0, 0, w, 0, w, h, 0, h]
    content = {
        "images": [{"id": 1, "file_name": "x.png", "height": h, "width": w}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, w, h],
                "segmentation": [polygon],
            }
        ],
        "categories": [{"id": 1, "name": "line"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    data = load_coco(str(tmp_path), str(tmp_path / "x.json"))
    resize = Resize((64,), 128)
    (batch,) = train_batches(data, seed=0, num_steps=1, batch_size=1, resize=resize, flip_prob=0.5)
    size = [128, 3] if h == 40 else [3, 128]
    assert batch["image_size"].tolist() == [size]
    assert batch["valid"].sum() == 1
    (batch,) = eval_batches(data, batch_size=1, resize=resize)
    assert batch["original_size"].tolist() == [[h, w]]
