import pytest
import torch

from comad.evaluate.intervals import Interval, paired_interval


def test_interval_covers_zero_for_equals_and_not_for_the_clearly_different():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(600) // 3
    good, poor, same = (torch.rand(600, generator=generator) < p for p in (0.8, 0.5, 0.8))
    assert paired_interval(good, good, groups) == Interval(0, 0, 0, seeds=1, concepts=200, images=600)
    found = paired_interval(good, poor, groups)
    assert 0 < found.low < found.difference < found.high
    assert found.difference == pytest.approx(100 * (good.double().mean() - poor.double().mean()).item())
    found = paired_interval(good, same, groups)
    assert found.low < 0 < found.high


def test_one_seed_is_a_t_over_concepts_and_says_so():
    """Concepts of equal size: the usual interval over their means, of which one concept is one observation."""
    scipy_stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(1)
    good, poor = torch.rand(100, generator=generator) < 0.6, torch.rand(100, generator=generator) < 0.5
    groups = torch.arange(100).repeat_interleave(5)
    found = paired_interval(good.repeat_interleave(5), poor.repeat_interleave(5), groups)
    means = 100 * (good.double() - poor.double()).numpy()
    half = scipy_stats.t.ppf(0.975, 99) * scipy_stats.sem(means)
    assert (found.low, found.high) == pytest.approx((means.mean() - half, means.mean() + half))
    assert found[3:] == (1, 100, 500) and found.over == "concepts alone, for there is one seed"


def test_seeds_alone_are_a_t_over_seeds():
    """The same gain on every concept: nothing is left but the seeds."""
    scipy_stats = pytest.importorskip("scipy.stats")
    gains = torch.tensor([0.1, 0.4, 0.25])
    good, poor = gains[:, None].expand(3, 40), torch.zeros(3, 40)
    found = paired_interval(good, poor, torch.arange(40) // 2)
    half = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem(100 * gains.numpy())
    assert (found.low, found.high) == pytest.approx((25 - half, 25 + half), rel=1e-5)
    assert found.seeds == 3 and found.over == "seeds and concepts"
    assert paired_interval(good, poor, torch.zeros(40).long())[:3] == pytest.approx(found[:3])


def test_rows_that_are_the_same_for_every_seed_count_once():
    generator = torch.Generator().manual_seed(3)
    good, poor = (torch.rand(300, generator=generator) < p for p in (0.7, 0.5))
    groups = torch.arange(300) // 3
    one, five = paired_interval(good, poor, groups), paired_interval(good.expand(5, 300), poor.expand(5, 300), groups)
    assert one[:3] == pytest.approx(five[:3])


def test_equal_rows_differ_by_nothing_and_a_shift_by_the_shift():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(200) // 2
    hits = torch.rand(3, 200, generator=generator) < 0.5
    assert paired_interval(hits, hits, groups)[:3] == (0, 0, 0)
    every_tenth = torch.arange(200) % 20 < 2  # one concept in ten, whole
    hits[:, every_tenth] = False
    difference, low, high, *_ = paired_interval(hits | every_tenth, hits, groups)
    assert difference == pytest.approx(10) and low < 10 < high


@pytest.mark.parametrize("seed_effect", [0.0, 0.01, 0.02])
@pytest.mark.parametrize(("seeds", "concepts"), [(3, 37), (5, 101)])
def test_it_covers_the_truth_as_often_as_it_says(seeds, concepts, seed_effect):
    """A small run of `benchmarks/intervals.py`: 400 draws are right to 2 %."""
    generator = torch.Generator().manual_seed(3)
    groups = torch.arange(600) % concepts
    covered = 0
    for _ in range(400):
        seed = seed_effect * torch.randn(seeds, 1, generator=generator)
        concept = 0.03 * torch.randn(concepts, generator=generator)[groups]
        good = torch.rand(seeds, 600, generator=generator) < 0.54 + seed + concept
        poor = torch.rand(seeds, 600, generator=generator) < 0.5
        _, low, high, *_ = paired_interval(good, poor, groups)
        covered += low <= 4 <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_nothing_and_one_of_each():
    empty = torch.zeros(0, dtype=torch.bool)
    with pytest.raises(ValueError, match="labelled test images"):
        paired_interval(empty, empty, torch.zeros(0, dtype=torch.int64))
    one = torch.ones(4)
    assert paired_interval(one, one * 0.5, torch.zeros(4).long()) == (50, -100, 100, 1, 1, 4)
