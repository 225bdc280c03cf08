"""Every known layout loads to the features of a plain Vision Transformer; everything else is refused on one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from comad.models.checkpoints import Checkpoint, num_heads, position_layout
from comad.models.formats import FORMATS
from comad.models.teachers import load_teacher

State = dict[str, Tensor]
ORIGINALS = ("dinov2", "dinov2-registers", "dinov2-full", "dinov2-full-registers", "dinov3")
ORIGINALS += ("dinov3-sat", "beit", "beitv2")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
PATCH, SIDE = 8, 4
SIZE = PATCH * SIDE


def mae_positions(width: int, side: int) -> Tensor:
    """As models_mae.py writes them: ``np.meshgrid(w, h)``, its first grid first."""

    def encode(positions: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
        angles = np.einsum("m,d->md", positions.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)))
    table = np.concatenate([encode(grid[0]), encode(grid[1])], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros([1, width]), table])).float().unsqueeze(0)


def moco_positions(width: int, side: int) -> Tensor:
    """As vits.py of MoCo v3 writes them: ``torch.meshgrid(w, h)``, matrix indexing, w first."""
    grid_w, grid_h = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    omega = 1.0 / 10000.0 ** (torch.arange(width // 4).float() / (width // 4))
    out_w, out_h = grid_w.flatten()[:, None] * omega, grid_h.flatten()[:, None] * omega
    table = torch.cat([out_w.sin(), out_w.cos(), out_h.sin(), out_h.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), table]).unsqueeze(0)


def learnt_positions(width: int, side: int) -> Tensor:
    return torch.randn(1, side**2 + 1, width) * 0.3


def vit_state(positions: Callable[[int, int], Tensor], width: int = 128, depth: int = 2, seed: int = 0) -> State:
    """Random weights under the names all these code bases share."""
    torch.manual_seed(seed)
    shapes = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, PATCH, PATCH)}
    shapes |= {"patch_embed.proj.bias": (width,)}
    for i in range(depth):
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (rows, columns) in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{i}.{name}.bias"] = (rows * width,)
        shapes |= {f"blocks.{i}.{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    state = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    return {**state, "pos_embed": positions(width, SIDE)}


def reference(state: State, images: Tensor, heads: int) -> Tensor:
    """The encoder of arXiv:2010.11929, eq. 1-4, in plain tensor code. Gives (B, 1 + N, E)."""
    width = state["cls_token"].shape[-1]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    pixels = (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(pixels, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    for i in range(sum(name.endswith("norm1.weight") for name in state)):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        query, key, value = qkv.view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-2, -1) / (width // heads) ** 0.5).softmax(dim=-1)
        x = x + linear((attention @ value).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def noise(*names: str) -> State:
    return {name: torch.randn(3, 3) for name in names}


def mae(**kwargs: Any) -> tuple[State, dict]:
    state = vit_state(mae_positions, **kwargs)
    return state, {"model": state}


def mae_full(**kwargs: Any) -> tuple[State, dict]:
    state = vit_state(mae_positions, **kwargs)
    decoder = noise("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight")
    return state, {"model": {**state, **decoder, **noise("decoder_norm.bias", "decoder_pred.weight")}, "epoch": 3}


def moco(**kwargs: Any) -> tuple[State, dict]:
    state, other = vit_state(moco_positions, **kwargs), vit_state(moco_positions, seed=7, **kwargs)
    content = {**prefixed(state, "module.base_encoder."), **prefixed(other, "module.momentum_encoder.")}
    content |= noise("module.base_encoder.head.0.weight", "module.momentum_encoder.head.0.weight")
    content |= {**noise("module.predictor.0.weight"), "module.predictor.1.num_batches_tracked": torch.tensor(5)}
    return state, {"epoch": 300, "arch": "vit_base", "state_dict": content, "optimizer": {"state": {}}, "scaler": {}}


def moco_linear(**kwargs: Any) -> tuple[State, dict]:
    state = vit_state(moco_positions, **kwargs)
    content = {**prefixed(state, "module."), **noise("module.head.weight", "module.head.bias")}
    return state, {"epoch": 90, "state_dict": content, "best_acc1": torch.tensor(76.7)}


def moco_bare(**kwargs: Any) -> tuple[State, dict]:
    state = vit_state(moco_positions, **kwargs)
    return state, state


def ibot(**kwargs: Any) -> tuple[State, dict]:
    state = vit_state(learnt_positions, **kwargs)
    return state, {"state_dict": state}


def full(**kwargs: Any) -> tuple[State, dict]:
    state, student = vit_state(learnt_positions, **kwargs), vit_state(learnt_positions, seed=7, **kwargs)
    student = {
        **prefixed(student, "module.backbone."),
        **noise("module.backbone.masked_embed", "module.head.mlp.0.bias"),
    }
    teacher = {**prefixed(state, "backbone."), **noise("head.mlp.0.weight", "head.last_layer.weight_g")}
    return state, {"student": student, "teacher": teacher, "epoch": 100}


def dino(**kwargs: Any) -> tuple[State, dict]:
    state = vit_state(learnt_positions, **kwargs)
    return state, state


# format: file layout, width, depth, heads, trained tokens, licence
LAYOUTS = {
    "mae": (mae, 128, 2, 2, ("patch",), "CC-BY-NC 4.0"),
    "mae-full": (mae_full, 128, 2, 2, ("patch",), "CC-BY-NC 4.0"),
    "mocov3": (moco, 384, 1, 12, ("cls", "patch"), "CC-BY-NC 4.0"),
    "mocov3-linear": (moco_linear, 384, 1, 12, ("cls", "patch"), "CC-BY-NC 4.0"),
    "mocov3-bare": (moco_bare, 384, 1, 12, ("cls", "patch"), "CC-BY-NC 4.0"),
    "ibot": (ibot, 128, 2, 2, ("cls", "patch"), "Apache-2.0"),
    "ibot/dino-full": (full, 128, 2, 2, ("cls", "patch"), "Apache-2.0"),
    "ibot/dino": (dino, 128, 2, 2, ("cls", "patch"), "Apache-2.0"),
}


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return f"dino={path}"


def refusal(spec: str, *words: str) -> str:
    """The message with which a teacher is refused: one line that holds all the words."""
    with pytest.raises(ValueError) as caught:
        load_teacher(spec, SIZE)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    return message


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_features_are_those_of_a_plain_vision_transformer(name: str, tmp_path: Path, images: Tensor):
    layout, width, depth, heads, token_types, licence = LAYOUTS[name]
    state, content = layout(width=width, depth=depth)
    teacher = load_teacher(save(tmp_path / "weights.pth.tar", content), SIZE)
    expected = reference(state, images, heads)
    tokens = teacher.backbone(images)
    torch.testing.assert_close(tokens.cls, expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.patches, expected[:, 1:], atol=1e-5, rtol=1e-5)
    card = teacher.card
    assert (card.format, card.heads, card.token_types, card.licence) == (name, heads, token_types, licence)
    assert (card.width, card.depth, card.patch_size, card.norm_eps) == (width, depth, PATCH, 1e-6)


def test_every_format_is_tested():
    elsewhere = {"efficientnet-lite", "dinov3-convnext", "mae-finetuned", *ORIGINALS}  # test_original_layouts.py, ...
    assert set(LAYOUTS) | elsewhere | {name for name, layout in FORMATS.items() if layout.refusal} == set(FORMATS)


@pytest.mark.parametrize(
    ("name", "file"), [("mine", "a.safetensors"), ("mine", "a.pth"), ("vit_tiny_patch16_224", "a.pth")]
)
def test_what_may_be_a_timm_file_without_a_head_is_not_taken_for_dino(name: str, file: str, tmp_path: Path):
    state, _ = dino()
    torch.save(state, tmp_path / file) if file == "a.pth" else safetensors.torch.save_file(state, tmp_path / file)
    refusal(f"{name}={tmp_path / file}", "same keys", "vit_base_patch16_224.dino=FILE", "augreg_in21k")


# --- heads: no shape tells them


def test_moco_small_has_twelve_heads_not_six(tmp_path: Path, images: Tensor):
    state, content = moco(width=384, depth=1)
    patches = load_teacher(save(tmp_path / "vit-s-300ep.pth.tar", content), SIZE).backbone(images).patches
    assert (patches - reference(state, images, 6)[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mae", {384: 6, 768: 12, 1024: 16, 1280: 16}),
        ("mae-full", {768: 12, 1024: 16, 1280: 16}),
        ("mocov3", {384: 12, 768: 12, 1024: 16}),
        ("mocov3-linear", {384: 12, 768: 12}),
        ("ibot", {384: 6, 768: 12, 1024: 16}),
        ("ibot/dino", {192: 3, 384: 6, 768: 12}),
        ("ibot/dino-full", {192: 3, 384: 6, 768: 12}),
    ],
)
def test_heads_of_the_published_sizes(name: str, expected: dict[int, int]):
    assert {width: num_heads(Checkpoint("file", name, {}), width) for width in expected} == expected


@pytest.mark.parametrize(("layout", "width"), [(moco, 128), (mae, 48)])
def test_width_without_a_rule_asks_for_the_heads(layout: Callable, width: int, tmp_path: Path, images: Tensor):
    state, content = layout(width=width, depth=1)
    spec = save(tmp_path / "weights.pth", content)
    refusal(spec, "heads", f"width {width}", "NAME=FILE:heads=12")
    refusal(f"{spec}:heads=5", "not 5")
    teacher = load_teacher(f"{spec}:heads=4", SIZE)
    expected = reference(state, images, 4)[:, 1:]
    torch.testing.assert_close(teacher.backbone(images).patches, expected, atol=1e-5, rtol=1e-5)


# --- positions: as stored, in either layout, resampled to another grid


@pytest.mark.parametrize("side", [2, 4, 14])
def test_both_sincos_layouts_are_recognised(side: int):
    assert position_layout(mae_positions(96, side)) == "mae"
    assert position_layout(moco_positions(96, side)) == "mocov3"
    assert position_layout(learnt_positions(96, side)) == "learnt"
    grids = [table(96, side)[0, 1:].view(side, side, 96) for table in (mae_positions, moco_positions)]
    torch.testing.assert_close(grids[0], grids[1].transpose(0, 1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_positions_stay_as_stored(name: str, tmp_path: Path):
    layout, width, *_ = LAYOUTS[name]
    state, content = layout(width=width, depth=1)
    vit = load_teacher(save(tmp_path / "weights.pth", content), SIZE).backbone.vit
    assert torch.equal(vit.pos_embed, state["pos_embed"])


def test_positions_of_fixed_layouts_need_no_container(tmp_path: Path):
    fixed = vit_state(mae_positions)
    for content in (fixed, {"state_dict": fixed}):
        assert load_teacher(save(tmp_path / "a.pth", content), SIZE).card.format == "mae"
    card = load_teacher(save(tmp_path / "b.pth", {"model": vit_state(moco_positions, width=384)}), SIZE).card
    assert (card.format, card.heads, card.unwrapped) == ("mocov3-bare", 12, ("model",))


def test_positions_of_another_method_betray_a_mislabelled_file(tmp_path: Path):
    fixed = {**vit_state(mae_positions), **noise("head.weight")}
    refusal(save(tmp_path / "b.pth", {"state_dict": fixed}), "positions are mae", "TIMM_NAME.TAG=FILE")
    learnt = {**vit_state(learnt_positions), **noise("mask_token", "decoder_embed.weight")}
    refusal(save(tmp_path / "c.pth", {"model": learnt}), "positions are learnt, not mae")


def test_positions_off_a_square_grid_are_refused(tmp_path: Path):
    state, content = dino()
    state["pos_embed"] = torch.randn(1, 14, 128)
    refusal(save(tmp_path / "weights.pth", content), "(1, 14, 128)", "square")


# --- files that would load, and should not


@pytest.mark.parametrize("key", ["norm1.weight", "attn.qkv.bias", "mlp.fc2.weight"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_key_is_named(name: str, key: str, tmp_path: Path):
    layout, width, *_ = LAYOUTS[name]
    _, content = layout(width=width, depth=1)
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for full_key in [full_key for full_key in part if full_key.endswith(f"blocks.0.{key}")]:
            del part[full_key]
    refusal(save(tmp_path / "weights.pth", content), f"blocks.0.{key}")


@pytest.mark.parametrize("extra", ["ls1.gamma", "masked_embed", "head.weight"])
def test_key_that_no_backbone_has_is_named(extra: str, tmp_path: Path):
    _, content = ibot()
    content["state_dict"][extra] = torch.randn(128)
    refusal(save(tmp_path / "weights.pth", content), "unexpected", extra)


def test_student_alone_is_refused(tmp_path: Path):
    _, content = full()
    refusal(
        save(tmp_path / "checkpoint.pth", {"student": content["student"]}), "unknown layout", "student/module.backbone"
    )


@pytest.mark.parametrize("learnt", [False, True])
def test_what_stands_for_an_image_in_a_finetuned_mae_is_what_its_classifier_sees(tmp_path: Path, learnt: bool):
    state, _ = mae()
    state |= {"fc_norm.weight": state.pop("norm.weight"), "fc_norm.bias": state.pop("norm.bias")}
    if learnt:
        state["pos_embed"] = state["pos_embed"] + 0.1 * torch.randn_like(state["pos_embed"])
    content = {"model": {**state, **noise("head.weight", "head.bias")}}
    teacher = load_teacher(save(tmp_path / "mae_finetuned_vit_base.pth", content), SIZE)
    network = VisionTransformer(
        SIZE, PATCH, embed_dim=128, depth=2, num_heads=2, num_classes=0, global_pool="avg"
    ).eval()
    network.load_state_dict(state)
    images = torch.rand(2, 3, SIZE, SIZE)
    pixels = (images - teacher.backbone.pixel_mean) / teacher.backbone.pixel_std
    with torch.no_grad():
        features = network.forward_features(pixels)
        wanted, tokens = network.forward_head(features, pre_logits=True), teacher.backbone(images)
        seen = torch.tensor([[0, 2]]).expand(2, -1)
        part = teacher.backbone(images, seen)
        blocks = teacher.backbone(images, intermediates=[1]).intermediates[0]
    assert teacher.card.format == "mae-finetuned" and teacher.card.token_types == ("cls", "patch")
    assert (tokens.cls - wanted).norm() <= 1e-5 * wanted.norm()
    torch.testing.assert_close(tokens.patches, network.fc_norm(features[:, 1:]), atol=1e-5, rtol=1e-5)
    assert part.patches.shape[1] == 2 and not torch.allclose(part.cls, tokens.cls)
    torch.testing.assert_close(blocks.cls, blocks.patches.mean(dim=1))  # of blocks before the norm too


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path):
    state, content = dino()
    state["blocks.1.mlp.fc1.bias"][3] = value
    refusal(save(tmp_path / "weights.pth", content), "NaN", "blocks.1.mlp.fc1.bias")


def test_other_shape_is_named(tmp_path: Path):
    state, content = dino()
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    refusal(save(tmp_path / "weights.pth", content), "shapes", "blocks.1.mlp.fc1.bias")


def unlike(keys: str) -> State:
    """The plain keys of a Vision Transformer, with ``+key`` added and ``-key`` taken away."""
    state = vit_state(learnt_positions, width=64, depth=1)
    for key in keys.split():
        state = (
            {**state, key[1:]: torch.zeros(1)} if key[0] == "+" else {k: v for k, v in state.items() if k != key[1:]}
        )
    return state


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(unlike("-patch_embed.proj.weight +mask_token"), id="no patches"),
        pytest.param(
            noise("vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight"), id="hf"
        ),
        pytest.param({"layer1.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, id="resnet"),
        pytest.param({"model": {"step": 3}}, id="no tensors"),
        pytest.param({}, id="empty"),
    ],
)
def test_unknown_layout_is_refused_with_its_keys(content: dict, tmp_path: Path):
    spec = save(tmp_path / "weights.pth", content)
    message = refusal(spec, "unknown layout", "known formats", *FORMATS)
    assert next((key for key in content), "(none)") in message


def test_flat_file_with_a_classifier_asks_for_its_timm_name(tmp_path: Path):
    content = vit_state(learnt_positions) | noise("head.weight", "head.bias")
    refusal(save(tmp_path / "weights.pth", content), "TIMM_NAME.TAG=FILE")


# --- files that do not read


def test_pickled_arguments_are_refused_until_converted(tmp_path: Path, images: Tensor):
    state, content = full()
    spec = save(tmp_path / "checkpoint.pth", {**content, "args": argparse.Namespace(arch="vit_small")})
    refusal(spec, "argparse.Namespace", "keep its tensors only", "NEW_FILE")
    kept = torch.load(tmp_path / "checkpoint.pth", weights_only=False)  # the way the message tells
    kept = {key: kept[key] for key in ("model", "state_dict", "teacher") if key in kept}
    patches = load_teacher(save(tmp_path / "kept.pth", kept), SIZE).backbone(images).patches
    torch.testing.assert_close(patches, reference(state, images, 2)[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_file_cut_short_is_refused(share: float, suffix: str, tmp_path: Path):
    path = tmp_path / f"weights{suffix}"
    state = vit_state(learnt_positions)
    save(path, state) if suffix == ".pth" else safetensors.torch.save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(f"dino={path}", "download")


@pytest.mark.parametrize("content", [b"hello world\n" * 30, b"<html>404</html>", b"\x89PNG\r\n" + bytes(99)])
def test_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "weights.pth").write_bytes(content)
    refusal(f"teacher={tmp_path / 'weights.pth'}", "not a readable checkpoint")


@pytest.mark.parametrize("content", [{1: torch.ones(2)}, {"model": {1: torch.ones(2), (2, "a"): torch.ones(2)}}])
def test_keys_that_are_no_text_are_an_unknown_layout(content: dict, tmp_path: Path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="unknown layout"):
        load_teacher(f"mine={tmp_path / 'file.pth'}", 32)


def test_bare_tensor_is_refused(tmp_path: Path):
    refusal(save(tmp_path / "weights.pth", torch.zeros(3)), "Tensor", "state_dict")


def test_missing_file_is_refused(tmp_path: Path):
    refusal(f"teacher={tmp_path / 'nothing.pth'}", "no file or folder")
    refusal(f"teacher={tmp_path}", "config.json")
