"""Weighted nearest neighbours on frozen features: no training, the quickest honest score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from comad.evaluate.features import FeatureSplits


@dataclass(frozen=True, kw_only=True)
class NeighbourResult:
    """Test scores of the neighbours chosen on the validation images.

    Attributes:
        top1: label set → percent of the labelled test images that were named rightly.
        correct: label set → bool (n,), one per labelled test image, in order.
        pool, k: what was chosen, on the first label set; every label set is scored with it.
        validation: percent on the validation images, first label set.
    """

    top1: dict[str, float]
    correct: dict[str, Bool[Tensor, " _"]]
    pool: str
    k: int
    validation: float


@dataclass(frozen=True, kw_only=True)
class NearestNeighbours:
    """Weighted kNN classifier (Wu et al. 2018, arXiv:1805.01978, sec. 3.4; as in DINO, arXiv:2104.14294).

    Cosine similarity s, each neighbour votes for its label with weight exp(s / temperature).

    Attributes:
        neighbours: numbers of neighbours to choose from.
        temperature: of the weights.
        chunk: queries compared at once; bounds memory to chunk * train images floats.
    """

    neighbours: tuple[int, ...] = (1, 5, 10, 20, 50)
    temperature: float = 0.07
    chunk: int = 512

    def __call__(self, features: FeatureSplits, device: torch.device | str = "cpu") -> NeighbourResult:
        """Choose k and the pool by validation accuracy, then score the test images once per label set.

        Of equal choices the first pool and the smallest k win.

        Raises:
            ValueError: no label set has labelled images in all three splits.
        """
        if not features.label_sets:
            raise ValueError("kNN needs labels in train, val and test; give images in one folder per class.")
        first = features.label_sets[0]
        best, pool, k = -1.0, "", 0
        for name in features.train.pools:
            hits = self.hits(features, first, name, "val", device)
            accuracy = 100 * hits.double().mean(dim=1)
            if (top := accuracy.max().item()) > best:
                best, pool, k = top, name, self.neighbours[int(accuracy.argmax())]
        row = self.neighbours.index(k)
        correct = {name: self.hits(features, name, pool, "test", device)[row] for name in features.label_sets}
        top1 = {name: 100 * hits.double().mean().item() for name, hits in correct.items()}
        return NeighbourResult(top1=top1, correct=correct, pool=pool, k=k, validation=best)

    def hits(
        self, features: FeatureSplits, label_set: str, pool: str, part: str, device: torch.device | str = "cpu"
    ) -> Bool[Tensor, "K n"]:
        """Say of each labelled image of a part (``val`` or ``test``) whether its K predictions are right."""
        bank, bank_labels = features.train.labelled(label_set, pool)
        queries, labels = getattr(features, part).labelled(label_set, pool)
        if not len(bank) or not len(queries):
            raise ValueError(f"no {label_set} label in {part if len(bank) else 'train'}; kNN needs some in each split.")
        return self.classify(bank.to(device), bank_labels.to(device), queries.to(device)).cpu() == labels

    def classify(
        self, bank: Float[Tensor, "m width"], labels: Int[Tensor, " m"], queries: Float[Tensor, "n width"]
    ) -> Int[Tensor, "K n"]:
        """Predict the label of each query from a labelled bank, once for each number of neighbours.

        Of the most neighbours that are looked up, those of equal similarity count in the order of the bank; classes of
        equal votes win in their own order.
        """
        most = min(max(self.neighbours), len(bank))
        num_classes = int(labels.max()) + 1
        bank = F.normalize(bank, dim=1)
        predictions = []
        for chunk in F.normalize(queries, dim=1).split(self.chunk):
            similarity, index = (chunk @ bank.T).topk(most, dim=1)
            index, order = index.sort(dim=1)
            similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
            weights = (similarity / self.temperature).exp()
            votes_for = labels[index.gather(1, order)]
            empty = weights.new_zeros(len(chunk), num_classes)
            votes = [empty.scatter_add(1, votes_for[:, :k], weights[:, :k]) for k in self.neighbours]
            predictions.append(torch.stack([vote.argmax(dim=1) for vote in votes]))
        return torch.cat(predictions, dim=1)
