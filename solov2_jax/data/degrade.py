"""Augmentations that make a finished picture worse: blur, noise, JPEG, holes.

Strengths are those at the network's size: the picture is resized by then.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

from solov2_jax.data import rasterize
from solov2_jax.data.augment import Augment, Outlines, Sample
from solov2_jax.data.transforms import hide_points


def degrade(sample: Sample, augment: Augment, rng: np.random.Generator) -> Sample:
    """Returns the sample with what `augment` says, in the order of a camera: a blurred
    view, a noisy sensor, a file; holes last. Changes its argument."""
    # All are drawn, so that one key changes nothing of what another one does.
    chances, sigma, noise = rng.random(3), rng.random(), rng.random()
    quality, seed = rng.random(), int(rng.integers(2**63))
    if chances[0] < augment.blur_prob:
        sample.image = blur(sample.image, sigma * augment.blur_sigma)
    if augment.noise:
        drawn = np.random.Generator(np.random.PCG64(seed))
        sample.image = add_noise(sample.image, noise * augment.noise, drawn)
    if chances[1] < augment.jpeg_prob:
        low, high = augment.jpeg_quality
        sample.image = compress(sample.image, low + int(quality * (high - low + 1)))
    if chances[2] < augment.cutout_prob:
        sample = cutout(sample, augment, rng)
    return sample


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Returns the image [h, w, C] after a gaussian of this width, in pixels."""
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
    from scipy import ndimage  # slow

    return ndimage.gaussian_filter(image, (sigma, sigma, 0))


def add_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Returns the image with gaussian noise of this standard deviation, of 255."""
    noisy = rng.standard_normal(image.shape, np.float32)
    noisy *= np.float32(sigma)
    noisy += image
    np.clip(noisy, 0, 255, out=noisy)
    return np.rint(noisy, out=noisy).astype(np.uint8) if image.dtype == np.uint8 else noisy


def compress(image: np.ndarray, quality: int) -> np.ndarray:
    """Returns an RGB image, uint8 [h, w, 3], as a JPEG file of this quality has it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def cutout(sample: Sample, augment: Augment, rng: np.random.Generator) -> Sample:
    """Returns the sample with rectangles of one random colour each in front of it.

    What they hide is no part of an object any more; a key point below is marked as
    hidden. Changes its argument.
    Source: DeVries and Taylor 2017, "Cutout"; the objects' masks follow here.
    """
    h, w = sample.size
    image = sample.image.copy()
    cover = np.zeros((h, w), bool)
    for _ in range(int(rng.integers(1, augment.cutout_holes + 1))):
        tall, wide = np.maximum(
            rng.uniform(augment.cutout_size[0], augment.cutout_size[1], 2) * min(h, w), 1
        ).astype(int)
        y, x = (rng.random(2) * (h - tall + 1, w - wide + 1)).astype(int)
        image[y : y + tall, x : x + wide] = rng.integers(0, 256, image.shape[2])
        cover[y : y + tall, x : x + wide] = True
    spans = rasterize.subtract_cover(sample.outlines(), cover)
    sample.image = image
    sample.masks = Outlines(spans, len(sample.labels), (h, w))
    sample.boxes = rasterize.bounding_boxes(spans, len(sample.labels))
    if sample.keypoints is not None:
        sample.keypoints = hide_points(sample.keypoints, cover)
    return sample
