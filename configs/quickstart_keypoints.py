"""The quickstart with key points: the middle and the outermost corners of generated shapes.

    python train.py --config configs/quickstart_keypoints.py --workdir runs/keypoints

Nothing is downloaded. `docs/results.md` has the measured time, AP and OKS AP.
"""

from configs import quickstart


def get_config():
    """Returns the configuration: `quickstart`'s, with another data set and one more head."""
    config = quickstart.get_config()
    config.data.mapper = "fcpose"
    config.data.generated.keypoints = True
    config.optim.milestones = (850, 950)
    config.train.steps = 1000
    return config
