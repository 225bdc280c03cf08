import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from comad.cli import main
from comad.data.ade20k import load_ade20k
from comad.evaluation.segmentation.config import RECIPES, recipe
from comad.evaluation.segmentation.run import build
from comad.runtime.optim import OptimConfig

SMALL = ["--preset=scenes", "--crop=32", "--short-side=32", "--stride=24", "--channels=16", "--run.precision=fp32"]
SHORT = ["--optim.epochs=2", "--optim.batch-size=4", "--run.no-tensorboard", "--run.checkpoint-every=3", "--run.keep=2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture
def command(teacher_specs, dense_folder):
    return ["evaluate", "segment", teacher_specs[0], f"--data={dense_folder}", *SMALL, *SHORT]


def failure(capfd, *arguments):
    assert main(list(arguments)) == 1
    told = capfd.readouterr().err
    (line,) = (line for line in told.splitlines() if line.startswith("comad: "))
    assert "Traceback" not in told
    return line


def test_a_run_scores_and_draws(command, dense_folder, capfd):
    assert main([*command, "--run.out=run", "--figures"]) == 0
    told = capfd.readouterr().out
    scores = json.loads(Path("run/scores.json").read_text())
    assert f"mIoU {scores['miou']:.2f} %" in told and scores["images"] == 4 and len(scores["iou"]) == 37
    assert scores["absent"] and "have no pixel" in told  # four images do not show 37 classes
    counts = np.load("run/counts.npz")["counts"]
    images = load_ade20k(str(dense_folder)).validation
    labelled = [int((images.load(index)[1] != 255).sum()) for index in range(4)]
    assert counts.shape == (4, 3, 37) and counts[:, 2].sum(axis=1).tolist() == labelled
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert any("miou" in line for line in log)
    assert Path("run/predictions.png").stat().st_size > 10_000 and Path("run/curves.png").is_file()
    assert yaml.safe_load(Path("run/config.yaml").read_text())["crop"] == 32


def test_a_stopped_run_goes_on_to_the_same_scores(command, capfd):
    assert main([*command, "--run.out=whole"]) == 0
    assert main([*command, "--run.out=part"]) == 0
    os.remove("part/checkpoints/step-00000004.pt")
    assert main([*command, "--run.out=part", "--run.resume"]) == 0
    part, whole = (json.loads(Path(out, "scores.json").read_text()) for out in ("part", "whole"))
    assert part == whole
    capfd.readouterr()
    assert "already" in failure(capfd, *command, "--run.out=part")
    assert "channels: 16 → 32" in failure(capfd, *command, "--run.out=part", "--run.resume", "--channels=32")


def test_a_training_label_map_with_colours_is_told_before_anything_is_written(command, dense_folder, capfd, tmp_path):
    folder = shutil.copytree(dense_folder, tmp_path / "copy")
    path = load_ade20k(str(folder)).train.label_path(3)
    Image.open(path).convert("RGB").save(path)
    told = failure(capfd, *command, f"--data={folder}", "--run.out=run")
    assert f"{path}: a label map of mode RGB; save one channel" in told and not Path("run").exists()


def test_a_run_refuses_to_go_on_with_other_images(command, dense_folder, capfd, tmp_path):
    folder = shutil.copytree(dense_folder, tmp_path / "copy")
    here = [*command, f"--data={folder}", "--head=linear", "--run.out=run"]
    assert main(here) == 0
    assert len(np.load("run/data.npy")) == 8
    images = load_ade20k(str(folder)).train
    for path in (images.path(3), images.label_path(3)):
        os.remove(path)
    capfd.readouterr()
    assert "its images are not those it was started with: 1 image removed" in failure(capfd, *here, "--run.resume")
    assert main([*here, f"--data={dense_folder}", "--run.resume"]) == 0  # the same ones, in another place


def test_a_linear_head_and_a_recorded_recipe(command):
    assert main([*command, "--run.out=linear", "--head=linear"]) == 0
    assert json.loads(Path("linear/scores.json").read_text())["head"] == "linear"
    assert main(["evaluate", "segment", "--recipe=linear/config.yaml", "--run.out=again"]) == 0
    assert json.loads(Path("again/scores.json").read_text()) == json.loads(Path("linear/scores.json").read_text())


def test_mistakes_are_told_in_one_line(capfd, command, teacher_specs, dense_folder):
    where = f"--data={dense_folder}"
    assert "no preset 'scense'; did you mean 'scenes'" in failure(
        capfd, "evaluate", "segment", teacher_specs[0], where, "--preset=scense"
    )
    assert "no folder of ADE20K's format" in failure(capfd, "evaluate", "segment", teacher_specs[0], "--data=.")
    assert "BACKBONE" in failure(capfd, "evaluate", "segment")
    assert "no multiple" in failure(capfd, *command, "--crop=30")
    for stride in (-5, 0, 40):
        assert "change --stride" in failure(capfd, *command, f"--stride={stride}")
    assert "--optim.batch-size 8" in failure(capfd, *command, "--optim.batch-size=9")


def test_the_standard_recipe_is_160000_steps_at_1e_4(teacher_specs):
    config = recipe("ade20k")
    steps_per_epoch = 20210 // 16
    assert config.optim.total_steps(steps_per_epoch) == pytest.approx(160_000, rel=1e-3)
    assert config.optim.peak_lr == pytest.approx(1e-4)
    assert (config.crop, config.stride, config.optim.schedule) == (512, 341, "poly")
    assert config.optim.lr(80_750, steps_per_epoch) == pytest.approx(0.5e-4, rel=0.01)
    assert config.optim.warmup_epochs * steps_per_epoch == pytest.approx(1500, rel=0.01)


@pytest.mark.parametrize("preset", RECIPES)
def test_every_recipe_builds(preset, teacher_specs):
    config = replace(recipe(preset), backbone=teacher_specs[0], channels=16)
    model, card = build(config, 150)
    assert card.name == "first" and model.head.classify[1].out_channels == 150
    assert isinstance(recipe(preset, "linear").optim, OptimConfig)
