import json
import os
import tempfile

import pytest

from comad.cli import main
from comad.planning import measure

STUDENT = [f"--student.{key}={value}" for key, value in
           {"image-size": 16, "patch-size": 4, "width": 12, "depth": 2, "heads": 2}.items()]  # fmt: skip
SHORT = ["--optim.epochs=6", "--optim.batch-size=8", "--loader.workers=0", "--run.no-tensorboard", "--run.threads=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """An empty folder to work in, and one for temporary files; both are empty again at the end."""
    work, temporary = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("temporary")
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(measure, "BUDGET", 0.05)
    yield
    assert not os.listdir(work) and not os.listdir(temporary)


@pytest.fixture
def command(teacher_specs, labelled_folder):
    return ["plan", "--preset=comad", f"--data={labelled_folder}", "--teachers", *teacher_specs, *STUDENT, *SHORT]


def failure(capsys, *arguments):
    assert main(list(map(str, arguments))) == 1
    (told,) = (line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith("comad: "))
    return told


def test_a_plan_for_machines(command, capsys):
    assert main([*command, "--json", "--gpus=4", "--no-cache-teachers"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["epochs"], told["images_per_step"], told["gpus"]["gpus"]) == (6.0, 8, 4)
    assert told["steps"] == 6 * (told["steps"] // 6) and list(told["stages"]) == ["live"]
    assert told["seconds"] == pytest.approx(sum(told["parts"].values()))
    assert all(told["parts"][name] > 0 for name in ("training", "loading", "calibration", "probes", "scores"))
    flops = told["stages"]["live"]["flops_per_step"]
    assert told["flops"]["total"] == pytest.approx(told["steps"] * sum(flops.values())) and flops["teachers"] > 0
    assert told["advice"][0].startswith("--budget 20min is ") and "comad teachers compare " in told["advice"][-1]
    assert told["disk"]["teacher_cache"] == 0 and told["disk"]["checkpoints"] > 0 and told["peak_bytes"] > 10**8


def test_a_plan_with_a_cache_has_two_kinds_of_steps_and_leaves_the_run_alone(command, capsys, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes").write_text("mine")
    cached = ["--cache-teachers", "--loader.fixed-views=2", "--split=none"]
    assert main([*command, *cached, f"--run.out={out}"]) == 0
    assert os.listdir(out) == ["notes"]
    told = capsys.readouterr().out
    for words in ("live", "cached", "teacher cache", "FLOPs of a cached step", "on 8 GPUs", "advice", "--budget 1h is"):
        assert words in told, words
    assert "scores" not in told


def test_mistakes_are_those_of_distill(command, capsys, teacher_specs, labelled_folder):
    for wrong in (["--optim.batch-size=999"], ["--cache-teachers"], ["--data=nowhere"], ["--teachers", "vit_tiny_x"]):
        told = [failure(capsys, verb, *command[1:], *wrong) for verb in ("plan", "distill")]
        assert told[0] == told[1]
    assert "did you mean 'comad-literal'" in failure(capsys, "plan", "--preset=comad-litral")
    assert "--mfu 2.0" in failure(capsys, *command, "--mfu=2")
    assert "comad plan distill|segment|detect" in failure(capsys, "plan", "finetune")
    assert "BACKBONE" in failure(capsys, "plan", "segment")


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("segment", ["--crop=32", "--short-side=32", "--stride=24", "--channels=16"]),
        ("detect", ["--image-size=64"]),
    ],
)
def test_plans_of_dense_training(task, options, teacher_specs, dense_folder, capsys):
    run = ["--run.precision=fp32", "--optim.batch-size=2", "--run.no-tensorboard", "--json"]
    assert main(["plan", task, teacher_specs[0], f"--data={dense_folder}", "--preset=scenes", *options, *run]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["task"] == f"comad evaluate {task}" and told["flops"]["total"] > 0 and told["flops"]["teachers"] == 0
    assert told["steps"] == round(told["epochs"] * 4) and told["parts"]["scores"] > 0
