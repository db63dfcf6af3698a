"""Training batches of augmented images, which the plan's padded shapes still hold."""

import dataclasses

import numpy as np

from solov2_jax.data import augment as changes
from solov2_jax.data import plan as planning
from solov2_jax.data import spans, transforms, views
from solov2_jax.data.augment import Augment, Scene
from solov2_jax.data.images import open_sized
from solov2_jax.data.loading import ArrayDict, TrainLoader
from solov2_jax.data.sizes import Resize
from solov2_jax.data.spans import Size

_OWN, _GUEST = range(2)  # what an image is drawn for


@dataclasses.dataclass(frozen=True)
class AugmentedLoader(TrainLoader):
    """Makes training batches, all that is random in them from (seed, epoch, index).

    Boxes are those of the masks, as in the reference where it crops. An image whose
    shape has changed is shrunk until the padded shape of the unchanged image holds it:
    the reference pads a batch to whatever comes.
    """

    augment: Augment
    resize: Resize

    def fill_row(self, row: ArrayDict, index: int, epoch: int) -> int:
        """Writes an image with its objects into a batch's row, and returns how many
        objects there are."""
        h, w = row["image"].shape[:2]
        scene = self.scene(index, epoch, (h, w), _OWN)
        rng = self.random(index, epoch, _GUEST)
        guest = int(rng.integers(len(self.dataset)))
        if rng.random() < self.augment.paste_prob:
            size = scene.view.size
            other = self.scene(guest, epoch, size, _GUEST)
            scene = changes.pasted(scene, other, rng)
        size = scene.view.size
        out = row["image"]
        transforms.write_image(
            scene.view.picture, out[: size[0], : size[1]], False, self.bgr
        )
        out[size[0] :] = 0
        out[: size[0], size[1] :] = 0
        row["image_size"][:] = size
        boxes = spans.bounding_boxes(scene.outlines, len(scene.labels))
        keep = self.choose(boxes)
        outlines = spans.select(scene.outlines, keep, len(scene.labels))
        return self.write_objects(row, outlines, boxes[keep], scene.labels[keep], size)

    def random(self, index: int, epoch: int, purpose: int) -> np.random.Generator:
        """Returns the generator of an image in an epoch."""
        bits = planning.random_bits(self.seed, planning.AUGMENT, epoch, index, purpose)
        return np.random.Generator(np.random.PCG64(int(bits)))

    def scene(self, index: int, epoch: int, room: Size, purpose: int) -> Scene:
        """Returns an augmented image.

        Args:
          room: its size at most.
        """
        data, augment = self.dataset, self.augment
        rng = self.random(index, epoch, purpose)
        old = int(data.heights[index]), int(data.widths[index])
        picture = open_sized(data.path(index), *old, data.annotation_file)
        objects = np.arange(data.start[index], data.start[index + 1])
        view = changes.recolored(views.view_of(picture), augment, rng)
        view = changes.maybe_rotated(view, augment, rng)
        boxes = view.boxes(data.boxes[objects])
        view = changes.crop_around(view, boxes, augment, rng)
        if augment.jitter_scale:
            view = changes.jittered(view, augment, rng)
            size = changes.fitted(view.size, room)
        else:
            shorts = self.resize.shorts
            scale = planning.scale_index(self.seed, epoch, index, len(shorts))
            size = transforms.shortest_edge_sizes(
                *view.size, shorts[int(scale)], self.resize.max_size
            )
            size = changes.fitted((int(size[0]), int(size[1])), room)
        if size != view.size:
            view = views.resized(view, size)
        if planning.is_flipped(self.seed, epoch, index, self.flip_prob):
            view = views.mirrored(view)
        try:
            outlines = views.draw(data.segmentations, objects.tolist(), old, view)
        except spans.DamagedRuns as error:
            raise self.damaged(objects, error) from None
        return Scene(view, outlines, data.labels[objects])
