"""Every key once: its unit, and in brackets the reference's key.

The values are those of the reference's `SOLOv2/R50_3x` unless a comment says
otherwise. A config is locked: an unknown key is an error that suggests the nearest.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the base configuration: SOLOv2, ResNet-50, 3x schedule, COCO."""
    config = ConfigDict()

    # Seeds the parameters, the order of the data and every augmentation [SEED].
    config.seed = 0
    # Weights to start from: a file (.npz, .safetensors) or another run's workdir;
    # "" starts from random weights. Ignored when the workdir resumes [MODEL.WEIGHTS].
    config.init_from = ""

    config.model = model = ConfigDict()
    # Number of classes without background; 0: counted from the training annotations
    # [MODEL.SOLOV2.NUM_CLASSES].
    model.num_classes = 0
    # "float32" or "bfloat16": the type convolutions compute in. Parameters, losses,
    # norms' statistics and NMS stay float32 [SOLVER.AMP.ENABLED].
    model.dtype = "float32"
    model.backbone = backbone = ConfigDict()
    backbone.depth = 50  # 18, 34, 50, 101 or 152 [MODEL.RESNETS.DEPTH]
    # Stages whose weights never change: 0 none, 1 stem, 2 stem and res2, ... 5 all
    # [MODEL.BACKBONE.FREEZE_AT].
    backbone.freeze_at = 2
    # Stride of a bottleneck in its first 1x1 convolution (True: MSRA/Caffe weights) or
    # in its 3x3 (False: torchvision weights) [MODEL.RESNETS.STRIDE_IN_1X1].
    backbone.stride_in_1x1 = True
    # "frozen_bn" (pretrained weights); "sync_bn", trained with the statistics of all
    # devices' images, but for frozen stages; or "gn", group norm, which lets
    # the backbone start from random weights [MODEL.RESNETS.NORM].
    backbone.norm = "frozen_bn"
    model.fpn = fpn = ConfigDict()
    fpn.channels = 256  # of p2 .. p6 [MODEL.FPN.OUT_CHANNELS]
    model.ins_head = ins_head = ConfigDict()
    # Convolutions of each tower, classes and kernels [MODEL.SOLOV2.NUM_INSTANCE_CONVS].
    ins_head.num_convs = 4
    ins_head.channels = 512  # of the towers [MODEL.SOLOV2.INSTANCE_CHANNELS]
    ins_head.num_kernels = 256  # E, weights of a dynamic kernel [..NUM_KERNELS]
    # Cells per side on each level, finest level first [MODEL.SOLOV2.NUM_GRIDS].
    ins_head.num_grids = (40, 36, 24, 16, 12)
    ins_head.prior_prob = 0.01  # initial class probability [..PRIOR_PROB]
    model.mask_head = mask_head = ConfigDict()
    # Of the convolutions before the mask features [MODEL.SOLOV2.MASK_CHANNELS].
    mask_head.channels = 128

    config.targets = targets = ConfigDict()
    # sqrt(box area), input pixels, both ends included; one pair per level
    # [MODEL.SOLOV2.FPN_SCALE_RANGES].
    targets.scale_ranges = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    targets.sigma = 0.2  # size of the centre region over the box's size [..SIGMA]
    # Slots for (cell, mask) pairs per image. An image with more trains on a random
    # subset of them, which is counted in the metric `pairs_dropped`.
    targets.max_pairs = 256

    config.loss = loss = ConfigDict()
    # Weight of cells with an object, 1 - alpha that of the others
    # [MODEL.SOLOV2.LOSS.FOCAL_ALPHA].
    loss.focal_alpha = 0.25
    # The larger, the less a cell counts that is right already
    # [MODEL.SOLOV2.LOSS.FOCAL_GAMMA].
    loss.focal_gamma = 2.0
    loss.focal_weight = 1.0  # of the class loss [MODEL.SOLOV2.LOSS.FOCAL_WEIGHT]
    loss.dice_weight = 3.0  # of the mask loss [MODEL.SOLOV2.LOSS.DICE_WEIGHT]

    config.test = test = ConfigDict()
    test.score_threshold = 0.1  # least class score [MODEL.SOLOV2.SCORE_THR]
    # Of the soft mask, from 0 to 1: what is above it is the object
    # [MODEL.SOLOV2.MASK_THR].
    test.mask_threshold = 0.5
    test.update_threshold = 0.05  # least score after NMS [MODEL.SOLOV2.UPDATE_THR]
    test.nms_pre = 500  # candidates that enter NMS [MODEL.SOLOV2.NMS_PRE]
    test.max_per_image = 100  # detections kept [MODEL.SOLOV2.MAX_PER_IMG]
    test.nms_type = "matrix"  # "matrix" or "mask" [MODEL.SOLOV2.NMS_TYPE]
    test.nms_kernel = "gaussian"  # "gaussian" or "linear" [MODEL.SOLOV2.NMS_KERNEL]
    test.nms_sigma = 2.0  # of the gaussian kernel [MODEL.SOLOV2.NMS_SIGMA]
    test.nms_iou = 0.5  # IoU above which mask NMS suppresses
    # Cell-class pairs above the score threshold whose masks are looked at, best score
    # first. The reference has no bound, and memory without bound.
    test.max_candidates = 4096

    config.input = input_ = ConfigDict()
    input_.channel_order = "BGR"  # "BGR" or "RGB" [INPUT.FORMAT]
    input_.mean = (103.53, 116.28, 123.675)  # in channel order [MODEL.PIXEL_MEAN]
    input_.std = (1.0, 1.0, 1.0)  # in channel order [MODEL.PIXEL_STD]
    # Short side in pixels, one drawn per image [INPUT.MIN_SIZE_TRAIN].
    input_.min_sizes_train = (640, 672, 704, 736, 768, 800)
    # "choice": one of `min_sizes_train`; "range": any whole number from the smallest to
    # the largest of them [INPUT.MIN_SIZE_TRAIN_SAMPLING].
    input_.size_sampling = "choice"
    input_.max_size_train = 1333  # long side at most [INPUT.MAX_SIZE_TRAIN]
    input_.min_size_test = 800  # short side in pixels [INPUT.MIN_SIZE_TEST]
    input_.max_size_test = 1333  # long side at most [INPUT.MAX_SIZE_TEST]
    # Share of the training images that are mirrored, left to right [INPUT.RANDOM_FLIP].
    input_.flip_prob = 0.5
    # Padded (height, width) shapes, multiples of 32; an image goes into the smallest
    # that holds it. (): derived from the sizes above. One compilation per shape.
    input_.buckets_train = ()
    # The same for evaluation and prediction. (): derived from the data set or, by
    # `predict.py`, each image's own.
    input_.buckets_test = ()

    # Changes of training images beyond resize and flip, none by default. Boxes become
    # those of the masks, as in the reference where it crops.
    config.augment = augment = ConfigDict()
    # Share of the images that are rotated; 0.5 in the reference [INPUT.IS_ROTATE].
    augment.rotate_prob = 0.0
    augment.rotate_degrees = 30.0  # to either side, at most
    # (): none; else smallest (height, width) of the part that is kept, over the
    # image's. It holds the centre of an object [INPUT.CROP.ENABLED, SIZE].
    augment.crop_size = ()
    # False: the part is enlarged until it cuts no object [INPUT.CROP.CROP_INSTANCE].
    augment.crop_objects = True
    augment.brightness = 0.0  # factor 1 - x to 1 + x
    augment.contrast = 0.0  # likewise, around the mean grey
    augment.saturation = 0.0  # likewise, around each pixel's grey
    # (): none; else (lowest, highest): large-scale jitter. The image is scaled to so
    # many times what fits into `jitter_size` (height, width), and cut to that; replaces
    # `input.min_sizes_train` and its padded shapes. (0.1, 2.0) is common.
    augment.jitter_scale = ()
    augment.jitter_size = (1024, 1024)  # (height, width) after large-scale jitter
    # Images that get objects of another image, each of its objects with probability
    # 0.5. Wants `jitter_scale`, as in the paper, but works without.
    augment.paste_prob = 0.0

    config.data = data = ConfigDict()
    data.train = ConfigDict()
    data.train.images = "datasets/coco/train2017"  # folder of images [DATASETS.TRAIN]
    # COCO instances json of these images; `file_name` is relative to the folder.
    data.train.annotations = "datasets/coco/annotations/instances_train2017.json"
    data.train.max_images = 0  # the first so many are trained on; 0: all
    data.val = ConfigDict()
    data.val.images = "datasets/coco/val2017"  # folder of images [DATASETS.TEST]
    # COCO instances json, with the same categories as the training data's.
    data.val.annotations = "datasets/coco/annotations/instances_val2017.json"
    # "": those of data.train and data.val. "shapes": the embedded generated data set,
    # written below `data.generated.root` on first use, replaces them. "tfds:FOLDER":
    # the records that `python -m solov2_jax.tools.tfds` wrote do.
    data.name = ""
    data.generated = generated = ConfigDict()
    generated.root = "datasets/shapes"  # folder that it is written below
    generated.num_train = 400  # training images
    generated.num_val = 64  # validation images
    generated.image_size = (128, 128)  # height, width
    generated.seed = 0  # of the images' contents
    # Any of these five; a class is an outline.
    generated.classes = ("ellipse", "rectangle", "triangle", "star", "ring")
    # Share of objects whose hue tells their class; at 0 only the outline does, which
    # takes far longer to learn.
    generated.color_cue = 0.0
    generated.max_objects = 6  # per image
    generated.min_radius = 0.09  # of an object, over the image's shorter side
    generated.max_radius = 0.30  # likewise
    # Train on images without objects too. The reference drops them
    # [DATALOADER.FILTER_EMPTY_ANNOTATIONS].
    data.keep_empty = True
    # Show images of rare classes more often: of an image's rarest class, sqrt of this
    # over the share of images that have it, times an epoch. 0: every image once; LVIS
    # is trained with 0.001 [DATALOADER.REPEAT_THRESHOLD].
    data.repeat_threshold = 0.0
    # Padded objects per image; 0: the largest number in the annotations.
    data.max_instances = 0
    data.num_workers = 4  # processes; 0: threads only [DATALOADER.NUM_WORKERS]
    data.num_threads = 2  # reading threads per process
    data.prefetch = 2  # batches ready per worker

    config.optim = optim = ConfigDict()
    # "sgd", as the reference, or "adamw", which wants a rate of about 1e-4 to 1e-3.
    optim.name = "sgd"
    # For 16 images a step; not scaled unless the next key says so [SOLVER.BASE_LR].
    optim.learning_rate = 0.01
    # Images a step that the rate is meant for: it is multiplied by train.batch_size /
    # reference_batch_size; 0: it is taken as it is [SOLVER.REFERENCE_WORLD_SIZE].
    optim.reference_batch_size = 0
    optim.momentum = 0.9  # of SGD; Adam's first beta [SOLVER.MOMENTUM]
    optim.weight_decay = 1e-4  # of all but norms' parameters [SOLVER.WEIGHT_DECAY]
    optim.weight_decay_norm = 0.0  # on norm parameters [SOLVER.WEIGHT_DECAY_NORM]
    # The rate of the first step over the rate after warm-up [SOLVER.WARMUP_FACTOR].
    optim.warmup_factor = 0.01
    # Steps in which the rate rises, in a straight line [SOLVER.WARMUP_ITERS].
    optim.warmup_steps = 1000
    # "multistep": times gamma at each milestone; "fixed_gamma": `num_decays` times, at
    # equal distances; "cosine": half a cosine down to `final_rate`
    # [SOLVER.LR_SCHEDULER_NAME].
    optim.schedule = "multistep"
    # Steps after which "multistep" lowers the rate [SOLVER.STEPS].
    optim.milestones = (210_000, 250_000)
    optim.gamma = 0.1  # factor at each milestone or decay [SOLVER.GAMMA]
    optim.num_decays = 3  # of "fixed_gamma" [SOLVER.NUM_DECAYS]
    # That "cosine" ends at; scaled as the rate is [SOLVER.BASE_LR_END].
    optim.final_rate = 0.0
    # Steps that "fixed_gamma" and "cosine" are spread over, and after which the rate
    # stays; 0: train.steps. Set it to train longer without changing what was done.
    optim.decay_steps = 0
    # Largest L2 norm of the whole gradient; 0: no clipping, as the reference. The
    # paper's own code clips at 35 [SOLVER.CLIP_GRADIENTS].
    optim.clip_norm = 0.0
    # Decay per step of a moving average of the weights, such as 0.9998, which is then
    # evaluated and used besides the weights themselves; lower in the first steps; 0: no
    # average.
    optim.ema_decay = 0.0
    # Parameters that are not trained, besides `backbone.freeze_at`: patterns of their
    # names, such as ("backbone/res3_*", "fpn/*").
    optim.freeze = ()

    config.train = train = ConfigDict()
    train.steps = 270_000  # optimiser steps in all [SOLVER.MAX_ITER]
    train.batch_size = 16  # global, over all devices [SOLVER.IMS_PER_BATCH]
    # Parts of a batch that are computed one after the other, to save memory. The losses
    # and gradients are those of the whole batch.
    train.accumulate = 1
    train.log_every = 20  # steps between two lines of metrics; 0: none
    # Steps; the end is always saved. 0: only that [SOLVER.CHECKPOINT_PERIOD].
    train.checkpoint_every = 5000
    # Steps; the end is always evaluated. 0: only that [TEST.EVAL_PERIOD].
    train.eval_every = 0
    train.keep_checkpoints = 3  # newest ones; the best is kept besides
    # Training batches over which the statistics of trained batch norms are computed
    # before each evaluation; 0: running averages [TEST.PRECISE_BN.NUM_ITER].
    train.precise_bn = 0
    # Besides console and metrics.jsonl: "tensorboard", "csv" (metrics.csv) and, with
    # their packages installed, "wandb" and "mlflow".
    train.writers = ("tensorboard",)
    # Steps; histograms of the parameters, in TensorBoard; 0: never.
    train.histogram_every = 0
    # (first, last) of the steps whose trace is written to the workdir's profile/; ():
    # none.
    train.profile_steps = ()
    # Steps in a row whose loss or gradient is not finite before training stops. Such a
    # step changes neither parameters nor optimiser.
    train.max_skipped = 10
    # The figure of the evaluation that makes a checkpoint the best. Of a loss, less is
    # better.
    train.best_metric = "segm/AP"
    # Evaluations, every `eval_every` steps, without a new best before training ends;
    # 0: it never ends early.
    train.patience = 0
    # Steps that the mask loss may stay where it starts before a line says why; 0: any.
    train.watch_steps = 500

    config.eval = ConfigDict()
    config.eval.batch_size = 1  # images a step
    config.eval.max_images = 0  # the first so many are evaluated; 0: all
    # Validation images whose loss is computed at each evaluation, in whole batches of
    # train.batch_size, as val/loss; 0: none.
    config.eval.loss_images = 0
    # What computes AP: "fast", whose figures are equal to pycocotools' to the last
    # digit, or "pycocotools" itself, many times slower.
    config.eval.backend = "fast"
    # Images drawn with truth beside prediction, in eval/pictures [VIS_PERIOD].
    config.eval.num_pictures = 16
    # Pad every image to its own multiples of 32, as the reference does with single
    # images, instead of to one of a few shapes: an object's grid cell depends on the
    # padded size. About 40 shapes on COCO, each compiled once. Where
    # `input.buckets_test` is given, it decides.
    config.eval.exact_padding = False

    return config.lock()  # a variant's misspelt key is an error, not a new key
