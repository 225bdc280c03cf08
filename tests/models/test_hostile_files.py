"""Files made to harm: each is refused on one line before it is loaded, nothing runs, and memory stays small."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from comad.models.files import LARGEST_JSON, read_json
from comad.models.students import VitConfig
from comad.models.teachers import load_teacher

SIZE = 16
Folder = Path


def refusal(spec: object, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_teacher(str(spec), SIZE)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def dino() -> dict[str, Tensor]:
    """A sound file of the format ibot/dino."""
    torch.manual_seed(0)
    return VitConfig(image_size=SIZE, patch_size=4, width=64, depth=1, heads=1).build().vit.state_dict()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A sound folder of `timm.models.save_for_hf`."""
    vit = VitConfig(image_size=SIZE, patch_size=4, width=64, depth=1, heads=1)
    config = {"model_args": vit.arguments}
    timm.models.save_for_hf(vit.build().vit, str(tmp_path / "sound"), model_config=config, safe_serialization=True)
    assert load_teacher(str(tmp_path / "sound"), SIZE).card.depth == 1
    return tmp_path / "sound"


@pytest.fixture
def theirs(tmp_path: Path) -> Folder:
    """A folder of transformers whose weights are a pickle."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return tmp_path / "theirs"


class Payload:
    """Pickles to a call that leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_pickle_runs_in_no_way_to_read_it(old: bool, tmp_path: Path, theirs: Folder):
    trace, pickles = tmp_path / "trace", (tmp_path / "weights.pth", theirs / "pytorch_model.bin")
    for path in pickles:
        content = {**dino(), "evil": Payload(trace)}
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    refusal(f"dino={pickles[0]}", "pickled", "not read")
    refusal(f"vit_tiny_patch16_224.augreg_in21k={pickles[0]}", "pickled")
    refusal(theirs, "pickled")
    assert not trace.exists()
    torch.load(pickles[0], weights_only=False)  # it would have run
    assert trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_cut_weights_of_a_folder_are_refused(name: str, theirs: Folder):
    path = theirs / name
    safetensors.torch.save_file(dino(), path) if name.endswith("s") else torch.save(dino(), path)
    path.write_bytes(path.read_bytes()[:-100])
    refusal(theirs, name, "download")


def test_zip_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path: Path):
    """A bomb: its zeros take a thousandth of the disk."""
    torch.save({**dino(), "zeros": torch.zeros(2**22)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.namelist():
            bomb.writestr(entry, plain.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 2**20
    refusal(f"dino={tmp_path / 'bomb.pth'}", "claim to unpack to", "authors")


def test_tensor_larger_than_the_bytes_behind_it_is_refused(tmp_path: Path):
    """A few bytes with strides of 0 are terabytes to whoever computes with them."""
    state = {**dino(), "norm.bias": torch.zeros(1).expand(2**20, 2**20)}
    torch.save(state, tmp_path / "flat.pth")
    torch.save({"model": state}, tmp_path / "model.pth")
    refusal(f"dino={tmp_path / 'flat.pth'}", "norm.bias", "no plain tensor")
    refusal(f"dino={tmp_path / 'model.pth'}", "model/norm.bias", "no plain tensor")


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensor_without_numbers_is_refused(kind: str, tmp_path: Path):
    tensor = torch.eye(64).to_sparse() if kind == "sparse" else torch.zeros(64, device="meta")
    torch.save({**dino(), "norm.bias": tensor}, tmp_path / "weights.pth")
    refusal(f"dino={tmp_path / 'weights.pth'}")


@pytest.mark.parametrize("length", [2**63, 10**9, 2**20])
def test_safetensors_with_an_absurd_header_is_refused(length: int, tmp_path: Path):
    (tmp_path / "weights.safetensors").write_bytes(struct.pack("<Q", length) + b'{"a": 1}' * 99)
    refusal(f"dino={tmp_path / 'weights.safetensors'}", "not a readable checkpoint")


def test_safetensors_that_declares_more_than_it_holds_is_refused(tmp_path: Path):
    header = {"cls_token": {"dtype": "F32", "shape": [2**30, 2**10], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    (tmp_path / "weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    refusal(f"dino={tmp_path / 'weights.safetensors'}", "not a readable checkpoint")


def test_empty_weights_of_a_folder_are_refused(folder: Folder):
    (folder / "model.safetensors").write_bytes(b"")
    refusal(folder, "empty")


def test_block_of_an_absurd_number_builds_no_such_depth(tmp_path: Path):
    state = dino()
    torch.save({**state, "blocks.999999999.norm1.bias": torch.zeros(64)}, tmp_path / "weights.pth")
    refusal(f"dino={tmp_path / 'weights.pth'}", "blocks.1.", "unmodified")


@pytest.mark.parametrize("shape", [(), (64, 3), (64, 3, 0, 0), (0, 3, 4, 4), (64, 3, 4, 4, 4), (64, 1, 4, 4)])
def test_patch_embedding_of_absurd_shape_is_refused(shape: tuple[int, ...], tmp_path: Path):
    torch.save({**dino(), "patch_embed.proj.weight": torch.zeros(shape)}, tmp_path / "weights.pth")
    refusal(f"dino={tmp_path / 'weights.pth'}", "patch_embed.proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_no_numbers_in_a_folder_are_refused(value: float, folder: Folder):
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["blocks.0.norm1.weight"][0] = value
    safetensors.torch.save_file(state, path)
    refusal(folder, "NaN", "blocks.0.norm1.weight")


def test_wrong_shape_in_a_folder_is_refused(folder: Folder):
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**state, "norm.bias": torch.zeros(2, 2)}, path)
    refusal(folder, "shapes", "norm.bias")


def test_circle_of_links_is_refused(tmp_path: Path, folder: Folder):
    for one, two in (("a.pth", "b.pth"), ("b.pth", "a.pth")):
        (tmp_path / one).symlink_to(tmp_path / two)
    refusal(f"dino={tmp_path / 'a.pth'}", "no file or folder")
    refusal(tmp_path / "a.pth", "no such file or folder")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)
        refusal(folder, name)


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path, folder: Folder):
    (tmp_path / "weights.pth").mkdir()
    refusal(f"dino={tmp_path / 'weights.pth'}", "no config.json")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        (folder / name).mkdir()
        refusal(folder, name)


@pytest.mark.parametrize("spec", ["x" * 5000, "x=" + "y" * 5000, "x=\0", "\0"])
def test_name_that_no_file_can_have_is_refused(spec: str):
    refusal(spec)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[]", "3", "null", '"text"', "{", "\0", ""])
def test_config_that_is_no_object_is_refused(text: str, folder: Folder):
    (folder / "config.json").write_text(text)
    refusal(folder, "config.json", "name a file, or an exported folder")


def test_config_that_is_no_text_is_refused(folder: Folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x80" * 9)
    refusal(folder, "config.json")


def test_huge_config_is_not_read(tmp_path: Path, folder: Folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(LARGEST_JSON + 1)  # sparse: it takes no disk
    refusal(folder, "config.json", "larger than 16 MiB")
    (tmp_path / "classes.json").write_text(json.dumps({"id2label": {str(i): f"LABEL_{i}" for i in range(22_000)}}))
    assert len(read_json(tmp_path / "classes.json", "")["id2label"]) == 22_000


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("text", ["[1]", "{", '{"image_mean": "abc", "image_processor": {"image_mean": "abc"}}'])
def test_image_processor_of_no_sense_is_refused(file: str, text: str, tmp_path: Path):
    import transformers

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**size, image_size=16, patch_size=8)).save_pretrained(tmp_path / "x")
    (tmp_path / "x" / file).write_text(text)
    refusal(tmp_path / "x")
