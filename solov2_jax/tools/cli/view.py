r"""Pictures of training batches as the network gets them, with their targets.

    solov2 view --config configs/light_448_r50.py --output view \
        --config.data.train.images=photos --config.data.train.annotations=train.json
    solov2 view --config runs/mine/config.json --output view --step 1000

A picture per image: the padded, augmented input with its masks at a quarter of the
size, and for each level the grid with the cells that are positive, in their object's
colour; cells of several objects have a white frame. Augmentations are those of the
config: `--config.augment.preset=strong` shows a preset. `--step 1000` shows what training
will see at that step. Exit code 0: written; 2: an error that `error: ...` explains.
"""

import functools

from solov2_jax.config_schema import text, whole
from solov2_jax.tools.cli import app
from solov2_jax.tools.cli.flags import Flag

_CONFIG = Flag("config", text(), "Config file, or a run's config.json.", required=True)
_OUTPUT = Flag("output", text(), "Folder for the pictures.", required=True)
_STEP = Flag("step", whole(0), "First step of training.")
_BATCHES = Flag("batches", whole(2, 1), "How many steps.")
FLAGS = (_CONFIG, _OUTPUT, _STEP, _BATCHES)


def main(overrides: list[str]) -> None:
    from solov2_jax.config import load_config
    from solov2_jax.data.build import load_train_dataset
    from solov2_jax.logging import show_log
    from solov2_jax.tools.browse_batches import browse

    show_log()
    config = load_config(_CONFIG.value, overrides)
    dataset = load_train_dataset(config)
    if config.train.epochs:
        from solov2_jax.training.build import in_steps

        config = in_steps(config, dataset)  # `augment.stop_last` counts from the end
    paths = browse(config, dataset, _OUTPUT.value, _STEP.value, _BATCHES.value)
    print(f"{len(paths)} pictures: {_OUTPUT.value}")


run = functools.partial(app.run, main, FLAGS, platform=False)
