"""Pictures of other channels and value ranges: read, moved, batched, trained on, exported."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_network
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_augment import SETTINGS, scenes  # noqa: F401
from test_augment_joined import assert_equal

from configs import base
from solov2_jax.config import input_statistics, load_config
from solov2_jax.data import build, images, pipeline, raw_images, transforms
from solov2_jax.data.augment import Augment
from solov2_jax.data.buckets import Resize
from solov2_jax.data.coco import load_coco
from solov2_jax.data.pixel_format import RGB, PixelFormat, Planes
from solov2_jax.inference.predictor import build_predictor
from solov2_jax.inference.preprocess import load_image, make_example
from solov2_jax.io import InputError
from solov2_jax.models import build_model
from solov2_jax.tools.doctor.derive import _of_channels
from solov2_jax.tools.predict.sources import find_files, open_sources
from solov2_jax.weights import convert
from solov2_jax.weights.settings import (
    check_form,
    check_settings,
    implied_settings,
    settings_of_config,
)
from solov2_jax.weights.sources import Weights

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
DEEP = PixelFormat(5, (0.0, 4095.0))
RNG = np.random.default_rng(0)
FIVE = RNG.integers(0, 4096, (30, 40, 5)).astype(np.uint16)


# --- Values ------------------------------------------------------------------------


def test_ranges_become_0_to_255():
    values = np.array([[[0.0, 1000], [0.5, 3000], [2, np.nan], [-np.inf, np.inf]]])
    one = PixelFormat(2, (0.0, 1.0)).scaled(values, "a")
    np.testing.assert_allclose(one[0, :, 0], [0, 127.5, 255, 0], rtol=1e-6)
    each = PixelFormat(2, (0.0, 1.0, 1000.0, 5000.0)).scaled(values, "a")
    np.testing.assert_allclose(each[0, :, 1], [0, 127.5, 0, 255], rtol=1e-6)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(each[..., 0], one[..., 0])
    # 16 bits: neighbouring values stay apart, and come back.
    deep = PixelFormat(1, (0.0, 65535.0))
    every = np.arange(65536, dtype=np.uint16)[None]
    scaled = deep.scaled(every, "a")[0, :, 0]
    assert len(np.unique(scaled)) == 65536
    np.testing.assert_array_equal(np.rint(scaled / 255 * 65535), every[0])
    np.testing.assert_allclose(deep.values_of([127.5]), [32767.5])
    assert RGB.values_of([103.53, -1.0, 300.0]) == (104, 0, 255)


@pytest.mark.parametrize(
    ("pixels", "values", "message"),
    [
        (DEEP, FIVE[..., :3], "a.tif: has 3 channels .* data.channels is 5; set data.channels=3"),
        (DEEP, FIVE[..., 0], "a.tif: has 1 channel .* set data.channels=1"),
        (DEEP, np.moveaxis(FIVE, -1, 0), "its channels come first; save it with them last"),
        (PixelFormat(5), FIVE, r"holds uint16 values from .* data.value_range=\(0,4095\)"),
        (PixelFormat(5), FIVE / 4095, r"holds float64 values .* data.value_range=\(0,1\)"),
        (DEEP, FIVE > 7, "holds bool values, not numbers"),
        (DEEP, FIVE.astype(complex), "holds complex128 values"),
    ],
)
def test_what_does_not_fit_is_one_line(pixels, values, message):
    with pytest.raises(InputError, match=message):
        pixels.scaled(values, "a.tif")


def test_what_is_shown():
    image = DEEP.scaled(FIVE, "a")
    np.testing.assert_array_equal(DEEP.to_rgb(image), np.rint(image[..., :3]).astype(np.uint8))
    chosen = dataclasses.replace(DEEP, display=(4, 1, 0))
    np.testing.assert_array_equal(chosen.to_rgb(image), DEEP.to_rgb(image[..., [4, 1, 0]]))
    grey = PixelFormat(2).to_rgb(FIVE[..., :2].astype(np.uint8))
    assert (grey == grey[..., :1]).all()
    np.testing.assert_array_equal(grey[..., 0], FIVE[..., 0].astype(np.uint8))


# --- Files -------------------------------------------------------------------------


def written(folder):
    """Returns {name: (file, what it holds)} in every form that is read."""
    files = {}

    def add(name, values, write):
        path = folder / name
        write(path)
        files[name] = str(path), values

    floats = FIVE.astype(np.float32) / 4095
    add("five.npy", FIVE, lambda p: np.save(p, FIVE))
    add("plane.npy", floats[..., 0], lambda p: np.save(p, floats[..., 0]))
    options = {"photometric": "minisblack"}
    for name, values, more in (
        ("five.tif", FIVE, {"planarconfig": "contig"}),
        ("lzw.tif", FIVE, {"planarconfig": "contig", "compression": "lzw", "predictor": True}),
        ("big.tif", FIVE, {"planarconfig": "contig", "bigtiff": True}),
        ("floats.tif", floats, {"planarconfig": "contig", "compression": "zlib"}),
        ("grey.tif", FIVE[..., 0], {}),
        ("float.tif", floats[..., 0], {}),
    ):
        add(name, values, lambda p, v=values, m=more: tifffile.imwrite(p, v, **options, **m))
    bands = np.moveaxis(FIVE, -1, 0)
    planar = {"planarconfig": "separate", **options}
    add("planar.tif", FIVE, lambda p: tifffile.imwrite(p, bands, **planar))
    add("pages.tif", FIVE, lambda p: tifffile.imwrite(p, bands, **options))
    rgb = FIVE[..., :3] * 16
    add("rgb16.tif", rgb, lambda p: tifffile.imwrite(p, rgb, photometric="rgb"))
    from imagecodecs import png_encode

    add("rgb16.png", rgb, lambda p: p.write_bytes(png_encode(np.ascontiguousarray(rgb))))
    add("grey16.png", FIVE[..., 0], lambda p: Image.fromarray(FIVE[..., 0]).save(p))
    small = (FIVE // 16).astype(np.uint8)
    add("rgba.png", small[..., :4], lambda p: Image.fromarray(small[..., :4]).save(p))
    add("grey.png", small[..., 0], lambda p: Image.fromarray(small[..., 0]).save(p))
    add("rgb.png", small[..., :3], lambda p: Image.fromarray(small[..., :3]).save(p))
    return files


def test_every_form_is_read_to_the_last_bit(tmp_path):
    for name, (path, values) in written(tmp_path).items():
        channels = values.shape[2] if values.ndim == 3 else 1
        got = raw_images.read_values(path, PixelFormat(channels, (0.0, 1.0)))
        np.testing.assert_array_equal(got.squeeze(), values.squeeze(), err_msg=name)
        assert got.dtype == values.dtype or got.dtype == np.int32, name
        header = images.read_header(path)
        assert (header.height, header.width) == (30, 40), name


def test_a_turned_tiff_is_upright(tmp_path):
    for tag in range(1, 9):
        path = tmp_path / f"{tag}.tif"
        extra = [(274, 3, 1, tag, True)]
        tifffile.imwrite(
            path, FIVE, photometric="minisblack", planarconfig="contig", extratags=extra
        )
        got = raw_images.read_values(str(path), DEEP)
        # The same picture of 8 bits, as Pillow turns it.
        plane = Image.fromarray((FIVE[..., 0] // 16).astype(np.uint8))
        plane.save(tmp_path / "a.png", exif=_exif(tag))
        want = np.asarray(images.open_image(str(tmp_path / "a.png")))[..., 0]
        np.testing.assert_array_equal(got[..., 0] // 16, want, err_msg=str(tag))
        assert (lambda h: (h.height, h.width))(images.read_header(str(path))) == want.shape


def _exif(tag):
    exif = Image.Exif()
    exif[274] = tag
    return exif


def test_damaged_files_are_one_line(tmp_path):
    files = written(tmp_path)
    for name in ("five.npy", "five.tif", "lzw.tif", "rgb16.png", "planar.tif"):
        whole = (tmp_path / name).read_bytes()
        for length in (0, 5, 60, len(whole) // 2):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(InputError, match=re.escape(str(tmp_path / "cut"))):
                raw_images.read_values(str(tmp_path / "cut"), DEEP)
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"o.npy: cannot be read as a .npy array"):
        raw_images.read_values(str(tmp_path / "o.npy"), DEEP)
    np.save(tmp_path / "o.npy", np.zeros((2, 3, 4, 5)))
    with pytest.raises(InputError, match=r"o.npy: holds an array of shape \[2, 3, 4, 5\]"):
        raw_images.read_values(str(tmp_path / "o.npy"), DEEP)
    with pytest.raises(InputError, match="no such image"):
        raw_images.read_values(str(tmp_path / "none.npy"), DEEP)
    assert files


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path, _ = written(tmp_path)["five.tif"]
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(
        InputError, match=r'five.tif: needs .* pip install "solov2_jax\[channels\]"'
    ):
        raw_images.read_values(path, DEEP)


# --- Moves and batches -------------------------------------------------------------


@given(st.integers(3, 60), st.integers(3, 60))
def test_planes_are_resized_as_a_picture_is(height, width):
    image = np.random.default_rng(height).integers(0, 256, (31, 45, 3), dtype=np.uint8)
    want = transforms.resize_image(image, height, width)
    planes = Planes.of(image).resize((width, height), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(planes.array(), want)
    floats = transforms.resize_image(image.astype(np.float32), height, width)
    np.testing.assert_allclose(floats, want, atol=1.01)


@pytest.mark.parametrize(
    "values",
    [*(s for s in SETTINGS if "saturation" not in s), {"mosaic_prob": 1.0}, {"mixup_prob": 1.0}],
    ids=lambda v: "+".join(v),
)
def test_a_declared_range_gives_the_batches_of_8_bits(scenes, values):  # noqa: F811
    """The same moves, masks and boxes; pixels but for the rounding of each move."""
    augment = Augment(jitter_size=(96, 96), **values)
    declared = dataclasses.replace(scenes, pixels=PixelFormat(3, (0.0, 255.0)))
    plain, deep = (
        pipeline.train_batches(
            data, seed=0, num_steps=4, batch_size=2, resize=Resize((64,), 128), flip_prob=0.5,
            channel_order="BGR", augment=augment,
        )
        for data in (scenes, declared)
    )  # fmt: skip
    for a, b in zip(plain, deep, strict=True):
        assert b["image"].dtype == np.float32
        np.testing.assert_allclose(b["image"], a["image"], atol=3)
        for key in set(a) - {"image"}:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.fixture(scope="module")
def five_band(scenes, tmp_path_factory):  # noqa: F811
    """The scenes as TIFF files of five channels of 12 bits, RGB first."""
    folder = tmp_path_factory.mktemp("five")
    content = json.loads(Path(scenes.annotation_file).read_text())
    for record in content["images"]:
        image = np.asarray(Image.open(f"{scenes.image_root}/{record['file_name']}")).astype(int)
        five = np.concatenate([image, 255 - image[..., :1], image.max(-1, keepdims=True)], -1) * 16
        record["file_name"] = record["file_name"].replace(".png", ".tif")
        path = folder / record["file_name"]
        tifffile.imwrite(path, five.astype(np.uint16), photometric="minisblack",
                         planarconfig="contig")  # fmt: skip
    (folder / "x.json").write_text(json.dumps(content))
    data = load_coco(str(folder), str(folder / "x.json"))
    return dataclasses.replace(data, pixels=PixelFormat(5, (0.0, 4080.0)))


def test_workers_and_resumed_runs_give_the_same(five_band):
    augment = Augment(
        brightness=0.3, contrast=0.3, noise=4.0, blur_prob=0.5, cutout_prob=0.5, paste_prob=0.5,
        mosaic_prob=0.3, mixup_prob=0.3, turn_prob=0.5, scale=(0.5, 1.5),
    )  # fmt: skip
    options = {"seed": 0, "num_steps": 6, "batch_size": 2, "resize": Resize((64,), 128)}
    options |= {"flip_prob": 0.5, "augment": augment, "channel_order": "BGR"}
    all_ = list(pipeline.train_batches(five_band, **options))
    assert all(b["image"].shape[-1] == 5 and b["image"].dtype == np.float32 for b in all_)
    assert all(0 <= b["image"].min() and b["image"].max() <= 255 for b in all_)
    reading = pipeline.Reading(num_workers=2, num_threads=1, prefetch=1)
    resumed = pipeline.train_batches(five_band, **options, start_step=2, reading=reading)
    assert_equal(list(resumed), all_[2:])


def test_the_order_of_other_channels_stays(five_band):
    batches = [
        list(pipeline.eval_batches(
            five_band, batch_size=2, resize=Resize((64,), 128), channel_order=order
        ))
        for order in ("RGB", "BGR")
    ]  # fmt: skip
    assert_equal(*batches)
    image = batches[0][0]["image"][0]
    np.testing.assert_allclose(image[:60, :60, 3], 255 - image[:60, :60, 0], atol=0.01)


# --- Weights -----------------------------------------------------------------------


def stem_weights(order="BGR"):
    kernel = RNG.standard_normal((7, 7, 3, 64)).astype(np.float32)
    return Weights("w", "", "detectron2", {convert._STEM: kernel}, {"input.channel_order": order})


@pytest.mark.parametrize("order", ["BGR", "RGB"])
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_the_stem_answers_as_before(channels, order, caplog):
    caplog.set_level(logging.INFO)
    weights = stem_weights(order)
    shape = jax.ShapeDtypeStruct((7, 7, channels, 64), np.float32)
    flat, _ = convert.match(
        weights, {"params": {"backbone": {"stem": {"conv1": {"kernel": shape}}}}}
    )
    new, old = flat[convert._STEM], weights.flat[convert._STEM]
    assert new.shape == shape.shape and "stem's RGB weights" in caplog.text
    rgb = old[:, :, ::-1] if order == "BGR" else old
    patch = RNG.standard_normal((7, 7, 3)).astype(np.float32)
    if channels == 1:  # grey
        patch[:] = patch[..., :1]
    answer = np.einsum("hwc,hwcf->f", patch, rgb)
    shown = patch[..., np.arange(channels) % 3]
    got = np.einsum("hwc,hwcf->f", shown, new)
    if channels in (1, 6):
        np.testing.assert_allclose(got, answer, rtol=2e-4, atol=2e-4)
    else:  # the weights of a colour in each, at three over the number
        for i in range(channels):
            np.testing.assert_allclose(new[:, :, i], rgb[:, :, i % 3] * 3 / channels, rtol=1e-6)
    with pytest.raises(ValueError, match=f"for pictures of 3 channels, .* {channels}: set data"):
        variables = {"params": {"backbone": {"stem": {"conv1": {"kernel": shape}}}}}
        convert.match(weights, variables, strict=True)


def test_means_follow_the_stem():
    config = base.get_config()
    blue, green, red = config.input.mean
    for channels, want in ((3, (blue, green, red)), (4, (red, green, blue, red)),
                           (1, ((red + green + blue) / 3,))):  # fmt: skip
        config.data.channels = channels
        np.testing.assert_allclose(input_statistics(config)[0], want)
    config.data.channels, config.input.mean = 5, (7.0,)
    assert input_statistics(config)[0] == (7.0,) * 5
    config.input.mean = (1.0, 2.0, 3.0, 4.0, 5.0)
    assert input_statistics(config)[0] == (1, 2, 3, 4, 5)
    stem = {convert._STEM: np.zeros((7, 7, 3, 64), np.float32)}
    metadata = {"solov2_jax": '{"input.mean": [1, 2]}'}
    with pytest.raises(ValueError, match="its input.mean has 2 entries for 3 channels"):
        implied_settings("solov2_jax", stem, {}, metadata)
    # A run with statistics of its own starts from weights with those of RGB.
    settings = settings_of_config(base.get_config())
    check_settings(settings, config, "w")
    assert check_form(settings_of_config(config))["input.mean"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["data.channels=0"], "data.channels = 0 must be at least 1"),
        (
            ["data.channels=5", "input.mean=(1.0,2.0)"],
            "input.mean = .* must have an entry for each",
        ),
        (["data.value_range=(0,)"], "must have 2 to 2000 entries"),
        (["data.value_range=(0,1,2)"], r"must be \(low, high\), or that for each"),
        (["data.value_range=(5,5)"], "every low below its high"),
        (["data.channels=2", "data.value_range=(0,1,3,2)"], "every low below its high"),
        (["data.channels=2", "data.display_channels=(0,1,2)"], "must be below data.channels = 2"),
    ],
)
def test_settings_that_cannot_be(flags, message):
    with pytest.raises(InputError, match=message):
        load_config("quickstart", [f"--config.{flag}" for flag in flags])


def test_own_data_leaves_out_what_is_for_rgb():
    config = load_config("finetune", ["--config.data.channels=4", "--config.init_from=a.npz"])
    values = {k: v for d in _of_channels(config) for k, v in d.values.items()}
    assert values == {"augment.saturation": 0.0, "model.backbone.freeze_at": 0}
    with pytest.raises(InputError, match="augment.saturation = 0.2 is for 8-bit RGB"):
        build.check_augment(config)
    assert not _of_channels(load_config("finetune"))


# --- Prediction and export ---------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    config = tiny_network.tiny_config()
    config.data.channels, config.data.value_range = 5, (0.0, 4080.0)
    config.input.buckets_test = ((64, 64),)
    model = build_model(config, len(tiny_network.NAMES))
    variables = tiny_network.tiny_variables(config)
    return model, build_predictor(config, model, variables, tiny_network.NAMES, tiny_network.IDS)


def test_a_path_an_array_and_a_batch_are_one_input(five_band, network):
    options = dataclasses.replace(network[1].input, buckets=((64, 64),))
    batches = pipeline.eval_batches(five_band, batch_size=1, resize=Resize((48,), 64, ((64, 64),)))
    for index, batch in enumerate(batches):
        path = five_band.path(index)
        example = make_example(path, 0, options)
        np.testing.assert_array_equal(example["image"], batch["image"][0])
        again = make_example(raw_images.read_values(path, five_band.pixels), 0, options)
        np.testing.assert_array_equal(again["image"], example["image"])
    with pytest.raises(ValueError, match=r"must be values \(0.0, 4080.0\) \[height, width, 5\]"):
        load_image(np.zeros((4, 4, 3), np.uint8), "a", options.pixels)


def test_an_export_takes_all_channels(tmp_path, five_band, network):
    pytest.importorskip("onnxruntime")
    from solov2_jax.tools.export.exported import ExportedPredictor
    from solov2_jax.tools.export.run import ExportOptions, export

    paths = [five_band.path(i) for i in range(3)]
    report = export(*network, ExportOptions("onnx"), tmp_path, paths, "a test")
    assert report["parity"]["max_score_difference"] < 1e-4
    assert report["parity"]["mean_mask_iou"] > 0.999
    exported = ExportedPredictor(tmp_path)
    assert exported.metadata["inputs"]["image"] == "float32 [batch, height, width, 5]"
    assert exported.input.pixels == PixelFormat(5, (0.0, 4080.0))
    for got, want in zip(
        exported.predict_images(paths), network[1].predict_images(paths), strict=True
    ):
        assert got.masks.shape == want.masks.shape
        assert (got.masks == want.masks).mean() > 0.97


def test_sources_of_other_pictures(tmp_path, five_band):
    np.save(tmp_path / "a.npy", FIVE)
    tifffile.imwrite(tmp_path / "b.tif", np.moveaxis(FIVE, -1, 0), photometric="minisblack")
    assert [p[-5:] for p in find_files(str(tmp_path), DEEP)] == ["a.npy", "b.tif"]
    (source,) = open_sources(str(tmp_path), "", threads=1, limit=0, every=1, pixels=DEEP)
    assert list(source.sizes()) == [(30, 40), (30, 40)]
    for call in source.calls():
        frame = call()
        np.testing.assert_array_equal(frame.values, FIVE)
        np.testing.assert_array_equal(frame.image, DEEP.to_rgb(DEEP.scaled(FIVE, "a")))
    with pytest.raises(InputError, match="a video has 8-bit RGB pictures"):
        open_sources("clip.mp4", "", threads=1, limit=0, every=1, pixels=DEEP)
