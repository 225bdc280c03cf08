"""A quick kNN score during training, on the validation part."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from comad.data.images import ImageSet, Splits
from comad.evaluation.features import extract_features, pixel_features
from comad.evaluation.knn import KNN
from comad.models.backbone import Backbone

MIN_BANK = 20
NEIGHBOURS = (10,)


class KnnProbe:
    """kNN top-1 on at most ``limit`` validation images with at most ``2 * limit`` training images as the bank.

    Args:
        splits: images and labels; without labels the probe reports nothing.
        image_size: pixels on the side of the view.
    """

    def __init__(self, splits: Splits, image_size: int, limit: int = 1000):
        self.splits = splits
        self.image_size = image_size
        self.bank = _labelled(splits.train, 2 * limit)
        self.queries = _labelled(splits.val, limit)
        self.knn = KNN(neighbours=NEIGHBOURS)

    def __call__(self, backbone: Backbone) -> dict[str, float]:
        """``knn``: percent of fine labels found, by class token or mean patch, the better; ``{}`` without labels."""
        top1 = {f"knn_{pool}": 100 * float(hits.float().mean()) for pool, hits in self.hits(backbone).items()}
        return {"knn": max(top1.values()), **top1} if top1 else {}

    def hits(self, backbone: Backbone | None) -> dict[str, Bool[Tensor, " n"]]:
        """Pool → whether each query's label was found; by pixels if there is no backbone, ``{}`` without labels."""
        if len(self.bank) < MIN_BANK or not len(self.queries):
            return {}

        def extract(images: ImageSet, indices: Tensor) -> dict[str, Tensor]:
            if backbone is None:
                return pixel_features(images, indices=indices)
            return extract_features(backbone, images, self.image_size, indices=indices)

        bank, queries = extract(self.splits.train, self.bank), extract(self.splits.val, self.queries)
        labels, truth = self.splits.train.labels["fine"][self.bank], self.splits.val.labels["fine"][self.queries]
        return {pool: self.knn.classify(bank[pool], labels, queries[pool])[0] == truth for pool in bank}


def _labelled(images: ImageSet, limit: int) -> Tensor:
    if "fine" not in images.labels:
        return torch.zeros(0, dtype=torch.int64)
    known = (images.labels["fine"] >= 0).nonzero().flatten()
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    return known[order[:limit]].sort().values
