"""Pooled features of frozen networks: what kNN and the linear probe see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from comad.data.images import ImageSet, Splits
from comad.data.loader import evaluation_views
from comad.models.backbone import Backbone, Tokens
from comad.runtime.processes import collect, count, own_rows

PIXELS = 16
"""Pixels on the side of the small copies that stand for no network at all."""


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

    def known(self, label_set: str) -> Bool[Tensor, " n"]:
        """Which images have a label in ``label_set``."""
        return self.labels[label_set] >= 0

    def labelled(self, label_set: str, pool: str) -> tuple[Float[Tensor, "m width"], Int[Tensor, " m"]]:
        """Features and labels of the m images that have a label in ``label_set``; no copy if all have."""
        known, rows, labels = self.known(label_set), self.pools[pool], self.labels[label_set]
        return (rows, labels) if known.all() else (rows[known], labels[known])


class FeatureSplits(NamedTuple):
    """Features of the three parts of a set: fit on ``train``, choose on ``val``, report ``test``."""

    train: Features
    val: Features
    test: Features

    @property
    def label_sets(self) -> tuple[str, ...]:
        """Label sets that all three parts have, the one that choices are made on first."""
        return tuple(name for name in self.train.labels if name in self.val.labels and name in self.test.labels)


class View(NamedTuple):
    """A network, and the pixels on the side of its square images. None is raw pixels: see `pixel_features`."""

    backbone: Backbone | None
    image_size: int

    def allocate(self, count: int) -> dict[str, Float[Tensor, "n width"]]:
        """Room for the features of so many images."""
        if self.backbone is None:
            return {"pixels": torch.empty(count, 3 * self.image_size**2)}
        names = ("cls", "patch") if "cls" in self.backbone.token_types else ("patch",)
        return {name: torch.empty(count, self.backbone.width) for name in names}


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
    backbone: Backbone | None,
    images: ImageSet,
    image_size: int,
    dtype: torch.dtype | None = None,
    batch_size: int = 256,
    indices: Int[Tensor, " n"] | None = None,
) -> dict[str, Float[Tensor, "n width"]]:
    """Features of one network; see `extract_many`."""
    return extract_many([View(backbone, image_size)], images, dtype, batch_size, indices)[0]


def extract_many(
    views: Sequence[View],
    images: ImageSet,
    dtype: torch.dtype | None = None,
    batch_size: int = 256,
    indices: Int[Tensor, " n"] | None = None,
) -> list[dict[str, Float[Tensor, "n width"]]]:
    """Encode whole images and pool their tokens, by several networks that each compute on their own device.

    Every image is decoded once for all of them (those of more than 224 pixels: see `evaluation_views`), and a network's
    features do not depend on the others.

    Args:
        views: networks and their image sizes; their train or eval mode is restored afterwards.
        images: a split.
        dtype: autocast to this type, for example ``torch.bfloat16``; None computes as the weights are.
        batch_size: images per forward.
        indices: only these images, in this order; None takes all.

    Returns:
        For each network, pool name → float32 (n, width) on the CPU: ``cls``, if its class token carries meaning, and
        ``patch``, the mean of the patch tokens; without a network ``pixels``.
    """
    num_images = len(images) if indices is None else len(indices)
    features = [view.allocate(num_images) for view in views]
    sizes = tuple(dict.fromkeys(view.image_size for view in views))
    start = 0
    with ExitStack() as stack, torch.inference_mode():
        places = [None if v.backbone is None else stack.enter_context(evaluating(v.backbone)) for v in views]
        for batches in evaluation_views(images, sizes, batch_size, indices):
            stop = start + len(batches[0])
            for view, place, rows in zip(views, places, features, strict=True):
                batch = batches[sizes.index(view.image_size)]
                for name, pooled in _pooled(view.backbone, batch, place, dtype).items():
                    if name in rows:
                        rows[name][start:stop] = pooled
            start = stop
    assert start == num_images, f"{images.name} gave {start} images, not {num_images}"
    return features


def _pooled(
    backbone: Backbone | None, batch: Tensor, place: torch.device | None, dtype: torch.dtype | None
) -> dict[str, Float[Tensor, "B width"]]:
    if backbone is None or place is None:
        return {"pixels": pixel_rows(batch)}
    with torch.autocast(place.type, dtype, enabled=dtype not in (None, torch.float32)):
        return pool_tokens(backbone(batch.to(place)))


def pixel_rows(small: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B _"]:
    """Small copies of the images as features, each image's mean value subtracted."""
    flat = small.flatten(1)
    return flat - flat.mean(dim=1, keepdim=True)


def pool_tokens(tokens: Tokens) -> dict[str, Float[Tensor, "B width"]]:
    """Reduce the tokens of each image to one float32 vector per pool."""
    pooled = {"patch": tokens.patches.float().mean(dim=1)}
    return pooled if tokens.cls is None else {"cls": tokens.cls.float(), **pooled}


def pixel_features(
    images: ImageSet, size: int = PIXELS, indices: Int[Tensor, " n"] | None = None
) -> dict[str, Float[Tensor, "n width"]]:
    """Small copies of the images as features: what a network must beat to have learnt anything.

    Returns:
        ``pixels`` → float32 (n, 3 * size * size), each image's mean value subtracted.
    """
    return extract_features(None, images, size, indices=indices)


def split_features(views: Sequence[View], splits: Splits, dtype: torch.dtype | None = None) -> list[FeatureSplits]:
    """Extract the features of every labelled image of all three splits for several networks, each image decoded once.

    They are in memory together: 4 bytes for each image, pool and channel of all networks. Processes that share (see
    `comad.runtime.processes.together`) each extract a part of the images; the features of the first network are then at
    the first process, those of the second at the second, and so on in turn.

    Args:
        views: networks and their image sizes.
        splits: the images; those without any label are skipped.
        dtype: see `extract_many`.
    """

    def extract(images: ImageSet) -> list[Features]:
        indices = labelled_indices(images)
        labels = {name: y[indices] for name, y in images.labels.items()}
        found = extract_many(views, images, dtype, indices=own_rows(indices))
        for number, pools in enumerate(found):
            for name in pools:
                pools[name] = collect(pools[name], len(indices), number % count())
        return [Features(pools, labels, images.groups[indices]) for pools in found]

    parts = [extract(images) for images in (splits.train, splits.val, splits.test)]
    return [FeatureSplits(*found) for found in zip(*parts, strict=True)]


def labelled_indices(images: ImageSet) -> Int[Tensor, " n"]:
    """Name the images that have a label in at least one label set, in order."""
    known = torch.zeros(len(images), dtype=torch.bool)
    for labels in images.labels.values():
        known |= labels >= 0
    return known.nonzero().flatten()
