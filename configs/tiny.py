"""Small objects of one's own: larger inputs, ranges of half the size, denser grids.

    python train.py --data FOLDER --config configs/tiny.py --workdir runs/tiny \
        --config.init_from=WEIGHTS

Mask features are a quarter of the input, whatever the network: below 16 pixels a side an
object has 4 x 4 of them. So the input grows, and each level takes objects of half the size.
For pictures far larger than the input train on tiles (docs/everyday.md).
"""

from configs import dense


def get_config():
    """Returns the configuration."""
    config = dense.get_config()
    config.targets.scale_ranges = ((1, 28), (14, 56), (28, 112), (56, 224), (112, 2048))
    config.input.min_sizes_train = (640, 704, 768, 832, 896)
    config.input.max_size_train = config.input.max_size_test = 1344
    config.input.min_size_test = 800
    config.train.batch_size = 2
    config.optim.reference_batch_size = 4
    return config
