"""SOLOv2: normalised images to class logits, dynamic kernels and mask features."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from solov2_jax.models.backbone import check_features
from solov2_jax.models.deform import Deform
from solov2_jax.models.fpn import FPN
from solov2_jax.models.heads import InstanceHead, MaskHead, split_features
from solov2_jax.models.keypoint_head import KeypointHead, kernel_size
from solov2_jax.models.semantic_head import SemanticHead
from solov2_jax.structs import Outputs


class SOLOv2(nn.Module):
    """The whole network. Sides of the image must be multiples of 32.

    Attributes:
      backbone: called with (image, extent), returns {"res2": ..., "res5": ...}, features at
        strides 4, 8, 16 and 32 of any number of channels; see `backbone.Backbone`.

    Source: adet/modeling/solov2/solov2.py, SOLOv2.forward, without its losses and
    post-processing, which are functions of `Outputs` here.
    """

    num_classes: int
    backbone: nn.Module
    fpn_channels: int = 256
    fpn_norm: str = "none"
    num_grids: Sequence[int] = (40, 36, 24, 16, 12)
    num_kernels: int = 256
    head_channels: int = 512
    head_convs: int = 4
    head_norm: str = "gn"
    head_deform: Deform | None = None
    head_deform_last: bool = False
    mask_channels: int = 128
    mask_norm: str = "gn"
    mask_deform: Deform | None = None
    prior_prob: float = 0.01
    dtype: Dtype = jnp.float32
    frozen: Sequence[str] = ()  # patterns of parameters that are not trained; see `ConvNorm`
    num_keypoints: int = 0  # of an object; 0: there is no such head
    keypoint_channels: int = 32
    semantic: bool = False  # whether there is the auxiliary head, see `loss.semantic_weight`
    # Of the programs that this network is a part of: their makers set it where they trace.
    matmul_precision: str = "default"

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "B h w c"],
        extent: Int[Array, "B 2"] | None = None,
        auxiliary: bool = False,
    ) -> Outputs:
        """Returns what the network computes of normalised images, 0 where padded.

        Args:
          extent: (height, width) of each image with its own padding, multiples of 32,
            where the array is larger than that; the outputs are those of an array of
            this size. Mask features beyond it mean nothing. None: the array's.
          auxiliary: compute also what only the training's loss reads.
        """
        _, h, w, _ = image.shape
        if h % 32 or w % 32:
            raise ValueError(
                f"the image is {h}x{w}; pad both sides to multiples of 32 "
                "(see input.buckets_train and input.buckets_test)"
            )
        features = self.backbone(image.astype(self.dtype), extent)
        check_features(features, image, type(self.backbone).__name__)
        fpn = FPN(self.fpn_channels, self.dtype, self.fpn_norm, self.frozen, name="fpn")
        features = fpn(features, extent)
        numbers = kernel_size(self.keypoint_channels)
        cate, kernel, points = InstanceHead(
            num_classes=self.num_classes,
            num_kernels=self.num_kernels,
            num_grids=self.num_grids,
            channels=self.head_channels,
            num_convs=self.head_convs,
            prior_prob=self.prior_prob,
            dtype=self.dtype,
            norm=self.head_norm,
            deform=self.head_deform,
            deform_last=self.head_deform_last,
            keypoint_kernels=self.num_keypoints * numbers,
            name="ins_head",
        )(split_features(features, extent), extent)
        mask_head = MaskHead(
            channels=self.mask_channels,
            num_kernels=self.num_kernels,
            dtype=self.dtype,
            norm=self.mask_norm,
            deform=self.mask_deform,
            name="mask_head",
        )
        mask_feat = mask_head(features, extent)
        semantic = None
        if self.semantic and (auxiliary or self.is_initializing()):
            semantic = self._semantic_head()(features, extent)
        outputs = Outputs(_join_levels(cate), _join_levels(kernel), mask_feat, semantic)
        if not self.num_keypoints:
            return outputs
        kernels = _join_levels(points).reshape(len(image), -1, self.num_keypoints, numbers)
        points_feat = self._keypoint_head()(features, extent)
        return dataclasses.replace(outputs, keypoint_kernel=kernels, keypoint_feat=points_feat)

    def _keypoint_head(self) -> KeypointHead:
        channels, norm = self.keypoint_channels, self.mask_norm
        return KeypointHead(channels, norm, self.dtype, name="keypoint_head")

    def _semantic_head(self) -> SemanticHead:
        return SemanticHead(
            num_classes=self.num_classes,
            channels=self.mask_channels,
            prior_prob=self.prior_prob,
            dtype=self.dtype,
            name="semantic_head",
        )


def _join_levels(levels: Sequence[jax.Array]) -> jax.Array:
    """Returns the cells of all levels one after the other: [B, S, C]."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in levels], axis=1)


def intermediates(
    model: nn.Module, variables: Mapping, image: Float[Array, "B h w c"]
) -> dict[str, jax.Array]:
    """Returns what every module computed, by path: "fpn/p3", "ins_head/cate_tower/gn0".

    A module called once per level, or returning several arrays, has the index appended:
    "ins_head/kernel_pred/4" is the coarsest level's.
    """
    _, state = model.apply(variables, image, capture_intermediates=True)
    calls: Any = flatten_dict(state["intermediates"])
    by_path = {}
    for path, values in calls.items():
        leaves = jax.tree_util.tree_leaves_with_path(values)
        for keys, leaf in leaves:
            # The first key counts the calls: leave it out when there was one call.
            keys = keys if len(values) > 1 else keys[1:]
            names = [jax.tree_util.keystr((k,), simple=True) for k in keys]
            by_path["/".join([*path[:-1], *names])] = leaf
    return by_path
