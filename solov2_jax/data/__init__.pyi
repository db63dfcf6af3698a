"""For type checkers: what `__init__.py` imports when it is first asked for."""

from solov2_jax.data.augment import Sample as Sample
from solov2_jax.data.build import load_datasets as load_datasets
from solov2_jax.data.coco import CocoDataset as CocoDataset
from solov2_jax.data.coco import load_coco as load_coco
from solov2_jax.data.images import list_images as list_images
from solov2_jax.data.images import read_image as read_image
