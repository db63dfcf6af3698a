"""What a backbone is: the contract of `model.backbone.name`, for ours and for one's own.

A backbone is a subclass of `Backbone` that maps an image to features at strides 4, 8, 16
and 32. It names its modules by stage, or says otherwise in `stages` and `layers`; nothing
else of the program knows which one it is.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax

from solov2_jax.io import InputError

LEVELS = ("res2", "res3", "res4", "res5")  # features at strides 4, 8, 16, 32
# Patterns of the names of parameters in the stages that `freeze_at` counts.
STAGES = (("stem*",), *((f"{level}*",) for level in LEVELS))


class Backbone(nn.Module, kw_only=True):
    """Base class of backbones: `__call__(image, extent)` returns {"res2": ..., "res5": ...}.

    The image is [B, h, w, c] with sides that are multiples of 32, normalised; the result's
    arrays are [B, h / 4, w / 4, any number of channels] to [B, h / 32, w / 32, ...]. `extent`
    is the true size of each image, see `ops`: what lies beyond it must change nothing within
    it, as if the array ended there; None: the array's size.

    The first convolution is best called "stem/conv1": RGB weights then fit pictures of any
    number of channels. `ConvNorm` takes `norm` and `frozen`; a backbone that has a field `norm`
    is given `model.backbone.norm`.

    Attributes:
      freeze_at: how many of `stages` are not trained.
      dtype: that convolutions and products compute in.
      frozen: patterns of names of parameters that are not trained, "backbone/" included.
    """

    freeze_at: int = 2
    dtype: Dtype = jnp.float32
    frozen: Sequence[str] = ()

    def stages(self) -> Sequence[Sequence[str]]:
        """Returns the patterns of names of each stage that can be frozen, from the image on."""
        return STAGES

    def layers(self) -> Sequence[Sequence[str]]:
        """Returns the patterns of each layer that `optim.layer_decay` counts, from the image on.

        A parameter belongs to the first layer that has a pattern for its name, to the last
        where none has.
        """
        return self.stages()

    def norm_of(self, norm: str, stage: int) -> str:
        """Returns the norm of a stage: a frozen stage's batch norm is frozen too."""
        return "frozen_bn" if norm == "sync_bn" and self.freeze_at >= stage else norm

    def cut(self, x: jax.Array, stage: int) -> jax.Array:
        """Returns `x` without a gradient if it ends a frozen stage: 1 the stem, 2 res2, ...

        Parameters of frozen stages stay as they are without this too; it saves their
        backward pass.
        """
        return lax.stop_gradient(x) if self.freeze_at >= stage else x


def check_features(features: dict[str, jax.Array], image: jax.Array, backbone: str) -> None:
    """Raises an InputError if features are not what the FPN takes."""
    if not isinstance(features, dict) or not set(LEVELS) <= set(features):
        found = sorted(features) if isinstance(features, dict) else type(features).__name__
        raise InputError(
            f"model.backbone.name: {backbone} returned {found}; it must return a dict of {LEVELS}"
        )
    for i, level in enumerate(LEVELS):
        want = (image.shape[0], *(side // (4 << i) for side in image.shape[1:3]))
        if features[level].ndim != 4 or features[level].shape[:3] != want:
            raise InputError(
                f"model.backbone.name: {backbone} returned {level} of shape "
                f"{features[level].shape} for an image of {image.shape}; it must be {want} and "
                "the channels"
            )
