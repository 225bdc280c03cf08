"""Folders of transformers give the tokens of transformers' own models, which this package does not need at run time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from comad.models.huggingface import FAMILIES
from comad.models.teachers import load_teacher

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TINY |= {"image_size": 32, "patch_size": 8}
SIZE = 32
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def shaken(model: torch.nn.Module) -> Any:
    """Give every parameter a value of its own: no LayerScale of 1, no bias of 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


class Case(NamedTuple):
    """A model to save, the family it is of, and the number of its tokens before the patches."""

    family: str
    model: Any
    prefix: int = 1


def vit(cls: Any = transformers.ViTModel, **changes: Any) -> Case:
    return Case("vit", cls(transformers.ViTConfig(**{**TINY, **changes})))


def mae(cls: Any = transformers.ViTMAEModel) -> Case:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return Case("vit_mae", cls(transformers.ViTMAEConfig(**TINY, **decoder, decoder_intermediate_size=16)))


def dinov2(cls: Any = transformers.Dinov2Model, **changes: Any) -> Case:
    return Case("dinov2", cls(transformers.Dinov2Config(**{**TINY, **changes})))


def dinov2_registers(**changes: Any) -> Case:
    config = transformers.Dinov2WithRegistersConfig(**{**TINY, **changes})
    return Case("dinov2_with_registers", transformers.Dinov2WithRegistersModel(config), 5)


def dinov3(registers: int = 4, **changes: Any) -> Case:
    config = transformers.DINOv3ViTConfig(**{**TINY, "num_register_tokens": registers, **changes})
    return Case("dinov3_vit", transformers.DINOv3ViTModel(config), 1 + registers)


def ijepa() -> Case:
    return Case("ijepa", transformers.IJepaModel(transformers.IJepaConfig(**TINY)), 0)


def siglip(cls: Any = transformers.SiglipVisionModel) -> Case:
    return Case("siglip", cls(transformers.SiglipVisionConfig(**TINY)), 0)


def clip(cls: Any = transformers.CLIPVisionModel, **changes: Any) -> Case:
    return Case("clip", cls(transformers.CLIPVisionConfig(**{**TINY, **changes})))


def both_towers(name: str) -> Case:
    """The whole of CLIP or SigLIP: a text tower beside the one that sees."""
    config, model = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Model")
    text = {key: TINY[key] for key in TINY if key not in ("image_size", "patch_size")} | {"vocab_size": 99}
    text |= {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return Case(name.lower(), model(config(text_config=text, vision_config=TINY)), name == "CLIP")


CASES = {
    "vit": vit,
    "vit with a head": lambda: vit(transformers.ViTForImageClassification),
    "vit of other epsilon, activation and bias": lambda: vit(
        layer_norm_eps=1e-3, hidden_act="gelu_new", qkv_bias=False
    ),
    "mae": mae,
    "mae with its decoder": lambda: mae(transformers.ViTMAEForPreTraining),
    "dinov2": dinov2,
    "dinov2 with a head": lambda: dinov2(transformers.Dinov2ForImageClassification),
    "dinov2 giant": lambda: dinov2(use_swiglu_ffn=True),
    "dinov2 registers": dinov2_registers,
    "dinov2 registers giant": lambda: dinov2_registers(use_swiglu_ffn=True),
    "dinov3": dinov3,
    "dinov3 without registers": lambda: dinov3(0),
    "dinov3 gated": lambda: dinov3(use_gated_mlp=True, hidden_act="silu"),
    "dinov3 of another theta": lambda: dinov3(rope_theta=30.0),
    "dinov3 without bias": lambda: dinov3(query_bias=False, value_bias=False),
    "ijepa": ijepa,
    "siglip": siglip,
    "siglip with text": lambda: both_towers("Siglip"),
    "clip": clip,
    "clip with gelu": lambda: clip(hidden_act="gelu"),
    "clip with text": lambda: both_towers("CLIP"),
}


def reference(model: Any, pixels: Tensor) -> Tensor:
    """The tokens of transformers' own model after its final norm, in the order of the image."""
    with torch.no_grad():
        for part in ("vit", "dinov2", "vision_model"):
            model = getattr(model, part, model)
        if isinstance(model, transformers.ViTMAEModel):  # noise in ascending order shuffles nothing
            model.config.mask_ratio = 0.0
            noise = torch.arange(16.0).expand(len(pixels), -1)
            return model(pixels, noise=noise).last_hidden_state
        tokens = model(pixels).last_hidden_state
        is_clip = type(model).__name__.startswith("CLIP")
        return model.post_layernorm(tokens) if is_clip else tokens


def save(folder: Path, case: Case, processor: bool = True) -> Path:
    shaken(case.model).save_pretrained(folder)
    if processor:
        facts = {"image_mean": MEAN, "image_std": STD, "do_normalize": True, "rescale_factor": 1 / 255}
        (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(spec: object, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_teacher(str(spec), SIZE)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("name", CASES)
def test_folder_gives_the_tokens_of_transformers(name: str, tmp_path: Path, images: Tensor):
    case = CASES[name]()
    teacher = load_teacher(str(save(tmp_path / "theirs", case)), SIZE)
    expected = reference(case.model, normalised(images))
    tokens = teacher.backbone(images)
    assert expected.shape[1] == case.prefix + 16
    torch.testing.assert_close(tokens.patches, expected[:, case.prefix :], atol=1e-4, rtol=0)
    if case.prefix:
        torch.testing.assert_close(tokens.cls, expected[:, 0], atol=1e-4, rtol=0)
    card = teacher.card
    assert (card.format, card.architecture, card.source) == ("transformers", case.family, "theirs/model.safetensors")
    assert (card.depth, card.width, card.heads, card.patch_size) == (2, 48, 4, 8)
    assert (card.num_prefix_tokens, card.pixel_mean, card.pixel_std) == (case.prefix, MEAN, STD)
    assert card.token_types == FAMILIES[case.family].token_types
    assert card.licence == "unknown"


def test_every_family_is_tested():
    assert {make().family for make in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("make", [vit, siglip, clip, dinov3])
def test_pickled_weights_and_the_path_of_the_file_do_as_well(make: Any, tmp_path: Path, images: Tensor):
    folder = save(tmp_path / "theirs", make())
    expected = load_teacher(str(folder), SIZE).backbone(images).patches
    by_file = load_teacher(f"mine={folder / 'model.safetensors'}", SIZE)
    assert by_file.name == "mine"
    torch.testing.assert_close(by_file.backbone(images).patches, expected)
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert load_teacher(str(folder / "pytorch_model.bin"), SIZE).card.source == "theirs/pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    for spec in (folder, folder / "pytorch_model.bin"):
        teacher = load_teacher(str(spec), SIZE)
        assert teacher.card.source == "theirs/pytorch_model.bin"
        torch.testing.assert_close(teacher.backbone(images).patches, expected)


@pytest.mark.parametrize("make", [vit, siglip, clip])
def test_keys_of_older_versions_have_a_wrapper_and_position_ids(make: Any, tmp_path: Path, images: Tensor):
    case = make()
    folder = save(tmp_path / "theirs", case)
    expected = load_teacher(str(folder), SIZE).backbone(images).patches
    wrapper = "vit." if case.family == "vit" else "vision_model."
    state = safetensors.torch.load_file(folder / "model.safetensors")
    old = {wrapper + key: tensor for key, tensor in state.items()}
    if case.family != "vit":
        old["vision_model.embeddings.position_ids"] = torch.arange(16).unsqueeze(0)
    safetensors.torch.save_file(old, folder / "model.safetensors")
    torch.testing.assert_close(load_teacher(str(folder), SIZE).backbone(images).patches, expected)


@pytest.mark.parametrize("make", [vit, siglip, clip, dinov2_registers])
def test_positions_are_resampled_to_another_size(make: Any, tmp_path: Path):
    folder = save(tmp_path / "theirs", make())
    backbone = load_teacher(str(folder), 48).backbone
    assert backbone.grid == (6, 6)
    assert backbone(torch.rand(1, 3, 48, 48)).patches.shape == (1, 36, 48)


def test_dinov3_at_another_size_is_transformers_at_that_size(tmp_path: Path):
    case, images = dinov3(), torch.rand(1, 3, 48, 48)
    backbone = load_teacher(str(save(tmp_path / "theirs", case)), 48).backbone
    expected = reference(case.model, normalised(images))[:, 5:]
    torch.testing.assert_close(backbone(images).patches, expected, atol=1e-4, rtol=0)


def test_mae_sees_all_patches_in_order_every_time(tmp_path: Path, images: Tensor):
    """ViTMAE of transformers drops three quarters of the patches and shuffles the rest, in eval mode too."""
    case = mae()
    folder = save(tmp_path / "theirs", case)
    assert case.model(images).last_hidden_state.shape[1] == 1 + 4
    one, two = (load_teacher(str(folder), SIZE).backbone(images).patches for _ in range(2))
    assert one.shape[1] == 16
    assert torch.equal(one, two)


# --- pixels, licence, config


@pytest.mark.parametrize(
    ("make", "mean", "std"),
    [
        (vit, (0.5,) * 3, (0.5,) * 3),
        (siglip, (0.5,) * 3, (0.5,) * 3),
        (dinov3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (clip, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ],
)
def test_pixels_without_a_processor_are_the_familys(make: Any, mean: tuple, std: tuple, tmp_path: Path):
    card = load_teacher(str(save(tmp_path / "theirs", make(), processor=False)), SIZE).card
    assert (card.pixel_mean, card.pixel_std) == (mean, std)


def test_pixels_follow_the_processor(tmp_path: Path):
    folder = save(tmp_path / "theirs", vit())
    edit(folder, "preprocessor_config.json", do_normalize=False)
    assert load_teacher(str(folder), SIZE).card.pixel_std == (1.0, 1.0, 1.0)
    edit(folder, "preprocessor_config.json", do_rescale=False)
    refusal(folder, "[0, 1]")
    edit(folder, "preprocessor_config.json", do_rescale=True, image_std=[0.5, 0.5, 0.0])
    refusal(folder, "image_std")
    (folder / "preprocessor_config.json").unlink()
    nested = {"image_processor": {"image_mean": MEAN, "image_std": STD}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert load_teacher(str(folder), SIZE).card.pixel_mean == MEAN


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- vision\n---\n# ViT", "Apache-2.0"),
        ("---\ntags: [x]\nlicense: other\nlicense_name: dinov3-license\n---\n", "dinov3-license"),
        ("license: apache-2.0", "unknown"),
        ("---\nlicense: [\n", "unknown"),
    ],
)
def test_licence_is_that_of_the_front_matter(text: str, licence: str, tmp_path: Path):
    folder = save(tmp_path / "theirs", vit())
    (folder / "README.md").write_text(text)
    assert load_teacher(str(folder), SIZE).card.licence == licence


def test_config_of_siglip_that_names_no_defaults_has_twelve_heads(tmp_path: Path):
    """As published: ``vision_config`` holds nothing but ``model_type``."""
    folder = save(tmp_path / "theirs", siglip())
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    assert load_teacher(str(folder), SIZE).card.heads == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, ("model_type is 'bert'", "dinov3_vit", "NET.py:FUNCTION")),
        ({"model_type": ["vit"]}, ("model_type",)),
        ({"num_attention_heads": 5}, ("num_attention_heads", "5", "48")),
        ({"num_attention_heads": "4"}, ("num_attention_heads",)),
        ({"num_hidden_layers": 12}, ("12 layers", "of 2")),
        ({"layer_norm_eps": None}, ("layer_norm_eps",)),
        ({"hidden_act": "relu6"}, ("hidden_act 'relu6'", "quick_gelu")),
        ({"qkv_bias": False}, ("unexpected", "qkv.bias")),
        ({"vision_config": [1]}, ("vision_config",)),
    ],
)
def test_config_that_does_not_fit_is_refused(changes: dict, words: tuple[str, ...], tmp_path: Path):
    folder = save(tmp_path / "theirs", vit())
    edit(folder, **changes)
    refusal(folder, *words)


def test_dinov3_of_other_make_is_refused(tmp_path: Path):
    folder = save(tmp_path / "theirs", dinov3())
    edit(folder, hidden_act="relu")
    refusal(folder, "hidden_act 'relu'", "gelu")
    edit(folder, hidden_act="gelu", rope_theta=-1.0)
    refusal(folder, "rope_theta")
    refusal(save(tmp_path / "key", dinov3(key_bias=True)), "unexpected", "k.bias")


@pytest.mark.parametrize("key", ["embeddings.position_embeddings", "encoder.layer.1.output.dense.bias"])
def test_missing_and_misshapen_tensors_are_refused(key: str, tmp_path: Path):
    folder = save(tmp_path / "theirs", vit())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({**state, key: torch.zeros(7)}, folder / "model.safetensors")
    refusal(folder, "theirs", "use an unmodified checkpoint")
    del state[key]
    safetensors.torch.save_file(state, folder / "model.safetensors")
    refusal(folder, "theirs", "use an unmodified checkpoint")


def test_weights_of_query_alone_are_refused(tmp_path: Path):
    folder = save(tmp_path / "theirs", vit())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["encoder.layer.1.attention.attention.key.weight"]
    safetensors.torch.save_file(state, folder / "model.safetensors")
    refusal(folder, "model_type", "save_pretrained")


def test_weights_in_several_files_are_put_together(tmp_path: Path, images: Tensor):
    folder = save(tmp_path / "theirs", vit())
    expected = load_teacher(str(folder), SIZE).backbone(images).patches
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"model-{number}-of-2.safetensors": dict(list(state.items())[number - 1 :: 2]) for number in (1, 2)}
    for name, part in parts.items():
        safetensors.torch.save_file(part, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, part in parts.items() for key in part}}))
    for spec in (folder, index):
        teacher = load_teacher(str(spec), SIZE)
        torch.testing.assert_close(teacher.backbone(images).patches, expected)
    assert teacher.card.source == "theirs/model.safetensors.index.json"
    (folder / "model-2-of-2.safetensors").unlink()
    refusal(folder, "1 of its files are missing", "model-2-of-2.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    refusal(folder, "no file beside it")
    index.write_text("{}")
    refusal(folder, "weight_map", "save_pretrained")


def test_weights_under_another_file_name_are_found(tmp_path: Path, images: Tensor):
    folder = save(tmp_path / "theirs", vit())
    expected = load_teacher(str(folder), SIZE).backbone(images).patches
    (folder / "model.safetensors").rename(folder / "my_vit.safetensors")
    teacher = load_teacher(str(folder), SIZE)
    torch.testing.assert_close(teacher.backbone(images).patches, expected)
    assert teacher.card.source == "theirs/my_vit.safetensors"


def test_file_without_its_config_asks_for_it(tmp_path: Path):
    folder = save(tmp_path / "theirs", vit())
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    refusal(tmp_path / "alone.safetensors", "unknown layout", "config.json beside it")
