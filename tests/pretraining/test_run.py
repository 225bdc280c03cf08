import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

from comad.cli import main
from comad.models.students import VitConfig
from comad.models.teachers import load_teacher
from comad.pretraining.positions import fix_positions

NETWORK = ["--vit.image-size=16", "--vit.patch-size=4", "--vit.width=24", "--vit.depth=2", "--vit.heads=2"]
SHORT = ["--optim.epochs=1", "--optim.batch-size=8", "--loader.workers=0", "--run.no-tensorboard"]


@pytest.fixture
def pretrain(labelled_folder, tmp_path):
    def run(name, *more):
        out = tmp_path / name
        assert main(["pretrain", *more, f"--data={labelled_folder}", *NETWORK, *SHORT, f"--run.out={out}"]) == 0
        return out / "teacher"

    return run


def test_fixed_positions_are_those_of_the_grid():
    vit = VitConfig(image_size=16, patch_size=4, width=24, depth=1, heads=2).build().vit
    fix_positions(vit)
    assert not vit.pos_embed.requires_grad
    assert not vit.pos_embed[0, 0].any()
    assert torch.equal(vit.pos_embed[0, 1:], build_sincos2d_pos_embed([4, 4], 24))


@pytest.mark.parametrize("method", ["mae", "mocov3"])
def test_positions_are_fixed_from_scratch(pretrain, method):
    teacher = pretrain("scratch", method)
    positions = load_file(teacher / "model.safetensors")["pos_embed"].float()
    assert "- data, images: train 56, val 4, test 12" in (teacher / "README.md").read_text()
    torch.testing.assert_close(positions[0, 1:], build_sincos2d_pos_embed([4, 4], 24), atol=1e-3, rtol=0)


def test_initial_weights_keep_their_positions_and_are_on_the_card(pretrain, teacher_specs):
    start = load_teacher(teacher_specs[0], 16)
    teacher = load_teacher(str(pretrain("on", "mae", f"--init={teacher_specs[0]}", "--optim.base-lr=1e-9")), 16)
    stored = teacher.backbone.vit.pos_embed
    torch.testing.assert_close(stored, start.backbone.vit.pos_embed, atol=1e-3, rtol=0)
    assert start.card.source in teacher.card.about
    assert "Random weights for tests" in teacher.card.about


def test_initial_weights_keep_their_pixels_and_their_licence(pretrain, teacher_specs, tmp_path):
    folder = Path(teacher_specs[0].partition("=")[2])
    shutil.copytree(folder, tmp_path / "bound")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
    config["comad"]["licence"] = "CC-BY-NC 4.0"
    (tmp_path / "bound" / "config.json").write_text(json.dumps(config))
    card = load_teacher(str(pretrain("on", "mae", f"--init={tmp_path / 'bound'}")), 16).card
    assert (card.pixel_mean, card.pixel_std) == ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
    assert card.licence == "CC-BY-NC 4.0"


def test_initial_weights_with_other_heads_are_refused(labelled_folder, teacher_specs, tmp_path, capsys):
    command = ["pretrain", "mae", f"--data={labelled_folder}", f"--init={teacher_specs[0]}", *NETWORK, *SHORT]
    assert main([*command, "--vit.heads=4", f"--run.out={tmp_path / 'x'}"]) == 1
    assert "2 heads" in capsys.readouterr().err


def test_initial_weights_of_another_architecture_are_refused(labelled_folder, teacher_specs, tmp_path, capsys):
    command = ["pretrain", "mae", f"--data={labelled_folder}", f"--init={teacher_specs[1]}", *NETWORK, *SHORT]
    assert main([*command, f"--run.out={tmp_path / 'x'}"]) == 1
    assert "another architecture" in capsys.readouterr().err


def test_a_run_goes_on_with_the_same_images_and_start_alone(pretrain, labelled_folder, teacher_specs, tmp_path, capsys):
    pretrain("run", "mae")
    command = ["pretrain", "mae", *NETWORK, *SHORT, f"--run.out={tmp_path / 'run'}", "--run.resume"]
    assert main([*command, f"--data={labelled_folder}", "--run.keep=1"]) == 0
    assert main([*command, f"--data={labelled_folder}", f"--init={teacher_specs[0]}"]) == 1
    assert "started with another setup: init" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(labelled_folder, other)
    next(path for path in other.rglob("*") if path.is_file()).unlink()
    assert main([*command, f"--data={other}"]) == 1
    assert "its images are not those it was started with: 1 image removed" in capsys.readouterr().err
