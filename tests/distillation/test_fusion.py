"""The consensus gate against the paper's equations written as loops, and what must hold for any tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from comad.distillation.fusion import Consensus, Fusion, Gate, Mean, Pair
from comad.models.backbone import Tokens

SCORES = {"both": (True, True), "affinity": (True, False), "consensus": (False, True), "uniform": (False, False)}
FUSIONS = [Gate(), Gate(detached=False), Gate(renormalize=True, detached=False), Mean(), Mean(renormalize=True)]


def tokens(num_teachers: int, seed: int = 0, share_seen: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Student (2, 5, 6), teachers (M, 2, 5, 6), float64, and which teacher saw which token."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)
    teachers = torch.randn(num_teachers, 2, 5, 6, dtype=torch.float64, generator=generator)
    return student, teachers, torch.rand(num_teachers, 2, 5, generator=generator) < share_seen


class Found(NamedTuple):
    target: Tensor
    weights: Tensor


def fuse(fusion: Fusion, student: Tensor, teachers: Tensor, valid: Tensor) -> Found:
    """The fused target and the weights of the teachers."""
    pairs = [Pair(student, tokens, seen, seen) for tokens, seen in zip(teachers, valid, strict=True)]
    (pair,), weights = fusion(fusion.build([6] * len(pairs)), pairs)
    assert pair.prediction is student and torch.equal(pair.valid, valid.any(dim=0))
    return Found(pair.target, weights)


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def cos(x: list[float], y: list[float]) -> float:
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


def gate_of_one_token(student, teachers, valid, scores: tuple[bool, bool], temperature: float) -> list[float]:
    """α of arXiv:2508.04816 among the teachers that saw the token."""
    saw = [m for m, seen in enumerate(valid) if seen]
    e = {}
    for m in saw:
        s = cos(student, teachers[m])
        others = [cos(teachers[m], teachers[k]) for k in saw if k != m]
        c = sum(others) / len(others) if others else 0.0
        e[m] = s * scores[0] + c * scores[1]
    total = sum(math.exp(value / temperature) for value in e.values())
    return [math.exp(e[m] / temperature) / total if m in e else 0.0 for m in range(len(teachers))]


@settings(max_examples=40, deadline=None)
@given(
    num_teachers=st.integers(1, 4),
    scores=st.sampled_from(sorted(SCORES)),
    temperature=st.sampled_from([0.1, 0.5, 3.0]),
    seed=st.integers(0, 10_000),
)
def test_gate_is_the_papers_equations(num_teachers, scores, temperature, seed):
    student, teachers, valid = tokens(num_teachers, seed)
    affinity, consensus = SCORES[scores]
    gate = Gate(affinity=affinity, consensus=consensus, temperature=temperature)
    fused = fuse(gate, student, teachers, valid)
    for b in range(2):
        for n in range(5):
            rows = teachers[:, b, n].tolist()
            weights = gate_of_one_token(
                student[b, n].tolist(), rows, valid[:, b, n].tolist(), SCORES[scores], temperature
            )
            target = [sum(w * row[d] for w, row in zip(weights, rows, strict=True)) for d in range(6)]
            assert fused.weights[:, b, n].tolist() == pytest.approx(weights, abs=1e-10)
            assert fused.target[b, n].tolist() == pytest.approx(target, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(num_teachers=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_mean_is_the_mean_of_those_who_saw_the_token(num_teachers, seed):
    student, teachers, valid = tokens(num_teachers, seed)
    fused = fuse(Mean(), student, teachers, valid)
    for b in range(2):
        for n in range(5):
            rows = [teachers[m, b, n] for m in range(num_teachers) if valid[m, b, n]]
            expected = sum(rows) / len(rows) if rows else torch.zeros(6, dtype=torch.float64)
            torch.testing.assert_close(fused.target[b, n], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gate", [Gate(temperature=1e9), Gate(affinity=False, consensus=False)], ids=["hot", "uniform"])
def test_a_gate_without_preference_is_the_mean(gate):
    case = tokens(3)
    for ours, mean in zip(fuse(gate, *case), fuse(Mean(), *case), strict=True):
        torch.testing.assert_close(ours, mean.to(ours.dtype), atol=1e-7, rtol=1e-7)


def test_a_cold_gate_picks_the_best_teacher():
    student, teachers, valid = tokens(3, share_seen=1.1)
    gate = Gate(temperature=1e-4)
    best = gate.scores(student, teachers, valid).argmax(dim=0)
    assert torch.equal(fuse(gate, student, teachers, valid).weights.argmax(dim=0), best)
    assert fuse(gate, student, teachers, valid).weights.max(dim=0).values.min() > 0.99


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_only_teacher_that_saw_the_token_gets_all_the_weight(fusion):
    student, teachers, valid = tokens(3)
    valid[:] = False
    valid[1] = True
    target, weights = fuse(fusion, student, teachers, valid)
    assert torch.equal(weights[1], torch.ones_like(weights[1])) and not weights[[0, 2]].any()
    expected = F.layer_norm(teachers[1], (6,)) if fusion.renormalize else teachers[1]
    torch.testing.assert_close(target, expected, atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 10_000), fusion=st.sampled_from(FUSIONS))
def test_permuting_teachers_permutes_weights_and_keeps_the_target(order, seed, fusion):
    student, teachers, valid = tokens(4, seed)
    before, after = fuse(fusion, student, teachers, valid), fuse(fusion, student, teachers[order], valid[order])
    torch.testing.assert_close(after.weights, before.weights[order])
    torch.testing.assert_close(after.target, before.target)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_weights_are_a_share_of_one_and_what_a_teacher_did_not_see_is_ignored(fusion):
    student, teachers, valid = tokens(3, seed=3)
    target, weights = fuse(fusion, student, teachers, valid)
    torch.testing.assert_close(weights.sum(dim=0).double(), valid.any(dim=0).double())
    assert not weights[~valid].any()
    elsewhere = torch.where(valid.unsqueeze(-1), teachers, torch.full_like(teachers, 7.0))
    torch.testing.assert_close(fuse(fusion, student, elsewhere, valid).target, target)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_nobody_saw_gives_zeros_and_finite_gradients(fusion, dtype):
    student, teachers, valid = tokens(3)
    valid[:, 0, 0] = False
    teachers[~valid] = 0.0  # as the scatter of dropped patches leaves them
    student[0, 0] = 0.0
    student, teachers = (x.to(dtype).requires_grad_() for x in (student, teachers))
    target, weights = fuse(fusion, student, teachers, valid)
    assert not weights[:, 0, 0].any() and not target[0, 0].any()
    (target.float() * torch.arange(6.0)).sum().backward()
    assert target.isfinite().all() and teachers.grad.isfinite().all()
    assert student.grad is None or student.grad.isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_weights_or_targets(fusion, dtype):
    student, teachers, valid = tokens(3)
    case = student.float(), 100 * teachers.float(), valid
    with torch.autocast("cpu", dtype):
        found = fuse(fusion, *case)
    for ours, exact in zip(found, fuse(fusion, *case), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact)


def test_no_gradient_passes_through_detached_weights():
    student, teachers, valid = tokens(3, share_seen=1.1)
    student, teachers = student.requires_grad_(), teachers.requires_grad_()
    target, weights = fuse(Gate(), student, teachers, valid)
    assert not weights.requires_grad
    up = torch.randn(target.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    student_grad, teacher_grad = torch.autograd.grad((target * up).sum(), (student, teachers), allow_unused=True)
    assert student_grad is None
    torch.testing.assert_close(teacher_grad, weights.unsqueeze(-1) * up)


def test_gradient_passes_through_weights_that_are_not_detached():
    student, teachers, valid = tokens(2, share_seen=1.1)
    gate = Gate(detached=False, temperature=1.0)
    inputs = (student.requires_grad_(), teachers.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: tuple(fuse(gate, s, t, valid)), inputs)
    target, _ = fuse(gate, student, teachers, valid)
    target[..., 0].sum().backward()
    assert student.grad.abs().sum() > 0


def test_renormalized_targets_have_mean_0_and_variance_1():
    case = tokens(3, share_seen=1.1)
    for fusion in (Gate(), Mean()):
        plain, normal = fuse(fusion, *case).target, fuse(replace(fusion, renormalize=True), *case).target
        assert normal.mean(dim=-1).abs().max() < 1e-9
        assert (normal.var(dim=-1, unbiased=False) - 1).abs().max() < 1e-3
        torch.testing.assert_close(normal, F.layer_norm(plain, (6,)))


def test_lengths_do_not_change_the_weights():
    student, teachers, valid = tokens(3)
    scale = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64).view(3, 1, 1, 1)
    torch.testing.assert_close(
        fuse(Gate(), 5 * student, teachers * scale, valid).weights, fuse(Gate(), student, teachers, valid).weights
    )


def knowing(seed: int, images: int = 96, width: int = 24) -> tuple[list[Tensor], list[Tensor]]:
    """Class tokens and patches of three teachers: two know the same eight facts of an image, the third is noise."""
    generator = torch.Generator().manual_seed(seed)
    facts = torch.randn(images, 8, generator=generator)
    maps = [torch.randn(8, width, generator=generator) for _ in range(2)]
    noise = [torch.randn(images, width, generator=generator) for _ in range(3)]
    cls = [facts @ maps[0] + 0.5 * noise[0], facts @ maps[1] + 0.5 * noise[1], noise[2]]
    return cls, [part.unsqueeze(1) + 0.1 * torch.randn(images, 4, width, generator=generator) for part in cls]


def consensus(fusion: Consensus, cls, patches, valid=None) -> Tensor:
    """Weights of the class token and four patches of every image but the anchors."""
    state = fusion.build([part.shape[-1] for part in patches])
    fusion.calibrate(
        state, [Tokens(c[: fusion.anchors], p[: fusion.anchors]) for c, p in zip(cls, patches, strict=True)]
    )
    targets = [torch.cat([c.unsqueeze(1), p], dim=1)[fusion.anchors :] for c, p in zip(cls, patches, strict=True)]
    valid = torch.ones(len(targets), *targets[0].shape[:2], dtype=torch.bool) if valid is None else valid
    pairs = [Pair(part, part, seen, seen) for part, seen in zip(targets, valid, strict=True)]
    weighed, shares = fusion(state, pairs)
    torch.testing.assert_close(torch.stack([pair.weight for pair in weighed]), shares)
    return shares


def test_noise_among_teachers_has_no_share_in_the_consensus():
    shares = consensus(Consensus(anchors=32), *knowing(0)).mean(dim=(1, 2))
    assert shares[2] < 0.05 and abs(shares[0] - 0.5) < 0.05
    cls, patches = knowing(0)
    assert torch.allclose(consensus(Consensus(anchors=32), cls[1:], patches[1:]), torch.tensor(0.5))


def test_consensus_is_the_correlation_of_rows_of_cosines():
    cls, patches = knowing(1)
    shares = consensus(Consensus(anchors=16, power=2.0), cls, patches)
    for token in range(2):  # the class token, and the first patch
        anchors = cls if token == 0 else [part.mean(dim=1) for part in patches]
        shown = cls if token == 0 else [part[:, 0] for part in patches]
        for image in (0, 7):
            rows = []
            for own, tokens in zip(anchors, shown, strict=True):
                centre = own[:16].mean(dim=0)
                rows.append([cos((tokens[16 + image] - centre).tolist(), (x - centre).tolist()) for x in own[:16]])
            mean = [sum(row) / 16 for row in rows]
            rows = [[x - mid for x in row] for row, mid in zip(rows, mean, strict=True)]
            scores = [max(0.0, sum(cos(a, b) for b in rows if b is not a) / 2) ** 2 for a in rows]
            wanted = torch.tensor([score / sum(scores) for score in scores])
            torch.testing.assert_close(shares[:, image, token], wanted, atol=1e-4, rtol=1e-3)


def test_consensus_is_among_the_teachers_that_saw_the_token():
    cls, patches = knowing(2)
    valid = torch.rand(3, 64, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    shares = consensus(Consensus(anchors=32), cls, patches, valid)
    assert (shares[~valid] == 0).all() and torch.allclose(shares.sum(dim=0), valid.any(dim=0).float())
    alone = valid.sum(dim=0) == 1
    assert alone.any() and torch.allclose(shares.amax(dim=0)[alone], torch.ones(()))
