"""Calibrated aligners: a common basis, one scale, no training; and the paper's trained ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distill.aligners import Frozen, FrozenAligners, Trained, common_rotations


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(width, width, seed=seed))[0]


def uneven(count: int, width: int, seed: int = 0) -> Tensor:
    """Tokens with unlike channels and a mean far from 0, as those of real teachers."""
    return draw(count, width, seed=seed) * torch.linspace(3.0, 0.2, width) + 5 * draw(width, seed=seed + 1)


def calibrated(tokens: list[Tensor], width: int) -> FrozenAligners:
    aligners = Frozen().build([part.shape[1] for part in tokens], width)
    aligners.calibrate(tokens)
    return aligners


def before_norm(aligners: FrozenAligners, tokens: Tensor, teacher: int) -> Tensor:
    return F.linear(tokens, getattr(aligners, f"weight_{teacher}"), getattr(aligners, f"bias_{teacher}"))


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
    aligners = calibrated(tokens, 8)
    for m, part in enumerate(tokens):
        mapped = before_norm(aligners, part, m)
        assert mapped.mean(dim=0).abs().max() < 1e-4
        assert float(mapped.var(dim=0, unbiased=False).mean()) == pytest.approx(1.0, rel=1e-4)


def test_map_is_an_orthogonal_projection_times_one_scale():
    weight = calibrated([uneven(500, 24), uneven(500, 24, seed=5)], 8).weight_1.double()
    gram = weight @ weight.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_kept_directions_are_those_of_largest_variance():
    tokens = uneven(500, 24)
    weight = calibrated([tokens], 8).weight_0
    directions = torch.linalg.qr(weight.T)[0]
    kept = float(((tokens - tokens.mean(dim=0)) @ directions).var(dim=0, unbiased=False).sum())
    covariance = torch.cov(tokens.T, correction=0)
    assert kept == pytest.approx(float(torch.linalg.eigvalsh(covariance)[-8:].sum()), rel=1e-4)


@pytest.mark.parametrize("width", [8, 24])
def test_rotated_scaled_and_shifted_copies_of_one_teacher_agree(width):
    tokens = uneven(500, 24)
    copies = [tokens, tokens @ rotation(24, 1), 7 * tokens @ rotation(24, 2) + 3]
    aligners = calibrated(copies, width)
    aligned = [aligners(copy.unsqueeze(0), m) for m, copy in enumerate(copies)]
    assert mean_cosine(aligned[0], aligned[1]) > 0.99
    assert mean_cosine(aligned[0], aligned[2]) > 0.99


def test_agreement_carries_over_to_tokens_not_calibrated_on():
    tokens, turn = uneven(800, 24), rotation(24, 1)
    aligners = calibrated([tokens[:500], tokens[:500] @ turn], 8)
    held_out = tokens[None, 500:]
    assert mean_cosine(aligners(held_out, 0), aligners(held_out @ turn, 1)) > 0.99


def test_related_teachers_agree_more_than_unrelated_ones():
    tokens = uneven(500, 24)
    related = tokens @ rotation(24, 1) + 0.5 * draw(500, 24, seed=2)
    aligners = calibrated([tokens, related, uneven(500, 24, seed=9)], 8)
    first, second, third = (
        aligners(part.unsqueeze(0), m) for m, part in enumerate((tokens, related, uneven(500, 24, seed=9)))
    )
    assert mean_cosine(first, second) > 0.5 > 0.3 > mean_cosine(first, third)


@pytest.mark.parametrize("widths", [(6,), (6, 24), (24, 6), (6, 5)])
def test_teacher_narrower_than_the_student(widths):
    tokens = [uneven(300, width, seed=width) for width in widths]
    aligners = calibrated(tokens, 16)
    for m, part in enumerate(tokens):
        aligned = aligners(part.unsqueeze(0), m)
        assert aligned.shape == (1, 300, 16) and aligned.isfinite().all()
        assert torch.linalg.matrix_rank(getattr(aligners, f"weight_{m}")) == min(16, part.shape[1])


def test_a_narrow_copy_agrees_with_its_wide_original():
    narrow = uneven(500, 6)
    wide = narrow @ rotation(24, 3)[:6]
    aligners = calibrated([wide, narrow], 16)
    assert mean_cosine(aligners(wide.unsqueeze(0), 0), aligners(narrow.unsqueeze(0), 1)) > 0.99


def test_fewer_tokens_than_channels_and_constant_tokens_stay_finite():
    for tokens in (uneven(5, 24), torch.ones(50, 24)):
        assert calibrated([tokens], 16)(tokens.unsqueeze(0), 0).isfinite().all()


def test_outputs_have_mean_0_and_variance_1_per_token():
    tokens = uneven(500, 24)
    aligned = calibrated([tokens], 8)(tokens.unsqueeze(0), 0)
    assert aligned.mean(dim=-1).abs().max() < 1e-5
    assert (aligned.var(dim=-1, unbiased=False) - 1).abs().median() < 1e-3


def test_calibration_is_deterministic_and_lives_in_buffers_alone():
    tokens = [uneven(300, 24), uneven(300, 12, seed=4)]
    first, second = calibrated(tokens, 8), calibrated(tokens, 8)
    assert not list(first.parameters())
    assert list(first.state_dict()) == ["weight_0", "bias_0", "weight_1", "bias_1"]
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    restored = Frozen().build([24, 12], 8)
    restored.load_state_dict(first.state_dict())
    assert torch.equal(restored(tokens[1].unsqueeze(0), 1), first(tokens[1].unsqueeze(0), 1))


@pytest.mark.parametrize("aligner", [Frozen(), Trained()])
def test_half_precision_teachers_are_mapped_in_float32(aligner):
    tokens = uneven(300, 24)
    aligners = aligner.build([24], 8)
    aligners.calibrate([tokens])
    found = aligners(tokens.bfloat16().unsqueeze(0), 0)
    assert found.dtype == torch.float32
    assert mean_cosine(found, aligners(tokens.unsqueeze(0), 0)) > 0.999


def test_trained_is_a_linear_map_and_a_norm_per_teacher():
    torch.manual_seed(0)
    aligners = Trained().build([24, 12], 8)
    nn.init.normal_(aligners.norm[1].weight)
    tokens = draw(2, 5, 12)
    mapped = tokens @ aligners.linear[1].weight.T + aligners.linear[1].bias
    variance, mean = torch.var_mean(mapped, dim=-1, keepdim=True, correction=0)
    expected = (mapped - mean) / (variance + 1e-5).sqrt() * aligners.norm[1].weight + aligners.norm[1].bias
    torch.testing.assert_close(aligners(tokens, 1), expected)
    before = {name: value.clone() for name, value in aligners.state_dict().items()}
    aligners.calibrate([draw(20, 24), draw(20, 12)])
    assert all(torch.equal(value, before[name]) for name, value in aligners.state_dict().items())
    assert all(parameter.requires_grad for parameter in aligners.parameters())
