"""The predictor with a network that paints: blue, green and red become three classes.

So what comes out is known to the pixel, and nothing here compiles for long.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_network
from PIL import Image

from solov2_jax.config import save_config
from solov2_jax.inference import pasting, programs
from solov2_jax.inference.pasting import round_size
from solov2_jax.inference.prediction import MaskCrops
from solov2_jax.inference.predictor import Predictor
from solov2_jax.inference.preprocess import InputOptions
from solov2_jax.inference.programs import DetectOptions
from solov2_jax.structs import Detections, Outputs

GRIDS = (4, 3, 2, 1, 1)
CELLS = sum(g * g for g in GRIDS)
# Cell -> (feature, class, logit of its score). Cells of the finest grid, that are no
# neighbours, so that point NMS keeps them. Feature 3 is a bar at the bottom of the
# padded input.
OBJECTS = {0: (0, 2, 3.0), 2: (1, 0, 2.0), 8: (2, 1, 1.0), 10: (3, 0, 2.5)}
INPUT = InputOptions(
    channel_order="BGR",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    min_size=64,
    max_size=160,
    buckets=(),
)
DETECT = DetectOptions(
    num_grids=GRIDS,
    score_threshold=0.1,
    mask_threshold=0.5,
    update_threshold=0.05,
    nms_pre=20,
    max_per_image=8,
    nms_type="matrix",
    nms_kernel="gaussian",
    nms_sigma=2.0,
    nms_iou=0.5,
    max_candidates=32,
)


@dataclass(frozen=True)
class Painter:
    """A network whose mask features are the image's channels at a quarter."""

    name: str
    matmul_precision: str = "default"

    def apply(self, variables, image, extent):
        TRACES.append((self.name, image.shape))
        b, h, w, _ = image.shape
        on = image[:, 2::4, 2::4] > 128
        bar = jnp.arange(h // 4)[None] >= extent[:, :1] // 4 - 4
        bar = jnp.broadcast_to(bar[:, :, None, None], (b, h // 4, w // 4, 1))
        on = jnp.concatenate([on, bar], axis=-1)
        kernel = np.zeros((CELLS, 4), np.float32)
        cate = np.full((CELLS, 3), -10, np.float32)
        for cell, (feature, label, logit) in OBJECTS.items():
            kernel[cell, feature] = 1
            cate[cell, label] = logit
        score = jnp.asarray(cate) + variables["shift"]
        return Outputs(
            cate=jnp.broadcast_to(score, (b, CELLS, 3)),
            kernel=jnp.broadcast_to(kernel, (b, CELLS, 4)),
            mask_feat=jnp.where(on, 10.0, -10.0),
        )


TRACES: list = []


def simple_detect(outputs, *, score_threshold, mask_threshold, max_per_image, **others):
    """Every cell's best class, without NMS: enough here, and quick to compile."""
    scores, cells = jax.lax.top_k(jax.nn.sigmoid(outputs.cate).max(-1), max_per_image)
    labels = jnp.take_along_axis(outputs.cate.argmax(-1), cells, axis=1)
    kernels = jnp.take_along_axis(outputs.kernel, cells[..., None], axis=1)
    logits = jnp.einsum("bde,bhwe->bdhw", kernels, outputs.mask_feat)
    soft_masks = jax.nn.sigmoid(logits)
    pixels = (soft_masks > mask_threshold).sum((2, 3))
    valid = (scores > score_threshold) & (pixels > 8)
    return Detections(scores, labels, soft_masks, valid, valid.sum(1))


@pytest.fixture(autouse=True)
def detect(request, monkeypatch):
    """Replaces `detect`, but for the tests that ask for the real one."""
    programs.compile_detect.cache_clear()
    if getattr(request, "param", "simple") == "simple":
        monkeypatch.setattr(programs, "detect", simple_detect)


def predictor(name="a", shift=0.0, **options):
    return Predictor(
        Painter(name),
        {"shift": np.float32(shift)},
        replace(INPUT, **options),
        DETECT,
        ("x", "y", "z"),
        (1, 2, 3),
    )


def picture(height, width):
    """A black RGB picture with a blue, a green and a red rectangle."""
    image = np.zeros((height, width, 3), np.uint8)
    h, w = height // 8, width // 8
    image[h : 3 * h, w : 4 * w, 2] = 255
    image[4 * h : 6 * h, w : 3 * w, 1] = 255
    image[2 * h : 5 * h, 5 * w : 7 * w, 0] = 255
    return image


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    ("size", "detect"),
    [
        ((64, 80), "real"),
        ((64, 80), "simple"),
        ((128, 96), "simple"),
        ((40, 50), "simple"),
        ((321, 200), "simple"),
    ],
    indirect=["detect"],
)
def test_masks_boxes_labels_and_scores_at_the_original_size(size):
    image = picture(*size)
    (p,) = predictor().predict_images([image])
    # The bar lies in the bottom 16 rows of the padded input, beyond or in the image.
    p = replace_bar(p)
    assert p.labels.tolist() == [2, 0, 1]
    assert p.scores == pytest.approx(1 / (1 + np.exp([-3.0, -2.0, -1.0])), abs=1e-3)
    assert p.masks.shape == (3, *size) and p.masks.dtype == bool
    for mask, box, channel in zip(p.masks, p.boxes, (2, 1, 0), strict=True):
        # A quarter of the input's resolution costs up to two input pixels an edge.
        assert iou(mask, image[..., channel] > 0) > 0.75
        ys, xs = np.nonzero(mask)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def replace_bar(p):
    """Without the bar, which is of class 0 like green but scores higher."""
    keep = np.abs(p.scores - 1 / (1 + np.exp(-2.5))) > 1e-3
    return replace(
        p,
        masks=p.masks[keep],
        boxes=p.boxes[keep],
        scores=p.scores[keep],
        labels=p.labels[keep],
    )


def test_a_mask_only_in_the_padding_is_dropped():
    # 80 rows are padded to 96, and 64 not at all, in whichever shape.
    for buckets in ((), ((160, 160),)):
        full = list(predictor(buckets=buckets).predict_images([picture(80, 64)]))[0]
        assert len(full) == 3
        assert len(list(predictor(buckets=buckets).predict_images([picture(64, 80)]))[0]) == 4
    assert (full.boxes[:, 2:] > full.boxes[:, :2]).all()


def test_nothing_found_keeps_the_shapes():
    (p,) = predictor(shift=-20.0).predict_images([picture(64, 80)])
    assert len(p) == 0
    assert p.masks.shape == (0, 64, 80) and p.boxes.shape == (0, 4)


def test_batches_equal_single_images_and_come_in_order():
    images = [picture(64, 80), picture(128, 96), picture(64, 90), picture(64, 80) // 2]
    one = list(predictor().predict_images(images))
    three = list(predictor().predict_images(images, batch_size=3))
    assert [p.image_id for p in one] == [p.image_id for p in three] == [0, 1, 2, 3]
    for a, b in zip(one, three, strict=True):
        np.testing.assert_array_equal(a.masks, b.masks)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-6)


def test_padding_of_a_batch_gives_no_prediction():
    batch = {
        "image": np.zeros((2, 64, 96, 3), np.uint8),
        "image_size": np.array([[64, 80], [1, 1]]),
        "original_size": np.array([[32, 40], [1, 1]]),
        "image_id": np.array([77, -1]),
    }
    (p,) = predictor().predict_batch(batch)
    assert p.image_id == 77 and p.masks.shape[1:] == (32, 40)


def test_one_trace_per_shape_shared_by_predictors_of_new_weights():
    TRACES.clear()
    first = predictor("traced")
    for size in ((64, 80), (64, 90), (66, 82), (128, 90)):
        list(first.predict_images([picture(*size)]))
    # Padded, the first three are 64 x 96; the last is 96 x 64.
    assert [shape for _, shape in TRACES] == [(1, 64, 96, 3), (1, 96, 64, 3)]
    (p,) = predictor("traced", shift=-0.5).predict_images([picture(64, 80)])
    assert len(TRACES) == 2
    assert p.scores[0] == pytest.approx(1 / (1 + np.exp(-2.5)), abs=1e-3)


def test_one_call_one_image_with_class_names_array_or_path(tmp_path):
    image = picture(64, 80)
    found = predictor()(image)
    assert found.names == [("x", "y", "z")[i] for i in found.labels]
    Image.fromarray(image).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(predictor()(path).masks, found.masks)


def test_compiled_ahead_is_not_compiled_again():
    TRACES.clear()
    ready = predictor("ahead", buckets=((64, 96), (160, 96)))
    ready.compile(ready.input.buckets, batch_size=2)
    compiled = [(2, 64, 96, 3), (2, 160, 96, 3)]
    assert sorted(shape for _, shape in TRACES) == compiled  # at once, in any order
    images = [picture(64, 80), picture(128, 80), picture(64, 90)]
    assert [p.image_id for p in ready.predict_images(images, batch_size=2)] == [0, 1, 2]
    assert sorted(shape for _, shape in TRACES) == compiled
    assert ready.padded_shape(128, 80) == (160, 96)


def test_masks_pasted_in_small_chunks_are_the_same(monkeypatch):
    (whole,) = predictor().predict_images([picture(200, 150)])
    monkeypatch.setattr(pasting, "ROUND_PIXELS", 256 * 256)
    assert round_size((256, 256), 100) == 1
    (parts,) = predictor().predict_images([picture(200, 150)])
    np.testing.assert_array_equal(whole.masks, parts.masks)
    np.testing.assert_array_equal(whole.boxes, parts.boxes)


def test_masks_of_a_large_image_are_held_packed(monkeypatch):
    (plain,) = predictor(buckets=((96, 96),)).predict_images([picture(80, 64)])
    monkeypatch.setattr(pasting, "PACK_BYTES", 2 * 64 * 80)
    (packed,) = predictor(buckets=((96, 96),)).predict_images([picture(80, 64)])
    assert isinstance(packed.masks, MaskCrops) and len(packed) == len(plain) == 3
    np.testing.assert_array_equal(np.asarray(packed.masks), plain.masks)
    np.testing.assert_array_equal(packed.boxes, plain.boxes)
    np.testing.assert_array_equal(packed.labels, plain.labels)
    assert packed.encode() == plain.encode()


def test_rounds_are_smaller_on_large_canvases():
    assert round_size((768, 768), 100) == round_size((1024, 1024), 100) == 100
    assert round_size((3072, 4096), 100) == 10
    assert round_size((20_000, 20_000), 100) == 1


def test_wrong_images_and_buckets_are_named():
    with pytest.raises(ValueError, match="must be uint8"):
        list(predictor().predict_images([np.zeros((4, 4, 3), np.float32)]))
    with pytest.raises(ValueError, match="must be uint8"):
        list(predictor().predict_images([np.zeros((4, 4), np.uint8)]))
    with pytest.raises(ValueError, match="has no pixels"):
        predictor()(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="batch_size is 0"):
        list(predictor().predict_images([], batch_size=0))
    small = predictor(buckets=((32, 32),))
    with pytest.raises(ValueError, match="input.buckets_test"):
        list(small.predict_images([picture(64, 80)]))


def test_from_workdir_reads_config_classes_and_the_asked_checkpoint(tmp_path):
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((64, 64),)
    workdir = tiny_network.write_workdir(tmp_path / "run", config, steps=(3, 7))
    last = Predictor.from_workdir(workdir)
    assert (last.class_names, last.category_ids) == (("cat", "dog"), (5, 20))
    assert last.input.buckets == ((64, 64),)
    first = Predictor.from_workdir(workdir, "3", ["--config.input.min_size_test=40"])
    assert first.input.min_size == 40
    kernels = [p.variables["params"]["fpn"]["output2"]["kernel"] for p in (first, last)]
    assert (kernels[0] != kernels[1]).any()
    want = tiny_network.tiny_variables(config, seed=7)["params"]["fpn"]["output2"]
    np.testing.assert_array_equal(kernels[1], want["kernel"])


def test_from_workdir_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        Predictor.from_workdir(tmp_path)
    config = tiny_network.tiny_config()
    save_config(config, tmp_path / "config.json")
    with pytest.raises(ValueError, match="classes.json"):
        Predictor.from_workdir(tmp_path)
    (tmp_path / "classes.json").write_text('{"names": ["a", "b"], "ids": [1, 2]}')
    with pytest.raises(ValueError, match="no checkpoint"):
        Predictor.from_workdir(tmp_path)


def test_from_weights_takes_classes_from_the_weights(tmp_path):
    config = tiny_network.tiny_config()
    weights = tiny_network.write_weights(tmp_path, config)
    config.model.num_classes = 0
    found = Predictor.from_weights(weights, config)
    assert (found.class_names, found.category_ids) == (("cat", "dog"), (1, 2))
    save_config(config, tmp_path / "tiny.json")
    half = ["--config.input.min_size_test=40"]
    named = Predictor.from_weights(Path(weights), tmp_path / "tiny.json", half)
    assert named.input.min_size == 40 and named.class_names == found.class_names
    with pytest.raises(ValueError, match="need a config file"):
        Predictor.from_weights(weights, config, half)
    config.model.num_classes = 80
    with pytest.raises(ValueError, match="model.num_classes is 80"):
        Predictor.from_weights(weights, config)
    config.model.num_classes = 0
    config.model.backbone.depth = 50
    with pytest.raises(ValueError, match="contradict the config"):
        Predictor.from_weights(weights, config)


@pytest.mark.parametrize("key", ["model.fpn.channels=64", "model.num_classes=7"])
def test_a_key_that_the_weights_contradict_is_an_error(tmp_path, key):
    workdir = tiny_network.write_workdir(tmp_path / "run", tiny_network.tiny_config())
    with pytest.raises(ValueError, match=f"--config.{key}: the weights of .* were trained with "):
        Predictor.from_workdir(workdir, overrides=[f"--config.{key}"])


@pytest.mark.parametrize("content", ["{", "[]", '{"x": "soon"}', None])
def test_times_of_earlier_compilations_are_only_a_hint(tmp_path, monkeypatch, content):
    path = tmp_path / "seconds.json"
    monkeypatch.setattr(programs, "_seconds_file", lambda: path)
    if content is None:
        path.mkdir()  # cannot be read or replaced
    else:
        path.write_text(content)
    assert programs.compile_seconds() == {}
    programs.note_compile_seconds("a", 1.26)
    assert programs.compile_seconds() == ({} if content is None else {"a": 1.3})
