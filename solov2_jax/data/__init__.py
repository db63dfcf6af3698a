"""Images and annotations -> batches. Start reading at `build.py`, then `batch.py`.

    from solov2_jax.data import Sample, load_coco, read_image

Nothing here imports JAX.
"""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CocoDataset": "coco:CocoDataset",
        "Sample": "augment:Sample",
        "list_images": "images:list_images",
        "load_coco": "coco:load_coco",
        "load_datasets": "build:load_datasets",
        "read_image": "images:read_image",
    },
)
