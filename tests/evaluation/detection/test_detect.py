import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comad.cli import main
from comad.evaluation.detection.config import RECIPES, recipe
from comad.evaluation.detection.run import build, shown
from comad.models.windows import WindowBlock

SMALL = ["--preset=scenes", "--image-size=64", "--detector.channels=16", "--detector.hidden=16", "--run.precision=fp32"]
SHORT = ["--optim.epochs=1", "--optim.batch-size=4", "--run.no-tensorboard", "--run.checkpoint-every=1", "--run.keep=2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture
def command(teacher_specs, dense_folder):
    return ["evaluate", "detect", teacher_specs[0], f"--data={dense_folder}", *SMALL, *SHORT]


def failure(capfd, *arguments):
    assert main(list(arguments)) == 1
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "Traceback" not in told
    return told


def test_a_run_scores_draws_and_goes_on_after_a_stop(command, capfd):
    assert main([*command, "--run.out=whole", "--figures"]) == 0
    told = capfd.readouterr().out
    scores = json.loads(Path("whole/scores.json").read_text())
    assert f"box   AP {scores['box']['ap']:.2f}" in told and len(scores["mask"]) == 12 and scores["images"] == 4
    assert Path("whole/predictions.png").stat().st_size > 10_000 and Path("whole/curves.png").is_file()
    log = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
    assert "loss_objectness" in log[0] and any("box_ap" in line for line in log)

    assert main([*command, "--run.out=part"]) == 0
    os.remove("part/checkpoints/step-00000002.pt")
    assert main([*command, "--run.out=part", "--run.resume"]) == 0
    part, whole = (json.loads(Path(out, "results.json").read_text()) for out in ("part", "whole"))
    assert part == whole


def test_a_figure_shows_sure_detections_or_the_likeliest():
    scores = torch.tensor([0.1, 0.6, 0.5, 0.2, 0.4])
    assert scores[shown(scores)].tolist() == pytest.approx([0.6, 0.5])
    assert scores[shown(scores / 2)].tolist() == pytest.approx([0.6, 0.5, 0.4])
    assert len(shown(scores[:0])) == 0


def test_faults_in_the_files_are_counted_and_told(command, dense_folder, tmp_path, capfd):
    copy = shutil.copytree(dense_folder, tmp_path / "copy")
    path = copy / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [900, 900, 5, 5]
    path.write_text(json.dumps(content))
    (copy / "train2017" / "000000000003.jpg").unlink()
    command[3] = f"--data={copy}"
    assert main([*command, "--run.out=run", "--detector.kind=plain"]) == 0
    told = "".join(capfd.readouterr())
    assert "1 objects with a box outside the image are left out" in told and "1 images are not in" in told
    skipped = json.loads(Path("run/scores.json").read_text())["skipped"]
    assert skipped == {"objects": {"with a box outside the image": 1}, "images": 1}


def test_mistakes_are_told_in_one_line(capfd, command, teacher_specs):
    assert "no folder of COCO's format" in failure(capfd, "evaluate", "detect", teacher_specs[0], "--data=.")
    assert "no multiple of 64" in failure(capfd, *command, "--image-size=100")
    assert "did you mean 'coco'" in failure(capfd, "evaluate", "detect", teacher_specs[0], "--data=.", "--preset=coc0")


def test_the_standard_recipe_is_vitdet_s(teacher_specs):
    config = recipe("coco")
    steps = 118_287 // 64
    assert config.optim.peak_lr == pytest.approx(1e-4) and config.image_size == 1024 and config.scale == (0.1, 2.0)
    assert config.optim.warmup_epochs * steps == pytest.approx(250, rel=0.05)
    rates = [config.optim.lr(round(share * 100 * steps), steps) for share in (0.5, 0.9, 0.97)]
    assert rates == pytest.approx([1e-4, 1e-5, 1e-6])
    assert config.detector.thresholds == (0.5, 0.6, 0.7) and replace(config.detector, kind="plain").thresholds == (0.5,)


@pytest.mark.parametrize("preset", RECIPES)
def test_every_recipe_builds(preset, teacher_specs):
    config = replace(recipe(preset), backbone=teacher_specs[0], image_size=128)
    model, _ = build(config, 80)
    assert len(model.heads.stages) == 3
    windows = [part for part in model.modules() if isinstance(part, WindowBlock)]
    assert bool(windows) == bool(config.window and len(model.maps.network.blocks) > 4)
