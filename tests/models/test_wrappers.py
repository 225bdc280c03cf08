"""Well-known wrappers come off by name and stand on the card; what is refused is told a way that works."""

from __future__ import annotations

import argparse
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from comad.models.checkpoints import INSIDE, PREFIXES
from comad.models.files import read_file
from comad.models.formats import APACHE, FORMATS, Format
from comad.models.huggingface import FAMILIES
from comad.models.teachers import load_teacher, teacher_from_module

SIZE = 32


def vit_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 0, "img_size": SIZE}
    return timm.create_model("vit_tiny_patch16_224", **shape).state_dict()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def load(tmp_path: Path, content: Any, name: str = "dino") -> Any:
    torch.save(content, tmp_path / "file.pth")
    return load_teacher(f"{name}={tmp_path / 'file.pth'}", SIZE)


WRAPPED = {
    "compiled": (lambda s: under("_orig_mod.", s), ("_orig_mod.",)),
    "ddp": (lambda s: under("module.", s), ("module.",)),
    "ddp, compiled": (lambda s: under("module._orig_mod.", s), ("module.", "_orig_mod.")),
    "backbone": (lambda s: under("backbone.", s), ("backbone.",)),
    "lightning": (lambda s: {"epoch": 3, "state_dict": under("model.", s)}, ("state_dict", "model.")),
    "ema": (lambda s: {"model": {"x.y": torch.ones(1)}, "model_ema": s}, ("model_ema",)),
    "ema of timm": (lambda s: {"state_dict": {"a.b": torch.zeros(1)}, "state_dict_ema": s}, ("state_dict_ema",)),
    "ema state": (lambda s: {"ema_state_dict": under("module.", s)}, ("ema_state_dict", "module.")),
    "teacher": (lambda s: {"teacher": under("module.", s)}, ("teacher", "module.")),
    "teacher and student": (lambda s: {**under("teacher.", s), **under("student.", s)}, ("teacher.",)),
    "model": (lambda s: {"model_state_dict": s, "optimizer": {"lr": 1.0}}, ("model_state_dict",)),
    "lightly-train": (
        lambda s: {"state_dict": under("wrapped_model._model.", s)},
        ("state_dict", "wrapped_model._model."),
    ),
    "fsdp": (lambda s: under("_fsdp_wrapped_module.", s), ("_fsdp_wrapped_module.",)),
    "block by block": (
        lambda s: {"model": {key.replace("blocks.0.", "blocks.0._orig_mod."): x for key, x in s.items()}},
        ("model", "_orig_mod."),
    ),
    "checkpointed": (
        lambda s: under("net.", {key.replace(".0.", ".0._checkpoint_wrapped_module."): x for key, x in s.items()}),
        ("net.", "_checkpoint_wrapped_module."),
    ),
    "moco": (
        lambda s: {"state_dict": {**under("module.encoder_q.", s), **under("module.encoder_k.", s)}},
        ("state_dict", "module.", "encoder_q."),
    ),
    "moco v3": (
        lambda s: {"state_dict": {**under("module.base_encoder.", s), **under("module.predictor.", s)}},
        ("state_dict", "module.", "base_encoder."),
    ),
    "distillation": (
        lambda s: {"state_dict": {**under("student_backbone.", s), **under("teacher_backbone.", s)}},
        ("state_dict", "teacher_backbone."),
    ),
    "transformers": (lambda s: under("timm_model.", s), ("timm_model.",)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper_comes_off_and_stands_on_the_card(name: str, tmp_path: Path):
    wrap, names = WRAPPED[name]
    state = vit_state()
    expected, images = load(tmp_path, state), torch.rand(1, 3, SIZE, SIZE)
    teacher = load(tmp_path, wrap(state))
    assert torch.equal(teacher.backbone(images).patches, expected.backbone(images).patches)
    assert teacher.card.unwrapped == names and expected.card.unwrapped == ()
    assert names[0] in teacher.card.summary()
    named = load(
        tmp_path,
        wrap(dict(timm.create_model("vit_tiny_patch16_224").state_dict())),
        "vit_tiny_patch16_224.augreg_in21k",
    )
    assert (named.card.format, named.card.unwrapped) == ("timm", names)


def test_every_prefix_is_tested():
    tested = {name for _, names in WRAPPED.values() for name in names if name.endswith(".")}
    assert tested | {"teacher.backbone."} == {*PREFIXES, *INSIDE}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".anything"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_kind_of_a_file_does_not_depend_on_its_suffix(kind: str, suffix: str, tmp_path: Path):
    path, state = tmp_path / f"file{suffix}", vit_state()
    torch.save(state, path) if kind == "torch" else safetensors.torch.save_file(state, path)
    assert load_teacher(f"dino={path}", SIZE).card.format == "ibot/dino"
    with pytest.raises(ValueError, match="same keys"):
        load_teacher(f"mine={path}", SIZE)


def test_safetensors_are_known_whatever_the_length_of_their_header(tmp_path: Path):
    """A header of 128, 384 ... bytes begins with the byte that a pickle begins with."""
    path, lowest = tmp_path / "file.safetensors", set()
    for padding in range(0, 256, 8):
        safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata={"pad": "x" * padding})
        lowest.add(path.read_bytes()[0])
        assert torch.equal(read_file(path)["a"], torch.ones(2))
    assert 0x80 in lowest


# --- remedies, tried


def refusal(spec: str, size: int = SIZE) -> str:
    with pytest.raises(ValueError) as caught:
        load_teacher(spec, size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_headless_file_is_read_by_the_names_that_its_refusal_offers(tmp_path: Path):
    torch.save(vit_state(), tmp_path / "vit.pth")
    message = refusal(f"mine={tmp_path / 'vit.pth'}")
    for name in ("dino", "ibot"):
        assert f"{name}=FILE" in message
        assert load_teacher(f"{name}={tmp_path / 'vit.pth'}", SIZE).card.pixel_mean == (0.485, 0.456, 0.406)
    whole = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1).state_dict()
    torch.save(timm.create_model("vit_base_patch16_224", num_classes=0).state_dict(), tmp_path / "base.pth")
    for name in re.findall(r"(vit_base\S+)=FILE", refusal(f"mine={tmp_path / 'base.pth'}")):
        card = load_teacher(f"{name}={tmp_path / 'base.pth'}", SIZE).card
        assert card.pixel_mean == ((0.5,) * 3 if "augreg" in name else (0.485, 0.456, 0.406))
    assert len(whole)


def test_file_with_a_classifier_is_offered_a_name_by_its_shapes(tmp_path: Path):
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    message = refusal(f"mine={tmp_path / 'vit.pth'}")
    assert "vit_tiny_patch16_224.TAG=FILE" in message
    assert load_teacher(f"vit_tiny_patch16_224.augreg_in21k={tmp_path / 'vit.pth'}", SIZE)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_file_of_torchvision_is_offered_timms_name(name: str, tmp_path: Path):
    network = getattr(torchvision.models, name)().eval()
    torch.save({"state_dict": under("module.", network.state_dict())}, tmp_path / "tv.pth")
    (offered,) = re.findall(r"pass (\S+)=FILE", refusal(f"mine={tmp_path / 'tv.pth'}"))
    teacher = load_teacher(f"{offered}={tmp_path / 'tv.pth'}", 64)
    trunk = nn.Sequential(*list(network.children())[:-2])
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = trunk((images - teacher.backbone.pixel_mean) / teacher.backbone.pixel_std).flatten(2).transpose(1, 2)
    torch.testing.assert_close(teacher.backbone(images).patches, wanted, atol=1e-4, rtol=1e-4)
    assert teacher.card.unwrapped == ("state_dict", "module.")


def test_file_of_open_clip_is_offered_timms_name(tmp_path: Path):
    torch.manual_seed(0)
    network = timm.create_model("vit_base_patch32_clip_224", num_classes=0).eval()
    names = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj.": "conv1."}
    names |= {"norm_pre.": "ln_pre.", "blocks.": "transformer.resblocks.", ".norm1.": ".ln_1.", ".norm2.": ".ln_2."}
    names |= {".attn.qkv.": ".attn.in_proj_", ".attn.proj.": ".attn.out_proj.", ".mlp.fc1.": ".mlp.c_fc."}
    names |= {".mlp.fc2.": ".mlp.c_proj."}
    content: dict[str, Tensor] = {"logit_scale": torch.zeros(()), "token_embedding.weight": torch.zeros(9, 4)}
    for key, tensor in network.state_dict().items():
        named = "ln_post." + key.removeprefix("norm.") if key.startswith("norm.") else key
        for ours, theirs in names.items():
            named = named.replace(ours, theirs)
        content[f"visual.{named}"] = tensor.flatten() if key == "cls_token" else tensor
    content["visual.positional_embedding"] = content["visual.positional_embedding"][0]
    torch.save(content, tmp_path / "clip.pt")
    (offered,) = re.findall(r"pass (\S+)\.TAG=FILE", refusal(f"mine={tmp_path / 'clip.pt'}"))
    teacher = load_teacher(f"{offered}.laion2b={tmp_path / 'clip.pt'}", 224)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        wanted = network.forward_features((images - teacher.backbone.pixel_mean) / teacher.backbone.pixel_std)
    torch.testing.assert_close(teacher.backbone(images).patches, wanted[:, 1:], atol=1e-4, rtol=1e-4)


NET = """
import torch, torchvision
from pathlib import Path

def network():
    whole = torchvision.models.mobilenet_v2()
    whole.load_state_dict(torch.load(Path(__file__).parent / "tv.pth"))
    return whole.features

def nothing():
    return 3

def broken():
    raise KeyError("lost")
"""


def test_any_other_file_is_read_by_a_function_of_ones_own(tmp_path: Path):
    torch.manual_seed(0)
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "tv.pth")
    assert "NAME=NET.py:FUNCTION" in refusal(f"mine={tmp_path / 'tv.pth'}")
    (tmp_path / "net.py").write_text(NET)
    spec = f"mine={tmp_path / 'net.py'}"
    teacher = load_teacher(f"{spec}:network:size=64", rows=3)
    assert teacher.backbone(torch.rand(1, 3, 64, 64)).patches.shape == (1, 9, 1280)
    assert (teacher.name, teacher.card.format, len(teacher.card.sha256)) == ("mine", "module", 64)
    assert "returns a int, not a module" in refusal(f"{spec}:nothing")
    assert "KeyError: 'lost'" in refusal(f"{spec}:broken")
    assert "has no attribute 'nix'" in refusal(f"{spec}:nix")
    assert "no file" in refusal(f"mine={tmp_path / 'other.py'}:network")


def run_one_liner(message: str, file: Path, new: Path) -> None:
    line = message[message.index("keep its tensors only: ") + 23 :].rstrip(".")
    code = line.replace("NEW_FILE", repr(str(new))).replace("FILE", repr(str(file)))
    subprocess.run([sys.executable, "-c", f"import torch; {code}"], check=True)


class Holder:
    """An object that `torch.save` pickles whole."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def state_dict(self) -> dict[str, Tensor]:
        return self.state


@pytest.mark.parametrize("kind", ["module", "in a container", "arguments", "script"])
def test_one_liner_for_a_pickled_file_works(kind: str, tmp_path: Path):
    file, new = tmp_path / "file.pth", tmp_path / "new.pth"
    state = vit_state()
    network = timm.create_model(
        "vit_tiny_patch16_224", patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=0, img_size=SIZE
    )
    network.load_state_dict(state)
    if kind == "script":
        torch.jit.trace(network.eval(), torch.rand(1, 3, SIZE, SIZE)).save(str(file))
    else:
        whole = {"module": network, "in a container": {"model": network, "args": Path()}}
        torch.save(whole.get(kind, {"state_dict": state, "args": Path()}), file)
    run_one_liner(refusal(f"dino={file}"), file, new)
    images = torch.rand(1, 3, SIZE, SIZE)
    found = load_teacher(f"dino={new}", SIZE).backbone(images).patches
    torch.testing.assert_close(found, load(tmp_path, state).backbone(images).patches)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_that_torch_did_not_write_is_read_once_it_is_converted_as_it_is_told(protocol: int, tmp_path: Path):
    file, new, state = tmp_path / "file.pkl", tmp_path / "new.pth", vit_state()
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    file.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol))
    run_one_liner(refusal(f"dino={file}"), file, new)
    images = torch.rand(1, 3, SIZE, SIZE)
    found = load_teacher(f"dino={new}", SIZE).backbone(images).patches
    torch.testing.assert_close(found, load(tmp_path, state).backbone(images).patches)


def test_one_liner_keeps_every_state_dict_and_the_average_is_taken(tmp_path: Path):
    """As timm's train.py saves them, and as YOLO's does: whole modules."""
    last = timm.create_model("vit_tiny_patch16_224")
    averaged = timm.create_model("vit_tiny_patch16_224").eval()
    scalars = {"epoch": 3, "args": argparse.Namespace(lr=1.0), "metric": 76.1}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]}
    saved = {"state_dict": last.state_dict(), "state_dict_ema": averaged.state_dict(), "optimizer": optimizer}
    for content in ({**scalars, **saved}, {**scalars, "model": last, "ema": averaged, "optimizer": optimizer}):
        path = tmp_path / "model_best.pth.tar"
        torch.save(content, path)
        spec = f"vit_tiny_patch16_224.augreg_in21k={tmp_path / 'new.pth'}"
        run_one_liner(refusal(f"mine={path}"), path, tmp_path / "new.pth")
        images, backbone = torch.rand(1, 3, 224, 224), load_teacher(spec, 224).backbone
        with torch.no_grad():
            wanted = averaged.forward_features((images - backbone.pixel_mean) / backbone.pixel_std)[:, 1:]
        torch.testing.assert_close(backbone(images).patches, wanted, atol=1e-4, rtol=1e-4)
        (tmp_path / "new.pth").unlink()


def test_only_broken_files_are_called_so(tmp_path: Path):
    sound = {
        "text.pth": b"hello world\n" * 30,
        "page.pth": b"<html>404</html>",
        "image.pth": b"\x89PNG\r\n" + bytes(99),
    }
    for name, content in sound.items():
        (tmp_path / name).write_bytes(content)
        assert "damaged" not in refusal(f"dino={tmp_path / name}")
    torch.save(vit_state(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-100])
    assert "damaged or cut short" in refusal(f"dino={tmp_path / 'cut.pth'}")


# --- tables are open


def test_format_from_outside_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def rename(weights: Any) -> dict[str, Tensor]:
        return {key.removeprefix("mine_"): tensor for key, tensor in weights.items()}

    mine = Format(detect=("mine_cls_token",), convert=rename, licence=APACHE)
    monkeypatch.setitem(FORMATS, "mine", mine)
    teacher = load(tmp_path, under("mine_", vit_state()))
    assert (teacher.card.format, teacher.card.depth) == ("mine", 1)


def test_whole_loader_from_outside_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def build(weights: Any) -> nn.Module:
        network = nn.Conv2d(3, 8, 4, 4)
        network.load_state_dict({"weight": weights["strange"], "bias": torch.zeros(8)})
        return network

    own = Format(detect=("strange",), build=build, positions="none", resampling="none", licence=APACHE)
    monkeypatch.setitem(FORMATS, "strange", own)
    teacher = load(tmp_path, {"strange": torch.randn(8, 3, 4, 4)})
    assert teacher.backbone(torch.rand(1, 3, SIZE, SIZE)).patches.shape == (1, 64, 8)
    assert teacher.card.format == "strange"


def test_family_from_outside_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTModel(transformers.ViTConfig(**size, image_size=SIZE, patch_size=8))
    model.save_pretrained(tmp_path / "theirs")
    config = (tmp_path / "theirs" / "config.json").read_text().replace('"model_type": "vit"', '"model_type": "mine"')
    (tmp_path / "theirs" / "config.json").write_text(config)
    assert "model_type is 'mine'" in refusal(str(tmp_path / "theirs"))
    monkeypatch.setitem(FAMILIES, "mine", FAMILIES["vit"])
    assert load_teacher(str(tmp_path / "theirs"), SIZE).card.architecture == "mine"


# --- objects


def test_model_of_timm_is_a_teacher_with_its_pixels_and_masks():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    teacher, images = load_teacher(vit, 64, name="mine"), torch.rand(2, 3, 64, 64)
    assert (teacher.card.pixel_mean, teacher.card.positions) == ((0.5,) * 3, "bicubic, antialiased")
    assert teacher.backbone.supports_masking and teacher.backbone.grid == (4, 4)
    assert vit.patch_embed.img_size == (224, 224) and all(p.requires_grad for p in vit.parameters())
    cnn = load_teacher(timm.create_model("resnet18"), rows=5, name="cnn")
    assert cnn.backbone.image_size == 224 and cnn.backbone(torch.rand(1, 3, 224, 224)).patches.shape == (1, 25, 512)
    assert images.shape == (2, 3, 64, 64)


def test_own_module_and_backbone_and_teacher_are_teachers():
    module = nn.Conv2d(3, 16, 8, stride=8)
    teacher = load_teacher(module, 32, name="mine", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
    assert teacher == load_teacher(teacher) and teacher.card.pixel_mean == (0.1, 0.2, 0.3)
    coarse = load_teacher(teacher, rows=2)
    assert coarse.backbone.grid == (2, 2) and teacher.backbone.grid == (4, 4)
    assert coarse.backbone.network is teacher.backbone.network
    again = load_teacher(teacher.backbone, name="again")
    assert again.backbone(torch.rand(1, 3, 32, 32)).patches.shape == (1, 16, 16)
    same = teacher_from_module("mine", module, 32, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
    assert same.card == teacher.card
    with pytest.raises(ValueError, match="another precision"):
        load_teacher(teacher, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="std above 0"):
        load_teacher(module, 32, name="mine", mean=(0.1,) * 3, std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="for teachers that are objects"):
        load_teacher("vit_tiny_patch16_224:random", 32, mean=(0.5,) * 3)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_network_in_a_wrapper_of_torch_is_itself(wrap: Any):
    network = torchvision.models.resnet18().eval()
    expected, teacher = (load_teacher(x, 64, name="mine") for x in (network, wrap(network)))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(teacher.backbone(images).patches, expected.backbone(images).patches)
    assert teacher.card.sha256 == expected.card.sha256 and teacher.card.architecture == "ResNet"


def test_list_of_modules_is_no_teacher_and_is_told_so_in_a_line():
    with pytest.raises(ValueError, match=r"^\[ResNet\([^\n]* is no teacher; give a name[^\n]*$"):
        load_teacher([torchvision.models.resnet18()], 64)  # pyright: ignore[reportArgumentType]


def test_module_that_calls_a_part_of_it_timm_model_is_all_of_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.timm_model = timm.create_model("resnet18")

        def forward(self, x: Tensor) -> Tensor:
            return self.timm_model.forward_features(x)[:, :7]

    assert load_teacher(Net(), 64, name="mine").backbone.width == 7


def spoilt(kind: str) -> nn.Module:
    network = nn.Conv2d(3, 8, 16, 16).eval()
    if kind == "nan":
        nn.init.constant_(network.weight, float("nan"))
    if kind == "quantised":
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(network, nn.Linear(2, 2)), {nn.Linear})
    if kind == "script":
        return torch.jit.trace(network, torch.rand(1, 3, 64, 64))
    return network.to("meta") if kind == "meta" else network


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("nan", "a sound network"), ("quantised", "in fp32"), ("meta", "in fp32"), ("script", "that it was made of")],
)
def test_network_without_plain_weights_is_refused_in_a_line(kind: str, remedy: str):
    with pytest.raises(ValueError, match=f"^mine: [^\n]*{remedy}"):
        load_teacher(spoilt(kind), 64, name="mine")


def test_model_of_transformers_of_unknown_pixels_asks_for_them():
    transformers = pytest.importorskip("transformers")
    stages = {"depths": [1] * 4, "hidden_sizes": [8] * 4}
    model = transformers.PoolFormerModel(transformers.PoolFormerConfig(**stages))
    with pytest.raises(ValueError, match="give mean and std"):
        load_teacher(model, 64, name="pool")
    teacher = load_teacher(model, 64, name="pool", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert teacher.backbone(torch.rand(1, 3, 64, 64)).patches.isfinite().all()


def test_identity_of_a_module_is_the_hash_of_its_weights_of_any_rank():
    module = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 4, (1, 8, 8), stride=(1, 8, 8)), nn.Flatten(2, 3))
    one, two = (load_teacher(module, 32, name="m").card.sha256 for _ in range(2))
    with torch.no_grad():
        module[1].weight[0] += 1
    assert one == two != load_teacher(module, 32, name="m").card.sha256
