import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from comad.evaluate.segmentation.scores import count_pixels, score_counts

NAMES = ("a", "b", "c", "d", "e")


def draw(seed, count=6, absent=()):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for index in range(count):
        size = (5 + index, 7)
        truth = torch.randint(0, 5, size, generator=generator)
        truth[torch.rand(size, generator=generator) < 0.2] = 255
        answer = torch.where(
            torch.rand(size, generator=generator) < 0.6, truth, torch.randint(0, 5, size, generator=generator)
        )
        answer = torch.where(answer == 255, 0, answer)
        for label in absent:
            truth[truth == label], answer[answer == label] = 0, 0
        pairs.append((answer.to(torch.uint8), truth.to(torch.uint8)))
    return pairs


def scores(pairs):
    return score_counts(torch.stack([count_pixels(*pair, 5) for pair in pairs]), NAMES)


def by_sets(pairs):
    """Sets of pixels of the whole data set, one class after another, in plain Python."""
    pixels = [
        (n, y, x, int(a[y, x]), int(t[y, x]))
        for n, (a, t) in enumerate(pairs)
        for y, x in np.ndindex(*t.shape)
        if t[y, x] != 255
    ]
    iou = []
    for label in range(5):
        answered = {p[:3] for p in pixels if p[3] == label}
        true = {p[:3] for p in pixels if p[4] == label}
        if answered | true:
            iou.append(len(answered & true) / len(answered | true))
    return 100 * sum(iou) / len(iou), 100 * sum(p[3] == p[4] for p in pixels) / len(pixels)


@pytest.mark.parametrize("absent", [(), (2,), (1, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_sets_of_pixels(seed, absent):
    pairs = draw(seed, absent=absent)
    found = scores(pairs)
    assert (found.miou, found.aacc) == pytest.approx(by_sets(pairs))
    assert [name for name, value in found.iou.items() if value is None] == [NAMES[label] for label in absent]


def test_equal_to_torchmetrics():
    pairs = draw(7)
    matrix, jaccard = MulticlassConfusionMatrix(5, ignore_index=255), MulticlassJaccardIndex(5, ignore_index=255)
    for answer, truth in pairs:
        matrix.update(answer.long().flatten(), truth.long().flatten())
        jaccard.update(answer.long().flatten(), truth.long().flatten())
    found, whole = scores(pairs), matrix.compute()
    assert found.miou == pytest.approx(100 * float(jaccard.compute()), abs=1e-4)
    assert found.aacc == pytest.approx(100 * float(whole.diag().sum() / whole.sum()), abs=1e-4)


def test_the_whole_data_set_is_added_up_before_dividing():
    """One large image, all right; a small one, all wrong: not the mean of 1 and 0."""
    large = torch.zeros(9, 10, dtype=torch.uint8)
    small = torch.zeros(1, 10, dtype=torch.uint8)
    found = scores([(large, large), (small + 1, small)])
    assert found.aacc == 90 and found.iou["a"] == 90 and found.iou["b"] == 0 and found.miou == 45


def test_a_class_that_is_answered_but_never_true_counts_as_0():
    truth = torch.zeros(2, 2, dtype=torch.uint8)
    found = scores([(torch.tensor([[0, 0], [0, 3]], dtype=torch.uint8), truth)])
    assert found.iou["d"] == 0 and found.iou["b"] is None


def test_no_labelled_pixel_is_an_error():
    nothing = torch.full((2, 2), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no pixel of the validation images has a class"):
        scores([(nothing * 0, nothing)])
