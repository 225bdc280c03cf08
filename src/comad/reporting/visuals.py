"""The images of a report as small data URIs, with words for who cannot see them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib import colormaps
from PIL import Image

from comad.reporting.samples import STUDENT, TARGET, Samples
from comad.reporting.words import percent

SHOWN_SIDE, SMALL_SIDE = 96, 44
"""Pixels on the side of the images with masks; of all images where many runs share a page."""
MAX_NEIGHBOURS = 4


class Figure(NamedTuple):
    """One image: its data URI and what it shows."""

    uri: str
    alt: str


class Strip(NamedTuple):
    """A row of images under one title. ``pixelated``: small maps that are shown enlarged."""

    title: str
    figures: list[Figure]
    pixelated: bool = False


def photo(image: UInt8[np.ndarray, "H W 3"], small: bool = False) -> str:
    """A data URI in WebP, lossy."""
    if small:
        side = min(SMALL_SIDE, *image.shape[:2])
        image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
    return _uri(image, quality=60 if small else 78, method=4)


def pixels(image: UInt8[np.ndarray, "h w C"]) -> str:
    """A data URI in WebP, exact: for maps of a pixel per patch."""
    return _uri(image, lossless=True)


def originals(samples: Samples, small: bool = False) -> Strip:
    """The images that everything is shown on."""
    return Strip("images", [Figure(photo(image, small), f"image {i + 1}") for i, image in enumerate(samples.images)])


def masks(samples: Samples, small: bool = False) -> list[Strip]:
    """What each network sees of each image; the rest is veiled."""
    return [_masked(samples, name, mask, small) for name, mask in samples.masks.items()]


def gates(samples: Samples) -> list[Strip]:
    """The weight of each teacher at each patch of each image."""
    return [_gate(name, weights) for name, weights in samples.gate.items()]


def gate_images(samples: Samples) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
    """Teacher → one image for who tracks a run: above the images, below its weight at each patch of them."""
    found = {}
    for name, weights in samples.gate.items():
        maps = [
            np.asarray(Image.fromarray(_shown_weights(part)).resize((SHOWN_SIDE, SHOWN_SIDE), 0)) for part in weights
        ]
        above = [np.asarray(Image.fromarray(image).resize((SHOWN_SIDE, SHOWN_SIDE))) for image in samples.images]
        found[name] = np.vstack([np.hstack(above), np.hstack(maps)])
    return found


def _shown_weights(weights: Float[np.ndarray, "... h w"]) -> UInt8[np.ndarray, "... h w 3"]:
    return (255 * colormaps["viridis"](weights)[..., :3]).astype(np.uint8)


def colours(samples: Samples) -> list[Strip]:
    """Features as colours: teachers, target, student."""
    return [
        Strip(
            f"{name} (these colours hold {percent(samples.explained.get(name, 0))} of its variance)",
            [
                Figure(pixels(part), f"features of {name}, image {i + 1}")
                for i, part in enumerate(samples.colours[name])
            ],
            pixelated=True,
        )
        for name in sorted(samples.colours, key=_last)
    ]


class Query(NamedTuple):
    """An image and its nearest neighbours by each network."""

    image: Figure
    strips: list[Strip]


def neighbours(samples: Samples, small: bool = False) -> list[Query]:
    """Per image, the nearest training images by each network; which ones student and teachers share is in words."""
    if not samples.neighbours:
        return []
    uris = {int(t): photo(samples.thumbnails[t], small) for t in _shown(samples.neighbours.values())}
    order = sorted(samples.neighbours, key=_last)
    found = []
    for i, image in enumerate(samples.images):
        strips = []
        for name in order:
            near = samples.neighbours[name][i, :MAX_NEIGHBOURS]
            figures = [Figure(uris[int(t)], f"neighbour {k + 1} by {name}") for k, t in enumerate(near)]
            strips.append(Strip(name + _common(samples, name, i), figures))
        found.append(Query(Figure(photo(image, small), f"image {i + 1}"), strips))
    return found


def lost(samples: Samples, small: bool = False) -> list[tuple[Figure, str]]:
    """Test images that the student lost, and the names of their classes."""
    names = [samples.class_names[label] for label in samples.lost_labels]
    return [(Figure(photo(image, small), name), name) for image, name in zip(samples.lost, names, strict=True)]


def _common(samples: Samples, name: str, i: int) -> str:
    """How many of the student's neighbours a teacher has as well."""
    if name == STUDENT or STUDENT not in samples.neighbours:
        return ""
    ours, theirs = (samples.neighbours[key][i, :MAX_NEIGHBOURS] for key in (STUDENT, name))
    return f" ({len(np.intersect1d(ours, theirs))} of {len(ours)} as the student)"


def _shown(lists: Iterable[np.ndarray]) -> Sequence[int]:
    return np.unique(np.concatenate([part[:, :MAX_NEIGHBOURS].ravel() for part in lists])).tolist()


def _last(name: str) -> int:
    """Teachers first, then the target, the student last."""
    return {TARGET: 1, STUDENT: 2}.get(name, 0)


def _gate(name: str, weights: Float[np.ndarray, "n h w"]) -> Strip:
    maps = _shown_weights(weights)
    figures = [
        Figure(pixels(shown), f"image {i + 1}, {name}: {percent(part.mean())}")
        for i, (shown, part) in enumerate(zip(maps, weights, strict=True))
    ]
    return Strip(f"{name}: {percent(weights.mean())} of the target", figures, pixelated=True)


def _masked(samples: Samples, name: str, visible: Bool[np.ndarray, "n h w"], small: bool) -> Strip:
    figures = []
    for i, (image, mask) in enumerate(zip(samples.images, visible, strict=True)):
        veil = Image.fromarray(np.where(mask, 0, 215).astype(np.uint8))
        shown = Image.fromarray(image).resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        shown.paste((110, 118, 132), mask=veil.resize(shown.size, Image.Resampling.NEAREST))
        figures.append(Figure(photo(np.asarray(shown), small), f"image {i + 1}: {name} sees {percent(mask.mean())}"))
    return Strip(f"{name} sees {percent(visible.mean())}", figures)


def _uri(image: np.ndarray, **options: object) -> str:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "WEBP", **options)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
