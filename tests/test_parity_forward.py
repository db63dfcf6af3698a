"""The whole forward pass and the detections against the reference, R18, 3 classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden_model

from solov2_jax import ops
from solov2_jax.inference.pasting import paste_detections
from solov2_jax.models import intermediates
from solov2_jax.postprocess import detect

MEAN, STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)
TEST = {
    "score_threshold": 0.1,
    "mask_threshold": 0.5,
    "update_threshold": 0.05,
    "nms_pre": 500,
    "max_per_image": 100,
    "nms_sigma": 2.0,
    "nms_iou": 0.5,
    "max_candidates": 4096,
}


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("forward")


@jax.jit
def forward(variables, image, size):
    model, _ = golden_model()
    x = ops.normalize_image(image, size, MEAN, STD)
    return model.apply(variables, x), intermediates(model, variables, x)


@pytest.fixture(scope="module", params=["eval", "eval_pad"])
def case(request, arrays):
    """(name, image size, outputs, every intermediate) of a golden image."""
    image = arrays[f"{request.param}_image"].transpose(1, 2, 0)
    h, w, _ = image.shape
    padded = np.full((1, 256, 320, 3), 77, np.uint8)  # whatever: it is masked out
    padded[0, :h, :w] = image
    _, variables = golden_model()
    size = jnp.asarray([[h, w]])
    return request.param, (h, w), *forward(variables, jnp.asarray(padded), size)


def assert_close(got, want):
    """1e-4 of the tensor's spread; float32's own noise is up to 2e-5 of it."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 1e-4 * want.std()


def test_features(arrays, case):
    name, _, outputs, found = case
    *steps, cell_step, mask_step = arrays[f"{name}_steps"]
    for level, step in zip(range(2, 7), steps, strict=True):
        start = int(step > 1)  # the goldens keep every step-th pixel
        got = found[f"fpn/p{level}"][:, start::step, start::step]
        assert_close(got.transpose(0, 3, 1, 2), arrays[f"{name}_p{level}"])
    got = outputs.mask_feat[:, 1::mask_step, 1::mask_step]
    assert_close(got.transpose(0, 3, 1, 2), arrays[f"{name}_mask_pred"])
    assert_close(outputs.cate[0].T, arrays[f"{name}_cate"])
    assert_close(outputs.kernel[0, ::cell_step].T, arrays[f"{name}_kernel"])


def test_every_intermediate_has_a_name(case):
    _, _, outputs, found = case
    assert {"backbone/res5_1/conv2", "ins_head/cate_tower/gn3/4"} <= set(found)
    last = found["ins_head/kernel_pred/4"].reshape(-1, outputs.kernel.shape[-1])
    np.testing.assert_array_equal(last, outputs.kernel[0, -144:])


VARIANTS = {
    "det": ("matrix", "gaussian"),
    "det_mask_gaussian": ("mask", "gaussian"),
    "det_matrix_linear": ("matrix", "linear"),
}


def test_detections(arrays, case):
    name, size, outputs, _ = case
    stored = [key for key in VARIANTS if f"{name}_{key}_scores" in arrays]
    assert len(stored) == {"eval": 1, "eval_pad": 3}[name]
    for key in stored:
        check_detections(arrays, f"{name}_{key}", size, outputs, *VARIANTS[key])


def check_detections(arrays, key, size, outputs, nms_type, nms_kernel):
    found = jax.jit(
        lambda outputs: detect(
            outputs,
            num_grids=(40, 36, 24, 16, 12),
            nms_type=nms_type,
            nms_kernel=nms_kernel,
            **TEST,
        )
    )(outputs)
    n, *original = arrays[f"{key}_masks_shape"]
    assert np.all(found.valid[0, :n]) and not np.any(found.valid[0, n:])
    np.testing.assert_array_equal(found.labels[0, :n], arrays[f"{key}_classes"])
    # A score holds the mean over the mask's pixels above 0.5: one that rounding moves
    # over the threshold changes it by up to half of one over their number.
    off = np.sort(np.abs(found.scores[0, :n] - arrays[f"{key}_scores"]))
    assert off[-1] <= 2e-4 and off[-3] <= 1e-5
    masks, _ = paste_detections(found.soft_masks, 0, np.arange(n), size, original, threshold=0.5)
    want = np.unpackbits(arrays[f"{key}_masks_packed"], axis=-1)[..., : original[1]]
    union = (masks | (want > 0)).sum((1, 2))
    iou = (masks & (want > 0)).sum((1, 2)) / np.maximum(union, 1)
    assert iou.min() >= 0.999
