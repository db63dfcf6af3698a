"""Images and annotations -> batches. Start reading at `build.py`, then `batch.py`.

    from solov2_jax.data import Sample, load_coco, read_image

Nothing here imports JAX.
"""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CocoDataset": "coco",
        "Sample": "augment",
        "list_images": "images",
        "load_coco": "coco",
        "load_datasets": "build",
        "read_image": "images",
    },
)
