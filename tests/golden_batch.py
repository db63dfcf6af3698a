"""The training images of the goldens as a batch, and our arrays under the reference's names."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from plain_masks import spans_of, stride4_of

from solov2_jax.data.rasterize import mass_centers
from solov2_jax.weights.tables import to_adelaidet

SLOTS, SIZE = 8, (256, 320)
CASES = {"one": [0], "two": [0, 1], "empty_second": [0, None], "empty": [None, None]}


def make_batch(arrays, images):
    """Padded fields of the golden images; None is an image without objects."""
    n = len(images)
    quarter_size = (SIZE[0] // 4, SIZE[1] // 4)
    fields = {
        "image": np.zeros((n, *SIZE, 3), np.uint8),
        "image_size": np.zeros((n, 2), np.int32),
        "boxes": np.zeros((n, SLOTS, 4), np.float32),
        "labels": np.zeros((n, SLOTS), np.int32),
        "centers": np.zeros((n, SLOTS, 2), np.float32),
        "masks": np.zeros((n, SLOTS, *quarter_size), np.uint8),
        "valid": np.zeros((n, SLOTS), bool),
        "image_id": np.arange(n),
    }
    for row, number in enumerate(images):
        # The reference's image without objects is its second one.
        pixels = arrays[f"image_{1 if number is None else number}"].transpose(1, 2, 0)
        h, w, _ = pixels.shape
        fields["image"][row, :h, :w] = pixels
        fields["image_size"][row] = h, w
        if number is None:
            continue
        masks = np.unpackbits(arrays[f"gt_masks_{number}"], axis=-1)[..., :w]
        count = len(masks)
        fields["boxes"][row, :count] = arrays[f"gt_boxes_{number}"]
        fields["labels"][row, :count] = arrays[f"gt_classes_{number}"]
        found = spans_of(masks)
        small = stride4_of(found, count, (h, w))
        fields["masks"][row, :count, : small.shape[1], : small.shape[2]] = small
        fields["centers"][row, :count] = mass_centers(found, count)[0]
        fields["valid"][row, :count] = True
    return jax.tree.map(jnp.asarray, fields)


def reference_names(params):
    """{reference name: array in the reference's layout} of a tree like the params."""
    flat = {"params/" + "/".join(k): np.asarray(v) for k, v in flatten_dict(params).items()}
    return to_adelaidet(flat)
