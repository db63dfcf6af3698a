"""An export beside its original: the same images through both."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from solov2_jax.data.buckets import Bucket
from solov2_jax.data.images import read_values
from solov2_jax.inference.preprocess import InputOptions, make_batches, make_example
from solov2_jax.io import InputError
from solov2_jax.tools.export.exported import ExportedPredictor
from solov2_jax.tools.export.program import Program

Outputs = Mapping[str, np.ndarray]
# Masks that overlap less are different objects.
_SAME = 0.5


@dataclass(frozen=True)
class Parity:
    """Sums over images; a figure of no pairs is None."""

    images: int
    detections: int  # of the original
    pairs: int  # of the same class, whose masks overlap by more than a half
    max_score_difference: float | None  # over pairs
    mean_mask_iou: float | None  # over pairs
    min_mask_iou: float | None
    max_box_difference: float | None  # input pixels; None without boxes
    # Detections that only one of the two has, and the best score among them: one at
    # the threshold comes and goes with the last bit of its score.
    unpaired: int
    best_unpaired_score: float | None

    def summary(self) -> str:
        """Returns one line for people."""
        if not self.pairs:
            return (
                f"{self.images} images, {self.detections} detections, no pair of the "
                "same object in both: nothing was compared"
            )
        text = (
            f"{self.images} images, {self.pairs} detections in both: scores differ by "
            f"at most {self.max_score_difference:.2g}, mask IoU mean "
            f"{self.mean_mask_iou:.5f}, least {self.min_mask_iou:.5f}"
        )
        if self.max_box_difference is not None:
            text += f", boxes by at most {self.max_box_difference:.3g} pixels"
        if self.unpaired:
            text += (
                f"; {self.unpaired} in one of the two only, best score "
                f"{self.best_unpaired_score:.3f}"
            )
        return text


def compare(pairs: Iterable[tuple[Outputs, Outputs]], threshold: float) -> Parity:
    """Returns how far the exported outputs are from the original's.

    Args:
      pairs: (original, exported) outputs of batches, see `program.make_program`.
      threshold: of masks that are probabilities.
    """
    images = detections = unpaired = 0
    scores, ious, boxes, lonely = [0.0][:0], [0.0][:0], [0.0][:0], [0.0][:0]
    for original, exported in pairs:
        for i in range(len(original["count"])):
            a, b = _image(original, i, threshold), _image(exported, i, threshold)
            found = _pair(a, b)
            images += 1
            detections += len(a["scores"])
            for m, n, iou in found:
                ious.append(iou)
                scores.append(abs(float(a["scores"][m]) - float(b["scores"][n])))
                if "boxes" in a:
                    boxes.append(float(np.abs(a["boxes"][m] - b["boxes"][n]).max()))
            for one, side in ((a, 0), (b, 1)):
                taken = {(m, n)[side] for m, n, _ in found}
                places = [p for p in range(len(one["scores"])) if p not in taken]
                rest = one["scores"][places]
                unpaired += len(rest)
                lonely.extend(rest.tolist())
    return Parity(
        images=images,
        detections=detections,
        pairs=len(ious),
        max_score_difference=max(scores, default=None),
        mean_mask_iou=float(np.mean(ious)) if ious else None,
        min_mask_iou=min(ious, default=None),
        max_box_difference=max(boxes, default=None),
        unpaired=unpaired,
        best_unpaired_score=max(lonely, default=None),
    )


def _image(outputs: Outputs, i: int, threshold: float) -> dict[str, np.ndarray]:
    """Returns the detections of one image, masks as booleans [n, pixels]."""
    n = int(outputs["count"][i])
    rows = {k: np.asarray(v[i][:n]) for k, v in outputs.items() if k != "count"}
    masks = rows["masks"]
    hard = masks > threshold if masks.dtype.kind == "f" else masks != 0
    return rows | {"masks": hard.reshape(n, int(np.prod(hard.shape[1:])))}


def _pair(a: Outputs, b: Outputs) -> list[tuple[int, int, float]]:
    """Returns (index in a, index in b, mask IoU), each once, best overlap first."""
    masks = [one["masks"].astype(np.float32) for one in (a, b)]
    common = masks[0] @ masks[1].T
    union = masks[0].sum(1)[:, None] + masks[1].sum(1)[None] - common
    iou = np.where(union > 0, common / np.maximum(union, 1), 0.0)
    iou = np.where(a["labels"][:, None] == b["labels"][None], iou, 0.0)
    found = []
    # Of equal overlaps, the pair at the same place in both comes first.
    far = np.abs(np.arange(iou.shape[0])[:, None] - np.arange(iou.shape[1])[None])
    for index in np.lexsort((far.ravel(), -iou.ravel())):
        m, n = divmod(int(index), iou.shape[1])
        if iou[m, n] <= _SAME:
            break
        if all(m != p[0] and n != p[1] for p in found):
            found.append((m, n, float(iou[m, n])))
    return found


def measure_parity(program: Program, exported: ExportedPredictor, images: Sequence[str]) -> Parity:
    """Returns how far the exported files are from the original on the images.

    Args:
      program: the original, which runs in the form that is fastest here.
    """
    original = jax.jit(program)

    def outputs() -> Iterator[tuple[Outputs, Outputs]]:
        for bucket in exported.input.buckets:
            for inputs in calibration(exported.input, exported.batch, images, bucket):
                yield jax.device_get(original(**inputs)), exported.run(**inputs)

    return compare(outputs(), exported.metadata["options"]["mask_threshold"])


def calibration(
    options: InputOptions, batch_size: int, images: Sequence[str], bucket: Bucket
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of the images as a file takes them: of its shape, else turned.

    A data set of landscapes shows a file for portraits something too.

    Args:
      options: of the exported program, with all its padded shapes.
    """
    examples = _examples(options, images, bucket)
    for start in range(0, len(examples), batch_size):
        for batch in make_batches(examples[start : start + batch_size], batch_size):
            yield {key: batch[key] for key in ("image", "image_size")}


def check_images(images: Sequence[str], bucket: Bucket, options: InputOptions) -> None:
    """Raises InputError when no image has a padded shape."""
    if not _examples(options, images, bucket, first=True):
        raise InputError(
            f"--images: none of {len(images)} images has the padded shape "
            f"{bucket[0]}x{bucket[1]}, so its file cannot be compared; give images "
            "that do with --images, or leave the shape out of --shape"
        )


def _examples(
    options: InputOptions, images: Sequence[str], bucket: Bucket, first: bool = False
) -> list[dict[str, np.ndarray]]:
    """Returns the images of a padded shape, or those that have it when turned.

    Args:
      first: one of either suffices.
    """
    straight, turned = [], []
    only = replace(options, buckets=(bucket,))
    for number, path in enumerate(images):
        picture = read_values(path, options.pixels)
        example = make_example(picture, number, options)
        if example["image"].shape[:2] == tuple(bucket):
            straight.append(example)
        elif not straight and (bucket[1], bucket[0]) == example["image"].shape[:2]:
            picture = np.ascontiguousarray(np.rot90(picture))
            turned.append(make_example(picture, number, only))
        if first and (straight or turned):
            break
    return straight or turned
