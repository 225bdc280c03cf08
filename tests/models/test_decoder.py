"""The decoder of dropped patches: it fills in every position from the visible ones alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from comad.models.backbone import gather_patches, random_visible, scatter_patches
from comad.models.decoder import MaskedDecoder

GRID = (3, 5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def decoder() -> MaskedDecoder:
    torch.manual_seed(0)
    return MaskedDecoder(12, GRID, 7, width=16, depth=2, heads=4).eval()


@pytest.fixture
def visible() -> Tensor:
    return random_visible(torch.rand(2, 15, generator=torch.Generator().manual_seed(1)), 6)


def test_predicts_every_position_with_and_without_class_token(decoder, visible):
    cls, patches = draw(2, 12), draw(2, 6, 12, seed=1)
    with_cls, without = decoder(cls, patches, visible), decoder(None, patches, visible)
    assert with_cls.shape == without.shape == (2, 15, 7)
    assert not torch.allclose(with_cls, without)


def test_ignores_what_hidden_patches_hold(decoder, visible):
    whole = draw(2, 15, 12)
    hidden = torch.ones(2, 15, 1).scatter(1, visible.unsqueeze(-1), 0.0)
    changed = whole + 100 * hidden * draw(2, 15, 12, seed=2)
    first, second = (decoder(None, gather_patches(tokens, visible), visible) for tokens in (whole, changed))
    assert torch.equal(first, second)


def test_every_visible_patch_matters_everywhere(decoder, visible):
    patches = draw(1, 6, 12).requires_grad_()
    for position in range(15):
        (grad,) = torch.autograd.grad(decoder(None, patches, visible[:1])[0, position].sum(), patches)
        assert (grad.abs().sum(dim=-1) > 0).all()


def test_patches_belong_to_their_positions_not_to_their_order(decoder, visible):
    patches, order = draw(2, 6, 12), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(decoder(None, patches[:, order], visible[:, order]), decoder(None, patches, visible))
    assert not torch.allclose(decoder(None, patches[:, order], visible), decoder(None, patches, visible))


def test_hidden_positions_differ_by_their_place_alone(decoder, visible):
    found = decoder(None, draw(2, 6, 12), visible)
    assert torch.pdist(found[0]).min() > 1e-4
    decoder.positions.zero_()
    found = decoder(None, draw(2, 6, 12), visible)
    hidden = [n for n in range(15) if n not in visible[0].tolist()]
    torch.testing.assert_close(found[0, hidden], found[0, hidden[:1]].expand(9, -1))


def test_mask_token_is_used_at_hidden_positions_only(decoder):
    everything = torch.arange(15).expand(2, -1)
    decoder(None, draw(2, 15, 12), everything).sum().backward()
    assert decoder.mask_token.grad is None or not decoder.mask_token.grad.any()
    decoder(None, draw(2, 6, 12), everything[:, :6]).square().sum().backward()
    assert decoder.mask_token.grad.any()


def test_images_do_not_mix(decoder, visible):
    cls, patches = draw(2, 12), draw(2, 6, 12)
    together = decoder(cls, patches, visible)
    for b in range(2):
        torch.testing.assert_close(together[b : b + 1], decoder(cls[b : b + 1], patches[b : b + 1], visible[b : b + 1]))


def test_every_parameter_gets_a_gradient_and_positions_are_not_stored(decoder, visible):
    decoder(draw(2, 12), draw(2, 6, 12), visible).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in decoder.parameters())
    assert "positions" not in decoder.state_dict()


def test_scatter_undoes_gather(visible):
    whole = draw(2, 15, 4)
    nothing = torch.zeros(15, 4)
    back = scatter_patches(gather_patches(whole, visible), visible, nothing)
    for b in range(2):
        for n in range(15):
            assert torch.equal(back[b, n], whole[b, n] if n in visible[b].tolist() else torch.zeros(4))
    everything = torch.arange(15).expand(2, -1)
    assert torch.equal(scatter_patches(gather_patches(whole, everything), everything, nothing), whole)
