"""Decoders of masked autoencoders: ours and official files, at any grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from comad.models.decoder import MaskedDecoder
from comad.models.mae_decoder import load_decoder

TOKENS, VISIBLE = torch.rand(2, 3, 24), torch.tensor([[0, 3, 5], [1, 2, 9]])


def official(decoder: MaskedDecoder) -> dict[str, Tensor]:
    """The names and shapes of facebookresearch/mae."""
    names = {"embed": "decoder_embed", "blocks": "decoder_blocks", "norm": "decoder_norm", "predict": "decoder_pred"}
    state = {}
    for name, tensor in decoder.state_dict().items():
        first, _, rest = name.partition(".")
        state[f"{names[first]}.{rest}" if rest else name] = tensor
    state["mask_token"] = decoder.mask_token.detach().view(1, 1, -1)
    positions = torch.cat([torch.zeros(1, decoder.positions.shape[1]), decoder.positions])
    encoder = {"cls_token": torch.zeros(1, 1, 24), "pos_embed": torch.zeros(1, 17, 24)}
    return state | encoder | {"decoder_pos_embed": positions.unsqueeze(0)}


@pytest.fixture
def decoder() -> MaskedDecoder:
    return MaskedDecoder(24, (4, 4), 48, width=64, depth=2, heads=2)


def test_the_decoder_of_an_official_file(tmp_path, decoder):
    torch.save({"model": official(decoder)}, tmp_path / "full.pth")
    loaded = load_decoder(f"mae={tmp_path / 'full.pth'}", (4, 4))
    torch.testing.assert_close(loaded(None, TOKENS, VISIBLE), decoder(None, TOKENS, VISIBLE))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_positions_are_resampled_to_another_grid(tmp_path, decoder):
    torch.save({"model": official(decoder)}, tmp_path / "full.pth")
    assert load_decoder(f"mae={tmp_path / 'full.pth'}", (6, 6))(None, TOKENS, VISIBLE).shape == (2, 36, 48)


def test_a_file_with_other_tensors_is_refused(tmp_path, decoder):
    state = official(decoder)
    del state["decoder_norm.weight"]
    torch.save({"model": state}, tmp_path / "full.pth")
    with pytest.raises(ValueError, match="not that of a masked autoencoder"):
        load_decoder(f"mae={tmp_path / 'full.pth'}", (4, 4))


@pytest.mark.parametrize("spec", ["ibot-stamps", "vit_tiny_patch16_224:random", "a=nowhere.pth"])
def test_a_teacher_without_decoder_is_told_where_to_get_one(spec):
    with pytest.raises(ValueError, match=r"no MAE decoder lies with this teacher.*comad pretrain mae"):
        load_decoder(spec, (6, 6))
