import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from comad.cli import main
from comad.distillation import results as results_module
from comad.distillation import run as run_module
from comad.distillation import setup as assembly
from comad.distillation.distiller import Distiller
from comad.evaluation.evaluation import Evaluation
from comad.models.onednn_linear import HAS_ONEDNN_LINEAR, OnednnLinear, use_onednn_linear
from comad.presets import METHODS
from comad.runtime.checkpoint import checkpoints

STUDENT = [f"--student.{key}={value}" for key, value in
           {"image-size": 16, "patch-size": 4, "width": 12, "depth": 2, "heads": 2}.items()]  # fmt: skip
SHORT = ["--optim.epochs=3", "--optim.batch-size=11", "--optim.warmup-epochs=1", "--optim.base-lr=0.01"]
LOGGED = ["--run.precision=fp32", "--run.log-every=1", "--run.no-tensorboard"]
CACHED = ["--cache-teachers", "--loader.fixed-views=2"]

KILLED = """
import json, os, signal, sys
import torch
from comad.cli import main
from comad.distillation import run
from comad.runtime import checkpoint, log

def die_in_a_step(self, step, metrics, real=log.RunLog.write):
    real(self, step, metrics)
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

def die_while_writing(state, file, real=torch.save):
    if state["step"] == 8:
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(state, file)

processes = []
for number, command in enumerate(json.loads(sys.argv[1])):  # one import of torch for both runs
    processes.append(os.fork())
    if not processes[-1]:
        if number == 0:
            log.RunLog.write = die_in_a_step
        else:
            checkpoint.torch.save = die_while_writing
        os._exit(main(command))
print([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes])
"""


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory, write_images):
    """Pictures without labels: runs on them skip the scores."""
    names = [f"train/{i}.png" for i in range(58)] + ["val/1.png", "test/1.png"]
    return write_images(tmp_path_factory.mktemp("plain"), names)


@pytest.fixture(scope="module")
def command(labelled_folder, teacher_specs):
    """A distillation of 5 steps an epoch, 15 in all."""

    def build(out, *more, data=labelled_folder):
        sources = ["--preset=comad", "--data", str(data), "--teachers", *teacher_specs]
        return ["distill", *sources, *STUDENT, *SHORT, *LOGGED, "--loader.workers=0", f"--run.out={out}", *more]

    return build


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(out, "--run.checkpoint-every=4", "--run.probe-every=5")) == 0
    return out


def weights(out):
    return (out / "student" / "model.safetensors").read_bytes()


def steps(out):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


def failure(capfd, arguments):
    assert main(arguments) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("comad: "))
    return line


def test_the_scoreboard(finished):
    rows = json.loads((finished / "scoreboard.json").read_text())["rows"]
    roles = [row["role"] for row in rows]
    assert roles == ["pixels", "teacher", "teacher", "untrained", "init_only", "student"]
    assert [row["name"] for row in rows if row["role"] == "teacher"] == ["first", "second"]
    for row in rows:
        for key in ("name", "role", "params", "knn", "linear", "flops", "latency_ms", "knn_share"):
            assert row[key] is not None
        assert 0 <= row["knn"] <= 100 and 0 <= row["linear"] <= 100
    by_role = {row["role"]: row for row in rows}
    assert by_role["student"]["params"] == by_role["untrained"]["params"] > 0
    assert by_role["init_only"]["knn"] == by_role["untrained"]["knn"]
    best = max(row["knn"] for row in rows if row["role"] == "teacher")
    assert by_role["student"]["knn_share"] == pytest.approx(100 * by_role["student"]["knn"] / best)


def test_the_log_has_losses_and_health(finished):
    lines = steps(finished)
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert lines[-1]["loss"] < lines[0]["loss"]
    for name in ("loss/token", "loss/spatial", "loss/first/token", "loss/second/spatial",
                 "student_information", "target_information", "student_cosine", "target_cosine",
                 "student_rank", "target_rank", "student_std", "target_std", "gate_entropy", "share_first",
                 "share_second", "lr", "grad_norm", "images_per_s", "data_wait"):  # fmt: skip
        assert isinstance(lines[-1][name], float)
    assert lines[-1]["share_first"] + lines[-1]["share_second"] == pytest.approx(1, abs=1e-4)
    probes = [line for line in map(json.loads, (finished / "log.jsonl").read_text().splitlines()) if "knn" in line]
    assert [line["step"] for line in probes] == [5, 10, 15]
    assert -1 <= probes[-1]["held_out_cosine_first"] <= 1
    assert not any("warning" in line for line in lines)


def test_the_export_loads_in_timm(finished):
    student = timm.create_model(f"local-dir:{finished / 'student'}", pretrained=True).eval()
    with torch.inference_mode():
        assert student(torch.zeros(1, 3, 16, 16)).shape == (1, 12)
    card = json.loads((finished / "student" / "config.json").read_text())["comad"]
    assert [teacher["name"] for teacher in card["teachers"]] == ["first", "second"]
    assert card["preset"] == "comad" and {row["role"] for row in card["scores"]} > {"student", "teacher"}


def test_the_config_runs_again_as_it_is(finished, tmp_path):
    again = tmp_path / "again"
    assert main(["distill", "--recipe", str(finished / "config.yaml"), f"--run.out={again}"]) == 0
    assert weights(again) == weights(finished)
    first, second = (yaml.safe_load((out / "config.yaml").read_text()) for out in (finished, again))
    assert first["run"].pop("out") != second["run"].pop("out") and first == second


ONE_TEACHER = [name for name, method in METHODS.items() if method.single_teacher or name == "dmt-like"]
FIELD = [name for name in METHODS if name == "comad-student-side" or not name.startswith(("comad", "mean", "g2sd"))]


@pytest.mark.parametrize("preset", FIELD)
def test_every_preset_runs_goes_on_and_gives_a_scoreboard(command, teacher_specs, tmp_path, preset):
    def run(name, *more):
        teachers = ["--teachers", *(teacher_specs[:1] if preset in ONE_TEACHER else teacher_specs)]
        arguments = [*command(tmp_path / name), *teachers, "--preset", preset, "--optim.epochs=1"]
        cached = ["--cache-teachers", f"--cache-folder={tmp_path / 'cache'}"] if METHODS[preset].masking.repeats else []
        return main([*arguments, *cached, "--loader.fixed-views=1", "--run.checkpoint-every=2", *more])

    assert run("whole") == 0
    numbers = steps(tmp_path / "whole")[-1]
    assert all(math.isfinite(value) for value in numbers.values() if isinstance(value, float))
    rows = json.loads((tmp_path / "whole" / "scoreboard.json").read_text())["rows"]
    assert {row["role"] for row in rows} >= {"teacher", "init_only", "student"} and rows[-1]["knn"] is not None
    student = timm.create_model(f"local-dir:{tmp_path / 'whole' / 'student'}", pretrained=True)
    assert student.num_features == 12
    before = weights(tmp_path / "whole")
    checkpoints(tmp_path / "whole" / "checkpoints")[-1].unlink()
    assert run("whole", "--run.resume") == 0
    assert weights(tmp_path / "whole") == before


def test_a_method_of_a_decoder_says_where_to_get_one(command, teacher_specs, tmp_path, capfd):
    line = failure(capfd, [*command(tmp_path / "run"), "--teachers", teacher_specs[0], "--preset", "g2sd"])
    assert "no MAE decoder" in line and "comad pretrain mae" in line


def test_cached_teachers_need_masks_that_repeat(command, tmp_path, capfd):
    line = failure(capfd, command(tmp_path / "run", *CACHED, "--masking.mask-ratio-end=0.7"))
    assert "--masking.mask-ratio-end" in line
    line = failure(capfd, command(tmp_path / "run", *CACHED, "--masking.mixup"))
    assert "--masking.mixup" in line


def test_mixup_blends_what_student_and_teachers_see_alike(command, tmp_path, monkeypatch):
    see, ask = Distiller.forward, Distiller.forward_teacher
    shown, taught = [], []
    monkeypatch.setattr(
        Distiller, "forward", lambda self, images, *rest: shown.append(images) or see(self, images, *rest)
    )
    monkeypatch.setattr(
        Distiller,
        "forward_teacher",
        lambda self, teacher, m, images, masks: taught.append(images) or ask(self, teacher, m, images, masks),
    )
    same = ["--augment.jitter=0", "--optim.epochs=1", "--preset=radio", "--split=none"]
    main(command(tmp_path / "plain", *same))
    plain = shown[0]
    shown.clear(), taught.clear()
    main(command(tmp_path / "mixed", *same, "--masking.mixup"))
    assert torch.equal(shown[0], taught[0]) and not torch.equal(shown[0], plain)
    pairs = torch.stack([plain, plain.roll(1, dims=0)])
    assert (shown[0] >= pairs.amin(dim=0) - 1e-6).all() and (shown[0] <= pairs.amax(dim=0) + 1e-6).all()


def test_mixup_of_outputs_shows_teachers_plain_images_and_can_be_cached(command, tmp_path, monkeypatch):
    see, ask = Distiller.forward, Distiller.forward_teacher
    shown, taught, blended = [], [], []

    def forward(self, images, outputs, masks):
        shown.append(images), blended.append(outputs[0].patches)
        return see(self, images, outputs, masks)

    def teach(self, teacher, m, images, masks):
        output = ask(self, teacher, m, images, masks)
        if m == 0:
            taught.append((images, output.patches))
        return output

    monkeypatch.setattr(Distiller, "forward", forward)
    monkeypatch.setattr(Distiller, "forward_teacher", teach)
    mixing = ["--masking.mixup", "--masking.mixup-outputs", "--loader.fixed-views=2"]
    same = ["--augment.jitter=0", "--optim.epochs=2", "--preset=radio", "--split=none", *mixing]
    main(command(tmp_path / "live", *same))
    plain, patches = taught[0]
    pairs = torch.stack([plain, plain.roll(1, dims=0)])
    share = ((shown[0] - pairs[1]) / (pairs[0] - pairs[1])).flatten(1).nanmedian(dim=1).values
    wanted = share[:, None, None] * patches + (1 - share)[:, None, None] * patches.roll(1, dims=0)
    torch.testing.assert_close(blended[0], wanted, atol=1e-4, rtol=1e-4)
    main(command(tmp_path / "cached", *same, "--cache-teachers"))
    live, cached = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("live", "cached"))
    torch.testing.assert_close(cached, live, atol=1e-4, rtol=0)


VARIANTS = {
    "in a step": ["--run.checkpoint-every=3", "--loader.workers=1", "--optim.ema=0.9"],
    "while it writes a checkpoint": ["--run.checkpoint-every=4", *CACHED],
}


@pytest.fixture(scope="module")
def killed(command, plain_folder, tmp_path_factory):
    """Folders of runs that got SIGKILL, in the middle of the second epoch."""
    folders = [tmp_path_factory.mktemp("killed") / "run" for _ in VARIANTS]
    commands = [command(out, *more, data=plain_folder) for out, more in zip(folders, VARIANTS.values(), strict=True)]
    result = subprocess.run([sys.executable, "-c", KILLED, json.dumps(commands)], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[-9, -9]", result.stderr
    return dict(zip(VARIANTS, folders, strict=True))


@pytest.mark.parametrize(("moment", "saved"), [("in a step", ("03", "06")), ("while it writes a checkpoint", ("04",))])
def test_a_killed_run_goes_on_to_bitwise_the_same_student(command, plain_folder, killed, tmp_path, moment, saved):
    out, whole = killed[moment], tmp_path / "whole"
    assert [path.name for path in checkpoints(out / "checkpoints")] == [f"step-000000{step}.pt" for step in saved]
    assert not (out / "student").exists()
    assert main(command(whole, *VARIANTS[moment], data=plain_folder)) == 0
    assert main(command(out, *VARIANTS[moment], "--run.resume", data=plain_folder)) == 0
    assert weights(out) == weights(whole)
    assert steps(out)[-1]["loss"] == steps(whole)[-1]["loss"]
    assert not list((out / "checkpoints").glob(".*"))


def test_two_processes_with_two_students_learn_what_one_learns_alone_and_write_once(command, plain_folder, tmp_path):
    same = ["--optim.batch-size=12", "--optim.epochs=2", "--masking=none"]
    students = ["vit_tiny_patch16_224", "vit_small_patch16_224"]
    several = [f"--student={name}" for name in students]
    assert main(command(tmp_path / "one", *same, data=plain_folder)) == 0
    two = command(tmp_path / "two", *same, *several, "--run.devices=2", data=plain_folder)
    done = subprocess.run([sys.executable, "-m", "comad.cli", *two], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one = load_file(tmp_path / "one" / "student" / "model.safetensors")
    for student in students:  # of the same width and depth, so the same network
        assert len(steps(tmp_path / "two" / student)) == len(steps(tmp_path / "one")) == 8
        two = load_file(tmp_path / "two" / student / "student" / "model.safetensors")
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-3, rtol=0)


@pytest.fixture
def teacher_calls(monkeypatch):
    """The number of a teacher for each time that it computes, for the cache or for a step."""
    calls, real, calibrate = [], Distiller.forward_teacher, run_module.calibrate_students

    def forward_teacher(self, teacher, m, *rest):
        if self.training:  # not for scores
            calls.append(m)
        return real(self, teacher, m, *rest)

    def calibrate_students(*arguments):
        before = list(calls)
        calibrate(*arguments)
        calls[:] = before

    monkeypatch.setattr(Distiller, "forward_teacher", forward_teacher)
    monkeypatch.setattr(run_module, "calibrate_students", calibrate_students)
    return calls


def test_cached_teachers_change_nothing(command, plain_folder, tmp_path, teacher_calls):
    main(command(tmp_path / "a", *CACHED, "--optim.epochs=4", "--split=none", data=plain_folder))
    cached = len(teacher_calls)
    assert 2 + 2 * 10 <= cached < 2 + 2 * 20  # each teacher: an example of its shape, two epochs, and dropped images
    main(command(tmp_path / "b", "--loader.fixed-views=2", "--optim.epochs=4", "--split=none", data=plain_folder))
    assert len(teacher_calls) == cached + 2 * 20
    cached_student, student = (load_file(tmp_path / name / "student" / "model.safetensors") for name in "ab")
    for name, tensor in student.items():  # not bitwise: the rows of a matrix product may depend on their batch
        torch.testing.assert_close(cached_student[name], tensor, atol=1e-4, rtol=0)
    assert not (tmp_path / "a" / "teacher-cache").exists()


def test_a_named_cache_serves_other_runs(command, plain_folder, teacher_specs, tmp_path, teacher_calls):
    calls = teacher_calls
    same = [*CACHED, "--optim.epochs=2", "--split=none", f"--cache-folder={tmp_path / 'cache'}"]
    main(command(tmp_path / "a", *same, data=plain_folder))
    assert len(calls) == 2 + 20
    main(command(tmp_path / "b", *same, data=plain_folder))
    assert len(calls) == 22 and weights(tmp_path / "a") == weights(tmp_path / "b")
    more = ["--teachers", *teacher_specs, f"third={teacher_specs[0].split('=')[1]}"]
    main(command(tmp_path / "c", *same, *more, data=plain_folder))
    assert len(calls) == 22 + 1 + 10  # the third alone: its masks differ from the first's
    main(command(tmp_path / "d", *same, "--optim.base-lr=0.02", "--student.width=16", data=plain_folder))
    assert len(calls) == 33
    main(command(tmp_path / "e", *same, "--cache-storage=int8", data=plain_folder))
    assert len(calls) == 33 + 22 and (tmp_path / "e" / "student").exists()


def test_offloaded_teachers_change_nothing(command, finished, tmp_path):
    assert main(command(tmp_path / "run", "--teachers-in=offload", "--run.probe-every=5")) == 0
    assert weights(tmp_path / "run") == weights(finished)
    assert not [path for path in tmp_path.iterdir() if path.name != "run"]


@pytest.mark.skipif(not HAS_ONEDNN_LINEAR, reason="this CPU or this torch has no packed bf16 products")
def test_packed_teachers_teach_the_same(command, tmp_path, monkeypatch):
    packed = []
    monkeypatch.setattr(
        assembly, "use_onednn_linear", lambda backbone: [packed.append(backbone), use_onednn_linear(backbone)]
    )
    for name in ("memory", "offload"):
        assert main(command(tmp_path / name, "--run.precision=bf16", f"--teachers-in={name}", "--split=none")) == 0
    assert len(packed) == 2 and all(any(isinstance(x, OnednnLinear) for x in net.modules()) for net in packed)
    for ours, plain in zip(steps(tmp_path / "memory"), steps(tmp_path / "offload"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-2)


@pytest.fixture
def compiled_eagerly(monkeypatch):
    """torch.compile without its compiler, which takes long."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **named: real(self, backend="eager", **named))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    yield
    torch._dynamo.reset()


def test_compiled_teachers_in_8_bits(command, finished, tmp_path, capfd, compiled_eagerly):
    more = "--compile", "--teacher-precision=int8", "--optim.ema=0.9", "--run.probe-every=10", "--split=none"
    assert main(command(tmp_path / "run", *more)) == 0
    said = capfd.readouterr().err
    cosines = dict(re.findall(r"(\w+): int8, tokens at a cosine of ([\d.]+) to bf16", said))
    assert list(cosines) == ["first", "second"] and all(0.998 < float(cosine) <= 1 for cosine in cosines.values()), said
    for ours, theirs in zip(steps(tmp_path / "run"), steps(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def test_8_bits_are_not_offloaded(command, tmp_path, capfd):
    line = failure(capfd, command(tmp_path / "run", "--teacher-precision=int8", "--compile", "--teachers-in=offload"))
    assert "leave out --teachers-in offload" in line


@pytest.mark.slow
def test_compiled_blocks_learn_what_plain_ones_do(command, finished, tmp_path):
    assert main(command(tmp_path / "run", "--compile")) == 0
    for ours, theirs in zip(steps(tmp_path / "run"), steps(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_sigterm_ends_with_a_checkpoint_and_130(command, finished, tmp_path, monkeypatch, capfd):
    calls = []
    real = Distiller.forward

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "forward", interrupted)
        assert main(command(tmp_path / "run")) == 130
    assert "--run.resume" in capfd.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000007.pt"]
    assert main(command(tmp_path / "run", "--run.resume")) == 0
    assert weights(tmp_path / "run") == weights(finished)


def test_a_run_is_not_overwritten(command, finished, capfd):
    before = weights(finished)
    assert "--run.resume" in failure(capfd, command(finished))
    assert weights(finished) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--optim.base-lr=0.02"], "optim.base_lr: 0.01 → 0.02"),
        (["--run.seed=1"], "run.seed: 0 → 1"),
        (["--masking.mask-ratio=0.8"], "method.masking.mask_ratio: 0.75 → 0.8"),
        (["--masking=none"], "method.masking.name: superset → none"),
    ],
)
def test_resume_refuses_another_config(command, finished, capfd, more, words):
    assert words in failure(capfd, command(finished, "--run.resume", *more))


def test_resume_refuses_other_weights_of_a_teacher(command, finished, capfd, teacher_specs):
    folder = teacher_specs[0].split("=")[1]
    path = f"{folder}/model.safetensors"
    with open(path, "rb") as file:
        content = file.read()
    try:
        with open(path, "wb") as file:
            file.write(content[:-1] + bytes([content[-1] ^ 1]))
        assert "add :allow_changed" in failure(capfd, command(finished, "--run.resume"))
        changed = ["--teachers", f"{teacher_specs[0]}:allow_changed", teacher_specs[1]]
        assert "teacher_cards.first.sha256" in failure(capfd, command(finished, "--run.resume", *changed))
    finally:
        with open(path, "wb") as file:
            file.write(content)


def test_an_unreadable_image_is_listed(command, tmp_path, write_images, capfd):
    names = [f"{part}/{label}/{i}.png" for part in ("train", "val", "test") for label in "ab" for i in range(12)]
    folder = write_images(tmp_path / "data", names)
    (folder / "train" / "a" / "3.png").write_bytes(b"broken")
    assert main([*command(tmp_path / "run"), "--data", str(folder)]) == 0
    listed = (tmp_path / "run" / "unreadable.txt").read_text().split()
    assert listed == [str(folder / "train" / "a" / "3.png")]
    assert "1 unreadable images skipped" in capfd.readouterr().err


def test_a_scorer_that_fails_leaves_student_and_checkpoint_and_the_run_goes_on_to_its_scores(
    command, finished, tmp_path, monkeypatch, capfd
):
    out = tmp_path / "run"

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", "test/bee/3.png")

    with monkeypatch.context() as patch:
        patch.setattr(results_module, "score_all", fail)
        assert main(command(out)) == 1
    assert "test/bee/3.png: Input/output error" in capfd.readouterr().err
    assert weights(out) == weights(finished) and not (out / "scoreboard.json").exists()
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-00000015.pt"]
    card = json.loads((out / "student" / "config.json").read_text())["comad"]
    assert not card["scores"] and timm.create_model(f"local-dir:{out / 'student'}", pretrained=True)
    assert main(command(out, "--run.resume")) == 0
    assert weights(out) == weights(finished)
    rows, expected = (json.loads((o / "scoreboard.json").read_text())["rows"] for o in (out, finished))
    assert [row["knn"] for row in rows] == [row["knn"] for row in expected]


def test_an_evaluation_that_cannot_score_is_told_before_the_first_step(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Evaluation, "members", dict(Evaluation.members))

    class Broken(Evaluation, name="broken"):
        """It divides by nothing."""

        def __call__(self, features, device=None):
            raise ZeroDivisionError("division by zero")

    line = failure(capfd, command(tmp_path / "run"))
    assert "evaluation 'broken' fails on random features of" in line and "division by zero" in line
    assert not (tmp_path / "run").exists()
    assert main(command(tmp_path / "run", "--split=none")) == 0  # nothing is scored


def test_without_labels_there_are_no_scores_but_a_student(command, tmp_path, write_images):
    folder = write_images(tmp_path / "data", [f"{i}.png" for i in range(30)])
    assert main([*command(tmp_path / "run", "--optim.epochs=1"), "--data", str(folder)]) == 0
    rows = json.loads((tmp_path / "run" / "scoreboard.json").read_text())["rows"]
    assert all(row["knn"] is None and row["reason"] for row in rows)
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_two_stages_go_through_a_proxy_that_is_used_again(command, tmp_path, capfd):
    short = ("--through=test_vit", "--split=none", "--optim.epochs=1", "--optim.warmup-epochs=0", "--preset=radio")
    assert main(command(tmp_path / "run", *short)) == 0
    proxy = tmp_path / "run-proxy"
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["through"] == "test_vit" and len(config["teachers"]) == 2
    assert json.loads((proxy / "student" / "config.json").read_text())["architecture"] == "test_vit"
    assert main(command(tmp_path / "run", *short, "--run.resume")) == 0
    first = (proxy / "log.jsonl").read_text()
    shutil.rmtree(tmp_path / "run")
    assert main(command(tmp_path / "run", *short)) == 0
    assert (proxy / "log.jsonl").read_text() == first
    shutil.rmtree(tmp_path / "run")
    line = failure(capfd, command(tmp_path / "run", *short, "--optim.base-lr=0.02"))
    assert "run-proxy" in line and "optim.base_lr" in line and "--run.out" in line


@pytest.mark.parametrize(
    ("preset", "words"), [("g2sd", "leave out --through"), ("hybrid", "got proxy; pass two or more")]
)
def test_what_a_proxy_cannot_teach_is_refused_before_it_is_trained(command, tmp_path, capfd, preset, words):
    assert words in failure(capfd, command(tmp_path / "run", "--through=test_vit", f"--preset={preset}"))
    assert not (tmp_path / "run-proxy").exists()
