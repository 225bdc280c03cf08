"""A student that starts from weights of its own: they are its first weights, a row of scores, and on its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

from comad.cli import main
from comad.distillation.config import DistillConfig
from comad.distillation.results import _start
from comad.models.students import VitConfig
from comad.models.teachers import load_teacher

SHAPE = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 2}


def test_the_first_weights_are_those_of_the_start(teacher_specs):
    student, start = VitConfig(**SHAPE, start=teacher_specs[0]).build(), load_teacher(teacher_specs[0], 16).backbone
    wanted = start.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in student.state_dict().items())
    assert torch.equal(student.pixel_mean, start.pixel_mean) and all(p.requires_grad for p in student.parameters())


def test_another_architecture_or_two_starts_are_refused(teacher_specs):
    with pytest.raises(ValueError, match="another architecture"):
        VitConfig(**SHAPE, start=teacher_specs[1]).build()
    with pytest.raises(ValueError, match="one start"):
        VitConfig(**SHAPE, start=teacher_specs[0], pretrained=True)


def test_a_run_from_a_checkpoint(labelled_folder, teacher_specs, tmp_path):
    """Scored untrained, at its start and trained; the card says what it started from and keeps its licence."""
    start = tmp_path / "mine"
    shutil.copytree(Path(teacher_specs[0].partition("=")[2]), start)
    config = json.loads((start / "config.json").read_text())
    config["comad"]["licence"] = "CC-BY-NC 4.0"
    (start / "config.json").write_text(json.dumps(config))
    student = [f"--student.{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]
    command = ["distill", f"--data={labelled_folder}", "--teachers", teacher_specs[1], "--preset=mean", *student]
    command += ["--optim.epochs=0.2", "--optim.batch-size=8", "--optim.warmup-epochs=0", "--loader.workers=0"]
    command += [f"--student.start={start}", "--run.no-tensorboard", f"--run.out={tmp_path / 'run'}"]
    assert main(command) == 0
    rows = [row["name"] for row in json.loads((tmp_path / "run" / "scoreboard.json").read_text())["rows"]]
    assert {"untrained", "init-only", "student"} <= set(rows)
    card = json.loads((tmp_path / "run" / "student" / "config.json").read_text())["comad"]
    assert "starting from mine" in card["about"] and card["licence"] == "CC-BY-NC 4.0"


def test_weights_of_timm_are_asked_for_and_on_the_card(monkeypatch):
    asked, real = [], timm.create_model

    def create(name, pretrained=False, **options):
        asked.append(pretrained)
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    config = DistillConfig(student=VitConfig(name="vit_tiny_patch16_224", image_size=32, pretrained=True))
    config.student.build()
    assert asked[-1] is True and config.student.start_licences == ("apache-2.0",)
    assert _start(config) == ", starting from timm's weights of vit_tiny_patch16_224"
    assert config.student.from_scratch == VitConfig(name="vit_tiny_patch16_224", image_size=32)
