"""Outputs -> Detections, whose masks are at a quarter of the size.

Memory depends on shapes and limits only, never on the image's content: candidates are
capped before any mask is computed, and masks are computed in tiles of pixels.
Shapes: the legend of `structs.py`; M candidates, N those that enter NMS.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from solov2_jax import ops, platforms
from solov2_jax.keypoints import decode_keypoints
from solov2_jax.nms import mask_nms, matrix_nms, point_nms
from solov2_jax.platforms import PlatformOp, Tuning
from solov2_jax.structs import Detections, Outputs

# Candidates whose masks are looked at together.
CHUNK = 512
# From so many masks on, a CPU counts common pixels by bits; fewer gain nothing.
BITS_FROM = 200
# NMS is compiled for these parts of `nms_pre`; the smallest sufficient one runs.
NMS_PARTS = (0.1, 0.25, 0.5, 0.75, 1.0)


@jax.named_scope("postprocess")
def detect(
    outputs: Outputs,
    *,
    num_grids: Sequence[int],
    strides: Sequence[int] = (8, 8, 16, 32, 32),
    score_threshold: float,
    mask_threshold: float,
    update_threshold: float,
    nms_pre: int,
    max_per_image: int,
    nms_type: str,
    nms_kernel: str,
    nms_sigma: float,
    nms_iou: float,
    max_candidates: int,
    extent: Int[Array, "B 2"] | None = None,
) -> Detections:
    """Returns the detections of every image, best first.

    Args:
      num_grids, strides: of the levels; a mask needs more pixels than its stride.
      score_threshold: a candidate's class score is above it.
      mask_threshold: a mask's pixels are above it.
      update_threshold: least score after NMS.
      nms_pre: candidates that enter NMS, best first after rescoring by the mask.
      max_per_image: D.
      nms_type: "matrix" or "mask"; nms_kernel, nms_sigma belong to the first, nms_iou
        to the second.
      max_candidates: cell-class pairs whose masks are looked at, best class score
        first. With at most so many the result is the reference's.
      extent: of the mask features, see `ops`; soft masks are 0 beyond it.

    Source: AdelaiDet adet/modeling/solov2/solov2.py, inference_single_image, which has
    no `max_candidates` and applies `update_threshold` to matrix NMS only.
    """
    if nms_type not in ("matrix", "mask"):
        raise ValueError(f'nms_type is "{nms_type}": give "matrix" or "mask"')
    if not len(num_grids) == len(strides):
        raise ValueError(f"{len(num_grids)} num_grids but {len(strides)} strides")
    level = np.repeat(np.arange(len(num_grids)), [g * g for g in num_grids])
    min_area = np.array(strides, np.float32)[level]
    limit = min(max_candidates, outputs.cate.shape[1] * outputs.cate.shape[2])
    nms_pre = min(nms_pre, limit)

    def detect_image(image):
        cate, kernel, feat, points, own = image
        pixels = _MaskFeatures(feat.reshape(-1, feat.shape[-1]))
        if own is not None:
            inside = ops.inside(own[None], *feat.shape[:2]).reshape(-1)
            pixels = _MaskFeatures(pixels.features, inside, own[0] * feat.shape[1])
        scores = jax.nn.sigmoid(cate.astype(jnp.float32))
        scores = point_nms(scores, num_grids)
        candidates, num_candidates = _select_candidates(scores, score_threshold, limit)

        def sums(kernels, overlaps):
            return _mask_sums(kernels, pixels, threshold=mask_threshold, overlaps=overlaps)

        rescore = functools.partial(_rescore, kernel, jnp.asarray(min_area), sums)
        candidates, num_kept = _keep_best(candidates, rescore, nms_pre)
        score, overlap, area = _rescore_nonempty(rescore, candidates, num_kept)
        order = jnp.argsort(-score)  # stable: ties stay in the reference's order
        candidates, score = jax.tree.map(lambda x: x[order], (candidates, score))
        iou = _iou(overlap[order][:, order], area[order])
        if nms_type == "matrix":
            score = matrix_nms(score, candidates.label, iou, nms_kernel, nms_sigma)
        else:
            score = jnp.where(mask_nms(candidates.label, iou, nms_iou), score, 0.0)
        kept = (score >= update_threshold) & (score > 0)
        score, best = lax.top_k(jnp.where(kept, score, 0.0), min(max_per_image, nms_pre))
        soft = jax.nn.sigmoid(_dynamic_conv(kernel[candidates.cell[best]], pixels.features))
        shown = score[:, None] > 0
        shown = shown if pixels.inside is None else shown & pixels.inside[None]
        soft = jnp.where(shown, soft, 0.0).reshape(-1, *feat.shape[:2])
        found = {
            "scores": score,
            "labels": candidates.label[best],
            "soft_masks": soft,
            "valid": score > 0,
            "num_candidates": num_candidates,
        }
        if points is not None:
            inside = None if pixels.inside is None else pixels.inside.reshape(feat.shape[:2])
            places = decode_keypoints(points[0][candidates.cell[best]], points[1], inside)
            found["keypoints"] = jnp.where((score > 0)[:, None, None], places, 0.0)
        return found

    points = (outputs.keypoint_kernel, outputs.keypoint_feat)
    points = None if outputs.keypoint_kernel is None else points
    images = (outputs.cate, outputs.kernel, outputs.mask_feat, points, extent)
    detections = lax.map(detect_image, images)
    missing = max(max_per_image - nms_pre, 0)
    return Detections(**{name: _pad_axis_1(x, missing) for name, x in detections.items()})


class _MaskFeatures(NamedTuple):
    """The mask features of an image, pixel by pixel, row by row."""

    features: Float[Array, "n E"]
    inside: Bool[Array, "n"] | None = None  # None: all
    end: Int[Array, ""] | None = None  # where not all: none is inside from here on


class _Candidates(NamedTuple):
    """Cell-class pairs; those that are none have score 0."""

    score: Float[Array, "M"]  # of the class, before the mask is looked at
    cell: Int[Array, "M"]
    label: Int[Array, "M"]


def _select_candidates(
    scores: Float[Array, "S K"], threshold: float, limit: int
) -> tuple[_Candidates, Int[Array, ""]]:
    """Returns at most `limit` candidates, row-major (cell, class), and how many are.

    The number is that before the limit. Candidates come first, then padding.
    """
    num_classes, flat = scores.shape[1], scores.ravel()
    flat = jnp.where(flat > threshold, flat, 0.0)
    score, index = lax.top_k(flat, limit)
    index = jnp.sort(jnp.where(score > 0, index, flat.size))
    score = jnp.where(index < flat.size, flat[jnp.minimum(index, flat.size - 1)], 0.0)
    index = jnp.where(score > 0, index, 0)
    candidates = _Candidates(score, lax.div(index, num_classes), lax.rem(index, num_classes))
    return candidates, jnp.sum(flat > 0, dtype=jnp.int32)


def _keep_best(
    candidates: _Candidates, rescore: Callable, nms_pre: int
) -> tuple[_Candidates, Int[Array, ""]]:
    """Returns the `nms_pre` candidates best after rescoring, and how many they are.

    Looks at masks only if there are more: as many chunks of them as hold candidates.
    """
    count = jnp.sum(candidates.score > 0, dtype=jnp.int32)
    if (limit := candidates.score.size) == nms_pre:
        return candidates, count
    chunk = min(CHUNK, limit)
    padded = jax.tree.map(lambda x: jnp.pad(x, (0, -limit % chunk)), candidates)

    def rescore_chunk(i, score):
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * chunk, chunk), padded)
        new, _, _ = rescore(part, overlaps=False)
        return lax.dynamic_update_slice_in_dim(score, new, i * chunk, 0)

    chunks = jnp.where(count > nms_pre, -(-count // chunk), 0)
    score = lax.fori_loop(0, chunks, rescore_chunk, jnp.zeros_like(padded.score))
    _, best = lax.top_k(score, nms_pre)
    first = jnp.arange(nms_pre, dtype=best.dtype)
    index = jnp.where(count > nms_pre, jnp.sort(best), first)
    return jax.tree.map(lambda x: x[index], padded), jnp.minimum(count, nms_pre)


def _rescore_nonempty(rescore: Callable, candidates: _Candidates, count: Int[Array, ""]):
    """Returns `rescore(candidates)`, computed for the smallest part that holds `count`."""
    size = candidates.score.size
    steps = sorted({math.ceil(size * part) for part in NMS_PARTS})

    def part(n):
        score, overlap, area = rescore(jax.tree.map(lambda x: x[:n], candidates))
        pad = (0, size - n)
        return jnp.pad(score, pad), jnp.pad(overlap, (pad, pad)), jnp.pad(area, pad)

    index = jnp.sum(count > np.array(steps[:-1], np.int32), dtype=jnp.int32)
    return lax.switch(index, [functools.partial(part, n) for n in steps])


def _rescore(
    kernel: Float[Array, "S E"],
    min_area: Float[Array, "S"],
    sums: Callable,
    candidates: _Candidates,
    overlaps: bool = True,
) -> tuple[Float[Array, "N"], Float[Array, "N N"] | None, Float[Array, "N"]]:
    """Returns score times the mask's mean probability, its overlaps and its area.

    The score of a mask with no more pixels than its level's stride is 0.
    """
    area, total, overlap = sums(kernel[candidates.cell], overlaps=overlaps)
    score = candidates.score * total / jnp.maximum(area, 1.0)
    return jnp.where(area > min_area[candidates.cell], score, 0.0), overlap, area


def _tiled_mask_sums(
    kernels: Float[Array, "N E"],
    pixels: _MaskFeatures,
    *,
    tuning: Tuning,
    common_pixels: Callable,
    threshold: float,
    overlaps: bool,
) -> tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N N"] | None]:
    """Returns each mask's area, its sum of probabilities, and pairs' common pixels."""
    (num_pixels, channels), size = pixels.features.shape, kernels.shape[0]
    tile = max(n for n in range(1, tuning.mask_pixels + 1) if num_pixels % n == 0)

    def add_tile(total, tile_pixels, inside):
        soft = jax.nn.sigmoid(_dynamic_conv(kernels, tile_pixels))
        hard = soft > threshold
        hard = hard if inside is None else hard & inside[None]
        ones = hard.astype(jnp.float32)
        new = [jnp.sum(ones, axis=1), jnp.sum(soft * ones, axis=1)]
        if overlaps:
            new.append(common_pixels(hard))
        return [a + b for a, b in zip(total, new, strict=True)]

    total = [jnp.zeros(size), jnp.zeros(size)]
    total += [jnp.zeros((size, size))] if overlaps else []
    tiles = pixels.features.reshape(-1, tile, channels)
    if len(tiles) == 1:  # no loop: where its end is data, a GPU's host would wait for it
        total = add_tile(total, tiles[0], pixels.inside)
    elif pixels.inside is None:
        total, _ = lax.scan(lambda t, p: (add_tile(t, p, None), None), total, tiles)
    else:
        inside = pixels.inside.reshape(-1, tile)
        # Tiles below the image are not looked at.
        assert pixels.end is not None
        num_tiles = (pixels.end + tile - 1) // tile
        total = lax.fori_loop(0, num_tiles, lambda i, t: add_tile(t, tiles[i], inside[i]), total)
    area, probability, *overlap = total
    return area, probability, overlap[0] if overlaps else None


def _common_by_products(hard: Bool[Array, "N n"]) -> Float[Array, "N N"]:
    """Returns how many pixels each pair has in common."""
    ones = hard.astype(jnp.float32)
    # Exact at any precision of the product: zeros, ones and float32 sums.
    return jnp.einsum("nx,mx->nm", ones, ones)


def _common_on_cpu(hard: Bool[Array, "N n"]) -> Float[Array, "N N"]:
    """Returns `_common_by_products` in the form that is fastest on a CPU."""
    return (_common_by_bits if len(hard) >= BITS_FROM else _common_by_products)(hard)


def _common_by_bits(hard: Bool[Array, "N n"]) -> Float[Array, "N N"]:
    """Returns `_common_by_products`, of 32 pixels in each word.

    Compiled with LLVM's first level, as programs of prediction are: at its third the loop
    is slower than the products.
    """
    padded = jnp.pad(hard, ((0, 0), (0, -hard.shape[1] % 32)))
    bits = padded.astype(jnp.uint32).reshape(len(hard), 32, -1)
    places = jnp.arange(32, dtype=jnp.uint32)[None, :, None]
    words = jnp.sum(bits << places, axis=1, dtype=jnp.uint32).T

    def add_word(i, common):
        return common + lax.population_count(words[i][:, None] & words[i][None])

    common = jnp.zeros((len(hard), len(hard)), jnp.uint32)
    return lax.fori_loop(0, len(words), add_word, common).astype(jnp.float32)


def _mask_sums_on_cpu(kernels, pixels, **options):
    return _tiled_mask_sums(
        kernels, pixels, tuning=platforms.CPU, common_pixels=_common_on_cpu, **options
    )


def _mask_sums_elsewhere(kernels, pixels, **options):
    return _tiled_mask_sums(
        kernels, pixels, tuning=platforms.ACCELERATOR, common_pixels=_common_by_products, **options
    )


def _portable_mask_sums(kernels, pixels, **options):
    return _tiled_mask_sums(
        kernels, pixels, tuning=platforms.CPU, common_pixels=_common_by_products, **options
    )


_mask_sums = PlatformOp("mask_sums", _mask_sums_on_cpu, _mask_sums_elsewhere, _portable_mask_sums)


def _dynamic_conv(kernels: Float[Array, "N E"], pixels: Float[Array, "n E"]) -> Float[Array, "N n"]:
    """Returns `ops.dynamic_conv` of one image's pixels, which stand in a row."""
    return jnp.einsum("ne,xe->nx", kernels, pixels, preferred_element_type=jnp.float32)


def _iou(overlap: Float[Array, "N N"], area: Float[Array, "N"]) -> Float[Array, "N N"]:
    """Returns the masks' IoU, 0 for two empty ones."""
    return overlap / jnp.maximum(area[:, None] + area[None] - overlap, 1.0)


def _pad_axis_1(x: Array, missing: int) -> Array:
    """Returns x with zeros up to D detections; counts per image stay as they are."""
    if x.ndim == 1 or not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
