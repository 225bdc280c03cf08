"""Offloaded networks compute the same bits and leave nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch

from comad.models.offload import offload
from comad.models.students import VitConfig

CPU = torch.device("cpu")


@pytest.fixture
def network():
    config = VitConfig(image_size=16, patch_size=4, width=24, depth=2, heads=2)
    return config.build().requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_the_same_bits_again_and_again(network, dtype, tmp_path):
    network.vit.to(dtype)
    resident = copy.deepcopy(network)
    offload(network, CPU, tmp_path)
    for seed in range(3):
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        visible = torch.tensor([[0, 3, 7], [1, 2, 15]])
        for expected, found in zip(resident(images, visible)[:2], network(images, visible=visible)[:2], strict=True):
            assert torch.equal(expected, found)
    for (name, expected), found in zip(resident.named_parameters(), network.parameters(), strict=True):
        assert torch.equal(expected, found) and expected.dtype == found.dtype, name


def test_the_weights_are_released_after_an_error_too(network, tmp_path):
    offload(network, CPU, tmp_path)
    with pytest.raises(Exception, match=r"."):
        network(torch.rand(1, 3, 17, 17))
    network(torch.rand(1, 3, 16, 16))


def test_no_file_is_left(network, tmp_path):
    offload(network, CPU, tmp_path)
    assert not list(tmp_path.iterdir())
