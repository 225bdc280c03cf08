"""A budget of time: read, fitted, kept by a resumed run, and the same numbers as the epochs it stands for."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from comad.cli import main
from comad.comparison import measure as comparison_measure
from comad.planning import budget as budget_module
from comad.planning import measure
from comad.planning.forecast import budget_seconds, largest_fit
from comad.runtime.checkpoint import checkpoints, load_checkpoint
from comad.runtime.optim import OptimConfig

STUDENT = [f"--student.{key}={value}" for key, value in
           {"image-size": 16, "patch-size": 4, "width": 12, "depth": 2, "heads": 2}.items()]  # fmt: skip
SHORT = ["--optim.batch-size=8", "--loader.workers=0", "--run.no-tensorboard", "--run.threads=1", "--split=none"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20min", 1200), ("1.5h", 5400), ("1h30min", 5400)])
def test_times(text, seconds):
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["20", "min", "0s", "20 min", "1d", "-5min", "5minutes"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="write it as 90s, 20min"):
        budget_seconds(text)


def forecast(optim):
    """10 s of other work, 2 s per epoch up to the fourth, then 1 s: a cache is full after four."""
    return SimpleNamespace(seconds=10 + optim.epochs + min(4.0, optim.epochs))


@pytest.mark.parametrize(("seconds", "epochs"), [(14, 2.0), (18, 4.0), (34, 20.0), (1014, 1000.0)])
def test_the_most_epochs_that_fit(seconds, epochs):
    found = largest_fit(OptimConfig(epochs=300.0, warmup_epochs=15.0), forecast, seconds)
    assert found.epochs == pytest.approx(epochs, rel=0.006)
    assert found.warmup_epochs == pytest.approx(found.epochs / 20, rel=0.006)


def test_too_short():
    with pytest.raises(ValueError, match="too short"):
        largest_fit(OptimConfig(), forecast, 9)


@pytest.fixture
def command(teacher_specs, labelled_folder, monkeypatch):
    monkeypatch.setattr(measure, "BUDGET", 0.05)
    return ["distill", f"--data={labelled_folder}", "--teachers", *teacher_specs, *STUDENT, *SHORT]


def test_a_run_is_that_of_the_epochs_which_it_records(command, tmp_path, monkeypatch, capfd):
    """Measured once, said, recorded as epochs; the same weights as by ``--optim.epochs``; a resume measures nothing."""
    timed, plain = tmp_path / "timed", tmp_path / "plain"
    real = budget_module.largest_fit
    monkeypatch.setattr(
        budget_module, "largest_fit", lambda optim, forecast, seconds: real(optim, forecast, forecast(optim).seconds)
    )
    epochs = ["--optim.epochs=2", "--optim.warmup-epochs=1"]  # the budget is what they take here, to be quick
    assert main([*command, *epochs, "--budget=1h", f"--run.out={timed}"]) == 0
    told = capfd.readouterr().err
    recorded = yaml.safe_load((timed / "config.yaml").read_text())
    chosen = recorded["optim"]["epochs"]
    assert recorded["budget"] == "" and chosen == pytest.approx(2, rel=0.1)
    assert f"--budget 1h: {chosen:g} epochs, 14 steps of 8 images, warm-up 1.0" in told
    epochs = [f"--optim.{name.replace('_', '-')}={recorded['optim'][name]}" for name in ("epochs", "warmup_epochs")]
    assert main([*command, *epochs, f"--run.out={plain}"]) == 0
    weights = [load_checkpoint(checkpoints(out / "checkpoints")[-1])["module"] for out in (timed, plain)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items() if torch.is_tensor(value))

    monkeypatch.setattr(budget_module, "measure_distillation", None)
    assert main(["distill", "--budget=5min", "--run.resume", f"--run.out={timed}"]) == 0
    assert f"--budget 5min: the run goes on with its {chosen:g} epochs." in capfd.readouterr().err


def test_what_has_no_budget(command, tmp_path, capfd):
    for options, words in (
        (["--budget=soon"], "is no time"),
        (["--budget=1h", "--run.devices=2"], "--budget is for one process"),
        (["--budget=1h", "--through=vit_tiny_patch16_224"], "leave out --through"),
    ):
        assert main([*command, *options, f"--run.out={tmp_path / 'none'}"]) == 1
        (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("comad: "))
        assert words in line
    assert not (tmp_path / "none").exists()


def test_a_comparison_of_equal_time(teacher_specs, labelled_folder, tmp_path, monkeypatch, capfd):
    """A row has a schedule of its own, decided once for all seeds; the table says both images and seconds."""
    out, real = tmp_path / "compare", budget_module.largest_fit

    def fit(optim, forecast, seconds):  # the budget is what two epochs take, however fast the machine is
        assert seconds == 1
        return real(optim, forecast, forecast(replace(optim, epochs=2.0, warmup_epochs=0.1)).seconds)

    monkeypatch.setattr(measure, "BUDGET", 0.05)
    monkeypatch.setattr(budget_module, "largest_fit", fit)
    data = [
        f"--data={labelled_folder}",
        "--teachers",
        *teacher_specs,
        *STUDENT,
        *SHORT[:-1],
        "--baselines",
        "untrained",
    ]
    command = ["compare", *data, "--presets", "mean", "--seeds", "0", "--budget=1s", f"--run.out={out}"]
    assert main(command) == 0
    (chosen,) = (json.loads(path.read_text()) for path in out.glob("runs/*/epochs.json"))
    assert chosen.pop("checksum") and chosen["epochs"] == pytest.approx(2, rel=0.1)
    row = json.loads((out / "comparison.json").read_text())["rows"][0]
    assert row["images_seen"] == 8 * OptimConfig(batch_size=8, **chosen).total_steps(7) and row["seconds"] > 0
    assert "1s by intent" in (out / "comparison.md").read_text()
    monkeypatch.setattr(comparison_measure, "fit_epochs", None)
    assert main([*command[: command.index("0")], "0", "1", *command[command.index("0") + 1 :]]) == 0
    assert main([*command, "--budget=2s"]) == 1
    assert "budget: 1s → 2s" in capfd.readouterr().err
    assert main([*command[:-1], "--baselines", "supervised", f"--run.out={tmp_path / 'b'}"]) == 1
