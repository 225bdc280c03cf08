"""Several students of the same teacher passes: each is what it would be alone."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml

from comad.cli import main
from comad.distillation import results as results_module
from comad.distillation import run as run_module
from comad.distillation.distiller import Distiller
from comad.models.students import VitConfig
from comad.recipes import read_distillation
from comad.runtime import trainer as trainer_module
from comad.runtime.checkpoint import checkpoints

SMALL, TINY = "test_vit", "vit_tiny_patch16_224"
OPTIONS = [
    *("--student.image-size=16", "--student.patch-size=4", "--student.depth=2", "--student.drop-path=0.5"),
    *("--optim.epochs=2", "--optim.batch-size=11", "--optim.warmup-epochs=1", "--optim.ema=0.5", "--split=none"),
    *("--run.precision=fp32", "--run.log-every=1", "--run.no-tensorboard", "--run.checkpoint-every=3"),
    *("--loader.workers=0", "--aligner.calibration-images=32", "--run.probe-every=5", "--no-cache-teachers"),
]
TIMES = ("images_per_s", "data_wait", "memory_gib")


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Pages take most of the time of runs that are this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_module, "write_report", lambda folders: folders[0] / "report.html")
        yield


@pytest.fixture(scope="module")
def command(labelled_folder, teacher_specs):
    """A distillation of 5 steps an epoch, 10 in all, with random depth."""

    def build(out, *more):
        sources = ["--preset=comad", "--data", str(labelled_folder), "--teachers", *teacher_specs]
        return ["distill", *sources, *OPTIONS, f"--run.out={out}", *more]

    return build


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """Folder of a run of each student by itself."""
    root = tmp_path_factory.mktemp("alone")
    for name in (TINY, SMALL):
        assert main(command(root / name, "--student", name)) == 0
    return root


def outcome(folder):
    """All of a run that does not depend on the clock or on where it lies."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert Path(config["run"].pop("out")) == folder
    return {
        "log": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "config": config,
        "student": (folder / "student" / "model.safetensors").read_bytes(),
        "board": json.loads((folder / "scoreboard.json").read_text()),
        "checkpoints": [path.name for path in checkpoints(folder / "checkpoints")],
    }


@pytest.fixture(scope="module")
def together(command, tmp_path_factory):
    """Both in one run, killed twice between the checkpoints of the two; and the number of teacher passes each time."""
    out, passes = tmp_path_factory.mktemp("together") / "run", []
    real_teacher, real_save = Distiller.forward_teacher, trainer_module.save_checkpoint

    def run(stop, *more):
        def save(folder, step, *rest):
            if (folder.parent.name, step) == stop:
                raise RuntimeError("pulled the plug")
            return real_save(folder, step, *rest)

        passes.append(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_module, "save_checkpoint", save)
            patch.setattr(Distiller, "forward_teacher", count)
            return main(command(out, "--student", SMALL, f"--student={TINY}", *more))

    def count(self, teacher, m, images, masks):
        passes[-1] += m == 0 and len(images) == 11  # not for calibration and scores
        return real_teacher(self, teacher, m, images, masks)

    assert run((TINY, 3)) == 70  # the first has a checkpoint, the second has none
    assert run((TINY, 9), "--run.resume") == 70
    assert [checkpoints(out / name / "checkpoints")[-1].stem[-1] for name in (SMALL, TINY)] == ["9", "6"]
    assert run(None, "--run.resume") == 0
    return out, passes


@pytest.mark.parametrize("name", [SMALL, TINY])
def test_each_is_bitwise_what_it_is_alone_after_two_interruptions(alone, together, name):
    ours, theirs = outcome(together[0] / name), outcome(alone / name)
    for part, value in theirs.items():
        assert ours[part] == value, part


def test_the_teachers_are_asked_once_per_batch(together):
    assert together[1] == [3, 9, 4]


def test_the_folder_has_one_recipe_and_a_run_per_student(together):
    out, _ = together
    assert sorted(p.name for p in out.iterdir() if "error" not in p.name and p.suffix != ".npy") == [
        "config.yaml",
        SMALL,
        TINY,
    ]
    recipe = read_distillation(out / "config.yaml")
    assert [(student.name, student.depth) for student in recipe.students] == [(SMALL, 2), (TINY, 2)]
    for name, width in ((SMALL, 64), (TINY, 192)):
        student = timm.create_model(f"local-dir:{out / name / 'student'}", pretrained=True)
        assert student(torch.zeros(1, 3, 16, 16)).shape == (1, width)


def test_one_goes_on_by_itself(command, alone, together, capfd):
    folder = together[0] / SMALL
    checkpoints(folder / "checkpoints")[-1].unlink()
    (folder / "student" / "model.safetensors").unlink()
    assert main(command(folder, "--student", SMALL, "--run.resume")) == 0
    assert outcome(folder)["student"] == outcome(alone / SMALL)["student"]
    assert "step 10/10" in capfd.readouterr().err


def test_each_takes_over_the_heads_of_the_teacher(command, teacher_specs, tmp_path, capfd):
    options = ["--teachers", teacher_specs[0], "--preset", "tinymim", "--optim.epochs=0.2"]
    given = command(tmp_path / "run", "--student", SMALL, "--student", TINY, *options)
    assert main([option for option in given if not option.startswith("--aligner")]) == 0
    recipe = read_distillation(tmp_path / "run" / "config.yaml")
    assert [student.heads for student in recipe.students] == [2, 2]
    student = timm.create_model(f"local-dir:{tmp_path / 'run' / TINY / 'student'}", pretrained=True)
    assert student.blocks[0].attn.num_heads == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" ")[0] for line in lines if "step 1/1" in line] == [f"{SMALL}:", f"{TINY}:"]


def test_students_of_one_recipe_may_differ_in_more_than_the_name(tmp_path):
    (tmp_path / "r.yaml").write_text("extra_students: [{width: 96, heads: 3}, {name: test_vit}]\n")
    config = read_distillation(tmp_path / "r.yaml")
    assert config.students == (VitConfig(), VitConfig(width=96, heads=3), VitConfig(name=SMALL))
    assert config.student_folders == (TINY, f"{TINY}-2", SMALL)


def test_students_with_other_patches_are_refused_in_one_line(command, tmp_path, capfd):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("student: {image_size: 16, patch_size: 4}\nextra_students: [{image_size: 16, patch_size: 8}]\n")
    assert main([*command(tmp_path / "run"), "--recipe", str(recipe)]) == 1
    line = capfd.readouterr().err
    assert "16 px in patches of 4" in line and "16 px in patches of 8" in line and "--student.patch-size" in line
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()


def test_naming_an_architecture_keeps_the_images_of_the_recipe_and_drops_its_widths(monkeypatch):
    found = []
    monkeypatch.setattr(run_module, "distill", found.append)
    main(["distill", "--student", SMALL])
    main(["distill", "--student.name", SMALL])
    main(["distill", f"--student={TINY}", "--student", SMALL, "--student.depth=3"])
    small = VitConfig(name=SMALL, image_size=48, patch_size=8)
    assert found[0].students == (small,)
    assert found[1].student.width == 96
    assert [(s.name, s.depth, s.image_size) for s in found[2].students] == [(TINY, 3, 48), (SMALL, 3, 48)]
