"""The patch embedding as one product: the convolution it stands for, under its names."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from comad.models.embedding import PatchProjection, project_patches
from comad.models.timm_backbone import TimmBackbone


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("kernel", [4, (4, 2)])
@pytest.mark.parametrize("size", [(12, 8), (15, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_convolution_and_its_gradients(kernel, size, bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 5, kernel, kernel, bias=bias).double()
    product = PatchProjection(copy.deepcopy(plain))
    results = []
    for network in (plain, product):
        pixels = draw(2, 3, *size).requires_grad_()
        out = network(pixels)
        out.square().sum().backward()
        results.append([out, pixels.grad, *(value.grad for value in network.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_checkpoints_of_the_network_stay_as_they_are():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    before, pixels = {name: value.clone() for name, value in vit.state_dict().items()}, draw(2, 3, 32, 32).float()
    tokens = vit.eval().forward_features(pixels)
    after = TimmBackbone(vit).vit
    assert isinstance(after.patch_embed.proj, PatchProjection)
    assert list(after.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())
    torch.testing.assert_close(after.forward_features(pixels), tokens)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "no_embed_class": True},
        {"dynamic_img_size": True},
        {"pos_embed": "none"},
        {"embed_norm_layer": nn.LayerNorm},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_visible_patches_alone_give_the_tokens_and_gradients_that_all_of_them_give(arguments):
    torch.manual_seed(0)
    plain = VisionTransformer(img_size=12, patch_size=4, embed_dim=6, depth=2, num_heads=2, num_classes=0, **arguments)
    plain.pos_embed = plain.pos_embed if plain.pos_embed is None else nn.Parameter(draw(*plain.pos_embed.shape).float())
    visible, results = torch.tensor([[0, 4, 8], [1, 2, 7]]), []
    for network in (TimmBackbone(copy.deepcopy(plain)).double(), TimmBackbone(copy.deepcopy(plain)).double()):
        if results:  # the convolution again, which has to see every pixel
            projection = network.vit.patch_embed.proj
            conv = nn.Conv2d(3, 6, 4, 4, dtype=torch.float64)
            conv.load_state_dict(projection.state_dict())
            network.vit.patch_embed.proj = conv
        images = draw(2, 3, 12, 12).requires_grad_()
        tokens = network(images, visible)
        sum(part.square().sum() for part in tokens[:2] if part is not None).backward()
        gradients = [value.grad for _, value in sorted(network.named_parameters()) if value.grad is not None]
        results.append([*(part for part in tokens[:2] if part is not None), images.grad, *gradients])
    assert len(results[0]) == len(results[1]) and results[0][-1].abs().sum() > 0
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_network_whose_projection_does_not_see_pixels_is_left_alone():
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, num_classes=0)
    padded = timm.create_model("vit_tiny_patch16_224", img_size=32, dynamic_img_pad=True, depth=1)
    for vit in (hybrid, padded):
        assert type(TimmBackbone(vit).vit.patch_embed.proj) is nn.Conv2d


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(3, 6, 4, 2), nn.Conv2d(3, 6, 4, 4, padding=1), nn.Conv2d(3, 6, 4, 4, groups=3), nn.Identity()],
    ids=["overlap", "padding", "groups", "none"],
)
def test_what_is_no_cutting_into_patches_is_left_alone(convolution):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    vit.patch_embed.proj = convolution
    project_patches(vit)
    assert vit.patch_embed.proj is convolution
