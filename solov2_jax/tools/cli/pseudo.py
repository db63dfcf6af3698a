r"""Labels pictures by a trained network, for a training beside labels that people made.

    solov2 pseudo --workdir runs/first --input photos --output pseudo
    solov2 train --data labelled --data pseudo --data_weights 2,1 --workdir runs/second
    solov2 pseudo --workdir runs/first --input photos --output pseudo --score best
    solov2 pseudo --workdir runs/first --input photos --output pseudo \
        --score 0.6 --class_scores person=0.8,"traffic light"=0.5 --tta flip

Writes `pseudo.json`, COCO instances with `score`, and the pictures it is about below
`images`. Taken are detections from their class's threshold on; pictures without any are
left out, as are those that the run was trained or evaluated on. `train --data` trains on
all of it and takes no validation image from it.

Exit code 0: done; 1: some pictures could not be read, which the line `error: ...` names,
and the others are labelled; 2: an error, and nothing was written.
"""

import functools

import numpy as np

from solov2_jax.config_schema import choice, several, share, switch, text
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

_SCORE = shared.ScoreFlag(
    "score",
    share(0.5),
    "Least score of a label; best: for each class the one that was best on the run's validation "
    "data.",
)
_CLASS_SCORES = Flag(
    "class_scores",
    several((), text("", form=(r"[^=]+=[^=]+", "written CLASS=SCORE"))),
    "Other scores for single classes: cat=0.6,dog=0.4.",
)
_KEEP_EMPTY = Flag(
    "keep_empty", switch(False), "Keep pictures without a label, as pictures without objects."
)
_IMAGES = Flag(
    "images",
    choice("link", ("link", "copy")),
    "How the pictures get into `images`; copies where the system has no links.",
)
FLAGS = (*shared.MODEL, shared.PICTURES, shared.OUTPUT, _SCORE, _CLASS_SCORES, _KEEP_EMPTY, _IMAGES)
FLAGS += (*shared.VIEWS, shared.BATCH_SIZE, shared.OVERWRITE)


def class_scores(words: tuple[str, ...], class_names: tuple[str, ...]) -> dict[str, float]:
    """Returns class -> least score, of "cat=0.6".

    Raises:
      InputError: for a class or a number that there is not.
    """
    from solov2_jax.config import suggest

    found = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if name not in class_names:
            hint = suggest(name, class_names)
            raise InputError(
                f"--class_scores {word}: no such class{hint} The classes are "
                f"{', '.join(class_names)}"
            )
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise InputError(f"--class_scores {word}: the score must be a number from 0 to 1")
        found[name] = value
    return found


def main(overrides: list[str]) -> None:
    shared.check_model(_SCORE)
    from solov2_jax.tools.labelling.pseudo import PseudoOptions, pseudo
    from solov2_jax.tools.multiview.build import build_views

    tta, tiles = shared.view_options()
    predictor = shared.on_local_devices(shared.load_predictor(overrides))
    names = predictor.class_names
    of_all = np.broadcast_to(shared.least_scores(predictor, _SCORE), len(names))
    own = class_scores(_CLASS_SCORES.value, names)
    least = tuple(own.get(n, float(s)) for n, s in zip(names, of_all, strict=True))
    predictor.limit_score = min(least)
    pictures = pseudo(
        predictor,
        lambda fitted: build_views(fitted, tta, tiles),
        shared.WORKDIR.value,
        shared.PICTURES.value,
        shared.OUTPUT.value,
        PseudoOptions(
            least=least,
            keep_empty=_KEEP_EMPTY.value,
            link=_IMAGES.value == "link",
            batch_size=shared.BATCH_SIZE.value * predictor.num_devices,
            overwrite=shared.OVERWRITE.value,
            origin=shared.WORKDIR.value or shared.WEIGHTS.value,
        ),
    )
    shared.end_with_problems(pictures, "the others are labelled")


run = functools.partial(app.run, main, FLAGS)
