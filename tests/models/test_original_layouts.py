"""Files of DINOv2, DINOv3 and BEiT under their authors' names give timm's features; what differs is never dropped."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from comad.models import sources
from comad.models.teachers import load_teacher

State = dict[str, Tensor]
PATCH, SIDE, WIDTH = 8, 4, 128
SIZE = PATCH * SIDE
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
AERIAL = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
COMMON: dict[str, Any] = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 0}
COMMON |= {"init_values": 1.0}


def shaken(network: nn.Module) -> nn.Module:
    """Give every parameter a value of its own: no LayerScale of 1, no bias of 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network.eval()


def dinov2(size: int = SIZE, **arguments: Any) -> tuple[nn.Module, State]:
    """A network without registers has upstream's names, but for the mask token."""
    network = shaken(VisionTransformer(img_size=size, **{**COMMON, **arguments}))
    return network, {**network.state_dict(), "mask_token": torch.randn(1, WIDTH)}


def dinov2_registers(**arguments: Any) -> tuple[nn.Module, State]:
    """Upstream gives the class token a position, and the registers none."""
    network = shaken(VisionTransformer(img_size=SIZE, reg_tokens=4, no_embed_class=True, **COMMON, **arguments))
    state = dict(network.state_dict())
    position = torch.randn(1, 1, WIDTH)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    return network, {**state, "mask_token": torch.randn(1, WIDTH)}


def dinov2_giant() -> tuple[nn.Module, State]:
    network = shaken(
        VisionTransformer(img_size=SIZE, mlp_ratio=16 / 3, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, **COMMON)
    )
    names = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
    return network, {**renamed(network.state_dict(), names), "mask_token": torch.randn(1, WIDTH)}


def in_teacher(made: tuple[nn.Module, State]) -> tuple[nn.Module, dict]:
    """A file of an own run: blocks in chunks, numbered through, beside the heads."""
    network, state = made
    state = {
        f"backbone.{key.replace('blocks.1.', 'blocks.1.1.').replace('blocks.0.', 'blocks.0.0.')}": x
        for key, x in state.items()
    }
    return network, {"teacher": {**state, "dino_head.mlp.0.weight": torch.randn(3, 3)}}


def renamed(state: State, names: dict[str, str]) -> State:
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): tensor for key, tensor in state.items()}
    return state


def dinov3_sat() -> tuple[nn.Module, State]:
    network, state = dinov3()
    norm = {f"local_cls_norm.{part}": torch.randn(WIDTH) for part in ("weight", "bias")}
    return network, {**state, **norm}


def dinov3(gated: bool = False) -> tuple[nn.Module, State]:
    """The bias of the key is under a mask; here its values and the mask's are what must have no effect."""
    rope = {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_temperature": 100.0, "rope_rotate_half": True}
    rope |= {"use_abs_pos_emb": False, "use_fc_norm": False, "num_reg_tokens": 4}
    gates = {"swiglu_mlp": True, "swiglu_align_to": 8} if gated else {}
    norm = partial(nn.LayerNorm, eps=1e-5)
    network = shaken(Eva(img_size=SIZE, norm_layer=norm, **COMMON, **rope, **gates))
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    names |= {"fc1_g": "w1", "fc1_x": "w2"} | ({"mlp.fc2": "mlp.w3"} if gated else {})
    state = renamed(dict(network.state_dict()), names)
    for i in range(2):
        stem = f"blocks.{i}.attn"
        query, value = state.pop(f"{stem}.q_bias"), state.pop(f"{stem}.v_bias")
        state[f"{stem}.qkv.bias"] = torch.cat([query, torch.full_like(query, 7.0), value])
        state[f"{stem}.qkv.bias_mask"] = torch.full((3 * WIDTH,), torch.nan)
    periods = (100.0 ** (torch.arange(16) / 16)).bfloat16()
    return network, {**state, "rope_embed.periods": periods, "mask_token": torch.randn(1, WIDTH)}


def beit(version: int = 1) -> tuple[nn.Module, dict]:
    shared = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False}
    network = shaken(Beit(img_size=SIZE, **COMMON, **shared, norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    extra = {"mask_token": torch.randn(1, 1, WIDTH), "lm_head.weight": torch.randn(5, WIDTH)}
    extra["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    extra |= {"cls_pt_layers.0.norm1.weight": torch.randn(WIDTH)} if version == 2 else {}
    return network, {"model": {**network.state_dict(), **extra}}


# format: network and file, pixel normalisation, prefix tokens, trained tokens, epsilon, licence
LAYOUTS = {
    "dinov2": (dinov2, IMAGENET, 1, ("cls", "patch"), 1e-6, "Apache-2.0"),
    "dinov2 giant": (dinov2_giant, IMAGENET, 1, ("cls", "patch"), 1e-6, "Apache-2.0"),
    "dinov2-registers": (dinov2_registers, IMAGENET, 5, ("cls", "patch"), 1e-6, "Apache-2.0"),
    "dinov2-full": (lambda: in_teacher(dinov2()), IMAGENET, 1, ("cls", "patch"), 1e-6, "Apache-2.0"),
    "dinov2-full-registers": (
        lambda: in_teacher(dinov2_registers()),
        IMAGENET,
        5,
        ("cls", "patch"),
        1e-6,
        "Apache-2.0",
    ),
    "dinov3": (dinov3, IMAGENET, 5, ("cls", "patch"), 1e-5, "DINOv3 License"),
    "dinov3 gated": (lambda: dinov3(gated=True), IMAGENET, 5, ("cls", "patch"), 1e-5, "DINOv3 License"),
    "dinov3-sat": (dinov3_sat, AERIAL, 5, ("cls", "patch"), 1e-5, "DINOv3 License"),
    "beit": (beit, HALVES, 1, ("patch",), 1e-6, "MIT"),
    "beitv2": (lambda: beit(2), IMAGENET, 1, ("cls", "patch"), 1e-6, "MIT"),
}


def expected_tokens(network: Any, images: Tensor, pixels: tuple) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pixels)
    with torch.no_grad():
        return network.forward_features((images - mean) / std)


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return f"teacher={path}"


def refusal(spec: str, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_teacher(spec, SIZE)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_file_gives_the_features_of_timms_network(name: str, tmp_path: Path, images: Tensor):
    make, pixels, prefix, token_types, eps, licence = LAYOUTS[name]
    network, content = make()
    teacher = load_teacher(save(tmp_path / "weights.pth", content), SIZE)
    expected = expected_tokens(network, images, pixels)
    tokens = teacher.backbone(images)
    torch.testing.assert_close(tokens.cls, expected[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens.patches, expected[:, prefix:], atol=1e-4, rtol=1e-4)
    card = teacher.card
    assert (card.format, card.licence, card.token_types) == (name.split()[0], licence, token_types)
    assert (card.depth, card.width, card.heads, card.patch_size) == (2, WIDTH, 2, PATCH)
    assert (card.num_prefix_tokens, card.norm_eps, (card.pixel_mean, card.pixel_std)) == (prefix, eps, pixels)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "registers" in name or "dinov3" in name])
def test_file_is_brought_to_another_grid(name: str, tmp_path: Path):
    make, pixels, prefix, *_ = LAYOUTS[name]
    network, content = make()
    spec = save(tmp_path / "weights.pth", content)
    images = torch.rand(1, 3, 6 * PATCH, 6 * PATCH)
    network.set_input_size(img_size=(6 * PATCH, 6 * PATCH))
    backbone = load_teacher(spec, 6 * PATCH, rows=6).backbone
    assert (backbone.grid, backbone.patch_size) == ((6, 6), PATCH)
    expected = expected_tokens(network, images, pixels)[:, prefix:]
    torch.testing.assert_close(backbone(images).patches, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dinov3", "beit"])
def test_pixels_per_row_follow_the_patch_not_the_size_of_the_student(name: str, tmp_path: Path):
    """16 × 16 tokens of 224 pixels are not 14 × 14: the image is resized instead."""
    backbone = load_teacher(save(tmp_path / "weights.pth", LAYOUTS[name][0]()[1]), "grid", rows=3).backbone
    assert (backbone.grid, backbone.patch_size, backbone.num_patches) == ((3, 3), PATCH, 9)
    assert backbone(torch.rand(1, 3, 24, 24)).patches.shape == (1, 9, WIDTH)


# --- silent failures


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dinov2", "blocks.1.ls2.gamma"),
        ("dinov2", "blocks.1.attn.qkv.bias"),
        ("dinov2-registers", "blocks.1.ls1.gamma"),
        ("dinov3", "blocks.1.attn.qkv.bias"),
        ("dinov3", "blocks.1.ls1.gamma"),
        ("dinov3 gated", "blocks.1.mlp.w2.weight"),
        ("beit", "blocks.1.gamma_1"),
        ("beit", "blocks.1.attn.v_bias"),
    ],
)
def test_missing_part_is_refused(name: str, key: str, tmp_path: Path):
    _, content = LAYOUTS[name][0]()
    del content.get("model", content)[key]
    refusal(save(tmp_path / "weights.pth", content), "misses the keys", "blocks.1.")


def test_layer_scale_registers_and_relative_positions_have_an_effect(tmp_path: Path, images: Tensor):
    parts = {
        "dinov2": "blocks.0.ls1.gamma",
        "dinov2-registers": "register_tokens",
        "dinov3": "storage_tokens",
        "beit": "rel_pos_bias.relative_position_bias_table",
    }
    for name, key in parts.items():
        _, content = LAYOUTS[name][0]()
        before = load_teacher(save(tmp_path / "weights.pth", content), SIZE).backbone(images).patches
        content.get("model", content)[key] = content.get("model", content)[key].flip(0) * 3
        after = load_teacher(save(tmp_path / "weights.pth", content), SIZE).backbone(images).patches
        assert (before - after).abs().max() > 1e-3, name


def test_registers_are_never_patches(tmp_path: Path, images: Tensor):
    for name in ("dinov2-registers", "dinov3"):
        patches = load_teacher(save(tmp_path / "weights.pth", LAYOUTS[name][0]()[1]), SIZE).backbone(images).patches
        assert patches.shape == (2, SIDE**2, WIDTH)


def test_rotary_periods_of_another_model_are_refused(tmp_path: Path):
    _, state = dinov3()
    state["rope_embed.periods"] = 10000.0 ** (torch.arange(16) / 16)
    refusal(save(tmp_path / "weights.pth", state), "rotary periods", "unmodified")


def test_safetensors_hold_the_same_weights(tmp_path: Path, images: Tensor):
    _, state = dinov2()
    expected = load_teacher(save(tmp_path / "weights.pth", state), SIZE).backbone(images)
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    found = load_teacher(f"teacher={tmp_path / 'weights.safetensors'}", SIZE).backbone(images)
    assert torch.equal(found.patches, expected.patches)


def test_dinov3_7b_is_refused_for_its_file_does_not_say_how_pixels_are_normalised(tmp_path: Path):
    _, state = dinov3_sat()
    without = {key: x for key, x in state.items() if ".qkv.bias" not in key}
    refusal(save(tmp_path / "weights.pth", without), "7B", "save_pretrained")
    refusal(f"vit_7b_patch16_dinov3.lvd1689m={tmp_path / 'weights.pth'}", "7B", "save_pretrained")


def test_finetuned_beit_needs_the_name_of_its_version_and_is_read_by_it(tmp_path: Path, monkeypatch: Any):
    small = {key: COMMON[key] for key in ("embed_dim", "depth", "num_heads")}
    monkeypatch.setattr(sources, "create_whole", partial(sources.create_whole, **small))
    network = shaken(timm.create_model("beit_base_patch16_224", **small))
    index = network.blocks[0].attn.relative_position_index  # which the authors' files hold
    state = {**network.state_dict(), "blocks.0.attn.relative_position_index": index}
    path = save(tmp_path / "weights.pth", {"model": state})
    refusal(path, "different ways", "beit_base_patch16_224.in22k_ft_in22k=FILE")
    images = torch.rand(2, 3, 224, 224)
    for name, (mean, std) in {
        "beit_base_patch16_224.in22k_ft_in22k": HALVES,
        "beitv2_base_patch16_224.in1k_ft_in22k": IMAGENET,
    }.items():
        backbone = load_teacher(f"{name}={tmp_path / 'weights.pth'}", 224).backbone
        pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            wanted = network.forward_head(network.forward_features(pixels), pre_logits=True)
            assert (backbone(images).cls - wanted).norm() <= 1e-5 * wanted.norm()


def test_beit_table_off_a_square_is_refused(tmp_path: Path):
    _, content = beit()
    key = "rel_pos_bias.relative_position_bias_table"
    content["model"][key] = content["model"][key][:-1]
    refusal(save(tmp_path / "weights.pth", content), "shapes", key)


def test_file_of_the_authors_is_read_by_its_own_names_under_a_timm_name(tmp_path: Path, images: Tensor):
    torch.save(dinov3()[1], tmp_path / "weights.pth")
    name = "vit_small_patch16_dinov3_qkvb.lvd1689m"
    teacher = load_teacher(f"{name}={tmp_path / 'weights.pth'}", SIZE)
    assert (teacher.name, teacher.card.format) == (name, "dinov3")


@pytest.mark.parametrize("key", ["register_tokens", "pos_embed", "cls_token", "patch_embed.proj.weight"])
def test_tensor_with_other_axes_is_refused(key: str, tmp_path: Path):
    _, state = dinov2_registers()
    refusal(save(tmp_path / "weights.pth", {**state, key: torch.randn(7)}), "unmodified")
