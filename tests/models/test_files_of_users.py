"""Files as training scripts and hubs leave them: the features are those of the network that was saved.

What is refused is refused with a way that works; the tests go it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from comad.models import checkpoints
from comad.models.teachers import Teacher, load_teacher

Features = Callable[[Tensor], Tensor]
SIZE = 32
TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
VISION = {**TINY, "patch_size": 8, "image_size": SIZE}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def shaken(network: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.eval()


def vit(name: str = "vit_tiny_patch16_224", **changes: Any) -> Any:
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 0, "img_size": SIZE}
    return shaken(timm.create_model(name, **{**shape, **changes}))


def written(folder: Path, content: Any, name: str = "file.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def refusal(spec: str, size: int = SIZE) -> str:
    with pytest.raises(ValueError) as caught:
        load_teacher(spec, size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(spec: str, features: Features, size: int = SIZE) -> Teacher:
    """The teacher's patches are the features, whatever stands before them."""
    teacher = load_teacher(spec, size)
    images, backbone = torch.rand(2, 3, size, size), teacher.backbone
    with torch.no_grad():
        wanted = features((images - backbone.pixel_mean) / backbone.pixel_std)
        found = backbone(images).patches
    wanted = wanted.flatten(2).transpose(1, 2) if wanted.ndim == 4 else wanted[:, -found.shape[1] :]
    assert wanted.shape == found.shape and (wanted - found).norm() <= 1e-4 * wanted.norm()
    return teacher


def offered(spec: str, tag: str = "") -> str:
    """The name of a timm model that a refusal offers, with a tag where it asks for one."""
    (name,) = re.findall(r"(\w+(?:\.\w+)?)=FILE(?: if it is|\.$)", refusal(spec))
    return name.replace(".TAG", f".{tag}")


# --- averages


@pytest.mark.parametrize("average", ["model_ema.", "ema_model.module.", "ema."])
def test_average_beside_the_weights_in_one_state_dict_is_taken(average: str, tmp_path: Path):
    last = vit()
    averaged = shaken(copy.deepcopy(last), seed=1)
    state = {**under("model.", last.state_dict()), **under(average, averaged.state_dict())}
    state["ema_model.n_averaged"] = torch.tensor(3)
    path = written(tmp_path, {"state_dict": state, "epoch": 3})
    card = check(f"dino={path}", averaged.forward_features).card
    assert card.unwrapped == ("state_dict", *(f"{part}." for part in average.split(".") if part))


def test_ijepa_teaches_by_the_encoder_that_is_an_average():
    averaged, predictor = {"module.norm.weight": torch.ones(1)}, {"module.predictor_pos_embed": torch.ones(1)}
    content: dict[str, Any] = {"encoder": {"module.norm.weight": torch.zeros(1)}, "predictor": predictor, "epoch": 1}
    assert list(checkpoints.unwrappings(content))[-1][1] == ("encoder", "module.")
    *_, (state, unwrapped) = checkpoints.unwrappings({**content, "target_encoder": averaged})
    assert unwrapped == ("target_encoder", "module.") and state["norm.weight"] == 1


# --- names that a refusal offers


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2", "resnext50_32x4d"])
def test_name_of_a_torchvision_resnet_fits(name: str, tmp_path: Path):
    network = getattr(torchvision.models, name)().eval()
    path = written(tmp_path, under("module.", network.state_dict()))
    trunk = nn.Sequential(*list(network.children())[:-2])
    assert check(f"{offered(f'mine={path}')}={path}", trunk, 64).card.architecture == f"{name}.tv_in1k"


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("vit_small_patch16_224", "augreg_in1k"),
        ("beit_base_patch16_224", "in22k_ft_in22k"),
        ("deit3_small_patch16_224", "fb_in1k"),
    ],
)
def test_name_of_a_file_with_timms_keys_fits(name: str, tag: str, tmp_path: Path):
    network = timm.create_model(name, num_classes=5).eval()
    path = written(tmp_path, {"state_dict": under("_orig_mod.module.", network.state_dict())})
    spec = f"mine={path}"
    if name.startswith("beit"):
        assert f"{name}.{tag}=FILE" in refusal(spec)
    else:
        assert offered(spec, tag) == f"{name}.{tag}"
    norm = getattr(network, "fc_norm", None) or nn.Identity()
    check(f"{name}.{tag}={path}", lambda pixels: norm(network.forward_features(pixels)), 224)


def test_no_name_is_offered_that_does_not_fit(tmp_path: Path):
    message = refusal(f"mine={written(tmp_path, vit(num_classes=3, depth=2).state_dict())}")
    assert "perhaps" not in message and "NAME=NET.py:FUNCTION" in message


def test_a_file_of_any_other_timm_model_is_told_to_name_it(tmp_path: Path):
    network = shaken(timm.create_model("convnext_atto"))
    path = written(tmp_path, network.state_dict())
    assert "TIMM_NAME.TAG=FILE" in refusal(f"mine={path}")
    check(f"convnext_atto.d2_in1k={path}", lambda pixels: network.head.norm(network.forward_features(pixels)), 64)


def test_fine_tuned_mae_without_its_container_is_read_by_the_name_that_is_offered(tmp_path: Path):
    network = shaken(timm.create_model("vit_base_patch16_224", global_pool="avg", num_classes=5))
    path = written(tmp_path, network.state_dict())
    spec = f"{offered(f'mine={path}', 'mae')}={path}"
    backbone = check(spec, lambda pixels: network.fc_norm(network.forward_features(pixels)), 224).backbone
    assert backbone.has_cls and spec.startswith("vit_base_patch16_224.mae=")


def test_keys_beyond_the_network_are_read_once_they_are_left_out(tmp_path: Path):
    network = vit()
    state = network.state_dict()
    path = written(tmp_path, {**state, "projector.0.weight": torch.ones(2, 2)})
    assert "save it without these" in refusal(f"dino={path}")
    del (content := torch.load(path, weights_only=True))["projector.0.weight"]
    check(f"dino={written(tmp_path, content)}", network.forward_features)


# --- names of the authors


def clip_state(network: Any) -> dict[str, Tensor]:
    """OpenCLIP's, with the projection to the space of texts that every such file has."""
    names = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj.": "conv1."}
    names |= {"norm_pre.": "ln_pre.", "blocks.": "transformer.resblocks.", ".norm1.": ".ln_1.", ".norm2.": ".ln_2."}
    names |= {".attn.qkv.": ".attn.in_proj_", ".attn.proj.": ".attn.out_proj.", ".mlp.fc1.": ".mlp.c_fc."}
    names |= {".mlp.fc2.": ".mlp.c_proj."}
    state = {"proj": torch.ones(len(network.norm.weight), 512)}
    for key, tensor in network.state_dict().items():
        key = re.sub(r"^norm\.", "ln_post.", key)
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = tensor.flatten() if key == "class_embedding" else tensor
    return {**state, "positional_embedding": state["positional_embedding"][0]}


@pytest.mark.parametrize("kind", ["of a training", "visual alone", "timm's trunk"])
def test_open_clip_as_it_is_saved(kind: str, tmp_path: Path):
    name = "vit_base_patch16_siglip_224" if "trunk" in kind else "vit_base_patch32_clip_224"
    network = shaken(timm.create_model(name, num_classes=0))
    visual = clip_state(network) if "trunk" not in kind else under("trunk.", network.state_dict())
    text = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    whole = {**text, **under("visual.", visual)}
    training = {"epoch": 3, "name": "run", "state_dict": under("module.", whole), "optimizer": {"state": {}}}
    path = written(tmp_path, {"of a training": training, "visual alone": visual}.get(kind, whole))
    tag = {"siglip": "webli"}.get(name.split("_")[3], "laion2b")
    assert offered(f"mine={path}", tag) == f"{name}.{tag}"
    check(f"{name}.{tag}={path}", network.forward_features, 224)


def test_convnext_of_its_authors(tmp_path: Path):
    network = shaken(timm.create_model("convnext_atto", num_classes=7))
    names = {r"^stem\.": "downsample_layers.0.", r"^stages\.(\d)\.downsample\.": r"downsample_layers.\1."}
    names |= {r"\.blocks\.": ".", "conv_dw": "dwconv", r"mlp\.fc": "pwconv", r"^head\.norm\.": "norm."}
    state = {}
    for key, tensor in network.state_dict().items():
        for ours, theirs in {**names, r"^head\.fc\.": "head."}.items():
            key = re.sub(ours, theirs, key)
        state[key] = tensor
    path = written(tmp_path, {"model": state})
    check(f"convnext_atto.d2_in1k={path}", lambda pixels: network.head.norm(network.forward_features(pixels)), 64)


def test_swin_of_its_authors_shrinks_at_the_end_of_a_stage(tmp_path: Path):
    network = shaken(timm.create_model("swin_tiny_patch4_window7_224", num_classes=7))
    state = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    for key, tensor in network.state_dict().items():
        key = re.sub(r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)
        state[key.replace("head.fc.", "head.")] = tensor
        if key.endswith("bias_table"):
            state[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    path = written(tmp_path, {"model": state})
    spec = f"swin_tiny_patch4_window7_224.ms_in1k={path}"
    check(spec, lambda pixels: network.forward_features(pixels).permute(0, 3, 1, 2), 224)


# --- folders of transformers


def saved(folder: Path, model: Any) -> Any:
    shaken(model).save_pretrained(folder)
    return model


def convnextv2(folder: Path) -> Features:
    model = saved(folder, transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**STAGES)))
    norm = model.convnextv2.layernorm
    return lambda pixels: norm(model.convnextv2(pixels).last_hidden_state.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def dinov2(folder: Path) -> Features:
    model = saved(folder, transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**VISION)))
    return lambda pixels: model.dinov2(pixels).last_hidden_state


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("weights.pth", "torch"),
        ("pytorch_model.bin", "safetensors"),
        ("model.safetensors", "torch"),
        ("model.fp16.safetensors", "safetensors"),
        ("best.anything", "torch"),
    ],
)
@pytest.mark.parametrize("make", [convnextv2, dinov2])
def test_weights_of_a_folder_are_read_whatever_their_name_and_kind(make: Any, name: str, kind: str, tmp_path: Path):
    features, folder = make(tmp_path / "theirs"), tmp_path / "theirs"
    state = {key: x.clone() for key, x in safetensors.torch.load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / name) if kind == "torch" else safetensors.torch.save_file(state, folder / name)
    size = 64 if make is convnextv2 else SIZE
    check(f"mine={folder / name}", features, size)
    if not name.endswith("anything"):
        check(str(folder), features, size)
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    torch.save({"lr": 1.0}, folder / "optimizer.pt")
    if name not in ("pytorch_model.bin", "model.safetensors"):
        assert f"NAME={folder}/FILE" in refusal(str(folder))
    check(f"mine={folder / name}", features, size)


def test_known_file_beside_a_config_of_another_network_is_itself(tmp_path: Path):
    dinov2(tmp_path)
    network = vit()
    assert check(f"dino={written(tmp_path, network.state_dict())}", network.forward_features).card.format == "ibot/dino"


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_names_of_tensors_may_be_those_in_memory(kind: str, tmp_path: Path):
    """`torch.save(model.state_dict(), FILE)` beside the config, which save_pretrained would rename."""
    make = {
        "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TINY, patch_size=8, image_size=SIZE)),
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
    }[kind]
    model = saved(tmp_path, make())
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    base = getattr(model, "vit", model)
    norm = base.post_layernorm if kind == "clip" else nn.Identity()
    check(str(tmp_path), lambda pixels: norm(base(pixels).last_hidden_state), 224 if kind == "dinov2" else SIZE)


def test_part_of_several_is_told_by_its_index(tmp_path: Path):
    network = vit()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [dict(list(network.state_dict().items())[i::2]) for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        safetensors.torch.save_file(part, tmp_path / name)
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (spec,) = re.findall(r"NAME=(.*)\.$", refusal(f"dino={tmp_path / names[0]}"))
    check(f"dino={spec}", network.forward_features)


def test_export_under_another_name_is_the_export(tmp_path: Path):
    network = vit(depth=2)
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": SIZE}
    timm.models.save_for_hf(network, str(tmp_path), model_config={"model_args": shape}, safe_serialization=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "best.safetensors")
    for spec in (str(tmp_path), f"mine={tmp_path / 'best.safetensors'}"):
        assert check(spec, network.forward_features).card.format == "export"


def pooled(name: str) -> tuple[Any, Any, Callable[[Any, Tensor], Tensor]]:
    """A model with a norm between its pooling and its classifier, that norm, and its tokens as rows."""
    if name == "convnext":
        model = transformers.ConvNextModel(transformers.ConvNextConfig(**STAGES))
        return model, model.layernorm, lambda model, x: model(x).last_hidden_state.flatten(2).transpose(1, 2)
    if name == "hiera":
        shape = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
        model = transformers.HieraModel(transformers.HieraConfig(**shape))
        return model, model.pooler.layernorm, lambda model, x: model(x).last_hidden_state
    model = transformers.BeitModel(transformers.BeitConfig(**VISION, use_relative_position_bias=True))
    return model, model.pooler.layernorm, lambda model, x: model(x).last_hidden_state[:, 1:]


@pytest.mark.parametrize("name", ["convnext", "hiera", "beit"])
def test_norm_behind_the_pooling_of_transformers_is_applied(name: str, tmp_path: Path):
    model, norm, rows = pooled(name)
    saved(tmp_path, model)
    size = SIZE if name == "beit" else 224
    images = torch.rand(2, 3, size, size)
    for teacher in (load_teacher(str(tmp_path), size), load_teacher(model, size, name="mine")):
        backbone = teacher.backbone
        with torch.no_grad():
            pixels = (images - backbone.pixel_mean) / backbone.pixel_std
            tokens, wanted = backbone(images), rows(model, pixels)
            seen = model(pixels).pooler_output
        torch.testing.assert_close(tokens.patches, norm(wanted), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(tokens.cls, seen, atol=1e-4, rtol=1e-4)
        assert backbone.has_cls


def test_deit_has_two_tokens_in_front_and_its_head_is_not_missed(tmp_path: Path):
    model = saved(tmp_path, transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VISION)))
    tokens = lambda pixels: model.deit(pixels).last_hidden_state  # noqa: E731
    assert check(str(tmp_path), tokens).card.token_types == ("cls", "patch")


NET = """
import transformers

def network():
    return transformers.{kind}.from_pretrained({folder!r})

def with_pixels():
    model = network()
    model.pixel_mean, model.pixel_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return model
"""


def test_kind_that_transformers_alone_knows_teaches_by_a_function(tmp_path: Path):
    stages = {"depths": [1] * 4, "hidden_sizes": [8] * 4}
    model = saved(tmp_path / "theirs", transformers.PoolFormerModel(transformers.PoolFormerConfig(**stages)))
    assert "NAME=NET.py:FUNCTION" in refusal(str(tmp_path / "theirs"))
    (tmp_path / "net.py").write_text(NET.format(kind="PoolFormerModel", folder=str(tmp_path / "theirs")))
    assert "pixel_mean and pixel_std" in refusal(f"mine={tmp_path / 'net.py'}:network", 64)
    features = lambda pixels: model(pixels).last_hidden_state  # noqa: E731
    card = check(f"mine={tmp_path / 'net.py'}:with_pixels", features, 64).card
    assert (card.pixel_mean, card.pixel_std) == ((0.5,) * 3, (0.25,) * 3)
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3}))
    assert check(f"mine={tmp_path / 'net.py'}:network", features, 64).card.pixel_mean == (0.1,) * 3


def test_folder_without_the_norm_that_its_base_model_has_teaches_by_a_function(tmp_path: Path):
    model = saved(tmp_path / "theirs", transformers.ConvNextBackbone(transformers.ConvNextConfig(**STAGES)))
    assert "NAME=NET.py:FUNCTION" in refusal(str(tmp_path / "theirs"))
    (tmp_path / "net.py").write_text(
        "import transformers\nfrom torch import nn\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        f"        self.m = transformers.ConvNextBackbone.from_pretrained({str(tmp_path / 'theirs')!r})\n\n"
        "    def forward(self, x):\n        return self.m(x).feature_maps[-1]\n"
    )
    check(f"mine={tmp_path / 'net.py'}:Net", lambda pixels: model(pixels).feature_maps[-1], 64)


def test_folder_of_a_model_without_a_pooler_gives_the_tokens_of_that_model(tmp_path: Path):
    config = transformers.BeitConfig(**VISION, use_shared_relative_position_bias=True)
    model = saved(tmp_path, transformers.BeitModel(config, add_pooling_layer=False))
    check(str(tmp_path), lambda pixels: model(pixels).last_hidden_state)


BEIT = {**VISION, "use_shared_relative_position_bias": True}
HEADS = {
    "masked images": (
        lambda: transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**BEIT, use_mask_token=True)),
        lambda model: lambda pixels: model.layernorm(model.beit(pixels).last_hidden_state),
        ("patch",),
    ),
    "data2vec": (
        lambda: transformers.Data2VecVisionForImageClassification(transformers.Data2VecVisionConfig(**BEIT)),
        lambda model: (
            lambda pixels: model.data2vec_vision.pooler.layernorm(model.data2vec_vision(pixels).last_hidden_state)
        ),
        ("cls", "patch"),
    ),
    "resnet": (
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        ),
        lambda model: lambda pixels: model.resnet(pixels).last_hidden_state,
        ("cls", "patch"),
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_model_of_transformers_with_a_head_teaches_by_its_backbone_as_folder_and_as_object(name: str, tmp_path: Path):
    make, features, token_types = HEADS[name]
    model = saved(tmp_path / "theirs", make())
    teacher = check(str(tmp_path / "theirs"), features(model))
    other = load_teacher(model, SIZE, name="mine")
    images = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(other.backbone(images).patches, teacher.backbone(images).patches)
    assert teacher.card.token_types == other.card.token_types == token_types
    if name == "data2vec":
        assert teacher.card.pixel_mean == other.card.pixel_mean == (0.485, 0.456, 0.406)


def test_model_of_transformers_with_a_head_that_hides_its_features_is_told_to_leave_it(tmp_path: Path):
    config = transformers.SegformerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, decoder_hidden_size=8)
    pixels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match=r"without a head, as transformers\.AutoModel loads it"):
        load_teacher(transformers.SegformerForImageClassification(config), 64, name="mine", **pixels)
    model = saved(tmp_path, transformers.SegformerForImageClassification(config))
    base = transformers.AutoModel.from_pretrained(tmp_path).eval()
    images, backbone = torch.rand(1, 3, 64, 64), load_teacher(base, 64, name="mine", **pixels).backbone
    with torch.no_grad():
        wanted = model.segformer((images - 0.5) / 0.5).last_hidden_state.flatten(2).mT
    torch.testing.assert_close(backbone(images).patches, wanted)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_timm_model_that_transformers_wraps_is_read_from_folder_file_and_object(name: str, tmp_path: Path):
    facts = {"mean": [0.4] * 3, "std": [0.2] * 3, "classifier": "fc" if name == "resnet18" else "head"}
    arguments = {} if name == "resnet18" else {"img_size": SIZE}
    config = transformers.TimmWrapperConfig(architecture=name, model_args=arguments, pretrained_cfg=facts)
    wrapper = saved(tmp_path / "theirs", transformers.TimmWrapperForImageClassification(config))
    features = wrapper.timm_model.forward_features
    teacher = check(str(tmp_path / "theirs"), features)
    assert teacher.card.pixel_mean == (0.4,) * 3
    tag = "a1_in1k" if name == "resnet18" else "augreg_in21k"
    card = check(f"{name}.{tag}={tmp_path / 'theirs' / 'model.safetensors'}", features).card
    assert card.unwrapped == ("timm_model.",)
    wrapper.timm_model.pretrained_cfg = facts
    images, other = torch.rand(1, 3, SIZE, SIZE), load_teacher(wrapper, SIZE, name="mine")
    torch.testing.assert_close(other.backbone(images).patches, teacher.backbone(images).patches)
    assert other.card.pixel_mean == (0.4,) * 3


def test_timm_folder_that_says_no_pixels_is_read_once_they_are_added_as_it_is_told(tmp_path: Path):
    network = saved(tmp_path, transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="resnet18")))
    (added,) = re.findall(r"such as (\"pretrained_cfg\": \{.*\})\.$", refusal(str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **json.loads(f"{{{added}}}")}))
    assert check(str(tmp_path), network.timm_model.forward_features).card.pixel_mean == (0.5,) * 3
