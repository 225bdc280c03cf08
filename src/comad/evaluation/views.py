"""Which images a network is looked at with, and how large: one rule for all commands that look at networks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from comad.data.bundled import BUNDLED
from comad.data.images import ImageSet, Splits, UnreadableImageError
from comad.data.loader import evaluation_batches
from comad.evaluation.features import evaluating
from comad.models.backbone import Backbone
from comad.models.teachers import Teacher, load_on_grid, load_teacher
from comad.models.timm_backbone import TimmBackbone

OWN = 224, 16
STAMPS = 48, 8
"""Pixels on the side of an image and of a patch that students have on own folders and on bundled sets by default."""
MIN_IMAGES, MAX_IMAGES = 8, 1000
BATCH, SMALL_BATCH = 64, 8


def load_one(spec: str, data: str, image_size: int | None = None) -> Teacher:
    """Load a network for images of ``image_size`` pixels.

    None is 224 pixels on an own folder. On a bundled set it is the grid of the demo, 6 × 6 patches, as in training:
    48 pixels for the bundled teachers, 96 for a Vision Transformer of 16-pixel patches.
    """
    if image_size is None and data in BUNDLED:
        return load_many((spec,), data)[0]
    return load_teacher(spec, OWN[0] if image_size is None else image_size)


def load_many(specs: tuple[str, ...], data: str, image_size: int | None = None) -> list[Teacher]:
    """Load networks on the grid that a student would have whose images are of ``image_size`` pixels.

    Its patches have 16 pixels, on bundled sets 8. None is 224 pixels, on bundled sets 48.
    """
    default_size, patch_size = STAMPS if data in BUNDLED else OWN
    image_size = default_size if image_size is None else image_size
    if image_size <= 0 or image_size % patch_size:
        fit = max(1, round(image_size / patch_size)) * patch_size
        raise ValueError(f"--image-size {image_size} is no multiple of {patch_size}; use {fit}.")
    return load_on_grid(specs, image_size // patch_size, patch_size)


def view_size(backbone: Backbone) -> int:
    """Pixels on the side of the images that a backbone was loaded for."""
    return backbone.image_size


def batch_size(backbone: Backbone) -> int:
    """Images at a time: on a CPU the maps of many large ones are far from its cache, and take twice as long."""
    return BATCH if isinstance(backbone, TimmBackbone) or device().type != "cpu" else SMALL_BATCH


def device() -> torch.device:
    """Where to compute: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Readable(ImageSet):
    """The same images, but a file that cannot be read is an error, not a white picture."""

    def __init__(self, images: ImageSet):
        self.images = images
        self.name, self.labels, self.groups = images.name, images.labels, images.groups
        self.eval_crop = images.eval_crop

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        """See `ImageSet.path`."""
        return self.images.path(index)

    def load(self, index: int, min_side: int = 0) -> Tensor:
        """See `ImageSet.load`.

        Raises:
            ValueError: the file cannot be read.
        """
        try:
            return self.images.load(index, min_side)
        except UnreadableImageError as error:
            raise ValueError(f"unreadable image {error}; remove or replace the file.") from error


def readable(splits: Splits) -> Splits:
    """Splits whose unreadable images are errors."""
    return splits._replace(train=Readable(splits.train), val=Readable(splits.val), test=Readable(splits.test))


def sample(splits: Splits, count: int) -> tuple[ImageSet, Int[Tensor, " n"]]:
    """Draw at most ``count`` images in random order, always the same, from val if it has as many, else from train.

    Never from test.

    Raises:
        ValueError: ``count`` is out of range, or there are too few images.
    """
    if not MIN_IMAGES <= count <= MAX_IMAGES:
        raise ValueError(f"--images {count} is out of range; use {MIN_IMAGES} to {MAX_IMAGES}.")
    images = splits.val if len(splits.val) >= min(count, len(splits.train)) else splits.train
    if len(images) < MIN_IMAGES:
        raise ValueError(f"{images.name} has {len(images)} images, {MIN_IMAGES} are needed; add images to --data.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images, order[:count]


def token_batches(backbone: Backbone, images: ImageSet, indices: Int[Tensor, " n"]) -> Iterator[Float[Tensor, "b N E"]]:
    """Encode whole images at the size the backbone was loaded for: their patch tokens, float32 on the CPU."""
    with evaluating(backbone) as place, torch.inference_mode():
        for batch in evaluation_batches(images, view_size(backbone), batch_size(backbone), indices):
            yield backbone(batch.to(place)).patches.float().cpu()
