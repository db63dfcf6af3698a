"""Test-time augmentation: an image mirrored and at several sizes, its masks averaged.

What every view finds is brought to one frame, a quarter of the largest view's size,
that covers the image exactly, so that mirroring the image mirrors the frame. Masks of
one class that agree are one object: its soft mask is their mean, weighted by score.

Source: none. AdelaiDet's `TEST.AUG` goes through detectron2's GeneralizedRCNNWithTTA,
which needs boxes and an R-CNN, and cannot run with SOLOv2.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from solov2_jax.data.buckets import STRIDE, round_up
from solov2_jax.inference.prediction import Prediction
from solov2_jax.inference.predictor import Predictor
from solov2_jax.inference.preprocess import InputOptions, make_example
from solov2_jax.structs import Detections
from solov2_jax.tools.multiview.merge import AGREE, NmsOptions, suppress
from solov2_jax.tools.multiview.tiling import MultiviewPredictor


@dataclass(frozen=True)
class TtaOptions:
    """The views of an image: each scale, and each mirrored if `flip`."""

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)  # of `input.min_size_test` and `max_size_test`

    def __post_init__(self):
        if not self.scales or not all(0.1 <= s <= 10 for s in self.scales):
            raise ValueError(f"--tta: scales {self.scales} must be from 0.1 to 10")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"--tta: scales {self.scales} must differ")

    @property
    def mirrored(self) -> tuple[bool, ...]:
        return (False, True) if self.flip else (False,)


class AugmentedPredictor(MultiviewPredictor):
    """Predicts each image from several views of it."""

    predictor: Predictor

    def __init__(self, predictor: Predictor, options: TtaOptions, nms: NmsOptions):
        super().__init__(predictor, nms)
        self.options = options
        self.inputs = [scaled(predictor.input, s) for s in options.scales]

    def _predict(self, image: np.ndarray, number: int, batch_size: int) -> Prediction:
        del batch_size  # an image and its mirrored self are the batch
        # Mirrored before it is resized: so a mirrored image has exactly the same views.
        pictures = [image[:, ::-1] if m else image for m in self.options.mirrored]
        found, sizes = [], []
        for options in self.inputs:
            examples = [make_example(picture, 0, options) for picture in pictures]
            batch = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
            found.append(self.predictor.detect(batch))
            for row in range(len(pictures)):
                self.predictor.report_limits(found[-1], row)
            sizes.append(examples[0]["image_size"])
        largest = int(np.argmax([s.prod() for s in sizes]))
        cells = jnp.asarray(-(-sizes[largest] // 4))
        frame = found[largest].soft_masks.shape[2:]
        aligned = [
            align(f.soft_masks, size, cells, frame, self.options.mirrored)
            for f, size in zip(found, sizes, strict=True)
        ]
        soft_masks = jnp.concatenate(aligned)
        fused = self._fuse(found, soft_masks, cells)
        return self.predictor.paste(
            fused,
            0,
            4 * np.asarray(cells),
            image.shape[:2],
            self.predictor.mask_threshold,
            number,
            self.class_names,
        )

    def _fuse(
        self, found: Sequence[Detections], soft_masks: Float[Array, "N h w"], cells: Int[Array, "2"]
    ) -> Detections:
        """Returns the detections of all views as one image's, in the frame."""
        fields = [(f.scores, f.labels, f.valid) for f in found]
        scores, labels, valid = (
            np.concatenate([x.ravel() for x in part])
            for part in zip(*jax.device_get(fields), strict=True)
        )
        kept = found[0].scores.shape[1]
        views = np.repeat(np.arange(len(scores) // kept), kept)
        iou = np.asarray(mask_iou(soft_masks, self.predictor.mask_threshold))
        groups = group_views(np.where(valid, scores, 0.0), labels, views, iou)
        means, groups = fuse_scores(groups, scores, labels, views, iou, self.nms)
        means, groups = means[:kept], groups[:kept]
        weights = np.zeros((kept, len(scores)), np.float32)
        for row, group in zip(weights, groups, strict=False):
            row[group] = scores[group] / scores[group].sum()
        fill = (0, kept - len(groups))
        best = labels[[group[0] for group in groups]]
        return Detections(
            jnp.asarray(np.pad(means, fill), jnp.float32)[None],
            jnp.asarray(np.pad(best, fill))[None],
            average(jnp.asarray(weights), soft_masks, cells)[None],
            jnp.asarray(np.pad(means, fill) > 0)[None],
            jnp.asarray([len(groups)]),
        )


def scaled(options: InputOptions, scale: float) -> InputOptions:
    """Returns the input options at another size, padded shapes in proportion."""
    max_size = max(1, round(options.max_size * scale))

    def side(length: int) -> int:
        # A side of `length` was rounded, from less than half a pixel more.
        largest = math.ceil((length + 0.5) * scale - 0.5)
        return round_up(min(largest, max_size), STRIDE)

    return replace(
        options,
        min_size=max(1, round(options.min_size * scale)),
        max_size=max_size,
        buckets=tuple((side(height), side(width)) for height, width in options.buckets),
    )


@functools.partial(jax.jit, static_argnames=("frame", "mirrored"))
def align(
    soft_masks: Float[Array, "B D h4 w4"],
    image_size: Int[Array, "2"],
    cells: Int[Array, "2"],
    frame: tuple[int, int],
    mirrored: tuple[bool, ...],
) -> Float[Array, "N H W"]:
    """Returns the soft masks of a view's images in the frame, 0 beyond its cells.

    Args:
      image_size: (height, width) at the network, which the cells cover.
      cells: how many rows and columns of the frame are used.
      mirrored: of each of the B images, whether it is.
    """
    h4, w4 = soft_masks.shape[2:]
    rows = _sampling(h4, image_size[0], cells[0], frame[0], False)
    columns = [_sampling(w4, image_size[1], cells[1], frame[1], m) for m in mirrored]
    aligned = jnp.einsum(
        "Hh,bdhw,bWw->bdHW",
        rows,
        soft_masks.astype(jnp.float32),
        jnp.stack(columns),
        precision="highest",
    )
    return aligned.reshape(-1, *frame)


def _sampling(
    size: int, image: Int[Array, ""], cells: Int[Array, ""], frame: int, mirror: bool
) -> Float[Array, "frame size"]:
    """Returns the bilinear weights of a mask's cells for each cell of the frame."""
    index = jnp.arange(frame)
    source = cells - 1 - index if mirror else index
    middle = (source + 0.5) / cells * image  # input pixels
    position = jnp.clip(middle / 4 - 0.5, 0, size - 1)
    distance = jnp.abs(position[:, None] - jnp.arange(size)[None])
    inside = (index < cells)[:, None]
    return jnp.where(inside, jnp.maximum(1 - distance, 0), 0.0).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="threshold")
def mask_iou(soft_masks: Float[Array, "N h w"], threshold: float) -> Float[Array, "N N"]:
    """Returns the IoU of all pairs of masks, 0 for two empty ones."""
    hard = (soft_masks > threshold).astype(jnp.float32)
    # Exact at any precision of the product: zeros, ones and float32 sums.
    common = jnp.einsum("nhw,mhw->nm", hard, hard, preferred_element_type=jnp.float32)
    area = jnp.diagonal(common)
    return common / jnp.maximum(area[:, None] + area[None] - common, 1.0)


@jax.jit
def average(
    weights: Float[Array, "D N"], soft_masks: Float[Array, "N h w"], cells: Int[Array, "2"]
) -> Float[Array, "D h w"]:
    """Returns weighted sums of soft masks in the frame, continued beyond its cells.

    So that a mask at the image's border is not mixed with the zeros there.
    """
    total = jnp.einsum("dn,nhw->dhw", weights, soft_masks, precision="highest")
    rows, columns = (
        jnp.minimum(jnp.arange(size), cells[axis] - 1) for axis, size in enumerate(total.shape[1:])
    )
    return total[:, rows][:, :, columns]


def group_views(
    scores: np.ndarray, labels: np.ndarray, views: np.ndarray, iou: np.ndarray
) -> list[np.ndarray]:
    """Returns the objects, each as indices of its detections, the best one first.

    The best detection that is left takes, of every other view, the one of its class
    that it agrees with most.

    Args:
      scores: 0 for what is no detection.
    """
    free = scores > 0
    groups = []
    for i in np.argsort(-scores, kind="stable").tolist():
        if not free[i]:
            continue
        free[i] = False
        agrees = np.where(free & (labels == labels[i]), iou[i], 0.0)
        agrees[views == views[i]] = 0.0
        group = [i]
        for view in np.unique(views[agrees > AGREE]).tolist():
            group.append(int(np.argmax(np.where(views == view, agrees, 0.0))))
        free[group] = False
        groups.append(np.array(group))
    return groups


def fuse_scores(
    groups: Sequence[np.ndarray],
    scores: np.ndarray,
    labels: np.ndarray,
    views: np.ndarray,
    iou: np.ndarray,
    nms: NmsOptions,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the scores of the objects that NMS keeps, best first, and their groups.

    A score is the root mean square over all views; one that found nothing counts 0. An
    object that one of six scales shows keeps two fifths of its score, and all six together
    that of each; of the plain mean it would keep a sixth, less than the threshold. NMS is
    between objects that no view saw both: two that one view saw have been judged by the
    network's own. The IoU of two objects is that of their best detections.
    """
    number = int(views.max()) + 1
    squares = [np.square(scores[g], dtype=np.float64).sum() for g in groups]
    means = np.sqrt(np.array(squares) / number)
    order = np.argsort(-means, kind="stable")
    seeds = np.array([groups[i][0] for i in order], int)
    seen = np.zeros((len(groups), number), int)
    for row, i in zip(seen, order.tolist(), strict=True):
        row[views[groups[i]]] = 1
    overlap = iou[seeds][:, seeds]
    apart = (labels[seeds][:, None] == labels[seeds][None]) & (seen @ seen.T == 0)
    pairs = np.argwhere(np.triu((overlap > 0) & apart, 1))
    means = suppress(means[order], pairs, overlap[tuple(pairs.T)], nms)
    kept = np.flatnonzero((means > 0) & (means >= nms.update_threshold))
    kept = kept[np.argsort(-means[kept], kind="stable")]
    return means[kept], [groups[i] for i in order[kept].tolist()]
