"""Random views of images with label maps or masks, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from comad.data.ade20k import IGNORED
from comad.data.identity import Listed
from comad.data.images import UnreadableImageError
from comad.data.loader import MAX_UNREADABLE_RUN, randomness_of

GREY = [124.0, 116.0, 104.0]
"""What fills a view beyond its image: the mean of ImageNet."""
NEAREST = InterpolationMode.NEAREST_EXACT
CROP_TRIES = 10
THIN = 8
"""Times the shorter side, beyond which a piece of the longer one is taken before an image is resized."""


@runtime_checkable
class DenseImages(Listed, Protocol):
    """Images with something to learn for each pixel or object."""

    def path(self, index: int) -> str:
        """Name one image."""
        ...

    def load(self, index: int) -> tuple[Tensor, Any]:
        """An image, uint8 (3, h, w), and its target. Raises UnreadableImageError."""
        ...


class DenseBatch(NamedTuple):
    """Views and what is to be learnt from them.

    Attributes:
        images: uint8 (B, 3, S, S).
        targets: label maps, uint8 (B, S, S), or for each image boxes, labels and masks.
        image: int64 (B,), which image was asked for.
        readable: bool (B,), False where the file was unreadable and the next readable one stands in.
    """

    images: Tensor
    targets: Any
    image: Tensor
    readable: Tensor


@dataclass(frozen=True, kw_only=True)
class SegmentationView:
    """The view of the usual recipe on ADE20K: scale, crop, flip, change of colours.

    Args:
        crop: pixels on the side of the view.
        short_side: pixels on the shorter side of the image before ``scale``.
        scale: smallest and largest factor.
        largest_share: a crop whose commonest class has more of the labelled pixels is drawn again; after ten tries the
            one with the most labelled pixels is taken, for one without any teaches nothing.
    """

    crop: int
    short_side: int
    scale: tuple[float, float] = (0.5, 2.0)
    largest_share: float = 0.75

    def __call__(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (3, h, w) and (h, w) → (3, crop, crop) and (crop, crop)."""
        image, classes = _piece(image, classes)
        factor = self.short_side * float(torch.empty(()).uniform_(*self.scale)) / min(image.shape[1:])
        size = [max(1, round(side * factor)) for side in image.shape[1:]]
        image = F.resize(image, size, antialias=True)
        classes = F.resize(classes[None], size, NEAREST)
        missing = [max(0, self.crop - size[1]), max(0, self.crop - size[0])]
        image, classes = F.pad(image, [0, 0, *missing], GREY), F.pad(classes, [0, 0, *missing], [float(IGNORED)])
        top, left = self._corner(classes[0])
        image = F.crop(image, top, left, self.crop, self.crop)
        classes = F.crop(classes, top, left, self.crop, self.crop)
        if torch.rand(()) < 0.5:
            image, classes = F.horizontal_flip(image), F.horizontal_flip(classes)
        return v2.RandomPhotometricDistort(p=0.5)(image), classes[0]

    def _corner(self, classes: Tensor) -> tuple[int, int]:
        """Where to crop: a place with more than one class if tries find one, else the one with most labelled pixels."""
        best, most = (0, 0), -1
        for _ in range(CROP_TRIES):
            top, left = (int(torch.randint(0, side - self.crop + 1, ())) for side in classes.shape)
            counts = classes[top : top + self.crop, left : left + self.crop].flatten().bincount(minlength=256)[:IGNORED]
            labelled = int(counts.sum())
            if counts.max() < self.largest_share * labelled:
                return top, left
            if labelled > most:
                best, most = (top, left), labelled
        return best


def _piece(image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """A random piece of a thin image, for the whole would be made as high as a view; others are left as they are."""
    longer, most = max(classes.shape), THIN * min(classes.shape)
    if longer <= most:
        return image, classes
    start = int(torch.randint(0, longer - most + 1, ()))
    axis = -1 if classes.shape[1] == longer else -2
    return image.narrow(axis, start, most), classes.narrow(axis, start, most)


@dataclass(frozen=True, kw_only=True)
class DetectionView:
    """Large-scale jitter (arXiv:2012.07177) and flip; boxes are those of the masks after it.

    Args:
        size: pixels on the side of the view.
        scale: smallest and largest longer side of the image, as a share of the view.
    """

    size: int
    scale: tuple[float, float] = (0.1, 2.0)

    def __call__(self, image: Tensor, target: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (3, h, w), masks (n, h, w) and labels (n,) → uint8 (3, size, size), ``boxes`` (m, 4), ... ."""
        masks, labels = target
        factor = self.size * float(torch.empty(()).uniform_(*self.scale)) / max(image.shape[1:])
        size = [max(1, round(side * factor)) for side in image.shape[1:]]
        top, left = (int(torch.randint(0, max(0, side - self.size) + 1, ())) for side in size)
        flip = bool(torch.rand(()) < 0.5)
        image = self._fit(F.resize(image, size, antialias=True), (top, left), GREY)
        masks = self._fit(F.resize(masks, size, NEAREST) if len(masks) else masks, (top, left), [0.0])
        if flip:
            image, masks = F.horizontal_flip(image), F.horizontal_flip(masks)
        return image, targets_of(masks, labels)

    def _fit(self, image: Tensor, corner: tuple[int, int], fill: list[float]) -> Tensor:
        """Crop what is too large, fill up what is too small."""
        if not len(image):
            return image.new_zeros(0, self.size, self.size)
        height, width = (min(side, self.size) for side in image.shape[1:])
        return F.pad(F.crop(image, *corner, height, width), [0, 0, self.size - width, self.size - height], fill)


def targets_of(masks: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Boxes (m, 4) in pixels as left, top, right, bottom, labels (m,) and masks (m, h, w) of the m masks not empty."""
    seen = masks.flatten(1).any(dim=1).bool()
    masks = masks[seen]
    boxes = masks_to_boxes(masks) if len(masks) else torch.zeros(0, 4)
    return {"boxes": boxes + torch.tensor([0.0, 0.0, 1.0, 1.0]), "labels": labels[seen], "masks": masks}


class DenseDataset(Dataset[DenseBatch]):
    """Images as random views. A sample's randomness is a function of (seed, view number, image)."""

    def __init__(self, images: DenseImages, view: Callable[[Tensor, Any], tuple[Tensor, Any]], seed: int):
        self.images = images
        self.view = view
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> DenseBatch:
        view, index = key
        (image, target), readable = self._load(index)
        with randomness_of(self.seed, view, index):
            image, target = self.view(image, target)
        return DenseBatch(image, target, torch.tensor(index), torch.tensor(readable))

    def _load(self, index: int) -> tuple[tuple[Tensor, Any], bool]:
        problem = ""
        for step in range(min(MAX_UNREADABLE_RUN, len(self.images))):
            try:
                return self.images.load((index + step) % len(self.images)), step == 0
            except UnreadableImageError as error:
                problem = problem or str(error)
        raise ValueError(f"{MAX_UNREADABLE_RUN} images in a row cannot be used; the first: {problem}")


def collate(samples: list[DenseBatch]) -> DenseBatch:
    """Put samples together; targets that differ in size stay a list."""
    images, targets, image, readable = zip(*samples, strict=True)
    together = torch.stack(targets) if isinstance(targets[0], Tensor) else list(targets)
    return DenseBatch(torch.stack(images), together, torch.stack(image), torch.stack(readable))


class _InOrder(Dataset[Any]):
    def __init__(self, load: Callable[[int], Any]):
        self.load = load

    def __getitem__(self, index: int) -> Any:
        return self.load(index)


def in_order(load: Callable[[int], Any], count: int, workers: int = 0) -> Iterator[Any]:
    """What ``load`` gives for 0 to ``count`` - 1, read ahead by worker processes."""
    indices = range(count)
    yield from DataLoader(
        _InOrder(load), sampler=indices, batch_size=None, num_workers=workers, generator=torch.Generator()
    )
