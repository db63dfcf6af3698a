r"""Ranks pictures without labels: which to label next.

    solov2 select --workdir runs/first --input photos --output next --number 50
    solov2 select --workdir runs/first --input photos --output next --images link

Writes `selection.csv` and `selection.json`: rank, file, how unsure the network is of what
it found (`uncertainty`, 0 to 1), and how unlike the picture is to all that come before it
or were trained on (`difference`, 0 to 1). A picture is taken where the product of both is
largest; --diversity moves the weight from one to the other. Pictures that the run was
trained or evaluated on are left out. The same call gives the same list.

Exit code 0: done; 1: some pictures could not be read, which the line `error: ...` names,
and the others are ranked; 2: an error, and nothing was written.
"""

import functools

from solov2_jax.config_schema import choice, share, switch, whole
from solov2_jax.tools.cli import app, shared
from solov2_jax.tools.cli.flags import Flag

_NUMBER = Flag("number", whole(50), "How many to choose. 0: rank all.")
_DIVERSITY = Flag(
    "diversity", share(0.5), "0: by uncertainty alone; 1: as different as possible, whatever found."
)
_AGAINST = Flag(
    "against_training", switch(True), "Prefer what is unlike the images that were trained on."
)
_IMAGES = Flag(
    "images",
    choice("none", ("none", "link", "copy")),
    "Whether to put the chosen pictures into `images` there.",
)
FLAGS = (
    *shared.MODEL,
    shared.PICTURES,
    shared.OUTPUT,
    _NUMBER,
    _DIVERSITY,
    _AGAINST,
    _IMAGES,
    shared.BATCH_SIZE,
)
FLAGS += (shared.OVERWRITE,)


def main(overrides: list[str]) -> None:
    shared.check_model()
    from solov2_jax.tools.labelling.select import SelectOptions, select

    pictures = select(
        shared.on_local_devices(shared.load_predictor(overrides)),
        shared.WORKDIR.value,
        shared.PICTURES.value,
        shared.OUTPUT.value,
        SelectOptions(
            number=_NUMBER.value,
            diversity=_DIVERSITY.value,
            against_training=_AGAINST.value,
            batch_size=shared.BATCH_SIZE.value,
            images=_IMAGES.value,
            overwrite=shared.OVERWRITE.value,
        ),
    )
    shared.end_with_problems(pictures, "the others are ranked")


run = functools.partial(app.run, main, FLAGS)
