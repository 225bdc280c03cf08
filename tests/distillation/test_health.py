"""The health numbers against loops, and the detector: it speaks when targets collapse, and is silent otherwise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comad.distillation.aligners import TrainedAdapter
from comad.distillation.health import (
    COLLAPSED_SHARE,
    MAX_IMAGES,
    CollapseDetector,
    central_patches,
    health_metrics,
    information,
    mean_shares,
)
from comad.evaluation.similarity import cross_image_cosine, effective_rank
from comad.presets import METHODS

HEALTHY = {"loss": 1.0, "target_information": 0.5, "student_cosine": 0.3, "target_cosine": 0.1, "epoch": 0.0}
TRAINING = 140, 6e-3
"""Steps and learning rate: enough for a collapse, if there is to be one."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 6), width=st.integers(2, 6), seed=st.integers(0, 1000))
def test_numbers_are_those_of_a_naive_loop(count, width, seed):
    rows = draw(count, width, seed=seed).tolist()
    softmaxes = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in rows]
    mean = [sum(column) / count for column in zip(*softmaxes, strict=True)]
    kl = [sum(a * math.log(a / b) for a, b in zip(p, mean, strict=True)) for p in softmaxes]
    assert float(information(torch.tensor(rows))) == pytest.approx(sum(kl) / count, abs=1e-5)

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))

    cosines = [cosine(rows[i], rows[j]) for i in range(count) for j in range(count) if i != j]
    expected = sum(cosines) / len(cosines)
    assert float(cross_image_cosine(torch.tensor(rows, dtype=torch.float64))) == pytest.approx(expected, abs=1e-9)


def test_equal_tokens_hold_no_information():
    same = draw(1, 8).expand(20, -1)
    assert float(information(same)) == pytest.approx(0.0, abs=1e-9)
    assert float(cross_image_cosine(same)) == pytest.approx(1.0)
    assert float(effective_rank(same)) == pytest.approx(1.0, abs=0.1)


def test_information_does_not_see_a_constant_and_is_at_most_log_of_the_images():
    tokens = draw(20, 8)
    torch.testing.assert_close(information(tokens + 100.0), information(tokens))
    assert float(information(1e3 * torch.eye(8))) == pytest.approx(math.log(8), rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_effective_rank_of_k_orthogonal_directions_is_k(k):
    directions = torch.linalg.qr(draw(8, 8))[0][:k]
    tokens = torch.cat([directions, -directions]) + draw(8, seed=1)
    assert float(effective_rank(tokens)) == pytest.approx(k, rel=1e-6)
    assert float(effective_rank(7 * tokens)) == pytest.approx(k, rel=1e-6)


def test_one_image_gives_finite_numbers_but_the_spread():
    assert all(float(number(draw(1, 8))) >= 0 for number in (information, cross_image_cosine, effective_rank))


def test_gate_numbers():
    weights = torch.tensor([[[0.5, 1.0, 0.0]], [[0.5, 0.0, 0.0]]])  # the last token was seen by nobody
    metrics = health_metrics(draw(4, 3), draw(4, 3, seed=1), weights)
    assert float(metrics["gate_entropy"]) == pytest.approx(0.5)
    assert mean_shares(weights).tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("num_teachers", [1, 2, 4])
def test_equal_weights_have_full_entropy(num_teachers):
    weights = torch.full((num_teachers, 2, 5), 1 / num_teachers)
    metrics = health_metrics(draw(4, 3), draw(4, 3), weights)
    assert float(metrics["gate_entropy"]) == pytest.approx(float(num_teachers > 1), abs=1e-6)
    assert mean_shares(weights).tolist() == pytest.approx([1 / num_teachers] * num_teachers)


def test_health_is_told_from_one_patch_with_a_target_near_the_middle_of_each_image():
    student, target = draw(3, 9, 2).requires_grad_(), draw(3, 9, 2, seed=1)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 3:6] = False
    valid[2, :8] = False
    ours, theirs = central_patches(valid, student, target)
    assert torch.equal(theirs[0], target[0, 4])
    assert any(torch.equal(theirs[1], target[1, n]) for n in (2, 6))
    assert torch.equal(ours[2], student[2, 8])
    assert not ours.requires_grad


def test_health_is_told_from_a_bounded_number_of_images():
    many = torch.ones(MAX_IMAGES + 9, 4, 2)
    (found,) = central_patches(torch.ones(MAX_IMAGES + 9, 4).bool(), many)
    assert len(found) == MAX_IMAGES


def test_the_detector_warns_when_the_information_of_the_targets_falls():
    watch = CollapseDetector()
    assert watch(1, HEALTHY) is None
    assert watch(20, HEALTHY | {"target_information": 0.5 * COLLAPSED_SHARE + 0.01, "loss": 0.1}) is None
    warning = watch(40, HEALTHY | {"target_information": 0.05, "loss": 0.01})
    assert warning is not None
    assert "collapsed" in warning and "10 %" in warning and "from 1 to 0.01" in warning and "comad" in warning


def test_the_detector_keeps_its_words_before_the_colon():
    watch = CollapseDetector()
    watch(1, HEALTHY)
    first, second = (watch(20, HEALTHY | {"target_information": left}) or "" for left in (0.05, 0.02))
    assert first != second and first.partition(":")[0] == second.partition(":")[0]


def test_the_detector_compares_with_the_start_not_with_the_last_step():
    watch = CollapseDetector()
    falling = [watch(step, HEALTHY | {"target_information": 0.5 * 0.7**step}) for step in range(8)]
    assert [warning is not None for warning in falling] == [0.7**step < COLLAPSED_SHARE for step in range(8)]


@pytest.mark.parametrize(
    "change", [{"loss": 0.001}, {"target_information": 5.0}, {"student_cosine": 0.9}, {"epoch": 9.0}]
)
def test_the_detector_is_silent_otherwise(change):
    watch = CollapseDetector()
    assert watch(1, HEALTHY) is None and watch(20, HEALTHY | change) is None


def test_the_detector_tells_a_loss_that_rises_far():
    watch = CollapseDetector()
    watch(1, HEALTHY)
    assert watch(20, HEALTHY | {"loss": 9.0}) is None
    assert "from 1 to 1e+03; try a lower --optim.base-lr" in (watch(40, HEALTHY | {"loss": 1000.0}) or "")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"std_mae": 0.0, "std_dino": 0.5}, "the same from mae for"), ({"image_std": 0.0}, "are blank")],
)
def test_the_detector_tells_constant_teachers_and_blank_images_from_the_first_step_on(change, words):
    watch = CollapseDetector()
    assert words in (watch(1, HEALTHY | change) or "") and words in (watch(20, HEALTHY | change) or "")


def test_a_damaged_start_is_not_compared_with():
    watch = CollapseDetector({"step": 1, "loss": 2.0})
    assert watch(20, HEALTHY) is None and watch.first == HEALTHY


def test_the_detector_tells_a_constant_student_after_two_epochs():
    watch = CollapseDetector()
    watch(1, HEALTHY)
    constant = HEALTHY | {"student_cosine": 0.99}
    assert watch(20, constant | {"epoch": 1.0}) is None
    assert "same token" in (watch(40, constant | {"epoch": 2.0}) or "")
    assert watch(40, constant | {"epoch": 2.0, "target_cosine": 0.99}) is None  # so are the targets: nothing to blame


PLAIN = {name: replace(term, temperature=1.0) for name, term in METHODS["comad"].objectives.items()}
"""The losses as printed, without a temperature."""


@pytest.mark.parametrize(
    "method",
    [METHODS["comad-literal"], replace(METHODS["comad"], aligner=TrainedAdapter(), objectives=PLAIN)],
    ids=["printed", "trained-adapters-alone"],
)
def test_comad_as_printed_collapses_and_says_so(small_distillation, method):
    warnings, metrics = small_distillation(method, num_images=128).watched_training(*TRAINING)
    assert any("targets have collapsed" in warning for warning in warnings)
    assert metrics["loss"] < 0.05  # while the loss looks splendid


def test_comad_does_not_collapse_in_the_same_setting(small_distillation):
    warnings, metrics = small_distillation(METHODS["comad"], num_images=128).watched_training(*TRAINING)
    assert warnings == []
    assert metrics["target_information"] > 0.3 and metrics["target_cosine"] < 0.2
