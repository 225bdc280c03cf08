"""Norms of new heads: set once by data, in the order in which data pass."""

import pytest
import torch
from torch import nn

from comad.evaluate.segmentation.heads import UPerHead
from comad.models.pyramid import SimplePyramid, centring_norms


def maps(count: int = 6) -> list[torch.Tensor]:
    """Four maps with channels that are large and the same in all images, as a Vision Transformer has them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 16, 6, 6, generator=generator) + 50 * torch.arange(16).view(-1, 1, 1) for _ in range(4)]


HEADS = {
    "upernet": lambda: UPerHead([16] * 4, [8] * 4, 32, 5),
    "pyramid": lambda: SimplePyramid([16] * 4, [8] * 4, 32),
}


@pytest.mark.parametrize("name", HEADS)
def test_every_channel_behind_a_norm_has_mean_0_and_variance_1(name):
    torch.manual_seed(0)
    head, said = HEADS[name]().eval(), {}
    with centring_norms(head):
        head(maps())
    norms = {part: key for key, part in head.named_modules() if isinstance(part, nn.GroupNorm)}
    for norm in norms:
        norm.register_forward_hook(lambda norm, inputs, output: said.update({norms[norm]: output}))
    first = head(maps())
    assert len(said) == len(norms) > 7
    for key, output in said.items():
        std, mean = torch.std_mean(output, dim=(0, 2, 3), correction=0)
        assert torch.allclose(mean, torch.zeros(32), atol=1e-3), key
        assert torch.allclose(std, torch.ones(32), atol=1e-3), key
    for part in first.values() if isinstance(first, dict) else [first]:
        assert part.requires_grad  # the norms are trained on from there


def test_a_single_view_gives_finite_numbers():
    torch.manual_seed(0)
    head = UPerHead([16] * 4, [8] * 4, 32, 5).eval()
    with centring_norms(head):
        head(maps(1))  # pooled to one cell, each channel has one value
    assert all(part.isfinite().all() and part.abs().max() < 1e4 for part in head.state_dict().values())
    assert head(maps(2)).isfinite().all()


def test_nothing_but_norms_of_the_heads_changes():
    torch.manual_seed(0)
    head, other = HEADS["upernet"]().eval(), nn.GroupNorm(4, 16)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with centring_norms(head):
        head([other(part) for part in maps()])
    norms = {key for key, part in head.named_modules() if isinstance(part, nn.GroupNorm)}
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in changed} == norms
    assert torch.equal(other.weight, torch.ones(16)) and torch.equal(other.bias, torch.zeros(16))
