"""Teachers by name, file and folder: what is loaded, what the card says, and how a wrong name is answered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from comad.models import sources
from comad.models.files import sha256
from comad.models.sources import BUNDLED, bundled_teachers
from comad.models.students import VitConfig
from comad.models.teachers import Teacher, TeacherCard, inherited_licence, licence_notice, load_on_grid, load_teacher

TINY = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
SIZE = 32
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
OURS = {"token_types": ["patch"], "licence": "Apache-2.0 weights, teachers CC-BY-NC 4.0"}


def tiny_vit(seed: int = 0, **arguments: Any) -> timm.models.VisionTransformer:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE, **{**TINY, **arguments}).eval()


def export(folder: Path, dtype: torch.dtype = torch.float16, ours: dict | None = OURS, **arguments: Any) -> Path:
    """Write a folder the way the package does, with weights that survive half precision."""
    vit = tiny_vit(**arguments).to(dtype)
    config = {"comad": ours} if ours else {}
    data = {"mean": MEAN, "std": STD}
    timm.models.save_for_hf(vit, str(folder), model_config=config, safe_serialization=True, data_config=data)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(spec: str, *words: str, image_size: int = SIZE) -> None:
    with pytest.raises(ValueError) as caught:
        load_teacher(spec, image_size)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def features(vit: timm.models.VisionTransformer, images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return vit.forward_features((images - mean) / std)[:, vit.num_prefix_tokens :]


# --- folders that save_for_hf wrote


def test_half_precision_export_comes_back(tmp_path: Path, images: Tensor):
    folder = export(tmp_path / "ours")
    teacher = load_teacher(str(folder), SIZE)
    expected = features(tiny_vit().half().float(), images)
    torch.testing.assert_close(teacher.backbone(images).patches, expected, atol=1e-5, rtol=1e-5)
    card = teacher.card
    assert (teacher.name, card.name, card.source) == ("ours", "ours", "ours/model.safetensors")
    assert (card.format, card.architecture, card.token_types) == ("export", "vit_tiny_patch16_224", ("patch",))
    assert (card.depth, card.width, card.heads, card.patch_size, card.num_prefix_tokens) == (2, 48, 4, 8, 1)
    assert (card.pixel_mean, card.pixel_std, card.licence) == (MEAN, STD, OURS["licence"])
    assert card.params == sum(x.numel() for x in tiny_vit().parameters())


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_the_folder_of_a_run_is_the_network_that_it_left(tmp_path: Path, images: Tensor, part: str):
    expected = load_teacher("mae-stamps")
    shutil.copytree(BUNDLED / "mae-stamps", tmp_path / "run" / part)
    found = load_teacher(str(tmp_path / "run"))
    assert found.name == "run" and found.card.sha256 == expected.card.sha256
    with pytest.raises(ValueError, match=r"no config.json in this folder"):
        load_teacher(str(tmp_path))


def test_export_is_resampled_to_another_size(tmp_path: Path):
    folder, images = export(tmp_path / "ours", torch.float32), torch.rand(2, 3, 48, 48)
    teacher = load_teacher(f"big={folder}", 48)
    vit = tiny_vit()
    vit.set_input_size(img_size=48)
    torch.testing.assert_close(teacher.backbone(images).patches, features(vit, images), atol=1e-5, rtol=1e-5)
    assert (teacher.name, teacher.backbone.grid) == ("big", (6, 6))


def test_registers_and_layer_scale_survive(tmp_path: Path, images: Tensor):
    arguments = {"reg_tokens": 4, "init_values": 0.3, "no_embed_class": True}
    folder = export(tmp_path / "ours", torch.float32, **arguments)
    teacher = load_teacher(str(folder), SIZE)
    expected = features(tiny_vit(**arguments), images)
    torch.testing.assert_close(teacher.backbone(images).patches, expected, atol=1e-5, rtol=1e-5)
    assert teacher.card.num_prefix_tokens == 5


def test_plain_timm_folder_has_every_token_and_no_known_licence(tmp_path: Path):
    folder = export(tmp_path / "plain", ours=None)
    edit(folder, pretrained_cfg={"mean": MEAN, "std": STD})
    card = load_teacher(str(folder), SIZE).card
    assert (card.token_types, card.licence) == (("cls", "patch"), "unknown")
    edit(folder, pretrained_cfg={"mean": MEAN, "std": STD, "tag": "mae", "license": "cc-by-nc-4.0"})
    card = load_teacher(str(folder), SIZE).card
    assert (card.token_types, card.licence) == (("patch",), "CC-BY-NC 4.0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "hf-hub:someone/something"}, ("'hf-hub:someone/something' is a network of your own",)),
        ({"architecture": None}, ("architecture",)),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, ("model_args", "checkpoint_path")),
        ({"model_args": {**TINY, "in_chans": 4}}, ("RGB",)),
        ({"model_args": [1]}, ("config.json",)),
        ({"pretrained_cfg": {}}, ("mean", "std")),
        ({"comad": {"token_types": ["register"]}}, ("token_types", "register")),
        ({"model_args": {**TINY, "depth": 3}}, ("misses the keys", "blocks.2")),
        ({"model_args": {**TINY, "depth": 1}}, ("unexpected", "blocks.1")),
        ({"model_args": {**TINY, "patch_size": 16}}, ("shapes", "patch_embed.proj.weight")),
    ],
)
def test_config_that_does_not_fit_is_refused(changes: dict, words: tuple[str, ...], tmp_path: Path):
    folder = export(tmp_path / "ours")
    edit(folder, **changes)
    refusal(f"teacher={folder}", *words)


def test_folder_that_is_not_whole_is_refused(tmp_path: Path):
    folder = export(tmp_path / "ours")
    (folder / "model.safetensors").unlink()
    refusal(str(folder), "model.safetensors")
    for content in ("{not json", "[]", "3"):
        (folder / "config.json").write_text(content)
        refusal(str(folder), "config.json")
    (folder / "config.json").unlink()
    refusal(str(folder), "no config.json")


# --- timm names


def test_random_weights_are_the_same_every_time_and_disturb_nothing():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = load_teacher("vit_tiny_patch16_224:random", SIZE)
    assert torch.equal(torch.rand(3), expected)
    two = load_teacher("vit_tiny_patch16_224:random", SIZE)
    assert one.card == two.card
    assert torch.equal(one.backbone.vit.pos_embed, two.backbone.vit.pos_embed)
    assert one.card.licence == "none (random weights)"
    assert one.card.pixel_mean == (0.5, 0.5, 0.5)
    assert one.card.heads == 3


def test_pretrained_weights_that_timm_cannot_get_name_the_other_ways(monkeypatch: pytest.MonkeyPatch):
    def offline(
        name: str, image_size: int, pretrained: bool = False, **arguments: Any
    ) -> timm.models.VisionTransformer:
        if pretrained:
            raise OSError("no route to host\nmany lines")
        return tiny_vit()

    monkeypatch.setattr(sources, "create_vit", offline)
    name = "vit_base_patch16_224.mae"
    refusal(name, f"{name}=FILE", f"{name}:random")


def test_pretrained_card_follows_timm(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def online(name: str, image_size: int, **arguments: Any) -> timm.models.VisionTransformer:
        asked.append((name, arguments))
        return tiny_vit()

    monkeypatch.setattr(sources, "create_vit", online)
    card = load_teacher("vit_base_patch16_224.mae", SIZE).card
    assert asked[-1] == ("vit_base_patch16_224", {"pretrained": True, "pretrained_cfg": "mae"})
    assert (card.architecture, card.token_types) == ("vit_base_patch16_224.mae", ("patch",))
    assert card.licence == "CC-BY-NC 4.0"
    assert load_teacher("vit_base_patch16_224.dino", SIZE).card.token_types == ("cls", "patch")


def test_flat_file_is_read_as_the_timm_model_it_is_named_after(tmp_path: Path):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=SIZE).eval()
    torch.save(vit.state_dict(), tmp_path / "file.pth")
    name = "vit_tiny_patch16_224.augreg_in21k"
    teacher = load_teacher(f"{name}={tmp_path / 'file.pth'}", SIZE)
    images = torch.rand(1, 3, SIZE, SIZE)
    expected = vit.forward_features(images * 2 - 1)[:, 1:]
    torch.testing.assert_close(teacher.backbone(images).patches, expected, atol=1e-5, rtol=1e-5)
    assert (teacher.name, teacher.card.source, teacher.card.format) == (name, "file.pth", "timm")
    assert (teacher.card.pixel_std, teacher.card.architecture) == ((0.5, 0.5, 0.5), name)
    refusal(f"vit_tiny_patch16_224={tmp_path / 'file.pth'}", "TIMM_NAME.TAG=FILE")
    refusal(f"vit_small_patch16_224.dino={tmp_path / 'file.pth'}", "shapes")
    refusal(f"vit_tiny_patch16_224.nope={tmp_path / 'file.pth'}", "unknown teacher")


def test_name_of_a_file_and_heads_outweigh_the_config_beside_it(tmp_path: Path):
    torch.manual_seed(0)
    file = export(tmp_path / "ours", torch.float32) / "model.safetensors"
    assert load_teacher(f"mine={file}", SIZE).card.format == "export"
    refusal(f"vit_small_patch16_224.dino={file}", "misses the keys")
    refusal(f"mine={file}:heads=6", "same keys")
    (file.parent / "config.json").write_text('{"of": "another program"}')
    refusal(f"mine={file}", "same keys")


# --- names


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", ("unknown teacher",)),
        ("=", ("NAME=FILE_OR_FOLDER",)),
        ("mae=", ("NAME=FILE_OR_FOLDER",)),
        ("=weights.pth", ("NAME=FILE_OR_FOLDER",)),
        ("mae=nothing/weights.pth", ("'nothing/weights.pth'",)),
        ("nothing/weights.pth", ("check the path",)),
        ("weights.pth.tar", ("check the path",)),
        ("vit_tiny_patch16_22", ("vit_tiny_patch16_224", "NAME=FILE_OR_FOLDER", "bundled", "timm")),
        ("vit_base_patch16_224.ame", ("vit_base_patch16_224.mae",)),
        ("vit_tiny_patch16_224:rnd", (":random",)),
        ("vit_tiny_patch16_224:heads=3", (":random",)),
        ("zzz", ("unknown teacher 'zzz'; name a teacher by",)),
    ],
)
def test_wrong_name_is_answered_on_one_line(spec: str, words: tuple[str, ...]):
    refusal(spec, *words)


def test_bundled_teachers_are_listed_loaded_and_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "BUNDLED", tmp_path)
    assert bundled_teachers() == ()
    for name in ("one-stamps", "another-stamps"):
        export(tmp_path / name)
    (tmp_path / "not-a-teacher").mkdir()
    assert bundled_teachers() == ("another-stamps", "one-stamps")
    assert load_teacher("one-stamps", SIZE).name == "one-stamps"
    refusal("one-stamp", "near: one-stamps")


@pytest.mark.parametrize("name", bundled_teachers())
def test_the_card_of_a_bundled_teacher_describes_the_weights_beside_it(name: str):
    folder = BUNDLED / name
    card = json.loads((folder / "config.json").read_text())["comad"]
    assert card["sha256"] == sha256(folder / "model.safetensors")
    assert card["sha256"] in (folder / "README.md").read_text()
    assert card["command"].startswith(f"comad pretrain {card['preset']}")
    for key in ("code", "hardware", "hours", "curve", "data_licence", "images_seen", "licence"):
        assert card[key], key
    assert "efficientnet-lite" in card["about"]  # where its initial weights come from
    assert {row["role"] for row in card["scores"]} == {"pixels", "untrained", "teacher"}


def test_the_bundled_teachers_are_small_and_of_one_architecture():
    folders = [BUNDLED / name for name in bundled_teachers()]
    assert len(folders) >= 3
    assert sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors")) <= 30e6
    arguments = [json.loads((folder / "config.json").read_text())["model_args"] for folder in folders]
    shapes = [{key: part[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")} for part in arguments]
    assert shapes == shapes[:1] * len(shapes)


@pytest.mark.parametrize("name", bundled_teachers())
def test_every_bundled_teacher_loads(name: str):
    teacher = load_teacher(name, 48)
    assert teacher.name == name
    assert teacher.backbone(torch.rand(1, 3, 48, 48)).patches.isfinite().all()


def test_path_and_file_name_alone_name_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export(tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    assert load_teacher("ours", SIZE).name == "ours"
    monkeypatch.chdir(tmp_path / "ours")
    assert load_teacher(".", SIZE).card.source == "ours/model.safetensors"


# --- the backbone and its card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_teacher_is_frozen_and_takes_plain_pixels_in_any_precision(dtype: torch.dtype, tmp_path: Path, images: Tensor):
    teacher = load_teacher(str(export(tmp_path / "ours")), SIZE, dtype)
    backbone = teacher.backbone
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert {parameter.dtype for parameter in backbone.parameters()} == {dtype}
    assert backbone.pixel_mean.dtype == torch.float32
    patches = backbone(images).patches
    assert patches.dtype == dtype
    torch.testing.assert_close(patches.float(), features(tiny_vit(), images), atol=0.1, rtol=0.1)


def test_image_size_off_the_patches_is_refused(tmp_path: Path):
    refusal(str(export(tmp_path / "ours")), "35 pixels", "use 32", image_size=35)


def test_card_survives_a_file_and_tells_files_apart(tmp_path: Path):
    one, two = (load_teacher(f"x={export(tmp_path / str(i), seed=i)}", SIZE).card for i in range(2))
    assert json.loads(json.dumps(one.as_dict())) == one.as_dict()
    assert one.as_dict().keys() == TeacherCard.__dataclass_fields__.keys()
    assert one.sha256 != two.sha256
    assert len(one.sha256) == 64
    assert "\n" not in one.summary()
    assert str(tmp_path) not in one.summary()
    assert all(word in one.summary() for word in ("x: export", "width 48", one.sha256[:12], one.licence))


def test_licence_notice_names_the_non_commercial(tmp_path: Path):
    bound = load_teacher(f"bound={export(tmp_path / 'a', ours={'licence': 'CC-BY-NC 4.0'})}", SIZE)
    free = load_teacher(f"free={export(tmp_path / 'b', ours={'licence': 'Apache-2.0'})}", SIZE)
    assert licence_notice([free]) == licence_notice([]) == ""
    notice = licence_notice([free, bound])
    assert "bound (CC-BY-NC 4.0)" in notice
    assert "free" not in notice
    assert "\n" not in notice
    assert isinstance(bound, Teacher)


@pytest.mark.parametrize(
    ("licences", "inherited"),
    [
        ([], "apache-2.0"),
        (["Apache-2.0", "MIT", "bsd-3-clause", "none (random weights)"], "apache-2.0"),
        (["Apache-2.0", "CC-BY-NC 4.0", "CC-BY-NC 4.0"], "CC-BY-NC 4.0"),
        (["DINOv3 License", "CC-BY-NC 4.0"], "CC-BY-NC 4.0, DINOv3 License"),
        (["unknown"], "unknown"),
    ],
)
def test_what_is_learnt_from_weights_inherits_what_binds_them(licences: list[str], inherited: str):
    assert inherited_licence(licences) == inherited


def test_licence_of_pretrained_weights_is_known():
    assert VitConfig(name="vit_base_patch16_224.mae", pretrained=True).start_licences == ("cc-by-nc-4.0",)
    assert VitConfig(name="vit_base_patch16_224.mae").start_licences == ()


def test_folder_with_weights_in_torchs_own_format(tmp_path: Path, images: Tensor):
    vit = tiny_vit()
    timm.models.save_for_hf(vit, str(tmp_path), safe_serialization=False, data_config={"mean": MEAN, "std": STD})
    teacher = load_teacher(f"ours={tmp_path}", SIZE)
    torch.testing.assert_close(teacher.backbone(images).patches, features(vit, images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("as_folder", [False, True])
def test_network_with_two_heads(tmp_path: Path, images: Tensor, as_folder: bool):
    torch.manual_seed(0)
    network = timm.create_model("deit_tiny_distilled_patch16_224", img_size=SIZE, **TINY).eval()
    if as_folder:
        timm.models.save_for_hf(network, str(tmp_path), safe_serialization=True)
        found = load_teacher(f"deit={tmp_path}", SIZE)
    else:
        whole = timm.create_model("deit_tiny_distilled_patch16_224").eval()
        torch.save(whole.state_dict(), tmp_path / "deit.pth")
        found = load_teacher(f"deit_tiny_distilled_patch16_224.fb_in1k={tmp_path / 'deit.pth'}", 224)
        network, images = whole, torch.rand(1, 3, 224, 224)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_features((images - mean) / std)
    tokens = found.backbone(images)
    torch.testing.assert_close(tokens.patches, expected[:, 2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.cls, expected[:, 0], atol=1e-5, rtol=1e-5)


def test_hybrid_has_the_grid_that_is_asked_for():
    (teacher,) = load_on_grid(["vit_small_r26_s32_224:random"], 3, 16)
    side = 3 * teacher.backbone.patch_size
    assert teacher.backbone(torch.rand(1, 3, side, side)).patches.shape == (1, 9, 384)


@pytest.mark.parametrize(
    "name", ["vit_tiny_r_s16_p8_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_rpn_224"]
)
def test_students_that_cannot_be_trained_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name}.*vit_tiny_patch16_224"):
        VitConfig(name=name).build()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 100}, "100 pixels.*use 96"),
        ({"heads": 5}, "multiple of its heads"),
        ({"pretrained": True}, "weights"),
    ],
)
def test_students_whose_sizes_do_not_fit_are_refused(changes: dict[str, Any], words: str, monkeypatch):
    def unreachable(*arguments, **named):
        raise OSError("no network")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", unreachable)
    with pytest.raises(ValueError, match=words):
        VitConfig(**changes).build()
