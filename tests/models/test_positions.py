"""Positions reach another grid by the rule of those who trained them, whatever file, folder or name they come in.

The expected positions are computed one by one from the formula of each rule, with no interpolation of torch.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from comad.models import sources
from comad.models.formats import POSITION_RULES
from comad.models.teachers import load_teacher

WIDTH, SIZES = 64, (112, 160, 224, 288)
SHAPE: dict[str, Any] = {"embed_dim": WIDTH, "depth": 1, "num_heads": 1, "num_classes": 0}


def kernel(x: float, a: float) -> float:
    """Keys' cubic kernel (1981), of parameter a."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def cubic_matrix(old: int, new: int, scale: float) -> Tensor:
    """Rows of weights: position i of the new grid lies at (i + 0.5) / scale - 0.5 of the old one; borders repeat."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        place = (i + 0.5) / scale - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += kernel(place - tap, -0.75)
    return matrix


def antialiased_matrix(old: int, new: int) -> Tensor:
    """The same with the kernel as wide as the old grid is finer, its weights brought to the sum 1 within the grid."""
    matrix, wide = torch.zeros(new, old, dtype=torch.float64), max(old / new, 1.0)
    for i in range(new):
        centre = (i + 0.5) * old / new
        for tap in range(max(0, int(centre - 2 * wide + 0.5)), min(old, int(centre + 2 * wide + 0.5))):
            matrix[i, tap] = kernel((tap + 0.5 - centre) / wide, -0.5)
        matrix[i] /= matrix[i].sum()
    return matrix


def moco_table(rows: int) -> Tensor:
    """vits.py of MoCo v3 makes the table of every grid anew: first the row's sines and cosines, then the column's."""
    omega = [10000 ** (-k / (WIDTH // 4)) for k in range(WIDTH // 4)]
    table = [
        [f(axis * w) for axis in (row, column) for f in (math.sin, math.cos) for w in omega]
        for row in range(rows)
        for column in range(rows)
    ]
    return torch.tensor(table, dtype=torch.float64)


def expected(positions: Tensor, rows: int, rule: str) -> Tensor:
    """Positions (n, E) of the patches on a grid of ``rows`` by a rule."""
    side = math.isqrt(len(positions))
    if side == rows:
        return positions.double()
    if rule == "rebuild":
        return moco_table(rows)
    matrix = {
        "antialias": lambda: antialiased_matrix(side, rows),
        "plain": lambda: cubic_matrix(side, rows, rows / side),
        "offset": lambda: cubic_matrix(side, rows, (rows + 0.1) / side),
    }[rule]()
    grid = positions.double().view(side, side, -1)
    return torch.einsum("ia,jb,abe->ije", matrix, matrix, grid).flatten(0, 1)


def mae_table(rows: int) -> Tensor:
    table = moco_table(rows).view(rows, rows, -1)
    return table.transpose(0, 1).flatten(0, 1)


def vit(patch: int = 16, size: int = 224, **arguments: Any) -> VisionTransformer:
    torch.manual_seed(0)
    network = VisionTransformer(img_size=size, patch_size=patch, **{**SHAPE, **arguments})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network.eval()


def fixed(network: VisionTransformer, table: Tensor) -> dict[str, Tensor]:
    state = dict(network.state_dict())
    return {**state, "pos_embed": torch.cat([torch.zeros(1, 1, WIDTH), table.float().unsqueeze(0)], dim=1)}


def dinov2(registers: int = 0) -> dict[str, Tensor]:
    """Published for 37 × 37 patches of 14 pixels."""
    network = vit(14, 518, init_values=1.0, reg_tokens=registers, no_embed_class=bool(registers))
    state = {**network.state_dict(), "mask_token": torch.randn(1, WIDTH)}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, WIDTH), state["pos_embed"]], dim=1)
    return state


# name: file, rule; the positions of the patches follow that of the class token
FILES = {
    "dino": (lambda: vit().state_dict(), "offset"),
    "dino of 8 pixels": (lambda: vit(8).state_dict(), "offset"),
    "ibot": (lambda: {"state_dict": vit().state_dict()}, "offset"),
    "ibot teacher": (lambda: {"teacher": {f"backbone.{k}": x for k, x in vit().state_dict().items()}}, "offset"),
    "dinov2": (dinov2, "offset"),
    "dinov2 own run": (lambda: {"teacher": {f"backbone.{k}": x for k, x in dinov2().items()}}, "offset"),
    "dinov2 registers": (lambda: dinov2(4), "antialias"),
    "mae": (lambda: {"model": fixed(vit(), mae_table(14))}, "plain"),
    "mocov3": (
        lambda: {"state_dict": {f"module.base_encoder.{k}": x for k, x in fixed(vit(), moco_table(14)).items()}},
        "rebuild",
    ),
    "vit_tiny_patch16_224.augreg_in21k": (
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(),
        "antialias",
    ),
}


def patches_of(state: dict) -> Tensor:
    while "pos_embed" not in state and not any(key.endswith("pos_embed") for key in state):
        state = next(value for value in state.values() if isinstance(value, dict))
    return next(tensor for key, tensor in state.items() if key.endswith("pos_embed"))[0, 1:]


@pytest.mark.parametrize("name", FILES)
def test_positions_of_a_file_follow_the_rule_of_its_authors(name: str, tmp_path: Path):
    make, rule = FILES[name]
    content = make()
    torch.save(content, tmp_path / "file.pth")
    heads = "" if "timm" in name or "." in name else ":heads=1"
    grids = []
    for size in SIZES:
        patch = {"dinov2": 14}.get(name.split()[0], 8 if "8 pixels" in name else 16)
        side = size // patch * patch
        teacher = load_teacher(f"{name}={tmp_path / 'file.pth'}{heads}", side)
        rows, network = side // patch, teacher.backbone.vit
        found = network.pos_embed[0, (0 if network.no_embed_class else 1) :]
        wanted = expected(patches_of(content), rows, rule)
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm(), (name, size)
        assert teacher.card.positions == POSITION_RULES[rule]
        assert (teacher.card.image_size, teacher.backbone.image_size) == (side, side)
        grids.append(rows)
    assert len(set(grids)) == 4


def test_the_rules_differ_by_more_than_the_tolerance():
    positions = vit(14, 518).pos_embed[0, 1:]
    found = [expected(positions, 16, rule) for rule in ("offset", "plain", "antialias")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (found[a] - found[b]).norm() > 0.02 * found[b].norm()


TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
FOLDERS = {
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**TINY, image_size=224)), 16),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TINY, image_size=518)), 14),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**TINY, patch_size=14, image_size=518)
        ),
        14,
    ),
    "siglip": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY, image_size=224)), 16),
    "clip": (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY, patch_size=16)), 16),
    "ijepa": (lambda: transformers.IJepaModel(transformers.IJepaConfig(**TINY, patch_size=14)), 14),
    "vit_mae": (
        lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**TINY, image_size=224, mask_ratio=0.0)),
        16,
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_of_a_folder_are_those_of_transformers_at_every_size(name: str, tmp_path: Path):
    make, patch = FOLDERS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "theirs")
    for size in SIZES:
        side = size // patch * patch
        teacher = load_teacher(str(tmp_path / "theirs"), side)
        images = torch.rand(1, 3, side, side)
        pixels = (images - teacher.backbone.pixel_mean) / teacher.backbone.pixel_std
        takes = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
        if name == "vit_mae":
            takes["noise"] = torch.arange((side // patch) ** 2).float().expand(1, -1)
        with torch.no_grad():
            wanted = model(pixels, **takes).last_hidden_state
            wanted = model.post_layernorm(wanted) if name == "clip" else wanted
            found = teacher.backbone(images).patches
        wanted = wanted[:, -found.shape[1] :]
        assert (found - wanted).norm() <= 1e-4 * wanted.norm(), size


def geometric(side: int, new: int) -> list[float]:
    """Distances of BEiT's old table on the new grid: a progression that ends where the new table does."""
    low, high, q = 1.01, 1.5, 1.0
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (side // 2)) / (1 - q) > new // 2 else (q, high)
    steps = [sum(q**k for k in range(count + 1)) for count in range(side // 2)]
    return [-x for x in reversed(steps)] + [0.0] + steps


def beit(finetuned: bool) -> tuple[str, str, Beit]:
    """A name to load it by, the key of its table, and the network, of 14 rows."""
    pretrained = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False, "init_values": 0.1}
    if not finetuned:
        network = Beit(img_size=224, patch_size=16, **SHAPE, **pretrained)
        return "beit", "rel_pos_bias.relative_position_bias_table", network
    network = timm.create_model("beit_base_patch16_224", **SHAPE)
    return "beit_base_patch16_224.in22k_ft_in22k", "blocks.0.attn.relative_position_bias_table", network


@pytest.mark.parametrize("finetuned", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_relative_positions_of_beit_move_by_a_geometric_progression(
    size: int, finetuned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    interpolate = pytest.importorskip("scipy.interpolate")
    small = {key: value for key, value in SHAPE.items() if key != "num_classes"}
    monkeypatch.setattr(sources, "create_whole", partial(sources.create_whole, **small))
    torch.manual_seed(0)
    name, key, network = beit(finetuned)
    state = {**network.state_dict(), key: torch.randn(27 * 27 + 3, 1)}
    torch.save({"model": state}, tmp_path / "beit.pth")
    teacher = load_teacher(f"{name}={tmp_path / 'beit.pth'}" + ("" if finetuned else ":heads=1"), size)
    assert teacher.card.positions == POSITION_RULES["spline"]
    found = teacher.backbone.network.state_dict()[key]
    network.load_state_dict(state)
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    other = load_teacher(network, size, name="mine")
    assert torch.equal(other.backbone.network.state_dict()[key], found)
    assert other.card.positions == POSITION_RULES["spline"]
    new = 2 * (size // 16) - 1
    assert torch.equal(found[-3:], state[key][-3:])
    places, at = geometric(27, new), [float(x) for x in range(-(new // 2), new // 2 + 1)]
    if new == 27:
        assert torch.equal(found, state[key])
        return
    spline = interpolate.RectBivariateSpline(places, places, state[key][:-3].view(27, 27).double().numpy())
    wanted = torch.from_numpy(spline(at, at))
    assert (found[:-3].view(new, new).double() - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_module_has_positions_of_its_own():
    assert load_teacher(nn.Conv2d(3, 8, 16, 16), 64, name="mine").card.positions == "of the network itself"
