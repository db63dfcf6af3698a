"""SOLOv2, ResNet-50, on LVIS v1: 1,203 classes, rare ones shown more often.

    python train.py --config configs/lvis_r50.py --workdir runs/lvis_r50 \
        --config.init_from=WEIGHTS

`datasets/coco` is COCO's folder with train2017 and val2017, where LVIS's images are.

What 1,203 classes cost, by the shapes: the class head's last convolution has 3 x 3 x 512 x
1,203 = 5.5 million weights (22 MB, four times that with gradient and momentum), instead of
0.4 million. An image has 3,872 cells of all levels, so 4.7 million class logits: 18.6 MB in
float32, and the focal loss keeps a few arrays of this size, 16 images a step about 1 GB.
In prediction the best 4,096 of these pairs are candidates (`test.max_candidates`), whatever
the number of classes. Not trained by us.
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
