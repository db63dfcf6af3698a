"""How far two programs' detections of the same images are apart."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

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

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)

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
