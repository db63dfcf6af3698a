"""SOLOv2, ResNet-50, on LVIS v1: 1,203 classes, rare ones shown more often.

    python train.py --config configs/lvis_r50.py --workdir runs/lvis_r50 \
        --config.init_from=WEIGHTS

`datasets/coco` is COCO's folder with train2017 and val2017, where LVIS's images are.

What 1,203 classes cost in memory: docs/evaluation_and_prediction.md, "Other metrics than
COCO's"; about 1.9 GB of a step of 16 images. Not trained by us.
"""

from configs import r50_3x


def get_config():
    """Returns the configuration."""
    config = r50_3x.get_config()
    config.data.train.images = config.data.val.images = "datasets/coco"
    config.data.train.annotations = "datasets/lvis/lvis_v1_train.json"
    config.data.val.annotations = "datasets/lvis/lvis_v1_val.json"
    config.data.val.metric = "lvis"
    config.data.repeat_threshold = 0.001
    # Scores of rare classes are low, and LVIS counts 300 detections per image.
    config.test.score_threshold = config.test.update_threshold = 0.001
    config.test.nms_pre = 1000
    config.test.max_per_image = 300
    return config
