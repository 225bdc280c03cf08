import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comad.evaluation.features import Features, FeatureSplits
from comad.evaluation.knn import KNN


def draw(num_images, seed, noise=1.0, num_classes=4):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    good = centres[labels] + noise * torch.randn(num_images, 8, generator=generator)
    bad = torch.randn(num_images, 8, generator=generator)
    return Features({"bad": bad, "good": good}, {"fine": labels, "coarse": labels // 2}, torch.arange(num_images))


@pytest.fixture
def features():
    return FeatureSplits(draw(60, 0), draw(40, 1), draw(30, 2))


def naive(bank, labels, query, k, temperature):
    similarity = [float(torch.cosine_similarity(query, row, dim=0)) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
    votes = {}
    for i in nearest:
        votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + math.exp(similarity[i] / temperature)
    return max(sorted(votes), key=lambda label: votes[label])


@pytest.mark.parametrize("chunk", [7, 512])
def test_same_as_a_naive_loop(features, chunk):
    knn = KNN(chunk=chunk)
    bank, labels = features.train.labelled("fine", "good")
    queries, _ = features.test.labelled("fine", "good")
    found = knn.classify(bank, labels, queries)
    for row, k in zip(found.tolist(), knn.neighbours, strict=True):
        assert row == [naive(bank, labels, query, k, 0.07) for query in queries]


def test_pool_and_k_are_chosen_on_the_validation_images(features):
    knn = KNN()
    scores, choices = knn(features)
    assert choices["pool_knn"] == "good" and choices["validation_knn"] > 60
    accuracy = [100 * knn.hits(features, "fine", "good", "val")[row].double().mean() for row in range(5)]
    assert choices["k"] == knn.neighbours[max(range(5), key=lambda row: accuracy[row])]
    fine, coarse = scores["knn"], scores["knn_coarse"]
    assert coarse.percent >= fine.percent == 100 * fine.correct.double().mean()
    shuffled = features.test._replace(labels={name: y.flip(0) for name, y in features.test.labels.items()})
    others, same = knn(features._replace(test=shuffled))
    assert same == choices and others["knn"].percent != fine.percent


def test_same_as_the_formula_of_dino_in_float64(features):
    """Sum over the k nearest of exp(cosine / 0.07) times the one-hot label (arXiv:2104.14294), of all at once."""
    bank, labels = features.train.labelled("fine", "good")
    queries, _ = features.test.labelled("fine", "good")
    cosine = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    one_hot = F.one_hot(labels, 4).double()
    for k, row in zip((1, 5, 10, 20, 50), KNN().classify(bank, labels, queries), strict=True):
        near = cosine >= cosine.sort(dim=1, descending=True).values[:, k - 1 : k]
        votes = (near * (cosine / 0.07).exp()) @ one_hot
        assert near.sum(dim=1).eq(k).all() and torch.equal(row, votes.argmax(dim=1))


def test_a_bank_in_blocks_gives_the_same_neighbours():
    generator = torch.Generator().manual_seed(5)
    bank, labels = torch.randn(333, 16, generator=generator), torch.randint(7, (333,), generator=generator)
    queries = torch.randn(90, 16, generator=generator)
    whole = KNN().classify(bank, labels, queries)
    for block in (20, 64, 332):
        assert torch.equal(KNN(block=block, chunk=31).classify(bank, labels, queries), whole)


def test_no_more_similarities_than_a_block_are_in_memory(monkeypatch):
    sizes, real = [], Tensor.topk

    def watched(x, *rest, **more):
        sizes.append(x.numel())
        return real(x, *rest, **more)

    monkeypatch.setattr(Tensor, "topk", watched)
    KNN(chunk=8, block=60).classify(torch.randn(1000, 4), torch.arange(1000) % 3, torch.randn(20, 4))
    assert max(sizes) <= 8 * (60 + 50)


def test_unlabelled_images_neither_vote_nor_count(features):
    labels = features.train.labels["fine"]
    hidden = torch.where(torch.arange(60) < 30, labels, -1)
    smaller = Features({name: x[:30] for name, x in features.train.pools.items()}, {"fine": labels[:30]}, labels[:30])
    masked = features.train._replace(labels={"fine": hidden})
    test = features.test._replace(labels={"fine": features.test.labels["fine"].index_fill(0, torch.tensor([0, 3]), -1)})
    (one, _), (two, _) = (KNN()(features._replace(train=train, test=test)) for train in (smaller, masked))
    assert one["knn"].percent == two["knn"].percent and len(one["knn"].correct) == len(one["knn"].groups) == 28


def test_equal_neighbours_come_in_the_order_of_the_bank():
    bank = torch.ones(6, 3)
    found = KNN(neighbours=(1, 6)).classify(bank, torch.tensor([3, 1, 1, 1, 1, 1]), torch.ones(2, 3))
    assert found.tolist() == [[3, 3], [1, 1]]


def test_no_labels_is_an_error_with_a_remedy(features):
    with pytest.raises(ValueError, match="one folder per class"):
        KNN()(features._replace(train=features.train._replace(labels={})))
    unlabelled = features.val._replace(labels={"fine": torch.full((40,), -1)})
    with pytest.raises(ValueError, match="no fine label in val"):
        KNN()(features._replace(val=unlabelled))


def test_the_choice_is_made_on_some_of_many_validation_images(features):
    knn = KNN(neighbours=(1, 5), chosen_on=15)
    assert knn.hits(features, "fine", "good", "val").shape == (2, 14)  # of 40 every third
    assert torch.equal(
        knn.hits(features, "fine", "good", "val"), KNN(neighbours=(1, 5)).hits(features, "fine", "good", "val")[:, ::3]
    )
    assert knn.hits(features, "fine", "good", "test").shape == (2, 30)
