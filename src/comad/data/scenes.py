"""`comad data scenes`: images with many objects, composed of the bundled cut-outs, in the formats of ADE20K and COCO.

Training scenes show training concepts, validation scenes test concepts or, while choices are made, validation concepts.
A scene is a function of (seed, part, number).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from comad.data.backdrops import random_backdrop
from comad.data.images import ImageSet

MIN_VISIBLE, MIN_PIXELS = 0.4, 40
"""An object that would be seen to a smaller share, or by fewer pixels, is not placed, nor one that hides another so."""
TRIES = 8


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What scenes look like.

    Args:
        sides: smallest and largest height and width, in pixels.
        object_sides: smallest and largest longer side of an object, in pixels; small ones are as likely as large ones.
        max_objects: most labelled objects in a scene.
        max_clutter: most unlabelled things in a scene.
        empty: share of scenes without a labelled object.
        crowds: share of scenes with a heap of small things of one label.
        turn: objects are turned by at most so many degrees, either way.
    """

    sides: tuple[int, int] = (112, 176)
    object_sides: tuple[int, int] = (20, 104)
    max_objects: int = 8
    max_clutter: int = 3
    empty: float = 0.05
    crowds: float = 0.06
    turn: float = 20.0


class Thing(NamedTuple):
    """One labelled region of a scene: an object, or a heap if ``crowd``."""

    label: int
    crowd: bool


class Scene(NamedTuple):
    """An image and what is in it.

    Attributes:
        pixels: uint8 (h, w, 3).
        owner: int16 (h, w), which thing is seen at a pixel; -1: backdrop or clutter.
        things: in the order in which they were placed; later ones hide earlier ones.
    """

    pixels: np.ndarray
    owner: np.ndarray
    things: list[Thing]


class Composer:
    """Composes scenes of the cut-outs of one part of a set.

    Args:
        images: cut-outs with alpha.
        labels: int64 (n,), -1 for clutter.
        config: what scenes look like.
    """

    def __init__(self, images: ImageSet, labels: Tensor, config: SceneConfig):
        self.images = images
        self.config = config
        known = labels.numpy()
        self.clutter = np.flatnonzero(known < 0)
        self.by_label = {int(label): np.flatnonzero(known == label) for label in np.unique(known[known >= 0])}

    def __call__(self, generator: np.random.Generator) -> Scene:
        """Draw a scene: a backdrop, by chance a heap, then objects and clutter in random order."""
        config = self.config
        height, width = (int(side) for side in generator.integers(config.sides[0], config.sides[1] + 1, 2))
        owner = np.full((height, width), -1, dtype=np.int16)
        canvas = _Canvas(random_backdrop(generator, height, width).astype(np.float32), owner, [], [])
        objects = 0
        if generator.random() >= config.empty:
            objects = int(generator.integers(1, config.max_objects + 1))
            if generator.random() < config.crowds:
                self._heap(generator, canvas)
        kinds = [True] * objects + [False] * int(generator.integers(0, config.max_clutter + 1))
        for labelled in generator.permutation(kinds) if kinds else ():
            label = int(generator.choice(list(self.by_label))) if labelled else -1
            self._place(generator, canvas, label)
        return Scene(canvas.pixels.clip(0, 255).astype(np.uint8), canvas.owner, canvas.things)

    def _place(self, generator: np.random.Generator, canvas: _Canvas, label: int) -> None:
        """Put one object or piece of clutter anywhere, partly outside the image too, if it hides nothing too much."""
        low, high = np.log(self.config.object_sides)
        for _ in range(TRIES):
            sprite = self._sprite(generator, label, float(np.exp(generator.uniform(low, high))))
            centre = generator.uniform(0, canvas.owner.shape)
            if canvas.add(sprite, centre, Thing(label, False)):
                return

    def _heap(self, generator: np.random.Generator, canvas: _Canvas) -> None:
        """Small things of one label close together, as one region."""
        label = int(generator.choice(list(self.by_label)))
        middle, side = generator.uniform(0.25, 0.75, 2) * canvas.owner.shape, generator.uniform(12, 22)
        canvas.start_heap(Thing(label, True))
        for _ in range(int(generator.integers(6, 12))):
            canvas.add_to_heap(self._sprite(generator, label, side), middle + generator.normal(0, side, 2))
        canvas.end_heap()

    def _sprite(self, generator: np.random.Generator, label: int, side: float) -> np.ndarray:
        """A cut-out of a label, by chance mirrored, its longer side ``side`` pixels, then turned: uint8 (h, w, 4)."""
        chosen = self.by_label[label] if label >= 0 else self.clutter
        stamp = self.images.load(int(generator.choice(chosen))).permute(1, 2, 0).numpy()
        image = Image.fromarray(stamp, "RGBa").crop(Image.fromarray(stamp[..., 3]).getbbox())
        if generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        share = side / max(image.size)
        size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
        image = image.resize(size, Image.Resampling.BICUBIC)
        angle = generator.uniform(-self.config.turn, self.config.turn)
        bands = [band.rotate(angle, Image.Resampling.BICUBIC, expand=True) for band in image.split()]
        return np.asarray(Image.merge("RGBa", bands))


class _Canvas(NamedTuple):
    """A scene in the making; ``areas`` are the pixels that each thing would have if nothing hid it."""

    pixels: np.ndarray
    owner: np.ndarray
    things: list[Thing]
    areas: list[int]

    def add(self, sprite: np.ndarray, centre: np.ndarray, thing: Thing) -> bool:
        """Lay a sprite on top, unless too little of it or of a thing below would be seen."""
        window, part = _overlap(sprite, centre, self.owner.shape)
        solid, below = part[..., 3] > 127, self.owner[window]
        hidden = np.bincount(below[solid & (below >= 0)], minlength=len(self.things))
        seen, area = int(solid.sum()), int((sprite[..., 3] > 127).sum())
        left = np.bincount(self.owner[self.owner >= 0], minlength=len(self.things)) - hidden
        smallest = np.maximum(MIN_VISIBLE * np.array(self.areas), MIN_PIXELS)
        if seen < max(MIN_VISIBLE * area, MIN_PIXELS) or (left < smallest).any():
            return False
        self._lay(window, part)
        below[solid] = len(self.things) if thing.label >= 0 else -1
        if thing.label >= 0:
            self.things.append(thing)
            self.areas.append(area)
        return True

    def start_heap(self, thing: Thing) -> None:
        self.things.append(thing)
        self.areas.append(0)

    def add_to_heap(self, sprite: np.ndarray, centre: np.ndarray) -> None:
        window, part = _overlap(sprite, centre, self.owner.shape)
        self._lay(window, part)
        self.owner[window][part[..., 3] > 127] = len(self.things) - 1

    def end_heap(self) -> None:
        """A heap that missed the image is no thing."""
        self.areas[-1] = int((self.owner == len(self.things) - 1).sum())
        if self.areas[-1] < MIN_PIXELS:
            self.owner[self.owner == len(self.things) - 1] = -1
            del self.things[-1], self.areas[-1]

    def _lay(self, window: tuple[slice, slice], part: np.ndarray) -> None:
        share = part[..., 3:].astype(np.float32) / 255
        self.pixels[window] = part[..., :3] + (1 - share) * self.pixels[window]


def _overlap(sprite: np.ndarray, centre: np.ndarray, shape: tuple[int, ...]) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window of the image that a sprite around ``centre`` covers, and the part of the sprite in it."""
    height, width = sprite.shape[:2]
    top, left = round(centre[0] - height / 2), round(centre[1] - width / 2)
    rows, columns = (
        slice(*np.clip(ends, 0, limit))
        for ends, limit in zip(((top, top + height), (left, left + width)), shape, strict=True)
    )
    return (rows, columns), sprite[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
