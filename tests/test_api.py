"""`comad.distill` with objects in the place of names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import comad
from comad.models.teachers import load_teacher
from comad.runtime.checkpoint import checkpoints
from comad.runtime.run import RunConfig

STUDENT = comad.VitConfig(image_size=16, patch_size=4, width=12, depth=2, heads=2)
Distil = Callable[..., "comad.DistillResult"]


class Photographs(Dataset[tuple[Image.Image, int]]):
    """Noise with a colour for each label, as torchvision's datasets give it."""

    classes = ("red", "green", "blue")

    def __init__(self, count: int, seed: int):
        rng = np.random.default_rng(seed)
        self.targets = [index % 3 for index in range(count)]
        pixels = rng.integers(0, 120, (count, 24, 28, 3), dtype=np.uint8)
        for image, label in zip(pixels, self.targets, strict=True):
            image[..., label] += 100
        self.images = [Image.fromarray(image) for image in pixels]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]


DATA = {"train": Photographs(32, 0), "val": Photographs(9, 1), "test": Photographs(12, 2)}


def networks(seed: int = 0) -> list[nn.Module]:
    """A map, and a Vision Transformer of timm."""
    torch.manual_seed(seed)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    return [nn.Conv2d(3, 8, 32, 32), vit]


@pytest.fixture
def distil(tmp_path: Path) -> Distil:
    """Four steps on small networks."""

    def run(data: Any = DATA, teachers: Any = None, student: Any = STUDENT, **options: Any) -> comad.DistillResult:
        given = {"out": tmp_path / "run", "epochs": 1, "batch_size": 8, "warmup_epochs": 0, "workers": 0}
        given |= {"tensorboard": False, "threads": 1, "log_every": 1, "split": "none", "base_lr": 0.01, **options}
        return comad.distill(data, networks() if teachers is None else teachers, student, **given)

    return run


def weights(result: comad.DistillResult) -> bytes:
    return (result.student_folder / "model.safetensors").read_bytes()


def test_modules_teach_the_same_after_a_resume(distil: Distil, tmp_path: Path):
    whole = distil(checkpoint_every=1, keep=9)
    shutil.copytree(whole.folder, tmp_path / "other")
    saved = checkpoints(tmp_path / "other" / "checkpoints")
    assert len(saved) == 4
    for path in sorted(saved)[2:]:
        path.unlink()
    resumed = distil(checkpoint_every=1, keep=9, out=tmp_path / "other", resume=True)
    assert weights(resumed) == weights(whole)
    assert [line["step"] for line in resumed.history if "loss" in line] == [1, 2, 3, 4]


def test_resume_refuses_a_module_with_other_weights(distil: Distil):
    before = weights(distil())
    conv, vit = networks()
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"another setup: .*conv2d\.sha256") as caught:
        distil(teachers=[conv, vit], resume=True)
    assert "\n" not in str(caught.value) and "visiontransformer" not in str(caught.value)
    assert weights(distil(resume=True)) == before


def test_resume_refuses_other_images(distil: Distil):
    distil()
    with pytest.raises(ValueError, match="32 images resized"):
        distil({**DATA, "train": Photographs(32, 5)}, resume=True)


def test_everything_an_object(distil: Distil):
    torch.manual_seed(0)
    student = timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2, mlp_ratio=2.0
    )
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    named = load_teacher(networks()[0], name="mine", dtype=RunConfig().autocast or torch.float32)
    result = distil(
        teachers=[named, networks()[1], "vit_tiny_patch16_224:random:size=32"], student=student, split="val"
    )
    assert result.folder.name == "run" and (result.folder / "report.html").is_file()
    assert result.scoreboard.names == (
        "pixels", "mine", "visiontransformer", "vit_tiny_patch16_224", "untrained", "init-only", "student",
    )  # fmt: skip
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert len(losses) == 4 and all(np.isfinite(losses))
    assert not torch.equal(student.state_dict()["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])
    image = DATA["val"][0][0]
    pixels = result.transform(image).unsqueeze(0)
    assert pixels.shape == (1, 3, 16, 16)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # DeiT's
    white = result.transform(Image.new("RGB", (20, 20), (255, 255, 255)))
    torch.testing.assert_close(
        white[:, 3, 3], ((1 - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))[:, 0, 0]
    )
    with torch.no_grad():
        torch.testing.assert_close(
            result.student.forward_features(pixels), student.eval().forward_features(pixels), atol=1e-4, rtol=1e-4
        )
    card = json.loads((result.student_folder / "config.json").read_text())["comad"]
    assert card["data"] == "own dict" and card["data_licence"] == "your own"
    assert [len(teacher["sha256"]) for teacher in card["teachers"]] == [64, 64, 64]


def test_one_dataset_is_split_and_one_teacher_needs_no_list(distil: Distil):
    result = distil(Photographs(60, 0), networks()[1])
    assert len([line for line in result.history if "loss" in line]) >= 4


def test_the_caller_keeps_the_teachers(distil: Distil):
    teachers = networks()
    before = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in teachers]
    distil(teachers=teachers)
    for net, state in zip(teachers, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
        assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teachers": [3]}, "3 is no teacher; give a name, a file, a module"),
        ({"teachers": [None]}, "None is no teacher"),
        ({"teachers": [nn.Conv2d(3, 8, 16, 16), nn.Conv2d(3, 8, 16, 16)]}, r"same name: conv2d, conv2d; .*name=NAME"),
        ({"teachers": nn.Flatten()}, "Flatten.* gives no map of features|Flatten"),
        ({"teachers": ["vit_tiny_patch16_224:random"], "teacher_image_size": 30}, "no multiple .* use 32"),
        ({"teacher_image_size": -3}, "images of -3 pixels are too small"),
        ({"teacher_image_size": "owm"}, "teacher_image_size='owm': Input should be 'own' or 'grid'"),
        ({"student": timm.create_model("resnet18")}, "timm builds another network than this one as 'resnet18'"),
        ({"student": timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(16, 32))}, "are squares, not"),
        ({"student": timm.create_model("vit_tiny_patch16_224", depth=1, fc_norm=True)}, "cannot be trained here"),
        ({"student": 3}, "3 is no student; give a network, or its name"),
        ({"student": "vit_tini"}, "timm knows no model 'vit_tini'"),
        ({"data": None}, "NoneType is no path, and no dataset .*; pass a folder"),
        ({"data": []}, "list is no path, and no dataset .*; pass a folder"),
        ({"data": [torch.rand(3, 20, 20) for _ in range(40)]}, r"unreadable.*float32 \(3, 20, 20\) is no image"),
        ({"data": Path("nowhere")}, "no folder 'nowhere'"),
        ({"data": {"val": DATA["val"]}}, "a dict of datasets has train"),
        ({"data": {"train": Photographs(5, 0), "val": DATA["val"]}}, "too few for a batch of 8"),
        ({"epoch": 3}, "no option 'epoch'; did you mean 'epochs'"),
        ({"optim": {"epoch": 3}}, "no option 'epoch'; did you mean 'epochs'"),
        ({"epochs": "many"}, "epochs='many': Input should be a valid number"),
        ({"batch_size": 2.5}, "batch_size=2.5: Input should be a valid integer"),
        ({"precision": "fp8"}, "precision='fp8': Input should be"),
        ({"fusion": "meen"}, "no fusion 'meen'; did you mean 'mean'"),
        ({"preset": "komad"}, "no preset 'komad'; did you mean 'comad'"),
        ({"method": 3}, "3 is no method; pass one of comad.METHODS"),
    ],
)
def test_wrong_inputs_are_told_in_one_line_before_anything_is_written(
    options: dict[str, Any], words: str, distil: Distil, tmp_path: Path
):
    with pytest.raises(ValueError, match=words) as caught:
        distil(**options)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()
