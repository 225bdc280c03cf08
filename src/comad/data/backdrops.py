"""Backdrops of composed images. Add one: a function of (generator, height, width), an entry in `BACKDROPS`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def random_backdrop(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One of `BACKDROPS`, by chance with grain on it: uint8 (height, width, 3)."""
    names = list(BACKDROPS)
    colours = BACKDROPS[names[generator.integers(len(names))]](generator, height, width)
    if generator.random() < 0.5:
        colours = colours + generator.normal(0, generator.uniform(2, 14), (height, width, 1))
    return colours.clip(0, 255).astype(np.uint8)


def _colours(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.uniform(0, 255, (*shape, 3))


def _flat(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.broadcast_to(_colours(generator, 1, 1), (height, width, 3))


def _gradient(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    return _enlarged(_colours(generator, 2, 2), height, width)


def _clouds(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of four scales; each finer one is weaker."""
    shares = [(cells, 0.6**octave) for octave, cells in enumerate((2, 5, 11, 23))]
    layers = [share * _enlarged(_colours(generator, cells, cells), height, width) for cells, share in shares]
    return np.sum(layers, axis=0) / sum(share for _, share in shares)


def _waves(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Stripes of any direction between two colours, soft or hard."""
    angle, period = generator.uniform(0, np.pi), generator.uniform(6, 48)
    y, x = np.mgrid[:height, :width]
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period) * generator.choice([1.0, 8.0])
    share = (0.5 + 0.5 * wave.clip(-1, 1))[..., None]
    first, second = _colours(generator, 2)
    return share * first + (1 - share) * second


def _checks(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    side = int(generator.integers(6, 40))
    y, x = np.mgrid[:height, :width]
    return _colours(generator, 2)[(y // side + x // side) % 2]


def _mosaic(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Cells around random points, each of one colour."""
    points = generator.uniform(0, (height, width), (int(generator.integers(4, 40)), 2))
    y, x = np.mgrid[:height, :width]
    distance = (y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2
    return _colours(generator, len(points))[distance.argmin(axis=-1)]


def _enlarged(colours: np.ndarray, height: int, width: int) -> np.ndarray:
    small = Image.fromarray(colours.astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)


BACKDROPS: dict[str, Draw] = {
    "flat": _flat,
    "gradient": _gradient,
    "clouds": _clouds,
    "waves": _waves,
    "checks": _checks,
    "mosaic": _mosaic,
}
