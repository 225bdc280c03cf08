"""Calibrated aligners: a common basis, one scale, no training; the paper's trained ones; heads of the student."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distill.aligners import Aligner, ProcrustesAligner, StudentProjector, TrainedAdapter, common_rotations
from comad.distill.features import StudentOutput

FIXED = ProcrustesAligner()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(width, width, seed=seed))[0]


def uneven(count: int, width: int, seed: int = 0) -> Tensor:
    """Tokens with unlike channels and a mean far from 0, as those of real teachers."""
    return draw(count, width, seed=seed) * torch.linspace(3.0, 0.2, width) + 5 * draw(width, seed=seed + 1)


def build(aligner: Aligner, widths: list[int], width: int) -> Any:
    return aligner.build(widths, width, [False] * len(widths), True)


def calibrated(tokens: list[Tensor], width: int) -> Any:
    """The state of fixed maps."""
    state = build(FIXED, [part.shape[1] for part in tokens], width)
    FIXED.calibrate(state, tokens)
    return state


def aligned(state: nn.Module, tokens: Tensor, teacher: int) -> Tensor:
    return FIXED.teacher(state, tokens.unsqueeze(0), teacher)


def mean_cosine(x: Tensor, y: Tensor) -> float:
    return float(F.cosine_similarity(x, y, dim=-1).mean().detach())


def test_rotations_are_orthogonal_and_bring_rotated_copies_together():
    scores = draw(200, 6).double()
    turns = [rotation(6, seed).double() for seed in (1, 2, 3)]
    copies = [scores @ turn for turn in turns]
    found = common_rotations(copies)
    for matrix in found:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(6, dtype=torch.float64))
    first, *others = (copy @ matrix for copy, matrix in zip(copies, found, strict=True))
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)


def test_map_is_centred_with_mean_variance_1_before_the_norm():
    tokens = [uneven(500, 24, seed=seed) for seed in (0, 10, 20)]
    for linear, part in zip(calibrated(tokens, 8), tokens, strict=True):
        mapped = linear(part)
        assert mapped.mean(dim=0).abs().max() < 1e-4
        assert float(mapped.var(dim=0, unbiased=False).mean()) == pytest.approx(1.0, rel=1e-4)


def test_map_is_an_orthogonal_projection_times_one_scale():
    weight = calibrated([uneven(500, 24), uneven(500, 24, seed=5)], 8)[1].weight.double()
    gram = weight @ weight.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_kept_directions_are_those_of_largest_variance():
    tokens = uneven(500, 24)
    weight = calibrated([tokens], 8)[0].weight
    directions = torch.linalg.qr(weight.T)[0]
    kept = float(((tokens - tokens.mean(dim=0)) @ directions).var(dim=0, unbiased=False).sum())
    covariance = torch.cov(tokens.T, correction=0)
    assert kept == pytest.approx(float(torch.linalg.eigvalsh(covariance)[-8:].sum()), rel=1e-4)


@pytest.mark.parametrize("width", [8, 24])
def test_rotated_scaled_and_shifted_copies_of_one_teacher_agree(width):
    tokens = uneven(500, 24)
    copies = [tokens, tokens @ rotation(24, 1), 7 * tokens @ rotation(24, 2) + 3]
    state = calibrated(copies, width)
    found = [aligned(state, copy, m) for m, copy in enumerate(copies)]
    assert mean_cosine(found[0], found[1]) > 0.99
    assert mean_cosine(found[0], found[2]) > 0.99


def test_agreement_carries_over_to_tokens_not_calibrated_on():
    tokens, turn = uneven(800, 24), rotation(24, 1)
    state = calibrated([tokens[:500], tokens[:500] @ turn], 8)
    held_out = tokens[500:]
    assert mean_cosine(aligned(state, held_out, 0), aligned(state, held_out @ turn, 1)) > 0.99


def test_related_teachers_agree_more_than_unrelated_ones():
    tokens = uneven(500, 24)
    parts = [tokens, tokens @ rotation(24, 1) + 0.5 * draw(500, 24, seed=2), uneven(500, 24, seed=9)]
    state = calibrated(parts, 8)
    first, second, third = (aligned(state, part, m) for m, part in enumerate(parts))
    assert mean_cosine(first, second) > 0.5 > 0.3 > mean_cosine(first, third)


@pytest.mark.parametrize("widths", [(6,), (6, 24), (24, 6), (6, 5)])
def test_teacher_narrower_than_the_student(widths):
    tokens = [uneven(300, width, seed=width) for width in widths]
    state = calibrated(tokens, 16)
    for m, part in enumerate(tokens):
        found = aligned(state, part, m)
        assert found.shape == (1, 300, 16) and found.isfinite().all()
        assert torch.linalg.matrix_rank(state[m].weight) == min(16, part.shape[1])


def test_a_narrow_copy_agrees_with_its_wide_original():
    narrow = uneven(500, 6)
    wide = narrow @ rotation(24, 3)[:6]
    state = calibrated([wide, narrow], 16)
    assert mean_cosine(aligned(state, wide, 0), aligned(state, narrow, 1)) > 0.99


def test_fewer_tokens_than_channels_and_constant_tokens_stay_finite():
    for tokens in (uneven(5, 24), torch.ones(50, 24)):
        assert aligned(calibrated([tokens], 16), tokens, 0).isfinite().all()


def test_outputs_have_mean_0_and_variance_1_per_token():
    tokens = uneven(500, 24)
    found = aligned(calibrated([tokens], 8), tokens, 0)
    assert found.mean(dim=-1).abs().max() < 1e-5
    assert (found.var(dim=-1, unbiased=False) - 1).abs().median() < 1e-3


def test_calibration_is_deterministic_and_is_never_trained():
    tokens = [uneven(300, 24), uneven(300, 12, seed=4)]
    first, second = calibrated(tokens, 8), calibrated(tokens, 8)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    restored = build(FIXED, [24, 12], 8)
    restored.load_state_dict(first.state_dict())
    assert torch.equal(aligned(restored, tokens[1], 1), aligned(first, tokens[1], 1))


@pytest.mark.parametrize("aligner", [ProcrustesAligner(), TrainedAdapter()])
def test_half_precision_teachers_are_mapped_in_float32(aligner):
    tokens = uneven(300, 24)
    state = build(aligner, [24], 8)
    aligner.calibrate(state, [tokens])
    found = aligner.teacher(state, tokens.bfloat16().unsqueeze(0), 0)
    assert found.dtype == torch.float32
    assert mean_cosine(found, aligner.teacher(state, tokens.unsqueeze(0), 0)) > 0.999


def test_an_adapter_is_a_linear_map_and_a_norm_per_teacher():
    torch.manual_seed(0)
    aligner = TrainedAdapter()
    state = build(aligner, [24, 12], 8)
    nn.init.normal_(state["norm"][1].weight)
    tokens = draw(2, 5, 12)
    mapped = tokens @ state["linear"][1].weight.T + state["linear"][1].bias
    variance, mean = torch.var_mean(mapped, dim=-1, keepdim=True, correction=0)
    expected = (mapped - mean) / (variance + 1e-5).sqrt() * state["norm"][1].weight + state["norm"][1].bias
    torch.testing.assert_close(aligner.teacher(state, tokens, 1), expected)
    assert not aligner.num_calibration_images and all(parameter.requires_grad for parameter in state.parameters())


# --- heads on the student's side

HEADS = [
    StudentProjector(head="linear"),
    StudentProjector(head="linear", separate_cls=True),
    StudentProjector(head="mlp", separate_cls=True, hidden_ratio=2.0),
    StudentProjector(head="multi-layer", separate_cls=True),
    StudentProjector(head="transformer"),
]
of_head = pytest.mark.parametrize("aligner", HEADS, ids=lambda aligner: f"{aligner.head}-{aligner.separate_cls}")


def student_output(num_taps: int, seed: int = 0) -> StudentOutput:
    last, *taps = (draw(2, 5, 32, seed=seed + tap) for tap in range(num_taps))
    return StudentOutput(last, last, tuple(taps), None, None)


@of_head
def test_one_head_per_teacher_and_every_parameter_is_trained(aligner):
    state = aligner.build([24, 48], 32, [False, True], False)
    found = [aligner.student(state, student_output(aligner.num_taps), m) for m in range(2)]
    assert [part.shape for part in found] == [(2, 5, 24), (2, 5, 48)]
    if aligner.separate_cls:
        assert not found[0][:, 0].any() and found[1][:, 0].any()  # no head for a class token that says nothing
    sum(part.square().sum() for part in found).backward()
    assert all(p.grad is not None and p.grad.any() for p in state.parameters())


@of_head
def test_fused_targets_share_one_head(aligner):
    state, output = aligner.build([24, 24], 32, [False, True], True), student_output(aligner.num_taps)
    assert torch.equal(aligner.student(state, output, 0), aligner.student(state, output, 1))
    alone = aligner.build([24], 32, [True], False)
    assert sum(p.numel() for p in state.parameters()) == sum(p.numel() for p in alone.parameters())


def test_a_multi_layer_head_is_the_sum_over_its_taps():
    aligner, output = StudentProjector(head="multi-layer", taps=3), student_output(3)
    state = aligner.build([24], 32, [True], False)
    sources = (*output.intermediates, output.compared)
    parts = [part(source) for part, source in zip(state["patches"][0].maps, sources, strict=True)]
    torch.testing.assert_close(aligner.student(state, output, 0), parts[0] + parts[1] + parts[2])


def test_targets_of_a_projector_stay_as_they_are():
    aligner, target = StudentProjector(), draw(2, 5, 24)
    state = aligner.build([24], 32, [True], False)
    assert torch.equal(aligner.teacher(state, target, 0), target) and aligner.own_loss(state, target, 0) is None
    identity = StudentProjector(head="identity")
    assert identity.student(identity.build([24], 32, [True], False), student_output(1), 0).shape == (2, 5, 32)
