"""Weighted nearest neighbours on frozen features: no training, the quickest honest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from comad.evaluation.evaluation import Evaluation, Result
from comad.evaluation.features import FeatureSplits


@dataclass(frozen=True, kw_only=True)
class KNN(Evaluation, name="knn"):
    """Weighted kNN classifier (Wu et al. 2018, arXiv:1805.01978, sec. 3.4; as in DINO, arXiv:2104.14294).

    Cosine similarity s, each neighbour votes for its label with weight exp(s / temperature).

    Args:
        neighbours: numbers of neighbours to choose from.
        temperature: of the weights.
        chosen_on: of the validation images at most so many, evenly spaced, choose the pool and k.
        chunk: queries compared at once.
        block: train images compared at once; at most chunk * block similarities are in memory.
    """

    title: ClassVar[str] = "kNN"

    neighbours: tuple[int, ...] = (1, 5, 10, 20, 50)
    temperature: float = 0.07
    chosen_on: int = 5000
    chunk: int = 512
    block: int = 16384

    def __call__(self, features: FeatureSplits, device: torch.device | str = "cpu") -> Result:
        """Choose k and the pool by validation accuracy on the first label set, then score the test images of all.

        Of equal choices the first pool and the smallest k win.

        Raises:
            ValueError: no label set has labelled images in all three splits.
        """
        first, *_ = names = self.label_sets(features)
        best, pool, k = -1.0, "", 0
        for candidate in features.train.pools:
            accuracy = 100 * self.hits(features, first, candidate, "val", device).double().mean(dim=1)
            if (top := accuracy.max().item()) > best:
                best, pool, k = top, candidate, self.neighbours[int(accuracy.argmax())]
        row = self.neighbours.index(k)
        correct = {name: self.hits(features, name, pool, "test", device)[row] for name in names}
        return Result(self.results(features, correct), {"pool_knn": pool, "k": k, "validation_knn": best})

    def hits(
        self, features: FeatureSplits, label_set: str, pool: str, part: str, device: torch.device | str = "cpu"
    ) -> Bool[Tensor, "K n"]:
        """Say of the images of ``test``, and of some of ``val``, whether their K predictions are right."""
        queries, labels = getattr(features, part).labelled(label_set, pool)
        if part == "val":
            every = -(-len(queries) // self.chosen_on)
            queries, labels = queries[::every], labels[::every]
        return self.classify(*features.train.labelled(label_set, pool), queries, device) == labels

    def classify(
        self,
        bank: Float[Tensor, "m width"],
        labels: Int[Tensor, " m"],
        queries: Float[Tensor, "n width"],
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "K n"]:
        """Predict the label of each query from a labelled bank, once for each number of neighbours, on the CPU.

        Of the most neighbours that are looked up, those of equal similarity count in the order of the bank; classes of
        equal votes win in their own order.
        """
        labels = labels.to(device)
        num_classes = int(labels.max()) + 1
        predictions = []
        for similarity, index in self._nearest(bank, queries, device):
            index, order = index.sort(dim=1)
            similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
            weights = (similarity / self.temperature).exp()
            votes_for = labels[index.gather(1, order)]
            empty = weights.new_zeros(len(index), num_classes)
            votes = [empty.scatter_add(1, votes_for[:, :k], weights[:, :k]) for k in self.neighbours]
            predictions.append(torch.stack([vote.argmax(dim=1) for vote in votes]))
        return torch.cat(predictions, dim=1).cpu()

    def _nearest(self, bank: Tensor, queries: Tensor, device: torch.device | str) -> list[tuple[Tensor, Tensor]]:
        """Of each chunk of queries the most similar rows of the bank: similarity and position, (chunk, most) each."""
        most = min(max(self.neighbours), len(bank))
        chunks = F.normalize(queries.to(device), dim=1).split(self.chunk)
        found = [(chunk.new_empty(len(chunk), 0), chunk.new_empty(len(chunk), 0).long()) for chunk in chunks]
        for start in range(0, len(bank), self.block):
            block = F.normalize(bank[start : start + self.block].to(device), dim=1)
            for number, (chunk, (similarity, index)) in enumerate(zip(chunks, found, strict=True)):
                near, place = (chunk @ block.T).topk(min(most, len(block)), dim=1)
                similarity, index = torch.cat([similarity, near], dim=1), torch.cat([index, place + start], dim=1)
                similarity, order = similarity.topk(min(most, similarity.shape[1]), dim=1)
                found[number] = (similarity, index.gather(1, order))
        return found
