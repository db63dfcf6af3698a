"""Which detections are shown and written: by score, class and number."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solov2_jax.inference.prediction import Prediction


@dataclass(frozen=True)
class DetectionFilter:
    """What a detection must be to be kept."""

    score: float  # at least
    labels: frozenset[int] | None = None  # None: all
    most: int = 0  # best ones of an image; 0: all

    def __call__(self, prediction: Prediction) -> Prediction:
        """Returns the detections that are kept, still best first."""
        keep = prediction.scores >= self.score
        if self.labels is not None:
            keep &= np.isin(prediction.labels, list(self.labels))
        chosen = np.flatnonzero(keep)
        return prediction.take(chosen[: self.most] if self.most else chosen)


def parse_classes(
    words: Sequence[str], class_names: Sequence[str], category_ids: Sequence[int]
) -> frozenset[int] | None:
    """Returns the labels of class names or category ids; None, all, without a word."""
    words = [word.strip() for word in words if word.strip()]
    labels: set[int] = set()
    for word in words:
        found = [i for i, name in enumerate(class_names) if name == word]
        if not found:
            found = [i for i, name in enumerate(class_names) if _alike(name, word)]
        if not found and word.isdigit():
            found = [i for i, number in enumerate(category_ids) if number == int(word)]
        if not found:
            raise ValueError(f"--classes {word}: {_known(word, class_names)}")
        labels.update(found)
    return frozenset(labels) if words else None


def _alike(name: str, word: str) -> bool:
    return name.casefold() == word.casefold()


def _known(word: str, class_names: Sequence[str]) -> str:
    if word.isdigit():
        return f"no such category id; the classes are {', '.join(class_names)}"
    lower = {name.casefold(): name for name in class_names}
    near = difflib.get_close_matches(word.casefold(), lower, n=1, cutoff=0.5)
    hint = f"did you mean {lower[near[0]]!r}? " if near else ""
    return f"no such class; {hint}There are {', '.join(class_names)}"
