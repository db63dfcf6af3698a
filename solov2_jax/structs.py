"""What flows from a record on disk to AP: Batch -> Outputs -> Targets / Detections.

Shape legend, used in every docstring:
  B batch, G padded ground truth, K classes, E mask-kernel size, C channels,
  S cells of all levels together (finest level first, row-major within a level),
  P pair slots, D detections kept, J key points; lower-case h, w a padded input image, and
  h4 = h / 4, w4 = w / 4 the mask features' size.
Boxes are (x0, y0, x1, y1) in pixels of the frame that the docstring names.
"""

from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num, UInt8


@struct.dataclass
class Batch:
    """Images of one padded shape with their ground truth.

    `image` is not normalised and holds arbitrary values beyond `image_size`:
    `ops.normalize_image` turns both into the reference's normalised, zero-padded input.
    """

    image: Num[Array, "B h w c"]  # uint8, or float32 0..255; in the config's channel order
    image_size: Int[Array, "B 2"]  # (height, width) before padding
    boxes: Float[Array, "B G 4"]  # input pixels
    labels: Int[Array, "B G"]  # 0..K-1
    centers: Float[Array, "B G 2"]  # (x, y) mass centre of the mask, pixel indices
    masks: UInt8[Array, "B G h4 w4"]  # 0/1 at a quarter of the size, zero-padded
    valid: Bool[Array, "B G"]  # False on padding
    image_id: Int[Array, "B"]  # the annotation file's id
    # False: the mask is the filled box, nothing else is known. None: all have one.
    has_mask: Bool[Array, "B G"] | None = None
    # The class of each pixel plus 1, 0 on background, 255 where no one knows; None without.
    basis_sem: UInt8[Array, "B h w"] | None = None
    # x, y in input pixels and 0 not annotated, 1 hidden, 2 visible; None: not trained on.
    keypoints: Float[Array, "B G J 3"] | None = None
    # (height, width) that the images are padded to, where their arrays are larger than that.
    extent: Int[Array, "B 2"] | None = None


@struct.dataclass
class Outputs:
    """What the network computes, before any activation."""

    cate: Float[Array, "B S K"]  # class logits
    kernel: Float[Array, "B S E"]  # dynamic kernels
    mask_feat: Float[Array, "B h4 w4 E"]
    # Class logits of pixels at strides 4, 8, 16, 32, in training with `loss.semantic_weight`.
    semantic: list[Float[Array, "B _ _ K"]] | None = None
    keypoint_kernel: Float[Array, "B S J F1"] | None = None  # see `keypoints.py`
    keypoint_feat: Float[Array, "B h4 w4 F"] | None = None


@struct.dataclass
class Targets:
    """Which cell learns what. A pair is one positive (cell, instance)."""

    cate: Int[Array, "B S"]  # class of the cell, K on background
    pair_cell: Int[Array, "B P"]  # in 0..S-1
    pair_instance: Int[Array, "B P"]  # in 0..G-1
    pair_weight: Float[Array, "B P"]  # 0 on padding, else num_pairs / pairs kept
    num_pairs: Int[Array, "B"]  # before the slots' limit
    num_cells: Int[Array, "B"]  # positive cells, each counted once


@struct.dataclass
class Detections:
    """Final detections, best first, padded to D."""

    scores: Float[Array, "B D"]
    labels: Int[Array, "B D"]  # 0..K-1
    soft_masks: Float[Array, "B D h4 w4"]  # probabilities over the padded input
    valid: Bool[Array, "B D"]
    num_candidates: Int[Array, "B"]  # cell-class pairs above the score threshold
    keypoints: Float[Array, "B D J 3"] | None = None  # x, y in input pixels, and a score
