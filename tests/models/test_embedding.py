"""The patch embedding as one product: the convolution it stands for, under its names."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
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
    "convolution",
    [nn.Conv2d(3, 6, 4, 2), nn.Conv2d(3, 6, 4, 4, padding=1), nn.Conv2d(3, 6, 4, 4, groups=3), nn.Identity()],
    ids=["overlap", "padding", "groups", "none"],
)
def test_what_is_no_cutting_into_patches_is_left_alone(convolution):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    vit.patch_embed.proj = convolution
    project_patches(vit)
    assert vit.patch_embed.proj is convolution
