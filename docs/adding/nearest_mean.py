"""An evaluation of your own: the class whose mean feature is nearest, on every scoreboard.

comad evaluate BACKBONE --data FOLDER --plugin docs/adding/nearest_mean.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from comad.evaluation.evaluation import Evaluation, Result
from comad.evaluation.features import FeatureSplits


@dataclass(frozen=True, kw_only=True)
class NearestMean(Evaluation, name="nearest-mean"):
    """Top-1 accuracy of the class mean with the largest cosine; the pool is chosen on the validation part."""

    title: ClassVar[str] = "nearest mean"

    def __call__(self, features: FeatureSplits, device: torch.device | str = "cpu") -> Result:
        """Choose the pool of features for the first label set, then score the test images of all."""
        first, *_ = names = self.label_sets(features)
        shares = {pool: self._hits(features, first, pool, "val").float().mean() for pool in features.train.pools}
        pool = max(shares, key=lambda name: shares[name])
        correct = {name: self._hits(features, name, pool, "test") for name in names}
        return Result(self.results(features, correct), {"pool_nearest_mean": pool})

    def _hits(self, features: FeatureSplits, label_set: str, pool: str, part: str) -> torch.Tensor:
        rows, labels = features.train.labelled(label_set, pool)
        means = torch.stack([rows[labels == label].mean(dim=0) for label in labels.unique()])
        queries, wanted = getattr(features, part).labelled(label_set, pool)
        cosines = torch.cosine_similarity(queries.unsqueeze(1), means.unsqueeze(0), dim=2)
        return labels.unique()[cosines.argmax(dim=1)] == wanted
