"""Distances against plain loops in float64, and which positions count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from comad.distill.features import StudentOutput
from comad.distill.fusion import Pair
from comad.distill.objectives import DISTANCES, FeatureLoss, Objective, RelationLoss, mean_over


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(objective: Objective, student: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Of one pair, at the positions that count."""
    pair = Pair(student, target, counts, counts)
    return mean_over(objective.distance_of(pair).unsqueeze(0), [pair], counts).sum()


def softmax(x: list[float], temperature: float) -> list[float]:
    top = max(x)
    powers = [math.exp((value - top) / temperature) for value in x]
    return [power / sum(powers) for power in powers]


def naive_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def naive_smooth_l1(difference: float, beta: float) -> float:
    size = abs(difference)
    return 0.5 * size * size / beta if size < beta else size - 0.5 * beta


def naive_distance(name: str, x: list[float], y: list[float], temperature: float) -> float:
    """The distance of one student token ``x`` to its target ``y``."""
    student, teacher = softmax(x, temperature), softmax(y, temperature)
    differences = [a - b for a, b in zip(x, y, strict=True)]
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    lengths = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
    return {
        "kl-student-teacher": naive_kl(student, teacher),
        "kl-teacher-student": naive_kl(teacher, student),
        "mse": sum(d * d for d in differences) / len(x),
        "smooth-l1": sum(naive_smooth_l1(d, temperature) for d in differences) / len(x),
        "l1": sum(abs(d) for d in differences) / len(x),
        "cosine": 1 - dot / lengths,
    }[name]


@pytest.mark.parametrize("name", DISTANCES)
@settings(max_examples=15, deadline=None)
@given(temperature=st.sampled_from([0.2, 1.0, 2.0]), scale=st.sampled_from([0.3, 3.0]), seed=st.integers(0, 1000))
def test_distance_is_the_naive_one(name, temperature, scale, seed):
    student, target = draw(2, 3, 5, seed=seed, scale=scale), draw(2, 3, 5, seed=seed + 1, scale=scale)
    found = DISTANCES[name](student, target, temperature)
    assert found.shape == (2, 3)
    for b in range(2):
        for n in range(3):
            expected = naive_distance(name, student[b, n].tolist(), target[b, n].tolist(), temperature)
            assert float(found[b, n]) == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_kl_directions_are_those_of_torch_distributions():
    student, target = draw(4, 7, seed=1, scale=2.0), draw(4, 7, seed=2, scale=2.0)
    s, t = Categorical(logits=student), Categorical(logits=target)
    torch.testing.assert_close(DISTANCES["kl-student-teacher"](student, target, 1.0), kl_divergence(s, t))
    torch.testing.assert_close(DISTANCES["kl-teacher-student"](student, target, 1.0), kl_divergence(t, s))
    assert not torch.allclose(kl_divergence(s, t), kl_divergence(t, s), rtol=0.05)


@pytest.mark.parametrize("name", DISTANCES)
def test_equal_tokens_are_at_distance_0_and_no_others_below(name):
    student = draw(50, 6)
    assert DISTANCES[name](student, student, 0.5).abs().max() < 1e-12
    assert DISTANCES[name](student, draw(50, 6, seed=1), 0.5).min() > 0


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_tokens_in_half_precision_give_finite_losses_and_gradients(name, dtype):
    student = (draw(2, 3, 8) * 1e4).to(dtype).requires_grad_()
    target = (draw(2, 3, 8, seed=1) * 1e4).to(dtype)
    objective = FeatureLoss(distance=name, temperature=0.1)
    loss = loss_of(objective, student, target, torch.ones(2, 3, dtype=torch.bool))
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > 0
    loss.backward()
    assert student.grad.isfinite().all()
    exact = loss_of(objective, student.detach().double(), target.double(), torch.ones(2, 3, dtype=torch.bool))
    assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-3)


def gradient(name: str, student: Tensor, targets: list[Tensor]) -> Tensor:
    """Of the mean of the losses to several targets."""
    student = student.clone().requires_grad_()
    losses = [DISTANCES[name](student, target, 1.0).sum() for target in targets]
    return torch.autograd.grad(sum(losses) / len(losses), student)[0]


@pytest.mark.parametrize("name", ["kl-student-teacher", "kl-teacher-student"])
def test_a_warm_kl_is_the_variance_of_the_difference_in_either_direction(name):
    torch.manual_seed(0)
    student, target = torch.randn(2, 5, 96, dtype=torch.float64)
    variance = (student - target).var(dim=-1, unbiased=False)
    torch.testing.assert_close(DISTANCES[name](student, target, 100.0) * 2 * 100**2, variance, rtol=0.02, atol=0)


def test_mean_of_losses_is_mean_of_targets_in_gradient_for_mse():
    student, targets = draw(4, 6), [draw(4, 6, seed=seed) for seed in (1, 2, 3)]
    torch.testing.assert_close(gradient("mse", student, targets), gradient("mse", student, [sum(targets) / 3]))


def test_mean_of_losses_is_mean_of_probabilities_in_gradient_for_forward_kl():
    student, targets = draw(4, 6), [draw(4, 6, seed=seed) for seed in (1, 2, 3)]
    mixture = (sum(target.softmax(dim=-1) for target in targets) / 3).log()
    apart = gradient("kl-teacher-student", student, targets)
    torch.testing.assert_close(apart, gradient("kl-teacher-student", student, [mixture]))
    torch.testing.assert_close(apart, student.softmax(dim=-1) - mixture.exp())
    # not so for the mean of the logits, nor for the other direction
    assert not torch.allclose(apart, gradient("kl-teacher-student", student, [sum(targets) / 3]), rtol=0.05)
    reverse = gradient("kl-student-teacher", student, targets)
    assert not torch.allclose(reverse, gradient("kl-student-teacher", student, [mixture]), rtol=0.05)


@settings(max_examples=30, deadline=None)
@given(where=st.sampled_from(["visible", "hidden", "all", "cls"]), cls=st.booleans(), seed=st.integers(0, 1000))
def test_positions(where, cls, seed):
    generator = torch.Generator().manual_seed(seed)
    visible, valid = (torch.rand(3, 7, generator=generator) < 0.5 for _ in range(2))
    cls_valid = torch.rand(3, 1, generator=generator) < 0.5
    everything = torch.cat([cls_valid, valid], dim=1)
    tokens = torch.zeros(3, 8, 2)
    found = FeatureLoss(where=where, cls=cls).positions([Pair(tokens, tokens, everything, everything)], visible)
    assert found.shape == (3, 8)
    for b in range(3):
        assert bool(found[b, 0]) == (cls and bool(cls_valid[b, 0]))
        for n in range(7):
            wanted = {"visible": bool(visible[b, n]), "hidden": not visible[b, n], "all": True, "cls": False}[where]
            assert bool(found[b, 1 + n]) == (wanted and bool(valid[b, n]))


@pytest.mark.parametrize("name", DISTANCES)
def test_the_sum_is_divided_by_the_number_of_positions_that_count(name):
    student, target = draw(3, 5, 4), draw(3, 5, 4, seed=1)
    counts = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    counts[0] = False  # an image without any
    each = [
        naive_distance(name, student[b, n].tolist(), target[b, n].tolist(), 1.0)
        for b in range(3)
        for n in range(5)
        if counts[b, n]
    ]
    assert float(loss_of(FeatureLoss(distance=name), student, target, counts)) == pytest.approx(
        sum(each) / len(each), rel=1e-5
    )


@pytest.mark.parametrize("name", DISTANCES)
def test_no_position_gives_0_and_no_gradient(name):
    student = draw(2, 3, 4).requires_grad_()
    loss = loss_of(FeatureLoss(distance=name), student, torch.zeros_like(student), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0 and not student.grad.any()


@pytest.mark.parametrize("name", DISTANCES)
def test_positions_that_do_not_count_get_no_gradient(name):
    student = draw(2, 3, 4).requires_grad_()
    counts = torch.tensor([[True, False, True], [False, False, True]])
    loss_of(FeatureLoss(distance=name), student, draw(2, 3, 4, seed=1), counts).backward()
    assert torch.equal(student.grad.abs().sum(dim=-1) > 0, counts)


@pytest.mark.parametrize("kind", [FeatureLoss, RelationLoss])
def test_a_distance_at_a_position_that_one_of_two_teachers_saw_counts_once(kind):
    """The mean goes over the positions that any teacher saw; each teacher adds where it has weight."""
    tokens, seen = draw(2, 4, 3), torch.tensor([[True, True, False, False]] * 2)
    nobody = torch.zeros_like(seen)
    pairs = [Pair(tokens, draw(2, 4, 3, seed=1), part, part) for part in (seen, nobody)]
    objective = kind(where="all", cls=True)
    compared, positions = objective.pairs(None, pairs, StudentOutput(tokens, tokens, (), None, None), [], seen[:, 1:])
    assert torch.equal(positions, seen)
    distances = torch.stack([objective.distance_of(pair) for pair in compared])
    found = mean_over(distances, compared, positions)
    assert found.shape == (2, 2) and not found[1].any()
    torch.testing.assert_close(found[0].sum(), distances[0][seen].mean())
