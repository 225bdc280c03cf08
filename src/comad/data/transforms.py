"""Random and fixed views of one image, on uint8 tensors; every random draw comes from torch's generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from comad.data.colours import change_colours

BICUBIC = InterpolationMode.BICUBIC
THIN = 4
"""Times the shorter side, beyond which the longer one is cut before an image is resized."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A random resized crop and a flip; an image with alpha is pasted on a random backdrop.

    Args:
        size: pixels on the side of the view.
        scale: smallest and largest share of the image's area.
        flip: probability of a horizontal flip.
    """

    size: int
    scale: tuple[float, float] = (0.25, 1.0)
    flip: float = 0.5

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3 or 4, h, w) → uint8 (3, size, size)."""
        top, left, height, width = _cropper(self.size, self.scale).make_params([image]).values()
        view = F.resized_crop_image(image, top, left, height, width, [self.size, self.size], BICUBIC, antialias=True)
        if torch.rand(()).item() < self.flip:
            view = view.flip(-1)
        return view if len(view) == 3 else paste(view, random_backdrop(self.size))


@dataclass(frozen=True, kw_only=True)
class ColourChange:
    """Colour jitter, and by chance grey or blur. ``strength`` scales brightness, contrast and saturation."""

    strength: float = 0.4
    hue: float = 0.1
    jitter: float = 0.8
    grey: float = 0.0
    blur: float = 0.0

    def __call__(self, view: Tensor) -> Tensor:
        """uint8 (3, H, W) → the same shape."""
        if torch.rand(()).item() < self.jitter:
            order, *factors = _jitterer(self.strength, self.hue).make_params([]).values()
            view = change_colours(view, order.tolist(), factors)
        if self.grey and torch.rand(()) < self.grey:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        if self.blur and torch.rand(()) < self.blur:
            view = F.gaussian_blur(view, [3, 3], [float(torch.empty(()).uniform_(0.1, 1.5))])
        return view


@lru_cache
def _cropper(size: int, scale: tuple[float, float]) -> v2.RandomResizedCrop:
    """torchvision's transform, made once: a module is slow to make, and a small view is quick."""
    return v2.RandomResizedCrop(size, scale)


@lru_cache
def _jitterer(strength: float, hue: float) -> v2.ColorJitter:
    return v2.ColorJitter(strength, strength, strength, hue)


def random_backdrop(size: int) -> Tensor:
    """White, one colour, a gradient or soft clouds, uint8 (3, size, size), so that the outline is not the label."""
    kind = float(torch.rand(()))
    if kind < 0.3:
        return torch.full((3, size, size), 255, dtype=torch.uint8)
    cells = (1, 1) if kind < 0.6 else ((2, 2) if kind < 0.8 else (5, 5))
    colours = torch.randint(0, 256, (3, *cells), dtype=torch.uint8)
    return F.resize(colours, [size, size], InterpolationMode.BILINEAR, antialias=False)


def paste(image: Tensor, backdrop: Tensor) -> Tensor:
    """Lay a premultiplied image (4, H, W) over a backdrop (3, H, W), both uint8."""
    behind = (255 - image[3:].to(torch.int32)) * backdrop
    return (image[:3] + (behind + 127) // 255).clamp(max=255).to(torch.uint8)


def evaluation_view(image: Tensor, size: int, crop: float) -> Tensor:
    """The fixed view for scores: resize the shorter side, centre crop, alpha on white; uint8 (3, size, size)."""
    shorter = round(size / crop)
    view = F.center_crop(F.resize(_middle(image), [shorter], BICUBIC, antialias=True), [size, size])
    return view if len(view) == 3 else paste(view, torch.full((3, size, size), 255, dtype=torch.uint8))


def _middle(image: Tensor) -> Tensor:
    """The middle of a thin image, which is all that is seen of it: the whole would be made as high as the view."""
    height, width = image.shape[1:]
    most = max(THIN * min(height, width), 32)
    top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
    return image[:, top : height - top, left : width - left]


def random_views(image: Tensor, crops: Sequence[tuple[Crop, ColourChange | None]]) -> tuple[Tensor, ...]:
    """One view for each pair of crop and colour change."""
    return tuple(colour(crop(image)) if colour else crop(image) for crop, colour in crops)
