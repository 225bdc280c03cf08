import json
import os

import pytest
import torch

from comad.data.images import ImageSet, Splits
from comad.evaluate.scoreboard import Row, Scoreboard, count_flops, measure_latency, paired_interval, score, shortage
from comad.models.timm_backbone import TimmBackbone, create_vit

SIZE = 16
WIDTH, DEPTH, PATCHES = 24, 2, 16


class Stripes(ImageSet):
    """Four classes of coloured noise, in two coarse classes, two images per concept."""

    eval_crop = 1.0

    def __init__(self, name, num_images, seed):
        generator = torch.Generator().manual_seed(seed)
        self.name = name
        classes = torch.arange(num_images) % 4
        self.labels = {"fine": classes, "coarse": classes // 2}
        self.groups = torch.arange(num_images) // 8
        colours = torch.tensor([[200, 30, 30], [200, 120, 30], [30, 30, 200], [30, 120, 200]])
        noise = torch.randint(-30, 31, (num_images, 3, SIZE, SIZE), generator=generator)
        self.pixels = (colours[classes].view(-1, 3, 1, 1) + noise).byte()

    def __len__(self):
        return len(self.pixels)

    def load(self, index, min_side=0):
        return self.pixels[index]

    def path(self, index):
        return f"{self.name}/{index}"


@pytest.fixture
def splits():
    return Splits(Stripes("train", 40, 0), Stripes("val", 16, 1), Stripes("test", 24, 2), {}, "none")


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", SIZE, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=2)
    return TimmBackbone(vit)


def row(name, role="student", **values):
    return Row(name=name, role=role, params=1_234_567, flops=10**9, latency_ms=1.5, **values)


@pytest.mark.parametrize("role", ["student", "pixels"])
def test_score_of_easy_images(backbone, splits, role):
    result = score("x", role, None if role == "pixels" else backbone, splits, SIZE)
    assert result.row.name == "x" and result.row.role == role and result.row.reason is None
    assert set(result.correct) == set(result.groups) == {"knn", "knn_coarse", "linear", "linear_coarse"}
    for name, correct in result.correct.items():
        assert getattr(result.row, name) == pytest.approx(100 * correct.double().mean().item())
        assert getattr(result.row, name) > 60
        assert result.groups[name].tolist() == splits.test.groups.tolist()
    assert (result.row.pool_knn == "pixels") == (role == "pixels")
    assert (result.row.params == 0) == (role == "pixels")
    assert result.row.k is not None and result.row.knn_share is None


def test_coarse_labels_are_optional(splits):
    del splits.val.labels["coarse"]
    result = score("x", "pixels", None, splits, SIZE)
    assert result.row.knn is not None and result.row.knn_coarse is None and set(result.correct) == {"knn", "linear"}


@pytest.mark.parametrize("known, reason", [(0, "0 train images"), (19, "19 train images"), (None, "0 train images")])
def test_too_few_labels_give_a_reason(backbone, splits, known, reason):
    if known is None:
        splits.train.labels.clear()
    else:
        splits.train.labels["fine"][known:] = -1
    result = score("x", "student", backbone, splits, SIZE)
    assert result.row.knn is None and result.row.linear is None and reason in result.row.reason
    assert result.row.params > 0 and result.correct == {}


def test_one_class_or_an_empty_test_split_is_too_little(splits):
    assert shortage(splits, "fine") is None
    splits.test.labels["fine"].fill_(-1)
    assert "no image of test" in shortage(splits, "fine")
    splits.train.labels["fine"].fill_(0)
    assert "1 fine class" in shortage(splits, "fine")


def test_flops_are_those_of_the_formula(backbone):
    n, d = PATCHES + 1, WIDTH
    block = n * 12 * d * d + 2 * n * n * d
    assert count_flops(backbone, SIZE) == 2 * (PATCHES * 48 * d + DEPTH * block)
    assert measure_latency(backbone, SIZE, num_runs=3) > 0


def test_board_shares_writes_and_shows(tmp_path):
    rows = (row("a", "teacher", knn=80.0), row("b", "teacher", knn=50.0), row("s", knn=60.0), row("u", reason="why"))
    board = Scoreboard(rows)
    assert [r.knn_share for r in board.shared_rows] == [100, 62.5, 75, None]
    path = tmp_path / "run" / "scoreboard.json"
    board.write(path)
    assert json.loads(path.read_text()) == board.as_dict()
    assert board.as_dict()["rows"][2]["knn_share"] == 75
    assert os.listdir(path.parent) == ["scoreboard.json"]
    lines = board.table().splitlines()
    assert len(lines) == 7 and "1,234,567" in lines[2] and lines[-1] == "no scores: why"
    assert lines[4].split()[:2] == ["s", "student"] and lines[4].split()[5:7] == ["60.0", "75.0"]


def test_board_without_teacher_has_no_shares():
    assert Scoreboard((row("s", knn=60.0),)).shared_rows[0].knn_share is None


def test_interval_covers_zero_for_equals_and_not_for_the_clearly_different():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(600) // 3
    good, poor, same = (torch.rand(600, generator=generator) < p for p in (0.8, 0.5, 0.8))
    assert paired_interval(good, good, groups) == (0, 0, 0)
    difference, low, high = paired_interval(good, poor, groups)
    assert 0 < low < difference < high
    assert difference == pytest.approx(100 * (good.double().mean() - poor.double().mean()).item())
    _, low, high = paired_interval(good, same, groups)
    assert low < 0 < high
    assert paired_interval(good, poor, groups) == paired_interval(good, poor, groups)


def test_interval_knows_that_a_concept_is_one_observation():
    concept = torch.rand(100, generator=torch.Generator().manual_seed(1)) < 0.6
    good, poor = concept.repeat_interleave(5), torch.zeros(500, dtype=torch.bool)
    _, low, high = paired_interval(good, poor, torch.arange(100).repeat_interleave(5))
    _, low_naive, high_naive = paired_interval(good, poor, torch.arange(500))
    assert (high - low) / (high_naive - low_naive) == pytest.approx(5**0.5, rel=0.1)
    error = 100 * (concept.double().mean() * (1 - concept.double().mean()) / 100).sqrt().item()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_interval_over_seeds_of_equal_rows_is_nothing_and_of_a_shift_is_the_shift():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(200) // 2
    hits = torch.rand(3, 200, generator=generator) < 0.5
    assert paired_interval(hits, hits, groups) == (0, 0, 0)
    every_tenth = torch.arange(200) % 20 < 2  # one concept in ten, whole
    hits[:, every_tenth] = False
    difference, low, high = paired_interval(hits | every_tenth, hits, groups)
    assert difference == pytest.approx(10) and low < 10 < high
    assert paired_interval(hits[:1], ~hits[:1], groups) == paired_interval(hits[0], ~hits[0], groups)


def test_interval_knows_that_seeds_differ():
    """Two concepts and many seeds whose difference comes from the seed alone: the width is that of the seeds' mean."""
    seeds = torch.rand(50, generator=torch.Generator().manual_seed(2)) < 0.5
    good, poor, groups = seeds[:, None].expand(50, 40), torch.zeros(50, 40, dtype=torch.bool), torch.arange(40) // 2
    _, low, high = paired_interval(good, poor, groups)
    error = 100 * (seeds.double().mean() * (1 - seeds.double().mean()) / 50).sqrt().item()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Differences with a part per seed and a part per concept, mean 4 points, 8 seeds, 60 concepts of 5 images."""
    generator, covered, groups = torch.Generator().manual_seed(3), 0, torch.arange(300) // 5
    for _ in range(200):
        seed = 0.03 * torch.randn(8, 1, generator=generator)
        concept = 0.1 * torch.randn(60, generator=generator).repeat_interleave(5)
        chance = torch.rand(8, 300, generator=generator)
        good, poor = chance < 0.54 + seed + concept, chance < 0.5
        _, low, high = paired_interval(good, poor, groups, num_resamples=400)
        covered += low <= 4 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_of_nothing():
    empty = torch.zeros(0, dtype=torch.bool)
    with pytest.raises(ValueError, match="labelled test images"):
        paired_interval(empty, empty, torch.zeros(0, dtype=torch.int64))
