"""A teacher sees the image size it was made for, or is read at another depth; its tokens reach the student's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.backbone import Backbone
from comad.models.feature_map_backbone import FeatureMapBackbone
from comad.models.teachers import load_on_grid, load_teacher
from comad.models.timm_backbone import TimmBackbone

SHAPE: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 0}


@pytest.fixture
def spec(tmp_path: Path) -> str:
    """A Vision Transformer for 48 pixels, 6 × 6 patches."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=48, **SHAPE)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    return f"dino={tmp_path / 'vit.pth'}"


def options(spec: str) -> str:
    return f"{spec}:heads=4"


def test_own_size_is_that_of_the_stored_positions(spec: str):
    teacher = load_teacher(options(spec))
    assert (teacher.backbone.image_size, teacher.backbone.grid, teacher.card.image_size) == (48, (6, 6), 48)
    assert load_teacher("tf_efficientnet_lite1:random").backbone.image_size == 240  # no multiple of its stride
    assert load_teacher("vit_small_patch14_dinov2:random").backbone.image_size == 224  # evaluated so, not at 518
    assert load_teacher("convnext_atto:random:size=64", 96).backbone.image_size == 64


def test_tokens_of_another_grid_are_the_own_ones_resampled_in_float32(spec: str):
    (own,), images = load_on_grid([options(spec)], 4, 16, image_size=None), torch.rand(2, 3, 48, 48)
    whole = load_teacher(options(spec), 48).backbone(images)
    maps = whole.patches.transpose(1, 2).unflatten(2, (6, 6))
    wanted = F.interpolate(maps, (4, 4), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    assert own.backbone.grid == (4, 4) and own.backbone.image_size == 48 and not own.backbone.supports_masking
    found = own.backbone(images)
    torch.testing.assert_close(found.patches, wanted)
    torch.testing.assert_close(found.cls, whole.cls)
    visible = torch.tensor([[0, 5, 9], [1, 2, 15]])
    torch.testing.assert_close(own.backbone(images, visible).patches[1], wanted[1, [1, 2, 15]])
    zeroed = own.backbone(images, visible, "zero").patches
    assert zeroed[0, 1].abs().sum() == 0 and torch.equal(zeroed[0, 5], found.patches[0, 5])
    inner = own.backbone(images, intermediates=[2], qkv=3)
    assert inner.intermediates[0].patches.shape == (2, 16, 48) and inner.qkv.patches.shape == (2, 16, 144)
    (half,) = load_on_grid([options(spec)], 4, 16, torch.bfloat16, image_size=None)
    torch.testing.assert_close(half.backbone(images).patches.float(), wanted, atol=0.2, rtol=0.1)


def test_equal_grids_resample_nothing_and_keep_masks(spec: str):
    (own,), (grid,) = (load_on_grid([options(spec)], 6, 16, image_size=size) for size in (None, "grid"))
    images, visible = torch.rand(2, 3, 48, 48), torch.tensor([[0, 5, 9], [1, 2, 35]])
    assert own.backbone.supports_masking and grid.backbone.image_size == own.backbone.image_size == 48
    assert torch.equal(own.backbone(images, visible).patches, grid.backbone(images, visible).patches)


@pytest.mark.parametrize("size", ["size=64", "size=own", "size=grid"])
def test_size_in_the_name_outweighs_that_of_all(size: str, spec: str):
    for others in (None, "grid", 96):
        (teacher,) = load_on_grid([f"{options(spec)}:{size}"], 4, 16, image_size=others)
        assert teacher.backbone.image_size == {"size=64": 64, "size=own": 48, "size=grid": 32}[size]
        assert teacher.backbone.grid == (4, 4)


def test_depth_gives_the_block_after_the_final_norm(spec: str):
    whole, images = load_teacher(options(spec)), torch.rand(2, 3, 48, 48)
    third = whole.backbone(images, intermediates=[3]).intermediates[0]
    for written in (f"{options(spec)}:depth=3", f"{spec}:depth=3:heads=4", f"{spec}:size=48:depth=3:heads=4"):
        teacher = load_teacher(written)
        tokens = teacher.backbone(images)
        torch.testing.assert_close(tokens.patches, whole.backbone.vit.norm(third.patches))
        torch.testing.assert_close(tokens.cls, whole.backbone.vit.norm(third.cls))
        assert (teacher.card.depth, teacher.card.read_at) == (3, 3) and "block 3" in teacher.card.summary()
        assert len(teacher.backbone.vit.blocks) == 3  # the last block is not even there
    other = load_teacher(timm.create_model("vit_tiny_patch16_224", img_size=48, **SHAPE), 48, name="a")
    assert other.card.read_at == 0


def test_depth_of_networks_that_see_whole_images():
    torch.manual_seed(0)
    name = "vit_small_patch16_dinov3_qkvb:random"
    whole, cut = load_teacher(name, 32), load_teacher(f"{name}:depth=2", 32)
    images = torch.rand(1, 3, 32, 32)
    second = whole.backbone(images, intermediates=[2]).intermediates[0]
    torch.testing.assert_close(cut.backbone(images).patches, whole.backbone.network.norm(second.patches))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (":depth=5", "blocks 1 to 4, not 5; use depth=4"),
        (":depth=0", "no number from 1"),
        (":depth=x", "no number from 1"),
        (":depth=-1", "no number from 1"),
        (":size=0", "no number from 1"),
        (":size=99999999", "no number from 1"),
        (":size=50", "50 pixels are no multiple of its 8-pixel patch; use 48"),
        (":seize=5", "options are :depth=BLOCK"),
    ],
)
def test_options_of_no_sense(option: str, words: str, spec: str):
    with pytest.raises(ValueError, match=words):
        load_teacher(options(spec) + option)


def test_depth_needs_blocks():
    with pytest.raises(ValueError, match="a row of equal blocks"):
        load_teacher("resnet18:random:depth=2")


# --- the contract of `Backbone.forward`


def vits() -> list[Backbone]:
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=48, **SHAPE)
    rotary = timm.create_model("vit_small_patch16_dinov3_qkvb", img_size=48, **SHAPE)
    return [
        TimmBackbone(plain).eval(),
        FeatureMapBackbone(rotary.eval(), (0.5,) * 3, (0.5,) * 3, 48),
    ]


def network_of(backbone: Backbone) -> Any:
    return next(backbone.children())


@pytest.mark.parametrize("which", [0, 1])
def test_intermediates_are_what_hooks_on_the_blocks_see(which: int):
    backbone, images, seen = vits()[which], torch.rand(2, 3, 48, 48), {}
    network = network_of(backbone)
    for number, block in enumerate(network.blocks, start=1):
        block.register_forward_hook(lambda module, inputs, output, number=number: seen.setdefault(number, output))
    tokens = backbone(images, intermediates=[1, 3])
    prefix = network.num_prefix_tokens
    for number, found in zip((1, 3), tokens.intermediates, strict=True):
        torch.testing.assert_close(found.patches, seen[number][:, prefix:])
        torch.testing.assert_close(found.cls, seen[number][:, 0])
    torch.testing.assert_close(tokens.patches, backbone(images).patches)


def test_qkv_is_what_a_hook_sees():
    backbone, images, seen = vits()[0], torch.rand(2, 3, 48, 48), []
    backbone.vit.blocks[1].attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = backbone(images, qkv=2)
    torch.testing.assert_close(tokens.qkv.patches, seen[1][:, 1:])
    torch.testing.assert_close(tokens.qkv.cls, seen[1][:, 0])


@pytest.mark.parametrize("which", [0, 1])
def test_stopping_early_runs_no_later_block(which: int):
    backbone, images, calls = vits()[which], torch.rand(2, 3, 48, 48), []
    whole = backbone(images, intermediates=[1, 2])
    for number, block in enumerate(network_of(backbone).blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    tokens = backbone(images, intermediates=[1, 2], stop_early=True)
    assert calls == [1, 2]
    torch.testing.assert_close(tokens.patches, whole.intermediates[1].patches)
    for found, wanted in zip(tokens.intermediates, whole.intermediates, strict=True):
        torch.testing.assert_close(found.patches, wanted.patches)


@pytest.mark.parametrize("which", [0, 1])
def test_block_that_is_not_there_is_told(which: int):
    with pytest.raises(ValueError, match="has blocks 1 to 4, not 9"):
        vits()[which](torch.rand(1, 3, 48, 48), intermediates=[9])


def test_maps_have_no_blocks():
    backbone = FeatureMapBackbone(timm.create_model("resnet18").eval(), (0.5,) * 3, (0.5,) * 3, 64)
    for asked in ({"intermediates": [1]}, {"qkv": 1}):
        with pytest.raises(ValueError, match="name a plain Vision Transformer"):
            backbone(torch.rand(1, 3, 64, 64), **asked)


def test_mean_over_a_map_stands_for_the_class_token_on_every_grid():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 8)

    images = torch.rand(1, 3, 48, 48)
    one, two = (load_teacher(Net(), 48, rows=rows, name="n").backbone(images) for rows in (6, 4))
    torch.testing.assert_close(one.cls, two.cls)
