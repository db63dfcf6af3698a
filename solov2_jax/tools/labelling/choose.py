"""Which pictures are worth labelling next: where the network is unsure, and no two alike.

Uncertainty of a picture: the mean of the entropies, in bits, of its ten most uncertain
detections, so 1 where all of these have score 0.5, and 0 where nothing is detected.
Difference of two pictures: half of one minus the cosine between their features, from 0
(alike) to 1; features are the means over the picture of the FPN's levels, each channel
shifted and scaled to mean 0 and variance 1 over all pictures.

Pictures are taken one after the other: always the one with the largest
uncertainty^(1 - d) * difference^d, where the difference is that to the most similar picture
that was taken before or is labelled already, and d is 0.5 unless the user says otherwise.
Source: greedy k-center as in Sener and Savarese, "Active Learning for Convolutional Neural
Networks: A Core-Set Approach" (2018), whose distances are not weighted by uncertainty.
"""

from dataclasses import dataclass

import numpy as np

MOST_DETECTIONS = 10
_ALIKE = 1e-6  # differences below it are rounding


@dataclass(frozen=True)
class Chosen:
    """The pictures to label, best first.

    Attributes:
      index: int64 [k].
      difference: of each to the most similar one before it or labelled, float64 [k]; 1 of
        the first where nothing is labelled.
    """

    index: np.ndarray
    difference: np.ndarray


def uncertainty(scores: np.ndarray) -> float:
    """Returns how unsure detections with these scores are, 0 to 1.

    Args:
      scores: float [n], 0 to 1.
    """
    p = np.clip(np.asarray(scores, np.float64), 1e-12, 1 - 1e-12)
    entropy = np.sort(-p * np.log2(p) - (1 - p) * np.log2(1 - p))[::-1]
    return float(entropy[:MOST_DETECTIONS].mean()) if len(entropy) else 0.0


def choose(
    unsure: np.ndarray,
    features: np.ndarray,
    number: int,
    *,
    labelled: np.ndarray | None = None,
    diversity: float = 0.5,
) -> Chosen:
    """Returns up to `number` pictures, one after the other.

    Of equal ones, the most different is taken, then the first.

    Args:
      unsure: uncertainty of each picture, float [n].
      features: float [n, c].
      labelled: features of pictures with labels, float [m, c].
      diversity: exponent d, 0 to 1; 0: uncertainty alone, 1: difference alone.
    """
    known = np.zeros((0, features.shape[1])) if labelled is None else labelled
    unit = _unit(np.concatenate([features, known]).astype(np.float64))
    unit, known = unit[: len(features)], unit[len(features) :]
    nearest = np.ones(len(unit))
    for one in known:
        nearest = np.minimum(nearest, _difference(unit, one))
    left = np.ones(len(unit), bool)
    index, difference = [], []
    for _ in range(min(number, len(unit))):
        gain = np.where(left, unsure ** (1 - diversity) * nearest**diversity, -1.0)
        best = int(np.lexsort((np.arange(len(unit)), -nearest, -gain))[0])
        index.append(best)
        difference.append(float(nearest[best]))
        left[best] = False
        nearest = np.minimum(nearest, _difference(unit, unit[best]))
    return Chosen(np.array(index, np.int64), np.array(difference))


def _unit(features: np.ndarray) -> np.ndarray:
    """Returns rows of length 1, each column with mean 0 and variance 1 before; or 0."""
    spread = features.std(axis=0)
    features = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def _difference(unit: np.ndarray, one: np.ndarray) -> np.ndarray:
    difference = np.clip((1 - unit @ one) / 2, 0, 1)
    return np.where(difference < _ALIKE, 0.0, difference)
