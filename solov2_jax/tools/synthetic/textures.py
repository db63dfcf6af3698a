"""Random surfaces for the generated data set."""

import numpy as np


def texture(rng: np.random.Generator, h: int, w: int, color: np.ndarray) -> np.ndarray:
    """Returns a random surface around a colour, float64 [h, w, 3] in 0..255.

    One of: plain, gradient, stripes, checks, soft blobs; always with fine noise.
    """
    contrast = rng.uniform(-45, 45, 3)
    patterns = (_plain, _gradient, _stripes, _checks, _blobs)
    pattern = patterns[rng.integers(len(patterns))](rng, h, w)
    noise = rng.normal(0, rng.uniform(1, 8), (h, w, 1))
    return np.clip(color + contrast * pattern[..., None] + noise, 0, 255)


def _plain(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Returns zeros; as every pattern, float64 [h, w] in about -1..1."""
    return np.zeros((h, w))


def _along(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Returns the coordinate along a random direction, in pixels."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:h, :w]
    return np.cos(angle) * x + np.sin(angle) * y


def _gradient(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    position = _along(rng, h, w)
    low, high = position.min(), position.max()
    return 2 * (position - low) / (high - low) - 1


def _stripes(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    period = rng.uniform(4, 16)
    return np.sin(2 * np.pi * _along(rng, h, w) / period)


def _checks(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    size = int(rng.integers(3, 9))
    y, x = np.mgrid[:h, :w]
    return 1.0 - 2.0 * ((y // size + x // size) % 2)


def _blobs(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Returns coarse noise, interpolated."""
    cell = int(rng.integers(6, 20))
    rows, columns = -(-h // cell) + 2, -(-w // cell) + 2
    coarse = rng.uniform(-1, 1, (rows, columns))
    y, x = np.arange(h) / cell, np.arange(w) / cell
    y0, x0 = y.astype(int), x.astype(int)
    fy, fx = (y - y0)[:, None], (x - x0)[None]
    top = coarse[y0][:, x0] * (1 - fx) + coarse[y0][:, x0 + 1] * fx
    below = coarse[y0 + 1][:, x0] * (1 - fx) + coarse[y0 + 1][:, x0 + 1] * fx
    return top * (1 - fy) + below * fy
