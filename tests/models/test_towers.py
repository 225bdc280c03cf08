"""Files and folders of timm's Vision Transformers, plain or not, under their names; and modules as teachers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from comad.distillation.features import Blocks, forward_teacher
from comad.models import sources
from comad.models.teachers import load_teacher, teacher_from_module

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}
# name: tokens before the patches, trained tokens
PLAIN = {
    "vit_base_patch16_224.augreg_in21k": (1, ("cls", "patch")),
    "vit_base_patch16_224.mae": (1, ("patch",)),
    "vit_base_patch16_clip_quickgelu_224.openai": (1, ("cls", "patch")),
    "vit_base_patch16_clip_224.laion2b": (1, ("cls", "patch")),
    "vit_base_patch16_siglip_224.webli": (0, ("patch",)),
    "vit_base_patch14_reg4_dinov2.lvd142m": (5, ("cls", "patch")),
}
WHOLE = {
    "vit_base_patch16_dinov3.lvd1689m": (5, ("cls", "patch")),
    "vit_small_patch16_dinov3_qkvb.lvd1689m": (5, ("cls", "patch")),
    "vit_small_plus_patch16_dinov3.lvd1689m": (5, ("cls", "patch")),
    "eva02_base_patch16_clip_224.merged2b": (1, ("cls", "patch")),
    "eva_giant_patch14_clip_224.laion400m": (1, ("cls", "patch")),
}
POOLED = ("beit_base_patch16_224.in22k_ft_in22k", "beitv2_base_patch16_224.in1k_ft_in22k")
POOLED += ("eva02_tiny_patch14_224.mim_in22k",)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the named networks with all they are, but two blocks of 48 channels."""
    monkeypatch.setattr(sources, "create_vit", partial(sources.create_vit, **SMALL))
    monkeypatch.setattr(sources, "create_whole", partial(sources.create_whole, **SMALL))


def shaken(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    network = timm.create_model(name, **SMALL, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network.eval()


def expected_tokens(network: Any, images: Tensor) -> Tensor:
    cfg, side = network.pretrained_cfg, images.shape[-1]
    network.set_input_size(img_size=(side, side))
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return network.forward_features((images - mean) / std)


def refusal(spec: str, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_teacher(spec, 64)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", [*PLAIN, *WHOLE])
def test_flat_file_gives_the_features_of_its_name(name: str, tmp_path: Path):
    network = shaken(name)
    torch.save(network.state_dict(), tmp_path / "file.pth")
    prefix, token_types = {**PLAIN, **WHOLE}[name]
    patch = network.patch_embed.patch_size[0]
    images = torch.rand(2, 3, 3 * patch, 3 * patch)
    teacher = load_teacher(f"{name}={tmp_path / 'file.pth'}", 3 * patch, rows=3)
    expected, tokens = expected_tokens(network, images), teacher.backbone(images)
    torch.testing.assert_close(tokens.patches, expected[:, prefix:], atol=1e-4, rtol=1e-4)
    if prefix:
        torch.testing.assert_close(tokens.cls, expected[:, 0], atol=1e-4, rtol=1e-4)
    card = teacher.card
    assert (card.token_types, card.num_prefix_tokens, card.norm_eps) == (token_types, prefix, network.norm.eps)
    assert (card.depth, card.heads, card.architecture, card.pixel_mean) == (2, 4, name, network.pretrained_cfg["mean"])
    assert (teacher.backbone.grid, teacher.backbone.patch_size) == ((3, 3), patch)
    assert teacher.backbone.supports_masking == (name not in WHOLE)


@pytest.mark.parametrize("name", POOLED)
def test_a_norm_that_follows_the_pooling_normalises_what_is_pooled_as_its_authors_do_and_patches(
    name: str, tmp_path: Path
):
    network = shaken(name)
    torch.save({"model": network.state_dict()}, tmp_path / "finetuned.pth")
    images = torch.rand(2, 3, *network.patch_embed.img_size)
    backbone = load_teacher(f"{name}={tmp_path / 'finetuned.pth'}", images.shape[-1]).backbone
    features, tokens = expected_tokens(network, images), backbone(images)
    with torch.no_grad():
        wanted = network.forward_head(features, pre_logits=True)
        patches = network.fc_norm(features[:, 1:])
    assert backbone.has_cls and (tokens.cls - wanted).norm() <= 1e-5 * wanted.norm()
    assert (tokens.patches - patches).norm() <= 1e-5 * patches.norm()
    assert torch.equal(backbone.pooled(images, "patch"), backbone.pooled(images, "cls"))
    assert load_teacher(f"{name.split('.')[0]}:random", images.shape[-1]).backbone.has_cls


@pytest.mark.parametrize("name", POOLED)
def test_a_file_from_before_fine_tuning_has_a_norm_of_tokens(name: str, tmp_path: Path):
    network = shaken(name, global_pool="")
    torch.save(network.state_dict(), tmp_path / "pretrained.pth")
    images = torch.rand(1, 3, *network.patch_embed.img_size)
    backbone = load_teacher(f"{name}={tmp_path / 'pretrained.pth'}", images.shape[-1]).backbone
    expected = expected_tokens(network, images)[:, 1:]
    torch.testing.assert_close(backbone(images).patches, expected, atol=1e-4, rtol=1e-4)
    assert backbone.token_types == (("patch",) if "mim" in name else ("cls", "patch"))


def test_clip_of_openai_needs_its_activation(tmp_path: Path):
    torch.save(shaken("vit_base_patch16_clip_224").state_dict(), tmp_path / "file.pth")
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    refusal(f"vit_base_patch16_clip_224.openai={tmp_path / 'file.pth'}", "QuickGELU", name)


def test_folder_of_timms_hub_is_read(tmp_path: Path):
    network = shaken("vit_base_patch16_dinov3")
    cfg = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "tag": "x", "classifier": "head", "license": "mit"}
    (tmp_path / "hub").mkdir()
    config = {"architecture": "vit_base_patch16_dinov3", "num_classes": 0, "pretrained_cfg": cfg}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "hub" / "model.safetensors")
    teacher, images = load_teacher(str(tmp_path / "hub"), 64), torch.rand(1, 3, 64, 64)
    network.pretrained_cfg = cfg
    expected = expected_tokens(network, images)[:, 5:]
    torch.testing.assert_close(teacher.backbone(images).patches, expected, atol=1e-4, rtol=1e-4)
    assert (teacher.card.format, teacher.card.source, teacher.card.licence) == (
        "export",
        "hub/model.safetensors",
        "mit",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype: torch.dtype, tmp_path: Path):
    name, images = "vit_base_patch16_dinov3.lvd1689m", torch.rand(1, 3, 64, 64)
    torch.save(shaken(name).state_dict(), tmp_path / "file.pth")
    spec = f"{name}={tmp_path / 'file.pth'}"
    whole, half = (load_teacher(spec, 64, precision).backbone(images) for precision in (torch.float32, dtype))
    assert half.patches.dtype == dtype
    assert (whole.patches - half.patches.float()).abs().mean() < 0.05


# --- modules


class Tokens(nn.Module):
    """Three tokens in front, and one per 8 × 8 pixels."""

    def __init__(self, prefix: int = 3):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, stride=8)
        self.front = nn.Parameter(torch.randn(1, prefix, 16))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.front.expand(len(pixels), -1, -1), patches], dim=1)


def test_module_that_gives_a_map_teaches():
    module = nn.Conv2d(3, 16, 8, stride=8)
    teacher = teacher_from_module("mine", module, 32, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0), licence="MIT")
    images = torch.rand(2, 3, 32, 32)
    pixels = (images - torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1)) / torch.tensor((0.5, 1.0, 2.0)).view(3, 1, 1)
    tokens = forward_teacher(Blocks(), teacher.backbone, images)
    torch.testing.assert_close(tokens.patches, module(pixels).flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens.cls, tokens.patches.mean(dim=1))
    card = teacher.card
    assert (card.format, card.architecture, card.width, card.patch_size, card.licence) == (
        "module",
        "Conv2d",
        16,
        8,
        "MIT",
    )
    assert not any(parameter.requires_grad for parameter in teacher.backbone.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())  # a copy is frozen, not the user's own


@pytest.mark.parametrize("has_cls", [True, False])
def test_module_that_gives_tokens_teaches(has_cls: bool):
    module = Tokens()
    teacher = teacher_from_module("mine", module, 32, num_prefix_tokens=3, has_cls=has_cls)
    images = torch.rand(2, 3, 32, 32)
    backbone = teacher.backbone
    expected, tokens = module((images - backbone.pixel_mean) / backbone.pixel_std), backbone(images)
    torch.testing.assert_close(tokens.patches, expected[:, 3:])
    assert teacher.card.num_prefix_tokens == 3
    assert backbone.token_types == (("cls", "patch") if has_cls else ("patch",))
    assert torch.equal(tokens.cls, expected[:, 0]) if has_cls else tokens.cls is None


def test_module_keeps_its_image_size_at_another_grid():
    backbone = teacher_from_module("mine", nn.Conv2d(3, 16, 8, stride=8), 32, rows=2).backbone
    assert (backbone.grid, backbone.patch_size) == ((2, 2), 16)
    assert backbone(torch.rand(1, 3, 32, 32)).patches.shape == (1, 4, 16)


def test_card_of_a_module_tells_its_weights_apart():
    modules = [nn.Conv2d(3, 16, 8, stride=8) for _ in range(2)]
    one, two = (teacher_from_module("mine", module, 32).card for module in modules)
    assert len(one.sha256) == 64
    assert one.sha256 != two.sha256
    assert one == teacher_from_module("mine", modules[0], 32).card
    assert json.loads(json.dumps(one.as_dict())) == one.as_dict()


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (Tokens(), {"num_prefix_tokens": 2}, "no square"),
        (Tokens(), {"num_prefix_tokens": 99}, "no square"),
        (Tokens(0), {"has_cls": True}, "num_prefix_tokens of at least 1"),
        (nn.Flatten(), {}, "no map of features"),
        (nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten()), {}, "'Sequential' gives"),
        (nn.MaxPool2d(8, return_indices=True), {}, "no map of features"),
    ],
)
def test_module_that_gives_something_else_is_refused(module: nn.Module, arguments: dict, words: str):
    with pytest.raises(ValueError, match=words):
        teacher_from_module("mine", module, 32, **arguments)
