"""Fusions of losses against loops, and where they are the same as fusions of targets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comad.distill.fusion import DropEasiest, Gate, LossGate, Mean, Pair, Sum, agreement, join
from comad.distill.objectives import Term, mean_distance

WIDTHS = (4, 6, 3)


def pairs(num_teachers: int = 3, seed: int = 0, share_seen: float = 0.7) -> list[Pair]:
    """Predictions and targets (2, 5, E) of teachers of unlike widths, float64, and who saw what."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for width in WIDTHS[:num_teachers]:
        x, y = (torch.randn(2, 5, width, dtype=torch.float64, generator=generator) for _ in range(2))
        found.append(Pair(x, y, torch.rand(2, 5, generator=generator) < share_seen))
    return found


def cos(x: list[float], y: list[float]) -> float:
    lengths = math.hypot(*x) * math.hypot(*y)
    return sum(a * b for a, b in zip(x, y, strict=True)) / lengths if lengths else 0.0


def naive_agreement(teachers: list[Pair], m: int, b: int, n: int) -> float:
    """Mean cosine of teacher m's row of token-token cosines to the others', over the tokens that both saw."""
    found = []
    for k, other in enumerate(teachers):
        if k != m and other.weight[b, n] and teachers[m].weight[b, n]:
            both = [j for j in range(5) if j != n and other.weight[b, j] and teachers[m].weight[b, j]]
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
    joined = join(LossGate(temperature=temperature), given_pairs)
    for b in range(2):
        for n in range(5):
            powers = [
                pair.weight[b, n].item()
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
            assert [float(pair.weight[b, n]) for pair in joined.pairs] == pytest.approx(expected, abs=1e-5)


def test_a_loss_gate_without_preference_is_the_mean_of_the_losses():
    given_pairs, term = pairs(share_seen=1.1), Term(where="all")
    losses = [term(pair.prediction, pair.target, pair.weight) for pair in given_pairs]
    for gate in (LossGate(temperature=1e9), LossGate(affinity=False, consensus=False)):
        joined = join(gate, given_pairs)
        distances = torch.stack([term.distances(pair) for pair in joined.pairs])
        weights = torch.stack([pair.weight for pair in joined.pairs])
        found = mean_distance(distances, weights, torch.ones(2, 5, dtype=torch.bool))
        assert float(found) == pytest.approx(float(sum(losses)) / 3, rel=1e-5)


def test_the_only_teacher_that_saw_a_token_has_weight_1():
    first, second, third = pairs()
    nobody, everybody = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    alone = [first._replace(weight=nobody), second._replace(weight=everybody), third._replace(weight=nobody)]
    for fusion in (LossGate(), Sum(), DropEasiest()):
        joined = join(fusion, alone)
        assert torch.equal(joined.pairs[1].weight, torch.ones(2, 5, dtype=joined.pairs[1].weight.dtype))
        assert not joined.pairs[0].weight.any() and torch.equal(joined.shares[1].float(), torch.ones(2, 5))


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 1000))
def test_permuting_teachers_permutes_weights(order, seed):
    given_pairs = pairs(seed=seed)
    for fusion in (LossGate(), Sum()):
        before, after = join(fusion, given_pairs), join(fusion, [given_pairs[m] for m in order])
        torch.testing.assert_close(after.shares, before.shares[list(order)])
    valid = torch.stack([pair.weight for pair in given_pairs])
    found = agreement([given_pairs[m].target for m in order], valid[list(order)])
    torch.testing.assert_close(found, agreement([pair.target for pair in given_pairs], valid)[list(order)])


def gradient(fusion, student: Tensor, targets: list[Tensor], distance: str) -> Tensor:
    """Of a term in the student's tokens, where all teachers are met by the same tokens."""
    student = student.clone().requires_grad_()
    everywhere = torch.ones(student.shape[:2], dtype=torch.bool)
    joined = join(fusion, [Pair(student, target, everywhere) for target in targets])
    term = Term(distance=distance)
    distances = torch.stack([term.distances(pair) for pair in joined.pairs])
    weights = torch.stack([pair.weight for pair in joined.pairs])
    return torch.autograd.grad(mean_distance(distances, weights, everywhere), student)[0]


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
    losses, chance = (torch.rand(3, 4, generator=generator) for _ in range(2))
    speaks = torch.rand(3, 4, generator=generator) < 0.8
    speaks[0] = True
    found = DropEasiest(probability=probability).keep(losses, speaks, chance)
    for b in range(4):
        speakers = [m for m in range(3) if speaks[m, b]]
        hardest = max(speakers, key=lambda m: float(losses[m, b]))
        stay = [m for m in speakers if m == hardest or float(chance[m, b]) >= probability]
        expected = [1 / len(stay) if m in stay else 0.0 for m in range(3)]
        assert found[:, b].tolist() == pytest.approx(expected)
