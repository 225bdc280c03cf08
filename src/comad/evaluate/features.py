"""Pooled features of frozen networks: what kNN and the linear probe see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from comad.data.images import ImageSet, Splits
from comad.data.loader import evaluation_batches
from comad.models.backbone import Backbone, Tokens


class Features(NamedTuple):
    """Features of the labelled images of one split.

    Attributes:
        pools: pool name → float32 (n, width); all pools see the same images.
        labels: label set name → int64 (n,), -1 where an image lacks this label.
        groups: int64 (n,), the concept of each image.
    """

    pools: dict[str, Float[Tensor, "n _"]]
    labels: dict[str, Int[Tensor, " n"]]
    groups: Int[Tensor, " n"]

    def labelled(self, label_set: str, pool: str) -> tuple[Float[Tensor, "m width"], Int[Tensor, " m"]]:
        """Features and labels of the m images that have a label in ``label_set``."""
        known = self.labels[label_set] >= 0
        return self.pools[pool][known], self.labels[label_set][known]


class FeatureSplits(NamedTuple):
    """Features of the three parts of a set: fit on ``train``, choose on ``val``, report ``test``."""

    train: Features
    val: Features
    test: Features

    @property
    def label_sets(self) -> tuple[str, ...]:
        """Label sets that all three parts have, the one that choices are made on first."""
        return tuple(name for name in self.train.labels if name in self.val.labels and name in self.test.labels)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[torch.device]:
    """Put a module into eval mode, give its device, and restore the mode of each of its parts afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield next(module.parameters()).device
    finally:
        for part, training in modes:
            part.training = training


def extract_features(
    backbone: Backbone,
    images: ImageSet,
    image_size: int,
    dtype: torch.dtype | None = None,
    batch_size: int = 256,
    indices: Int[Tensor, " n"] | None = None,
) -> dict[str, Float[Tensor, "n width"]]:
    """Encode whole images and pool their tokens, on the backbone's device.

    Args:
        backbone: the network; its train or eval mode is restored afterwards.
        images: a split.
        image_size: pixels on the side of the square view.
        dtype: autocast to this type, for example ``torch.bfloat16``; None computes as the weights are.
        batch_size: images per forward.
        indices: only these images, in this order; None takes all.

    Returns:
        Pool name → float32 (n, width) on the CPU: ``cls``, if the backbone's class token carries meaning, and
        ``patch``, the mean of the patch tokens.
    """
    num_images = len(images) if indices is None else len(indices)
    names = tuple(name for name in ("cls", "patch") if name == "patch" or name in backbone.token_types)
    features = {name: torch.empty(num_images, backbone.width) for name in names}
    start = 0
    with evaluating(backbone) as device, torch.inference_mode():
        for batch in evaluation_batches(images, image_size, batch_size, indices):
            with torch.autocast(device.type, dtype, enabled=dtype not in (None, torch.float32)):
                pooled = pool_tokens(backbone(batch.to(device)))
            for name, rows in features.items():
                rows[start : start + len(batch)] = pooled[name]
            start += len(batch)
    assert start == num_images, f"{images.name} gave {start} images, not {num_images}"
    return features


def pool_tokens(tokens: Tokens) -> dict[str, Float[Tensor, "B width"]]:
    """Reduce the tokens of each image to one float32 vector per pool."""
    pooled = {"patch": tokens.patches.float().mean(dim=1)}
    return pooled if tokens.cls is None else {"cls": tokens.cls.float(), **pooled}


def pixel_features(
    images: ImageSet, size: int = 16, indices: Int[Tensor, " n"] | None = None
) -> dict[str, Float[Tensor, "n width"]]:
    """Small copies of the images as features: what a network must beat to have learnt anything.

    Returns:
        ``pixels`` → float32 (n, 3 * size * size), each image's mean value subtracted.
    """
    flat = (batch.flatten(1) for batch in evaluation_batches(images, size, indices=indices))
    batches = [pixels - pixels.mean(dim=1, keepdim=True) for pixels in flat]
    return {"pixels": torch.cat([torch.empty(0, 3 * size * size), *batches])}


def split_features(
    backbone: Backbone | None, splits: Splits, image_size: int, dtype: torch.dtype | None = None
) -> FeatureSplits:
    """Extract the features of every labelled image of all three splits, each image once.

    Args:
        backbone: the network, or None for `pixel_features`.
        splits: the images; those without any label are skipped.
        image_size: pixels on the side of the square view (of networks; pixels keep their own size).
        dtype: see `extract_features`.
    """

    def extract(images: ImageSet) -> Features:
        indices = labelled_indices(images)
        if backbone is None:
            pools = pixel_features(images, indices=indices)
        else:
            pools = extract_features(backbone, images, image_size, dtype, indices=indices)
        return Features(pools, {name: y[indices] for name, y in images.labels.items()}, images.groups[indices])

    return FeatureSplits(extract(splits.train), extract(splits.val), extract(splits.test))


def labelled_indices(images: ImageSet) -> Int[Tensor, " n"]:
    """Name the images that have a label in at least one label set, in order."""
    known = torch.zeros(len(images), dtype=torch.bool)
    for labels in images.labels.values():
        known |= labels >= 0
    return known.nonzero().flatten()
