"""Training batches with key points and semantic masks: FCPose's and BlendMask's data.

The network here reads neither; these are the two branches that the reference's data
loader has besides. Heatmaps are made of the points on the device, see `heatmaps.py`.
Source: AdelaiDet adet/data/dataset_mapper.py and adet/data/fcpose.
"""

import dataclasses
import os
from typing import Any

import numpy as np
from PIL import Image

from solov2_jax.data import sampler, transforms
from solov2_jax.data.batch import ArrayDict, AugmentedBatchMaker, TrainBatchMaker
from solov2_jax.data.build import build_train_batches
from solov2_jax.data.coco import CocoDataset
from solov2_jax.data.keypoints import Keypoints, move_points
from solov2_jax.data.pipeline import Batches


@dataclasses.dataclass(frozen=True)
class PoseLoader(TrainBatchMaker):
    """Makes training batches with `keypoints`, and `basis_sem` with masks."""

    keypoints: Keypoints | None
    basis: str  # folder of the semantic masks, "" without

    def __call__(self, step: int, *rest: Any) -> ArrayDict:
        """Returns a batch as `TrainBatchMaker` does, with the further fields.

        `keypoints`, float32 [B, G, J, 3]: x, y in input pixels and the flag, zeros on
        padding. `basis_sem`, uint8 [B, h, w]: the class of each pixel of the padded
        input, 0 on padding.
        """
        batch = super().__call__(step, *rest)
        rows, h, w = batch["image"].shape[:3]
        if self.keypoints is not None:
            shape = (*batch["valid"].shape, len(self.keypoints), 3)
            batch["keypoints"] = np.zeros(shape, np.float32)
        if self.basis:
            batch["basis_sem"] = np.zeros((rows, h, w), np.uint8)
        for row in range(rows):
            index = int(self.plan.image[step, row])
            epoch = int(self.plan.epoch[step, row])
            flip = sampler.is_flipped(self.seed, epoch, index, self.flip_prob)
            size = int(batch["image_size"][row, 0]), int(batch["image_size"][row, 1])
            fields = {k: v[row] for k, v in batch.items() if k != "masks"}
            if self.keypoints is not None:
                self._fill_points(fields, index, size, flip)
            if self.basis:
                mask = self._basis_mask(index, size, flip)
                fields["basis_sem"][: size[0], : size[1]] = mask
        return batch

    def _fill_points(
        self, fields: ArrayDict, index: int, size: tuple[int, int], flip: bool
    ) -> None:
        """Writes the points of the objects that are in a row's slots."""
        data, keypoints = self.dataset, self.keypoints
        assert keypoints is not None
        old = int(data.heights[index]), int(data.widths[index])
        objects = np.arange(data.start[index], data.start[index + 1])
        boxes = transforms.transform_boxes(data.boxes[objects], old, size, flip)
        order = keypoints.mirrored if flip else None
        points = move_points(keypoints.points[objects], old, size, order)
        candidate = 0
        # Slots are in the json's order, without the objects that were left out.
        for slot in np.flatnonzero(fields["valid"]).tolist():
            box, label = fields["boxes"][slot], fields["labels"][slot]
            while candidate < len(objects) and not (
                (boxes[candidate] == box).all() and data.labels[objects[candidate]] == label
            ):
                candidate += 1
            if candidate == len(objects):
                raise ValueError(
                    f"{data.file_names[index]}: its objects were moved in another way "
                    "than by resizing and mirroring, which key points do not follow; "
                    "turn the other augmentations off."
                )
            fields["keypoints"][slot] = points[candidate]
            candidate += 1

    def _basis_mask(self, index: int, size: tuple[int, int], flip: bool) -> np.ndarray:
        """Returns a semantic mask, resized to the nearest pixel, maybe mirrored."""
        data = self.dataset
        name = os.path.splitext(str(data.file_names[index]))[0] + ".npz"
        path = os.path.join(self.basis, name)
        mask = read_basis(path, (int(data.heights[index]), int(data.widths[index])))
        resized = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
        values = np.asarray(resized)
        return values[:, ::-1] if flip else values


def read_basis(path: str, size: tuple[int, int]) -> np.ndarray:
    """Returns the `mask` of a .npz file, uint8 [height, width].

    Args:
      size: (height, width) that it must have.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mask = arrays["mask"]
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such semantic mask; there must be a .npz file with `mask` for every image."
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: has no array `mask` that can be read ({error}); save it again by "
            "numpy.savez_compressed(path, mask=mask)."
        ) from None
    whole = mask.dtype.kind in "ui" and mask.min(initial=0) >= 0
    if mask.shape != size or not whole or mask.max(initial=0) > 255:
        raise ValueError(
            f"{path}: `mask` is {mask.dtype} {mask.shape}; it must be whole numbers of "
            f"0 to 255 of the image's size {size}."
        )
    return mask.astype(np.uint8)


def build_pose_batches(
    config: Any,
    dataset: CocoDataset,
    keypoints: Keypoints | None,
    *,
    basis: str = "",
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Returns `build_train_batches`' batches with the fields of `PoseLoader`.

    Args:
      keypoints: as `load_keypoints` returns them, or None.
      basis: folder with a .npz file for each image, "" for none.
    """
    batches = build_train_batches(config, dataset, start_step, shard)

    def with_pose(loader: TrainBatchMaker) -> PoseLoader:
        if isinstance(loader, AugmentedBatchMaker):
            raise ValueError(
                "augment.*: key points and semantic masks follow resize and flip only; "
                "set every key of config.augment back to its default."
            )
        names = [f.name for f in dataclasses.fields(TrainBatchMaker)]
        plain = {name: getattr(loader, name) for name in names}
        return PoseLoader(**plain, keypoints=keypoints, basis=basis)

    batches.replace_loader(with_pose)
    return batches
