"""Detection and mask pasting against the reference and against a plain numpy form.

`golden/postprocess.npz`: point NMS with ties, matrix and mask NMS of 40 masks (packed
bits) with an exact duplicate, and the two final resizes of one mask map.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solov2_jax import nms, platforms, postprocess
from solov2_jax.paste import WINDOWS, paste_masks
from solov2_jax.platforms import ACCELERATOR
from solov2_jax.structs import Outputs

GRIDS, K, E, H4, W4 = (8, 6, 4), 3, 6, 16, 24
S = sum(g * g for g in GRIDS)
SETTINGS = dict(
    num_grids=GRIDS,
    strides=(4, 8, 16),
    score_threshold=0.1,
    mask_threshold=0.5,
    update_threshold=0.05,
    nms_pre=50,
    max_per_image=20,
    nms_type="matrix",
    nms_kernel="gaussian",
    nms_sigma=2.0,
    nms_iou=0.5,
    max_candidates=300,
)


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Several tiles and chunks even at the tests' sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platforms, "CPU", platforms.CPU._replace(mask_pixels=100))
        patch.setattr(postprocess, "CHUNK", 16)
        patch.setattr(postprocess, "NMS_PARTS", (0.3, 1.0))  # less to compile
        yield


@functools.cache
def jitted(**changes):
    return jax.jit(functools.partial(postprocess.detect, **{**SETTINGS, **changes}))


def make_outputs(seed=0, bias=-1.0, batch=1, dtype=jnp.float32):
    """Blobs: features are smooth, so that masks overlap as real ones do."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(-1, 1, W4), np.linspace(-1, 1, H4))
    basis = np.stack([x, y, x * y, x * x, y * y, np.ones_like(x)], -1)
    kernel = rng.normal(size=(batch, S, E)) * 3
    # Half of the cells repeat a kernel, more or less: something to suppress.
    kernel[:, ::2] = kernel[:, :1] + 0.3 * rng.normal(size=(batch, S // 2, E))
    fields = dict(
        cate=rng.normal(size=(batch, S, K)) * 2 + bias,
        kernel=kernel,
        mask_feat=np.broadcast_to(basis[None], (batch, H4, W4, E)),
    )
    return Outputs(**{k: jnp.asarray(v, dtype) for k, v in fields.items()})


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float32(x)))


def by_hand(outputs, i=0, **changes):
    """inference_single_image, line by line. Returns scores, labels, soft masks."""
    s = {**SETTINGS, **changes}
    scores, start = sigmoid(outputs.cate[i]), 0
    for g in GRIDS:
        level = scores[start : start + g * g].reshape(g, g, K)
        padded = np.pad(level, ((1, 0), (1, 0), (0, 0)), constant_values=-1)
        windows = [padded[:-1, :-1], padded[1:, :-1], padded[:-1, 1:], level]
        level *= np.max(windows, axis=0) == level
        start += g * g
    cells, labels = np.nonzero(scores > s["score_threshold"])
    score = scores[cells, labels]
    soft = sigmoid(
        np.asarray(outputs.kernel[i])[cells] @ np.asarray(outputs.mask_feat[i]).reshape(-1, E).T
    )
    hard = soft > s["mask_threshold"]
    stride = np.repeat(s["strides"], [g * g for g in GRIDS])[cells]
    big = hard.sum(1) > stride
    score, labels, soft, hard = score[big], labels[big], soft[big], hard[big]
    score = score * (soft * hard).sum(1) / hard.sum(1)
    order = np.argsort(-score, kind="stable")[: s["nms_pre"]]
    score, labels, soft, hard = (x[order] for x in (score, labels, soft, hard))
    n = len(score)
    inter = hard.astype(np.float64) @ hard.T
    area = hard.sum(1)
    iou = np.triu(inter / (area[:, None] + area - inter), 1)
    iou *= labels[:, None] == labels
    if s["nms_type"] == "mask":
        keep = np.ones(n, bool)
        for a in range(n):
            keep &= ~(keep[a] & (iou[a] > s["nms_iou"]))
        score = score * keep
    elif n:
        most = iou.max(0)[:, None]
        f = dict(gaussian=lambda x: np.exp(-s["nms_sigma"] * x**2), linear=lambda x: 1 - x)[
            s["nms_kernel"]
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            decay = f(iou) / f(most)
        score = score * np.where(np.isnan(decay), 1.0, decay).min(0)
    keep = score >= s["update_threshold"]
    score, labels, soft = score[keep], labels[keep], soft[keep]
    order = np.argsort(-score, kind="stable")[: s["max_per_image"]]
    return score[order], labels[order], soft[order].reshape(-1, H4, W4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nms_kernel": "linear"},
        {"nms_type": "mask"},
        {"nms_pre": 200, "max_per_image": 250},  # every candidate enters, few come out
        {"nms_pre": 9, "mask_threshold": 0.3},
    ],
    ids=str,
)
def test_detections_equal_the_plain_form(changes):
    """For few and many candidates: both sides of nms_pre and of every compiled part."""
    for seed, bias in enumerate((-6.0, -3.0, -2.0, -1.0, 1.0)):
        outputs = make_outputs(seed, bias)
        got = jitted(**changes)(outputs)
        scores, labels, soft = by_hand(outputs, **changes)
        n = len(scores)
        np.testing.assert_array_equal(got.valid[0], np.arange(got.valid.size) < n)
        np.testing.assert_array_equal(got.labels[0, :n], labels)
        np.testing.assert_allclose(got.scores[0, :n], scores, rtol=1e-5)
        np.testing.assert_allclose(got.soft_masks[0, :n], soft, atol=1e-5)
        assert not got.scores[0, n:].any() and not got.soft_masks[0, n:].any()


def test_images_of_a_batch_do_not_mix():
    outputs = make_outputs(batch=3)
    got = jitted()(outputs)
    for i in range(3):
        alone = jitted()(jax.tree.map(lambda x, i=i: x[i : i + 1], outputs))
        np.testing.assert_allclose(got.scores[i], alone.scores[0], rtol=1e-6)
        np.testing.assert_array_equal(got.labels[i], alone.labels[0])


def test_candidates_beyond_the_cap_are_the_weakest():
    outputs = make_outputs(bias=1.0)
    free, capped = jitted()(outputs), jitted(max_candidates=12)(outputs)
    assert capped.num_candidates == free.num_candidates > 60  # counted before the cap
    assert 0 < capped.valid.sum() <= 12
    # The best candidates are the same, so is the best detection.
    np.testing.assert_allclose(capped.scores[0, 0], free.scores[0, 0], rtol=1e-6)


def test_no_candidate():
    got = jitted()(make_outputs(bias=-50.0))
    assert not got.valid.any() and not got.scores.any() and got.num_candidates == 0
    assert got.soft_masks.shape == (1, 20, H4, W4) and not got.soft_masks.any()


def test_memory_does_not_grow_with_the_number_of_candidates():
    """Ten times the cap costs its scores and indices, not its masks."""
    outputs = make_outputs()
    sizes = [
        jax.jit(
            lambda *x, m=m: postprocess.detect(Outputs(*x), **{**SETTINGS, "max_candidates": m})
        )
        .lower(outputs.cate, outputs.kernel, outputs.mask_feat)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for m in (30, 300)
    ]
    one_mask = H4 * W4 * 4
    assert sizes[1] - sizes[0] < 270 * one_mask / 4


def test_one_trace_for_different_contents():
    traces = []

    def counted(outputs):
        traces.append(1)
        return postprocess.detect(outputs, **SETTINGS)

    program = jax.jit(counted)
    for bias in (-50.0, -3.0, 1.0):
        program(make_outputs(bias=bias))
    assert len(traces) == 1


@pytest.mark.parametrize("nms_kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("nms_type", ["matrix", "mask"])
def test_exact_duplicates_leave_one(nms_type, nms_kernel):
    """Every cell has the same mask: one detection per class, and no NaN."""
    outputs = make_outputs(bias=1.0)
    same = jnp.broadcast_to(outputs.kernel[:, 1:2], outputs.kernel.shape)
    got = jitted(nms_type=nms_type, nms_kernel=nms_kernel)(outputs.replace(kernel=same))
    for x in jax.tree.leaves(got):
        assert np.isfinite(x).all()
    if (nms_type, nms_kernel) != ("matrix", "gaussian"):  # which decays to exp(-2) only
        assert sorted(got.labels[0][got.valid[0]].tolist()) == [0, 1, 2]


def test_bfloat16_outputs_give_float32_detections():
    outputs = make_outputs()
    got = jitted()(jax.tree.map(lambda x: x.astype(jnp.bfloat16), outputs))
    assert got.scores.dtype == got.soft_masks.dtype == jnp.float32
    want = jitted()(outputs)
    # bfloat16 logits have three digits: the best detection is the same one.
    np.testing.assert_allclose(got.scores[0, 0], want.scores[0, 0], rtol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nms_type": "soft"}, 'nms_type is "soft"'),
        ({"nms_kernel": "cubic"}, 'nms_kernel is "cubic"'),
        ({"strides": (8, 8)}, "3 num_grids but 2 strides"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        postprocess.detect(make_outputs(), **{**SETTINGS, **changes})


def test_point_nms_equals_the_references(golden):
    g = golden("postprocess")
    for x, want in zip(g["pnms_in"], g["pnms_out"], strict=True):
        cells = jnp.asarray(np.moveaxis(x, 0, -1).reshape(144, 3))
        got = nms.point_nms(cells, (12,))
        np.testing.assert_array_equal(got, np.moveaxis(want, 0, -1).reshape(144, 3))


def golden_masks(g):
    masks = np.unpackbits(g["nms_masks"], axis=-1).reshape(40, -1).astype(np.float32)
    area, labels = jnp.asarray(masks.sum(1)), jnp.asarray(g["nms_labels"], jnp.int32)
    iou = postprocess._iou(jnp.asarray(masks @ masks.T), area)
    return jnp.asarray(g["nms_scores"]), labels, iou


@pytest.mark.parametrize("kernel", ["gaussian_2.0", "gaussian_0.5", "linear"])
def test_matrix_nms_equals_the_references(golden, kernel):
    g = golden("postprocess")
    name, _, sigma = kernel.partition("_")
    got = nms.matrix_nms(*golden_masks(g), name, float(sigma or 0))
    np.testing.assert_allclose(got, g[f"matrix_nms_{kernel}"], rtol=1e-5, atol=1e-7)


def test_mask_nms_equals_the_references(golden):
    g = golden("postprocess")
    _, labels, iou = golden_masks(g)
    np.testing.assert_array_equal(nms.mask_nms(labels, iou, 0.5), g["mask_nms_keep_0.5"])


def test_mask_nms_of_a_long_chain():
    """Each mask covers only the next: every other one stays, after many rounds."""
    n = 50
    iou = jnp.asarray(np.eye(n, k=1, dtype=np.float32))
    kept = nms.mask_nms(jnp.zeros(n, jnp.int32), iou, 0.5)
    np.testing.assert_array_equal(kept, np.arange(n) % 2 == 0)


def test_linear_matrix_nms_of_three_equal_masks():
    scores = jnp.float32([0.9, 0.8, 0.7, 0.6])
    iou = np.full((4, 4), 1.0, np.float32)
    iou[:3, 3] = 0.25  # the fourth is decayed by the first only, not by its copies
    got = nms.matrix_nms(scores, jnp.zeros(4, jnp.int32), jnp.asarray(iou), "linear", 2.0)
    np.testing.assert_allclose(got, [0.9, 0, 0, 0.45], rtol=1e-6)


def paste(soft, image_size, original, threshold=0.5, canvas=None):
    """Returns the masks at the original size, bool, and the boxes, as numpy."""
    height, width = canvas or original
    canvas = height, -(-width // 8) * 8
    program = jax.jit(paste_masks, static_argnums=(5, 6))
    sizes = jnp.int32(image_size), jnp.int32(original)
    part = np.arange(len(soft), dtype=np.int32)
    bits, boxes = program(soft, part, len(soft), *sizes, canvas, threshold)
    masks = np.unpackbits(bits, axis=2).view(bool)[:, : original[0], : original[1]]
    return masks, np.asarray(boxes)


@pytest.mark.parametrize("size", [(100, 126), (40, 51)])
def test_pasted_masks_equal_the_references_resizes(golden, size):
    g = golden("postprocess")
    want = g["final_{}x{}".format(*size)]
    for threshold in np.quantile(want, [0.1, 0.3, 0.5, 0.7, 0.9]):
        got, _ = paste(g["final_in"][0], (61, 77), size, float(threshold))
        clear = np.abs(want - threshold) > 1e-5  # rounding decides the others
        np.testing.assert_array_equal(got[clear], (want > threshold)[clear])
        assert clear.mean() > 0.99


@pytest.mark.parametrize("image_size", [(40, 50), (72, 64), (20, 120)])
def test_a_small_image_in_a_large_batch_keeps_its_masks(image_size):
    """The stride is 4 whatever the padding. The reference's is 1 to 3 here."""
    rng = np.random.default_rng(0)
    soft = np.zeros((3, 80, 80), np.float32)
    soft[:, :32, :32] = rng.random((3, 32, 32))
    alone, boxes_alone = paste(soft[:, :32, :32], image_size, (120, 100))
    padded, boxes = paste(soft, image_size, (120, 100))
    np.testing.assert_array_equal(padded, alone)
    np.testing.assert_array_equal(boxes, boxes_alone)


def test_pasted_shape_stands_where_it_was():
    """A square of 8..24 x 12..20 input pixels, at twice the size."""
    soft = np.zeros((1, 16, 16), np.float32)
    soft[0, 2:6, 3:5] = 1
    masks, boxes = paste(soft, (60, 64), (120, 128))
    np.testing.assert_allclose(boxes[0], [24, 16, 40, 48], atol=1)
    assert abs(masks[0].sum() - 16 * 32) < 40


def test_canvas_is_empty_beyond_the_image_and_sizes_do_not_retrace():
    traces = []

    @functools.partial(jax.jit, static_argnums=5)
    def counted(*args):
        traces.append(1)
        return paste_masks(*args, 0.5)

    soft = np.random.default_rng(0).random((5, 16, 16)).astype(np.float32)
    part = np.arange(5, dtype=np.int32)
    for original in ((50, 70), (33, 80), (1, 1), (60, 80)):
        sizes = jnp.int32([61, 50]), jnp.int32(original)
        bits, boxes = counted(soft, part, 5, *sizes, (60, 80))
        masks = np.unpackbits(bits, axis=2)
        h, w = original
        assert not masks[:, h:].any() and not masks[:, :, w:].any()
        want, want_boxes = paste(soft, (61, 50), original)
        np.testing.assert_array_equal(masks[:, :h, :w], want)
        np.testing.assert_array_equal(boxes, want_boxes)
    assert len(traces) == 1


def test_boxes_are_tight_and_zero_for_an_empty_mask():
    soft = np.random.default_rng(0).random((23, 8, 8)).astype(np.float32) ** 4
    soft[7] = 0
    masks, boxes = paste(soft, (32, 30), (45, 41))
    for mask, box in zip(masks, boxes, strict=True):
        y, x = np.nonzero(mask)
        tight = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0] * 4
        np.testing.assert_array_equal(box, tight)
    assert not masks[7].any() and masks.any((1, 2)).sum() > 15


@pytest.mark.parametrize("original", [(45, 130), (160, 150)])
def test_a_mask_enlarged_within_a_window_equals_the_whole(monkeypatch, original):
    """Spots of all sizes and places, against one window that is the canvas."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:40, :48]
    soft = []
    for part in np.repeat(WINDOWS, 6):
        cy, cx = rng.uniform(0, 37), rng.uniform(0, 44)
        distance = np.maximum(np.abs(y - cy) / 37, np.abs(x - cx) / 44)
        soft.append(1 / (1 + np.exp(60 * (distance - rng.uniform(0.2, 0.8) * part))))
    args = np.float32(soft), (148, 176), original, 0.3, (160, 152)
    masks, boxes = paste(*args)
    monkeypatch.setattr("solov2_jax.paste.WINDOWS", (1,))
    whole, whole_boxes = paste(*args)
    assert np.ptp(whole.sum((1, 2))) > 5000, "sizes differ"
    np.testing.assert_array_equal(masks, whole)
    np.testing.assert_array_equal(boxes, whole_boxes)


@pytest.mark.parametrize("pixels", [7, 64, 100])
def test_common_pixels_counted_by_bits_are_the_products(pixels):
    hard = jnp.asarray(np.random.default_rng(pixels).random((23, pixels)) < 0.4)
    want = postprocess._common_by_products(hard)
    np.testing.assert_array_equal(jax.jit(postprocess._common_by_bits)(hard), want)
    assert want.dtype == postprocess._common_by_bits(hard).dtype and want.max() > want.min()


def test_detections_by_bits_are_those_by_products(monkeypatch):
    monkeypatch.setattr(postprocess, "BITS_FROM", 1)
    outputs = make_outputs()
    with platforms.portable_forms():
        want = jax.jit(functools.partial(postprocess.detect, **SETTINGS))(outputs)
    for ours, theirs in zip(
        jitted()(outputs).__dict__.values(), want.__dict__.values(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("pixels", [1, 2 * 50 * 88, 2**24])
def test_the_form_for_other_devices_pastes_the_same(monkeypatch, pixels):
    soft = np.random.default_rng(0).random((5, 16, 24)).astype(np.float32)
    monkeypatch.setattr("solov2_jax.paste.ACCELERATOR", ACCELERATOR._replace(pasted_pixels=pixels))
    part, sizes = np.int32([3, 0, 0, 4, 2]), (jnp.int32([60, 90]), jnp.int32([50, 81]))
    for count in (0, 3, 5):
        want = jax.jit(lambda *args: paste_masks(*args, (50, 88), 0.5))(soft, part, count, *sizes)
        with platforms.portable_forms():
            program = jax.jit(lambda *args: paste_masks(*args, (50, 88), 0.5))
            got = program(soft, part, count, *sizes)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours[:count].any() == (count > 0) and not ours[count:].any()
    whole, boxes = paste(soft[part], (60, 90), (50, 81))
    np.testing.assert_array_equal(np.unpackbits(got[0], axis=2)[:, :, :81], whole)
    np.testing.assert_array_equal(got[1], boxes)


def test_a_canvas_that_does_not_fill_its_bytes_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        sizes = jnp.int32([60, 90]), jnp.int32([50, 81])
        paste_masks(jnp.zeros((1, 16, 24)), jnp.zeros(1, int), 1, *sizes, (50, 81), 0.5)
