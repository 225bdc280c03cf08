import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from comad.cli import main
from comad.comparison import measure as measure_module
from comad.comparison import run as run_module
from comad.comparison.config import CompareConfig
from comad.comparison.entries import ComparisonRow
from comad.comparison.measure import RowRun
from comad.data.load import load_images
from comad.distillation.config import DistillConfig
from comad.distillation.distiller import Distiller
from comad.evaluation.evaluation import Evaluation, PerImage, Result
from comad.evaluation.intervals import paired_interval
from comad.evaluation.scores import read_scores
from comad.presets import recipe
from comad.runtime.checkpoint import checkpoints
from comad.runtime.run import RunConfig
from comad.runtime.seal import is_intact, sealed

RECIPE = recipe("comad", demo=True)
ROWS = ["--presets", "comad", "mean", "--teacher-sets", "first,second", "first", "--seeds", 0, 1]


@pytest.fixture(scope="module")
def finished(compare_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    assert main(compare_command(out, *ROWS)) == 0
    return out


@pytest.fixture(scope="module")
def begun(compare_command, tmp_path_factory):
    """A comparison that was stopped before its first run."""

    def stopped(unit):
        raise KeyboardInterrupt

    out = tmp_path_factory.mktemp("begun") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "measure", stopped)
        assert main(compare_command(out, "--presets", "comad", "mean", "--seeds", 0)) == 130
    return out


def table(out):
    found = json.loads((out / "comparison.json").read_text())
    assert is_intact(found) and found.pop("checksum")  # over the seconds, too
    return found, {row["label"]: row for row in found["rows"]}


def failure(capfd, arguments):
    assert main(arguments) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("comad: "))
    return line


@pytest.fixture
def trainings(monkeypatch):
    """The runs that were started, as (preset, teachers, seed, resumed)."""
    started, real = [], measure_module.distill

    def watched(config):
        begun = bool(checkpoints(Path(config.run.out) / "checkpoints"))
        started.append((config.preset, len(config.teachers), config.run.seed, begun))
        return real(config)

    monkeypatch.setattr(measure_module, "distill", watched)
    return started


def test_the_table_has_every_row_and_number(finished):
    found, rows = table(finished)
    assert list(rows) == [
        "comad (first + second)", "comad (first)", "mean (first + second)", "mean (first)", "first", "second",
        "untrained", "init-only"]  # fmt: skip
    assert found["reference"] == "comad (first + second)" and found["split"] == "test"
    for row in rows.values():
        assert row["seeds"] == [0, 1] and row["params"] > 0 and row["flops"] > 0 and row["commit"]
        assert row["finetune"] is None and row["knn_coarse"] is None
        for name in ("knn", "linear"):
            low, high = row[f"{name}_interval"]
            assert 0 <= row[name] <= 100 and low <= row[f"{name}_minus_reference"] <= high
    student = rows["mean (first)"]
    assert student["preset"] == "mean" and student["teachers"] == ["first"] and student["kind"] == "student"
    assert student["images_seen"] > 0 and student["seconds"] > 0 and rows["first"]["images_seen"] == 0
    ours = rows["comad (first + second)"]
    assert ours["knn_minus_reference"] == 0 and ours["knn_interval"] == [0, 0] and ours["linear_interval"] == [0, 0]
    assert rows["untrained"]["knn"] == rows["init-only"]["knn"]
    # of one teacher the gate and the mean are the same
    assert rows["comad (first)"]["knn"] == rows["mean (first)"]["knn"]


def test_differences_are_those_of_the_stored_results(finished):
    _, rows = table(finished)

    def hits(label):
        files = sorted(finished.glob(f"runs/{label}-*/seed-*/scores-test.json"))
        assert len(files) == 2
        return [read_scores(path).scores[0] for path in files]

    untrained, others = hits("untrained"), []
    for path in finished.glob("runs/comad-*/seed-0/run/config.yaml"):
        if "second=" in path.read_text():
            others = [read_scores(path.parents[2] / f"seed-{s}" / "scores-test.json").scores[0] for s in (0, 1)]
    a, b = (torch.stack([score.correct["knn"] for score in part]) for part in (untrained, others))
    expected = paired_interval(a, b, untrained[0].groups["knn"])
    found = rows["untrained"]
    assert [found["knn_minus_reference"], *found["knn_interval"]] == pytest.approx(list(expected[:3]), abs=1e-3)
    assert found["knn_images"] == expected.images and found["knn_concepts"] == expected.concepts
    assert found["knn_seeds"] == 2 and found["knn_over"] == "seeds and concepts"
    assert found["knn"] == pytest.approx(100 * a.double().mean().item(), abs=1e-3)


def test_markdown_and_page(finished):
    page = (finished / "comparison.md").read_text()
    assert "# Comparison on labelled" in page and "difference to `comad (first + second)`" in page
    assert page.count("| `") == 8 and "[0.0, 0.0]" in page and "Coarse" not in page
    html = (finished / "report.html").read_text()
    assert "<title>" in html and "comad (first + second)" in html


def test_a_finished_comparison_trains_nothing_again_and_may_grow(compare_command, finished, tmp_path, trainings):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = table(out)[0]
    assert main(compare_command(out, *ROWS)) == 0
    assert trainings == [] and table(out)[0] == before
    assert main(compare_command(out, *ROWS, 2, "--presets", "comad", "--baselines")) == 0
    assert trainings == [("comad", 2, 2, False), ("comad", 1, 2, False)]
    assert table(out)[1]["comad (first)"]["seeds"] == [0, 1, 2]


def test_a_killed_comparison_goes_on_where_it_was(compare_command, finished, tmp_path, trainings, monkeypatch):
    out, calls, real = tmp_path / "out", [], Distiller.forward

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 9:  # in the second run
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "forward", stopped)
        assert main(compare_command(out, *ROWS)) == 130
    assert [(*start[:2], start[3]) for start in trainings] == [("comad", 2, False), ("comad", 1, False)]
    assert not (out / "comparison.json").exists()
    trainings.clear()

    half = next(path for path in out.glob("runs/*/seed-0/run") if not (path / "student").exists())
    assert list(half.glob("checkpoints/step-*.pt"))
    began = out / "runs" / "mean-00000000" / "seed-0" / "run"
    began.mkdir(parents=True)  # of no row of this comparison: left alone
    assert main(compare_command(out, *ROWS)) == 0
    assert trainings[0] == ("comad", 1, 0, True) and not any(start[3] for start in trainings[1:])
    assert len(trainings) == 7 and began.is_dir()
    new, old = table(out)[0], table(finished)[0]
    for rows in (new["rows"], old["rows"]):
        for row in rows:
            del row["seconds"]
    assert new == old


def test_a_run_without_a_checkpoint_begins_again(compare_command, tmp_path, trainings):
    rows = ["--presets", "comad", "--seeds", 0, "--baselines"]
    out = tmp_path / "out"
    assert main(compare_command(out, *rows)) == 0
    (run,) = out.glob("runs/comad-*/seed-0/run")
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "student")
    (run.parent / "scores-test.json").unlink()
    assert main(compare_command(out, *rows)) == 0
    assert [start[3] for start in trainings] == [False, False]
    assert (run / "log.jsonl").read_text().count('"loss"') == 5


def test_test_images_stay_unseen_while_choosing(compare_command, finished, tmp_path, trainings, monkeypatch):
    from comad.evaluation import features

    out, seen, real = tmp_path / "out", set(), features.evaluation_views

    def watched(images, *rest, **more):
        seen.add(images.name.split("/")[-1])
        return real(images, *rest, **more)

    monkeypatch.setattr(features, "evaluation_views", watched)
    rows = ["--presets", "comad", "mean", "--seeds", 0]
    assert main(compare_command(out, *rows, "--split=val")) == 0
    assert "test" not in seen and "val" in seen and table(out)[0]["split"] == "val"
    assert len(trainings) == 2
    assert main(compare_command(out, *rows)) == 0
    assert "test" in seen and len(trainings) == 2 and table(out)[0]["split"] == "test"
    assert table(out)[1]["comad"]["knn"] == pytest.approx(_of_seed(finished, 0), abs=1e-3)


def _of_seed(out, seed):
    for path in out.glob(f"runs/comad-*/seed-{seed}/run/config.yaml"):
        if "second=" in path.read_text():
            return read_scores(path.parents[1] / "scores-test.json").scores[0].row.scores["knn"]
    return None


def test_fine_tuned_and_supervised_rows(compare_command, tmp_path, trainings, monkeypatch):
    out = tmp_path / "out"
    tuning = ["--finetune", "--tuning.optim.epochs=2", "--tuning.optim.batch-size=8", "--tuning.optim.base-lr=0.05"]
    rows = ["--presets", "comad", "--seeds", 0, 1, "--baselines", "teachers", "supervised", "pixels"]
    assert main(compare_command(out, *rows, *tuning)) == 0
    found = table(out)[1]
    for label in ("comad", "first", "second", "supervised"):
        assert found[label]["finetune"] is not None and len(found[label]["finetune_interval"]) == 2
    assert found["pixels"]["finetune"] is None and found["pixels"]["params"] == 0
    assert found["supervised"]["images_seen"] == found["comad"]["images_seen"]
    assert found["supervised"]["seconds"] > 0 and "fine-tune" in (out / "comparison.md").read_text()

    learnt, real = [], measure_module.finetune_backbone
    monkeypatch.setattr(measure_module, "finetune_backbone", lambda *a: learnt.append(1) or real(*a))
    (lost,) = out.glob("runs/comad-*/seed-1/finetune-*/finetune.json")
    lost.unlink()
    trainings.clear()
    assert main(compare_command(out, *rows, *tuning)) == 0
    assert trainings == [] and len(learnt) == 1


def test_a_changed_teacher_is_another_row(compare_command, tmp_path, trainings, teacher_specs):
    out, own = tmp_path / "out", tmp_path / "own"
    name, folder = teacher_specs[0].split("=")
    shutil.copytree(folder, own)
    rows = ["--presets", "comad", "--seeds", 0, "--baselines", "--teachers", f"{name}={own}:allow_changed"]
    assert main(compare_command(out, *rows)) == 0
    path = own / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(compare_command(out, *rows)) == 0
    assert len(trainings) == 2 and len(list(out.glob("runs/comad-*"))) == 2


def test_changed_pictures_are_other_rows(compare_command, labelled_folder, tmp_path, trainings):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(labelled_folder, data)
    rows = ["--presets", "comad", "--teacher-sets", "first", "--seeds", 0, "--baselines", "pixels", f"--data={data}"]
    assert main(compare_command(out, *rows)) == 0
    assert main(compare_command(out, *rows)) == 0
    assert len(trainings) == 1 and len(list(out.glob("runs/*"))) == 2
    (data / "ant").rename(data / "away")
    (data / "bee").rename(data / "ant")
    (data / "away").rename(data / "bee")
    assert main(compare_command(out, *rows)) == 0
    assert len(trainings) == 2 and len(list(out.glob("runs/*"))) == 4


def test_an_evaluation_that_is_new_is_measured_of_old_rows(compare_command, finished, tmp_path, trainings, monkeypatch):
    monkeypatch.setattr(Evaluation, "members", dict(Evaluation.members))

    @dataclass(frozen=True, kw_only=True)
    class Luck(Evaluation, name="luck"):
        def __call__(self, features, device="cpu"):
            return Result({"fortune": PerImage(torch.ones(len(features.test.groups)) / 4, features.test.groups)}, {})

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = table(out)[1]
    assert main(compare_command(out, *ROWS)) == 0
    assert trainings == [] and all(row["fortune"] == 25 for row in table(out)[1].values())
    assert all(row["knn"] == before[label]["knn"] for label, row in table(out)[1].items())
    assert "fortune" in (out / "comparison.md").read_text()


def test_workers_and_a_network_that_is_two_baselines_change_nothing(compare_command, tmp_path):
    out, rows = tmp_path / "out", ["--presets", "comad", "--teacher-sets", "first", "--seeds", 0]
    rows += ["--baselines", "untrained", "init-only"]
    assert main(compare_command(out, *rows)) == 0
    assert len(list(out.glob("runs/untrained-*"))) == 1 and not list(out.glob("runs/init-only-*"))
    assert main(compare_command(out, *rows, "--loader.workers=1")) == 0


def test_what_int8_costs_is_another_row_than_exact_teachers(labelled_folder, tmp_path):
    splits = load_images(str(labelled_folder))

    def folder(**changes):
        entry = ComparisonRow(label="x", preset="x", teachers=(), kind="student", config=DistillConfig(**changes))
        config = CompareConfig(recipe=replace(RECIPE, run=RunConfig(out=str(tmp_path))))
        return RowRun(entry, 0, config, splits, {}, "").row_folder

    assert folder(cache_teachers=True, cache_storage="int8") != folder(cache_storage="int8") == folder()
    assert folder(cache_teachers=True) == folder()


@pytest.mark.parametrize(
    ("row", "words"),
    [("comad --optim.batch-size 900", "too few"), ("comad --cache-teachers", "set --loader.fixed-views")],
)
def test_a_row_that_cannot_run_is_told_before_any_other_runs(compare_command, tmp_path, capfd, row, words):
    assert main(compare_command(tmp_path / "out", "--presets", "mean", row, "--seeds", 0)) == 1
    told = capfd.readouterr().err
    assert words in told and "[1/" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--optim.epochs=2"], "holds another comparison: optim.epochs: 1.0 → 2.0; pass --run.out"),
        (["--ablation=gate"], "ablation: none → gate"),
        (["--presets", "comed"], "no preset 'comed'; did you mean 'comad'"),
        (["--ablation=views"], "no ablation 'views'"),
        (["--reference=mean-field"], "is none of the rows"),
        (["--teachers", "first=nowhere.pth"], "nowhere.pth"),
        (["--finetune", "--tuning.optim.batch-size=1000"], "too few to fine-tune"),
    ],
)
def test_mistakes_are_told_in_one_line_and_change_nothing(compare_command, begun, capfd, more, words):
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    assert words in failure(capfd, compare_command(begun, "--presets", "comad", "--teacher-sets=first", *more))
    assert before == {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} and len(before) == 1


@pytest.mark.parametrize("content", ['{"epochs": 9.0, "warmup_epochs": 0.1, "checksum": "0"}', "{", "{}", "[[["])
def test_what_was_measured_and_is_damaged_is_measured_again(tmp_path, capsys, content):
    path, unit = tmp_path / "epochs.json", object.__new__(RowRun)
    path.write_text(json.dumps(sealed({"epochs": 3.0, "warmup_epochs": 0.1})))
    assert unit._epochs(path) == {"epochs": 3.0, "warmup_epochs": 0.1} and capsys.readouterr().err == ""
    path.write_text(content)
    assert unit._epochs(path) is None
    assert capsys.readouterr().err == f"comad: {path} is damaged; how many epochs fit the budget is measured again.\n"


def test_a_record_of_a_comparison_that_is_damaged_is_told(begun, tmp_path, capsys):
    path = tmp_path / run_module.RECORD
    text = (begun / run_module.RECORD).read_text()
    path.write_text(text)
    assert run_module._read_record(path).presets == ("comad", "mean") and capsys.readouterr().err == ""
    path.write_text(text.replace("seed: 0", "seed: 1"))
    assert run_module._read_record(path) is None
    assert f"{path} is damaged; it is written anew" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_student_that_is_damaged_is_exported_again(finished, tmp_path, capsys, name):
    student = shutil.copytree(next(finished.glob("runs/comad-*/seed-0/**/student")), tmp_path / "student")
    assert measure_module._card(student / "config.json")["preset"] and capsys.readouterr().err == ""
    content = (student / name).read_bytes()
    (student / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert measure_module._card(student / "config.json") is None
    assert f"{student} is damaged; the student is exported again" in capsys.readouterr().err


def test_a_folder_of_something_else_and_data_without_labels(compare_command, tmp_path, capfd, write_images):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").touch()
    assert "holds no comparison" in failure(capfd, compare_command(tmp_path / "thesis", "--presets", "comad"))
    data = write_images(tmp_path / "plain", [f"{i}.png" for i in range(30)])
    arguments = compare_command(tmp_path / "out", "--presets", "comad", "--data", data)
    assert "one sub-folder per label" in failure(capfd, arguments)
    assert not (tmp_path / "out").exists()
