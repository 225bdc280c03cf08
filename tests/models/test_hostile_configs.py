"""A config.json of no sense is refused on one line, quickly and without memory: shapes in the weights decide."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import transformers

from comad.models.files import sha256
from comad.models.students import VitConfig
from comad.models.teachers import load_teacher, markdown

transformers.ConvNextModel(
    transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)
)  # its import takes seconds
SIZE = 16
MOST_SECONDS, MOST_BYTES = 30.0, 2**29


@pytest.fixture(autouse=True)
def bounded(grown: Callable[[], int]) -> Iterator[None]:
    """Time of this process, and growth of its memory, stay small."""
    started = time.process_time()
    yield
    assert time.process_time() - started < MOST_SECONDS
    assert grown() < MOST_BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder of `timm.models.save_for_hf`."""
    vit = VitConfig(image_size=SIZE, patch_size=4, width=64, depth=1, heads=2)
    config = {"model_args": vit.arguments}
    timm.models.save_for_hf(vit.build().vit, str(tmp_path / "sound"), model_config=config, safe_serialization=True)
    assert load_teacher(str(tmp_path / "sound"), SIZE).card.heads == 2
    return tmp_path / "sound"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(spec: object, *words: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_teacher(str(spec), SIZE)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


NONSENSE = [
    {"depth": 200_000},
    {"depth": 10**30},
    {"depth": 0},
    {"depth": -3},
    {"depth": None},
    {"depth": "1"},
    {"depth": 1.0},
    {"depth": True},
    {"embed_dim": 9_000},
    {"embed_dim": 0},
    {"embed_dim": None},
    {"embed_dim": "64"},
    {"num_heads": 5},
    {"num_heads": 0},
    {"num_heads": -2},
    {"num_heads": "2"},
    {"patch_size": 0},
    {"patch_size": -4},
    {"patch_size": [4, 4, 4]},
    {"patch_size": 3},
    {"mlp_ratio": 1e300},
    {"mlp_ratio": float("nan")},
    {"mlp_ratio": 400.0},
    {"act_layer": "no_such"},
    {"norm_layer": "no_such"},
    {"block_fn": "no_such"},
    {"init_values": "many"},
    {"reg_tokens": 10**9},
    {"reg_tokens": "x"},
    {"class_token": False},
    {"pos_embed": "no_such"},
    {"global_pool": "no_such"},
    {"drop_path_rate": "x"},
    {"weight_init": "no_such"},
    {"qkv_bias": False},
    {"checkpoint_path": "x.pth"},
    {"in_chans": 0},
    {"embed_layer": {"a": 1}},
]


@pytest.mark.parametrize("arguments", NONSENSE, ids=str)
def test_model_args_of_no_sense(arguments: dict, folder: Path):
    sound = json.loads((folder / "config.json").read_text())["model_args"]
    edit(folder, model_args={**sound, **arguments})
    refusal(folder)


@pytest.mark.parametrize("name", ["nope", "../x", "", "vit_tiny_patch16_224\n"])
def test_network_that_timm_does_not_know(name: str, folder: Path):
    edit(folder, architecture=name)
    refusal(folder, "NAME=NET.py:FUNCTION")


@pytest.mark.parametrize(
    "facts",
    [
        {"std": [0.5, 0.0, 0.5]},
        {"std": [0.5, -1.0, 0.5]},
        {"std": [0.5, None, 0.5]},
        {"std": [0.5, float("inf"), 0.5]},
        {"mean": [float("nan")] * 3},
        {"mean": "abc"},
        {"mean": [0.5]},
        {"mean": [[0.5], 0.5, 0.5]},
        {"mean": [True, 0.5, 0.5]},
        {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]},
        {"std": [1e-30] * 3},
    ],
    ids=str,
)
def test_pixels_of_no_sense(facts: dict, folder: Path):
    sound = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    edit(folder, pretrained_cfg={**sound, **facts})
    refusal(folder, "mean and std", "export it again")


@pytest.mark.parametrize("types", [None, [], "cls", ["cls", None], [["cls"]], {"cls": 1}, 3, ["register"]], ids=str)
def test_token_types_of_no_sense(types: Any, folder: Path):
    edit(folder, comad={"token_types": types})
    refusal(folder, "token_types", "'cls' and 'patch'")


@pytest.mark.parametrize("key", ["classifier", "tag", "license", "notes", "input_size"])
@pytest.mark.parametrize("value", [None, 3, [1, 2], {"a": 1}, "x" * 9999])
def test_facts_that_are_no_part_of_the_network_do_no_harm(key: str, value: Any, folder: Path):
    sound = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    edit(folder, pretrained_cfg={**sound, key: value})
    try:
        load_teacher(str(folder), SIZE)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": True},
        {"num_hidden_layers": 200_000},
        {"num_hidden_layers": None},
        {"hidden_act": None},
        {"hidden_act": ["gelu"]},
        {"layer_norm_eps": 0},
        {"layer_norm_eps": "1e-6"},
        {"layer_norm_eps": -1.0},
    ],
    ids=str,
)
def test_config_of_transformers_of_no_sense(changes: dict, tmp_path: Path):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTModel(transformers.ViTConfig(**size, image_size=SIZE, patch_size=8))
    model.save_pretrained(tmp_path / "x")
    edit(tmp_path / "x", **changes)
    refusal(tmp_path / "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"depths": [200_000, 1, 1, 1]},
        {"hidden_sizes": [9_000] * 4},
        {"hidden_sizes": None},
        {"hidden_act": "no_such"},
        {"patch_size": 0},
        {"num_channels": 4},
        {"num_labels": 100_000_000},
        {"layer_norm_eps": -1.0},
        {"layer_norm_eps": float("nan")},
    ],
    ids=str,
)
def test_config_that_transformers_would_build_of_no_sense(changes: dict, tmp_path: Path):
    stages = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    transformers.ConvNextModel(transformers.ConvNextConfig(**stages)).save_pretrained(tmp_path / "x")
    assert load_teacher(str(tmp_path / "x"), 64)
    edit(tmp_path / "x", **changes)
    refusal(tmp_path / "x")


def test_wide_patches_and_many_names_build_no_such_network(tmp_path: Path):
    """27 kB of a kernel would be 9,000 channels, times as many blocks as there are names."""
    state = {"cls_token": torch.zeros(1, 1, 9000), "pos_embed": torch.zeros(1, 2, 9000), "norm.weight": torch.ones(1)}
    state |= {"patch_embed.proj.weight": torch.zeros(9000, 3, 1, 1), "blocks.0.mlp.fc2.weight": torch.zeros(9000, 1)}
    state |= {f"blocks.{number}.x": torch.zeros(1) for number in range(300)}
    torch.save(state, tmp_path / "weights.pth")
    refusal(f"dino={tmp_path / 'weights.pth'}:heads=10", "misses the keys")


def test_weights_beyond_float32_are_refused(tmp_path: Path):
    state = VitConfig(image_size=SIZE, patch_size=4, width=64, depth=1, heads=1).build().vit.state_dict()
    state["norm.bias"] = state["norm.bias"].double()
    torch.save(state, tmp_path / "double.pth")
    assert load_teacher(f"dino={tmp_path / 'double.pth'}", SIZE).backbone.vit.norm.bias.dtype == torch.float32
    state["norm.bias"][3] = 1e300
    torch.save(state, tmp_path / "double.pth")
    refusal(f"dino={tmp_path / 'double.pth'}", "infinite", "norm.bias")


def test_other_weights_than_the_recorded_ones_are_told(folder: Path):
    edit(folder, comad={"sha256": "0" * 64})
    message = refusal(folder, "sha256", ":allow_changed")
    assert message.count("000000000000") == 1
    for spec in (f"{folder}:allow_changed", f"mine={folder}:allow_changed"):
        assert load_teacher(spec, SIZE).card.depth == 1
    assert load_teacher(str(folder), SIZE, allow_changed=True).card.depth == 1
    path = folder / "model.safetensors"
    edit(folder, comad={"sha256": sha256(path)})
    assert load_teacher(str(folder), SIZE)
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**state, "norm.bias": state["norm.bias"] + 1}, path)
    refusal(folder, "is not the file whose sha256")


def test_text_of_others_is_text_in_a_card(folder: Path):
    told = "CC\n# Free [beer](http://x) <script>alert(1)</script> | a `b` *c* _d_" + "x" * 5000
    edit(folder, comad={"licence": told, "about": told})
    card = load_teacher(str(folder), SIZE).card
    for text in (card.licence, card.about):
        assert "\n" not in text and len(text) <= 1000
    escaped = markdown(card.licence)
    for mark in "[]<|`*_#":
        assert all(escaped[i - 1] == "\\" for i, letter in enumerate(escaped) if letter == mark), mark
    assert "\n" not in card.summary()
