"""What normalisers make of tokens, against float64, and what they keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distillation.normalizers import L2, PHIS, LayerNorm, NoNormalizer, Normalizer, Standardize, hadamard
from comad.models.backbone import Tokens


def uneven(count: int, width: int = 12, seed: int = 0) -> Tensor:
    """Correlated channels of unlike size, far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.linspace(3.0, 0.1, width)
    return torch.randn(count, 5, width, generator=generator) @ mix + 4


def tokens(count: int = 40, width: int = 12, seed: int = 0) -> Tokens:
    return Tokens(uneven(count, width, seed + 100)[:, 0], uneven(count, width, seed))


def moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and variance of each channel, by loops in float64."""
    rows = x.flatten(0, -2).double().tolist()
    columns = list(zip(*rows, strict=True))
    means = [sum(column) / len(column) for column in columns]
    return means, [sum((v - m) ** 2 for v in c) / len(c) for c, m in zip(columns, means, strict=True)]


def assert_standard(x: Tensor) -> None:
    means, variances = moments(x)
    assert means == pytest.approx([0.0] * len(means), abs=1e-3)
    count = x.flatten(0, -2).shape[0]
    assert variances == pytest.approx([(count - 1) / count] * len(means), rel=1e-2)  # by n - 1, as published


def calibrated(normalizer: Normalizer, *given: Tokens) -> nn.Module:
    state = normalizer.build([part.patches.shape[2] for part in given])
    normalizer.calibrate(state, given)
    return state


def test_functions_of_one_token():
    given = tokens()
    none, norm, unit = (
        normalizer(normalizer.build([12]), given, 0) for normalizer in (NoNormalizer(), LayerNorm(), L2())
    )
    assert none is given
    torch.testing.assert_close(norm.patches, F.layer_norm(given.patches, (12,)))
    torch.testing.assert_close(unit.cls.norm(dim=-1), torch.ones(40))
    assert L2()(nn.Module(), given._replace(cls=None), 0).cls is None


def test_batch_moments_make_every_channel_standard_class_and_patches_apart():
    normalizer = Standardize(over="batch")
    cls, patches, *_ = normalizer(normalizer.build([12]), tokens(), 0)
    assert_standard(cls)
    assert_standard(patches)


def test_calibrated_moments_are_taken_once():
    normalizer = Standardize(over="calibration")
    state = calibrated(normalizer, tokens(), tokens(seed=1))
    for m in range(2):
        for row in normalizer(state, tokens(seed=m), m)[:2]:
            assert_standard(row)
    before = {name: value.clone() for name, value in state.state_dict().items()}
    normalizer(state, tokens(seed=7), 0)
    normalizer.follow(state, tokens(seed=7), 0, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in state.state_dict().items())


def test_running_moments_forget_less_and_less():
    normalizer = Standardize(over="running", momentum=0.4, momentum_end=0.2)
    state, expected = normalizer.build([12]), torch.zeros(12)
    for seed, (progress, share) in enumerate([(0.0, 0.4), (0.5, 0.3), (1.0, 0.2)]):
        normalizer.follow(state, tokens(seed=seed), 0, progress)
        expected = (1 - share) * expected + share * uneven(40, seed=seed).flatten(0, 1).mean(dim=0)
        torch.testing.assert_close(state[0].mean_patches, expected)
    normalizer(state, tokens(seed=9), 0)
    torch.testing.assert_close(state[0].mean_patches, expected)


def test_running_moments_are_those_of_the_calibration_until_the_first_batch():
    running, fixed = Standardize(over="running"), Standardize(over="calibration")
    ours, theirs = (calibrated(normalizer, tokens()).eval() for normalizer in (running, fixed))
    assert torch.equal(running(ours, tokens(seed=3), 0).patches, fixed(theirs, tokens(seed=3), 0).patches)
    running.follow(ours, tokens(seed=4), 0, 0.0)
    torch.testing.assert_close(ours[0].mean_patches, uneven(40, seed=4).flatten(0, 1).mean(dim=0))


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 24, 48, 192, 384, 768, 1152])
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_size(order):
    matrix = hadamard(order).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))


def test_a_width_without_a_hadamard_matrix_is_refused():
    with pytest.raises(ValueError, match="width 10; use"):
        PHIS().build([10])


def test_phi_s_gives_variance_1_in_every_channel_and_is_a_rotation_times_one_scale():
    given = tokens(400)
    state = calibrated(PHIS(), given)
    found = PHIS()(state, given, 0)
    assert_standard(found.patches)
    assert found.cls is given.cls
    matrix = state[0].weight.double()
    torch.testing.assert_close(matrix @ matrix.T / (matrix @ matrix.T)[0, 0], torch.eye(12).double(), atol=1e-5, rtol=0)
    values = torch.linalg.eigvalsh(torch.cov(given.patches.flatten(0, 1).double().T))
    assert float((matrix @ matrix.T)[0, 0]) == pytest.approx(1 / float(values.mean()), rel=1e-4)


@pytest.mark.parametrize("normalizer", [Standardize(over="running"), Standardize(over="calibration"), PHIS()])
def test_what_was_fitted_is_in_the_state_and_is_never_trained(normalizer):
    first, second = calibrated(normalizer, tokens()), normalizer.build([12])
    normalizer(first, tokens(seed=3), 0)
    second.load_state_dict(first.state_dict())
    ours, theirs = (normalizer(state.eval(), tokens(seed=5), 0).patches for state in (first, second))
    assert torch.equal(ours, theirs)
    assert not any(parameter.requires_grad for parameter in first.parameters())
