import math

import pytest
import torch

from comad.evaluate.features import Features, FeatureSplits
from comad.evaluate.knn import NearestNeighbours


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
    knn = NearestNeighbours(chunk=chunk)
    bank, labels = features.train.labelled("fine", "good")
    queries, _ = features.test.labelled("fine", "good")
    found = knn.classify(bank, labels, queries)
    for row, k in zip(found.tolist(), knn.neighbours, strict=True):
        assert row == [naive(bank, labels, query, k, 0.07) for query in queries]


def test_pool_and_k_are_chosen_on_the_validation_images(features):
    knn = NearestNeighbours()
    result = knn(features)
    assert result.pool == "good" and result.validation > 60
    accuracy = [100 * knn.hits(features, "fine", "good", "val")[row].double().mean() for row in range(5)]
    assert result.k == knn.neighbours[max(range(5), key=lambda row: accuracy[row])]
    assert result.top1["coarse"] >= result.top1["fine"] == 100 * result.correct["fine"].double().mean()
    shuffled = features.test._replace(labels={name: y.flip(0) for name, y in features.test.labels.items()})
    other = knn(features._replace(test=shuffled))
    assert (other.k, other.pool) == (result.k, result.pool) and other.top1 != result.top1


def test_unlabelled_images_neither_vote_nor_count(features):
    labels = features.train.labels["fine"]
    hidden = torch.where(torch.arange(60) < 30, labels, -1)
    smaller = Features({name: x[:30] for name, x in features.train.pools.items()}, {"fine": labels[:30]}, labels[:30])
    masked = features.train._replace(labels={"fine": hidden})
    test = features.test._replace(labels={"fine": features.test.labels["fine"].index_fill(0, torch.tensor([0, 3]), -1)})
    one, two = (NearestNeighbours()(features._replace(train=train, test=test)) for train in (smaller, masked))
    assert one.top1 == two.top1 and len(one.correct["fine"]) == 28


def test_equal_neighbours_come_in_the_order_of_the_bank():
    bank = torch.ones(6, 3)
    found = NearestNeighbours(neighbours=(1, 6)).classify(bank, torch.tensor([3, 1, 1, 1, 1, 1]), torch.ones(2, 3))
    assert found.tolist() == [[3, 3], [1, 1]]


def test_no_labels_is_an_error_with_a_remedy(features):
    with pytest.raises(ValueError, match="one folder per class"):
        NearestNeighbours()(features._replace(train=features.train._replace(labels={})))
    unlabelled = features.val._replace(labels={"fine": torch.full((40,), -1)})
    with pytest.raises(ValueError, match="no fine label in val"):
        NearestNeighbours()(features._replace(val=unlabelled))
