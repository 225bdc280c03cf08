"""Every kind of teacher on every grid of a student that makes sense: it loads, computes, teaches for a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn

import comad
from comad.models import sources
from comad.models.backbone import Backbone
from comad.models.teachers import load_on_grid, load_teacher

# rows of a student's grid: 32 pixels of patch 16, 48 of 8, 96 of 16, 112 of 8, 224 of 16, 384 of 32 and of 16
GRIDS = (2, 6, 7, 14, 24)
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 4}
PLAIN = (
    "vit_tiny_patch16_224",
    "vit_base_patch8_224",
    "vit_base_patch32_224",
    "vit_base_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_base_patch16_dinov3",
    "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
    "vit_base_patch16_siglip_224.v2_webli",
    "vit_huge_patch14_gap_224.in1k_ijepa",
    "vit_base_patch16_radio_v3",
    "vit_pe_core_tiny_patch16_384",
    "aimv2_large_patch14_224",
    "deit_tiny_patch16_224",
    "samvit_base_patch16",
)
OTHERS = ("resnet18", "tf_efficientnet_lite0", "convnext_atto", "hiera_tiny_224", "levit_128s", "mobilenetv3_small_050")
STAGE: dict[str, Any] = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
LARGE: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": STAGE,
    "swinv2_tiny_window8_256": STAGE,
    "mvitv2_tiny": {},
    "maxvit_tiny_tf_224": {"embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1)},
    "cait_xxs24_224": {"embed_dim": 48, "depth": 1, "num_heads": 4},
    "xcit_nano_12_p16_224": {"depth": 1},
}
"""Networks that take long, and the arguments that make them small."""
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
HUGGING_FACE = {
    "vjepa2": lambda: transformers.VJEPA2Model(
        transformers.VJEPA2Config(
            **{**TINY, "mlp_ratio": 2},
            crop_size=64,
            patch_size=16,
            pred_hidden_size=24,
            pred_num_hidden_layers=1,
            pred_num_attention_heads=2,
            pred_num_mask_tokens=1,
        )
    ),
    "ijepa": lambda: transformers.IJepaModel(transformers.IJepaConfig(**TINY, patch_size=14)),
    "siglip2": lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**TINY)),
    "aimv2": lambda: transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**TINY, image_size=224)),
    "dinov3_convnext": lambda: transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**STAGES)),
    "swin": lambda: transformers.SwinModel(transformers.SwinConfig(embed_dim=12, depths=[1, 1], num_heads=[2, 2])),
    "convnext": lambda: transformers.ConvNextModel(transformers.ConvNextConfig(**STAGES)),
    "radio": lambda: transformers.RadioModel(transformers.RadioConfig(**TINY)),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**TINY, patch_size=14, image_size=224)
    ),
}


def check(backbone: Backbone, rows: int, dtype: torch.dtype = torch.float32) -> None:
    assert backbone.grid == (rows, rows)
    side = backbone.image_size
    with torch.no_grad():
        tokens = backbone(torch.rand(2, 3, side, side))
    assert tokens.patches.shape == (2, rows * rows, backbone.width)
    assert tokens.patches.dtype == dtype and tokens.patches.isfinite().all()
    assert (tokens.cls is not None) >= ("cls" in backbone.token_types)
    assert tokens.cls is None or tokens.cls.shape == (2, backbone.width)
    visible = torch.tensor([[0, 3], [1, 2]])
    with torch.no_grad():
        assert backbone(torch.rand(2, 3, side, side), visible).patches.shape == (2, 2, backbone.width)


def shrink(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build a named network with all it is, but few blocks and channels."""
    arguments = SMALL if name in PLAIN else LARGE.get(name, {})
    monkeypatch.setattr(sources, "create_vit", partial(sources.create_vit, **arguments))
    monkeypatch.setattr(sources, "create_whole", partial(sources.create_whole, **arguments))
    tiny = timm.models.mvitv2.MultiScaleVitCfg(embed_dim=12, depths=(1, 1, 1, 1))
    monkeypatch.setitem(timm.models.mvitv2.model_cfgs, "mvitv2_tiny", tiny)


@pytest.mark.parametrize("rows", GRIDS)
@pytest.mark.parametrize("name", PLAIN)
def test_networks_of_patches_give_every_grid_without_resampling(name: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    shrink(name, monkeypatch)
    (teacher,) = load_on_grid([f"{name}:random"], rows, 16)
    assert teacher.backbone.image_size == rows * teacher.backbone.patch_size
    assert teacher.backbone.own_grid == (rows, rows)
    check(teacher.backbone, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*OTHERS, *LARGE])
def test_networks_of_maps_are_resampled_to_every_grid_in_every_precision(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    shrink(name, monkeypatch)
    for rows in (2, 14):
        (teacher,) = load_on_grid([f"{name}:random"], rows, 16, dtype)
        check(teacher.backbone, rows, dtype)
        assert not teacher.backbone.supports_masking


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_folders_and_models_of_transformers_give_every_grid(name: str, tmp_path: Path):
    torch.manual_seed(0)
    model = HUGGING_FACE[name]().eval()
    model.save_pretrained(tmp_path / "theirs")
    for rows, dtype in ((2, torch.float32), (6, torch.bfloat16), (14, torch.float32)):
        (teacher,) = load_on_grid([str(tmp_path / "theirs")], rows, 16, dtype)
        check(teacher.backbone, rows, dtype)
        assert teacher.card.format == "transformers" and teacher.card.architecture == name
        other = load_teacher(model, "grid", dtype, rows=rows, name="mine")
        images = torch.rand(1, 3, teacher.backbone.image_size, teacher.backbone.image_size)
        torch.testing.assert_close(other.backbone(images).patches, teacher.backbone(images).patches)
        assert other.card.pixel_mean == teacher.card.pixel_mean


def test_film_of_one_image_is_what_vjepa_sees():
    torch.manual_seed(0)
    model = HUGGING_FACE["vjepa2"]().eval()
    teacher = load_teacher(model, 64, mean=(0.0,) * 3, std=(1.0,) * 3, name="v")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(images.unsqueeze(1).repeat(1, 2, 1, 1, 1), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(teacher.backbone(images).patches, wanted)
    assert any(parameter.ndim == 5 for parameter in model.parameters())


def test_siglip2_sees_the_pixels_of_its_patches_in_their_order():
    torch.manual_seed(0)
    model = HUGGING_FACE["siglip2"]().eval()
    images = torch.rand(1, 3, 64, 64)
    processor = transformers.Siglip2ImageProcessorFast(max_num_patches=16, patch_size=16)
    seen = processor(images[0] * 255, return_tensors="pt", do_resize=False)
    with torch.no_grad():
        wanted = model(**seen).last_hidden_state
    teacher = load_teacher(model, 64, name="s")
    torch.testing.assert_close(teacher.backbone(images).patches, wanted, atol=2e-4, rtol=1e-3)


def dinov3_convnext() -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny-sized network of transformers, and its tensors under the names of the official file."""
    torch.manual_seed(0)
    model = transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    names = {"depthwise_conv": "dwconv", "layer_norm": "norm", "pointwise_conv1": "pwconv1"}
    names |= {"pointwise_conv2": "pwconv2"}
    official = {}
    for key, tensor in model.state_dict().items():
        key = key.removeprefix("model.")
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        stage, parts = key.split(".")[0], key.split(".")
        if stage == "stages" and parts[2] == "downsample_layers":
            key = ".".join(["downsample_layers", parts[1], *parts[3:]])
        elif stage == "stages":
            key = ".".join(["stages", parts[1], *parts[3:]])
        official[key] = tensor
    return model, {**official, "norms.3.weight": torch.ones(768)}


@pytest.mark.parametrize("name", ["dinov3", "convnext_tiny.dinov3_lvd1689m"])
def test_dinov3_convnext_has_its_final_norm(name: str, tmp_path: Path):
    model, official = dinov3_convnext()
    torch.save(official, tmp_path / "official.pth")
    teacher = load_teacher(f"{name}={tmp_path / 'official.pth'}", 64)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model((images - teacher.backbone.pixel_mean) / teacher.backbone.pixel_std).last_hidden_state
        found = teacher.backbone(images)
    torch.testing.assert_close(found.patches, wanted[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.cls, wanted[:, 0], atol=1e-4, rtol=1e-4)
    assert teacher.card.licence.lower().startswith("dinov3")


def test_network_that_takes_one_size_keeps_it_on_every_grid():
    (teacher,) = load_on_grid(["hiera_tiny_224:random"], 3, 16)
    assert teacher.backbone.image_size == 224 or teacher.backbone.image_size % 32 == 0
    check(teacher.backbone, 3)
    with pytest.raises(ValueError, match=r"cannot compute on 100 pixels .*; add :size=224"):
        load_teacher("levit_128s:random", 100)


def test_resampled_tokens_are_those_of_the_map_in_float32_whatever_the_precision():
    network = nn.Conv2d(3, 8, 16, 16)
    images = torch.rand(1, 3, 224, 224)
    tokens = [
        load_teacher(network, 224, dtype, rows=5, name="n").backbone(images).patches
        for dtype in (torch.float32, torch.bfloat16)
    ]
    own = load_teacher(network, 224, name="n").backbone(images).patches.transpose(1, 2).view(1, 8, 14, 14)
    wanted = nn.functional.interpolate(own, (5, 5), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[0], wanted)
    torch.testing.assert_close(tokens[1].float(), wanted, atol=0.02, rtol=0.02)


def test_timm_still_has_what_names_of_authors_are_read_by():
    """`networks._timm_names` uses it: if it goes, read such files by a `Format` of their own."""
    for name in ("vision_transformer", "convnext", "swin_transformer", "eva", "beit"):
        module = getattr(timm.models, name)
        assert callable(module.checkpoint_filter_fn), name


# --- a step of a distillation from each

STUDENTS = ((32, 16), (32, 8), (48, 16), (48, 12), (56, 8), (64, 16), (80, 16), (96, 12), (96, 8))
"""Pixels of the image and of a patch: grids of 2 to 12 rows."""
NAMES = [f"{name}:random" for name in (*PLAIN, *OTHERS, *LARGE)]
EVERY = [*NAMES, *HUGGING_FACE, *(f"folder {name}" for name in HUGGING_FACE)]
SETTINGS: tuple[tuple[Any, str], ...] = (("own", "fp32"), ("grid", "bf16"), ("own", "bf16"), (224, "fp32"))
"""Pixels of the teacher's images, and precision of the run."""
Run = Callable[..., "comad.DistillResult"]


def made(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str | nn.Module:
    """A teacher as one gives it to a run: a name, a model of transformers, or its folder."""
    if name in NAMES:
        shrink(name.removesuffix(":random"), monkeypatch)
        return name
    torch.manual_seed(0)
    model = HUGGING_FACE[name.removeprefix("folder ")]().eval()
    if not name.startswith("folder "):
        return model
    model.save_pretrained(folder / "theirs")
    return str(folder / "theirs")


@pytest.fixture(scope="module")
def photographs() -> dict[str, list[np.ndarray]]:
    """Noise in several forms, some thinner than high."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, 100 + 20 * i, 130 - 10 * i), dtype=np.uint8) for i in range(6)]
    return {"train": images[:2], "val": images[2:4], "test": images[4:]}


@pytest.fixture
def run(tmp_path: Path, photographs: dict[str, list[np.ndarray]]) -> Run:
    """One step of a distillation."""

    def distil(teacher: Any, image_size: int, patch_size: int, size: Any, **options: Any) -> comad.DistillResult:
        student = comad.VitConfig(image_size=image_size, patch_size=patch_size, width=24, depth=2, heads=2)
        given = {"epochs": 1, "batch_size": 2, "warmup_epochs": 0, "split": "none", "workers": 0, "log_every": 1}
        given |= {"tensorboard": False, "threads": 1, "teacher_image_size": size, **options}
        teachers = teacher if isinstance(teacher, list) else [teacher]
        result = comad.distill(photographs, teachers, student, out=tmp_path / "run", **given)
        losses = [line for line in result.history if "loss" in line]
        assert [line["step"] for line in losses] == [1]
        assert math.isfinite(losses[0]["loss"]) and 0 < losses[0]["grad_norm"] < math.inf
        probes = [value for line in result.history for key, value in line.items() if key.startswith("held_out_cosine")]
        assert len(probes) == len(teachers) and all(-1.01 <= value <= 1.01 for value in probes)
        features = result.student(torch.rand(1, 3, image_size, image_size))
        assert features.shape == (1, 24) and features.isfinite().all()
        return result

    return distil


PAIRS = [
    pytest.param(name, student, marks=[] if i % len(STUDENTS) == k else pytest.mark.slow)
    for i, name in enumerate(EVERY)
    for k, student in enumerate(STUDENTS)
]


@pytest.mark.parametrize(("name", "student"), PAIRS)
def test_every_kind_teaches_every_student(
    name: str, student: tuple[int, int], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Sizes and precisions come in turns; one student of each teacher is quick, all of them together are slow."""
    size, precision = SETTINGS[(EVERY.index(name) + STUDENTS.index(student)) % len(SETTINGS)]
    run(made(name, tmp_path, monkeypatch), *student, size, precision=precision)


@pytest.mark.parametrize("size", ["own", "grid"])
def test_names_files_modules_and_functions_teach_together(
    size: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    shrink("vit_tiny_patch16_224", monkeypatch)
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, num_classes=0, **SMALL)
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    (tmp_path / "net.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Conv2d(3, 8, 16, 16)\n")
    teachers = [
        "vit_tiny_patch16_224:random",
        f"dino={tmp_path / 'dino.pth'}:heads=4",
        vit,
        HUGGING_FACE["dinov2_with_registers"]().eval(),
        f"mine={tmp_path / 'net.py'}:make",
        nn.Conv2d(3, 8, 32, 32),
    ]
    result = run(teachers, 48, 12, size)
    assert [row.name for row in result.scoreboard.rows] == []
    assert (result.folder / "report.html").is_file()
