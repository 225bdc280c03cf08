"""Fusions of losses against loops, and where they are the same as fusions of targets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comad.distillation.fusion import DropEasiest, Fused, Fusion, Gate, LossGate, Mean, Pair, Sum, agreement
from comad.distillation.objectives import FeatureLoss, Objective, mean_over
from comad.presets import METHODS

WIDTHS = (4, 6, 3)


def pairs(num_teachers: int = 3, seed: int = 0, share_seen: float = 0.7) -> list[Pair]:
    """Predictions and targets (2, 5, E) of teachers of unlike widths, float64, and who saw what."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for width in WIDTHS[:num_teachers]:
        x, y = (torch.randn(2, 5, width, dtype=torch.float64, generator=generator) for _ in range(2))
        valid = torch.rand(2, 5, generator=generator) < share_seen
        found.append(Pair(x, y, valid, valid))
    return found


def fuse(fusion: Fusion, given: list[Pair]) -> Fused:
    return fusion(fusion.build([pair.target.shape[2] for pair in given]), given)


def loss_of(objective: Objective, compared: list[Pair]) -> Tensor:
    """Of all positions."""
    distances = torch.stack([objective.distance_of(pair) for pair in compared])
    return mean_over(distances, compared, torch.ones(2, 5, dtype=torch.bool)).sum()


def cos(x: list[float], y: list[float]) -> float:
    lengths = math.hypot(*x) * math.hypot(*y)
    return sum(a * b for a, b in zip(x, y, strict=True)) / lengths if lengths else 0.0


def naive_agreement(teachers: list[Pair], m: int, b: int, n: int) -> float:
    """Mean cosine of teacher m's row of token-token cosines to the others', over the tokens that both saw."""
    found = []
    for k, other in enumerate(teachers):
        if k != m and other.valid[b, n] and teachers[m].valid[b, n]:
            both = [j for j in range(5) if j != n and other.valid[b, j] and teachers[m].valid[b, j]]
            rows = [
                [cos(pair.target[b, n].tolist(), pair.target[b, j].tolist()) for j in both]
                for pair in (teachers[m], other)
            ]
            found.append(cos(*rows) if both else 0.0)
    return sum(found) / len(found) if found else 0.0


@settings(max_examples=15, deadline=None)
@given(num_teachers=st.integers(1, 3), temperature=st.sampled_from([0.1, 1.0]), seed=st.integers(0, 1000))
def test_loss_gate_is_the_naive_one(num_teachers, temperature, seed):
    given_pairs = pairs(num_teachers, seed)
    weighed, _ = fuse(LossGate(temperature=temperature), given_pairs)
    for b in range(2):
        for n in range(5):
            powers = [
                pair.valid[b, n].item()
                * math.exp(
                    (
                        cos(pair.prediction[b, n].tolist(), pair.target[b, n].tolist())
                        + naive_agreement(given_pairs, m, b, n)
                    )
                    / temperature
                )
                for m, pair in enumerate(given_pairs)
            ]
            expected = [power / sum(powers) if sum(powers) else 0.0 for power in powers]
            assert [float(pair.weight[b, n]) for pair in weighed] == pytest.approx(expected, abs=1e-5)


def test_a_loss_gate_without_preference_is_the_mean_of_the_losses():
    given_pairs, objective = pairs(share_seen=1.1), FeatureLoss(where="all")
    losses = [float(loss_of(objective, [pair])) for pair in given_pairs]
    for gate in (LossGate(temperature=1e9), LossGate(affinity=False, consensus=False)):
        assert float(loss_of(objective, fuse(gate, given_pairs)[0])) == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_the_only_teacher_that_saw_a_token_has_weight_1():
    nobody, everybody = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    seen = (nobody, everybody, nobody)
    alone = [pair._replace(valid=part, weight=part) for pair, part in zip(pairs(), seen, strict=True)]
    for fusion in (LossGate(), Sum(), DropEasiest()):
        weighed, shares = fuse(fusion, alone)
        assert torch.equal(weighed[1].weight, torch.ones(2, 5, dtype=weighed[1].weight.dtype))
        assert not weighed[0].weight.any() and torch.equal(shares[1].float(), torch.ones(2, 5))


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 1000))
def test_permuting_teachers_permutes_weights(order, seed):
    given_pairs = pairs(seed=seed)
    for fusion in (LossGate(), Sum()):
        before, after = fuse(fusion, given_pairs), fuse(fusion, [given_pairs[m] for m in order])
        torch.testing.assert_close(after[1], before[1][list(order)])
    valid = torch.stack([pair.valid for pair in given_pairs])
    found = agreement([given_pairs[m].target for m in order], valid[list(order)])
    torch.testing.assert_close(found, agreement([pair.target for pair in given_pairs], valid)[list(order)])


def gradient(fusion, student: Tensor, targets: list[Tensor], distance: str) -> Tensor:
    """Of a term in the student's tokens, where all teachers are met by the same tokens."""
    student = student.clone().requires_grad_()
    everywhere = torch.ones(student.shape[:2], dtype=torch.bool)
    weighed, _ = fuse(fusion, [Pair(student, target, everywhere, everywhere) for target in targets])
    return torch.autograd.grad(loss_of(FeatureLoss(distance=distance), weighed), student)[0]


def test_the_mean_of_losses_is_the_mean_of_targets_in_gradient_for_mse():
    student = pairs(1)[0].prediction
    targets = [pairs(1, seed)[0].target for seed in (1, 2, 3)]
    losses = gradient(Sum(), student, targets, "mse") / 3
    torch.testing.assert_close(losses, gradient(Mean(), student, targets, "mse"))
    torch.testing.assert_close(losses, gradient(LossGate(temperature=1e9), student, targets, "mse"))
    torch.testing.assert_close(losses, gradient(Gate(temperature=1e9), student, targets, "mse"), atol=1e-7, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(probability=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 1000))
def test_the_hardest_teacher_stays_and_the_others_by_chance(probability, seed):
    generator = torch.Generator().manual_seed(seed)
    losses, noise = (torch.rand(3, 4, generator=generator) for _ in range(2))
    has_target = torch.rand(3, 4, generator=generator) < 0.8
    has_target[0] = True
    found = DropEasiest(probability=probability).reweigh(losses, has_target, noise.T)
    stay = torch.zeros(3, 4)
    for b in range(4):
        there = [m for m in range(3) if has_target[m, b]]
        hardest = max(there, key=lambda m: float(losses[m, b]))
        for m in there:
            stay[m, b] = m == hardest or float(noise[m, b]) >= probability
    torch.testing.assert_close(found, 4 * stay / stay.sum())  # the mean over all that stay, of four images


def test_teachers_are_dropped_once_per_image_over_all_objectives(small_distillation):
    """Each image keeps the same teachers in every objective, the hardest by their weighted sum among them."""
    setting = small_distillation(METHODS["unic"], with_cls=(True,) * 3)
    setting.distiller.eval()  # statistics that follow the batch stand still
    images, outputs, masks = setting.batch(6)
    objectives, seen = setting.distiller.method.objectives, []
    keep = DropEasiest.reweigh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DropEasiest, "reweigh", lambda *args: seen.append((args[1], keep(*args))) or seen[-1][1])
        loss, metrics = setting.distiller(images, outputs, masks)
    ((losses, factors),) = seen
    setting.distiller.method = replace(setting.distiller.method, fusion=Sum())
    numbers = setting.distiller(images, outputs, masks)[1]()
    assert float(losses.sum()) == pytest.approx(
        sum(objective.weight * float(numbers[f"loss/{name}"]) for name, objective in objectives.items()), rel=1e-5
    )
    assert float((losses * factors).sum()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name in objectives:
        own = sum(float(metrics()[f"loss/teacher-{m}/{name}"]) for m in range(3))
        assert own == pytest.approx(float(metrics()[f"loss/{name}"]), rel=1e-5)
