import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from comad.cli import STATUS, VERBS, main
from comad.models.teachers import load_teacher
from comad.runtime.run import Interrupted, TrainingError

RANDOM = "vit_tiny_patch16_224:random"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def failure(capsys, *arguments):
    """The one line with which a command fails."""
    assert main(list(map(str, arguments))) == 1
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if not line.startswith("loading teachers")]  # told where slow
    assert len(lines) == 1 and lines[0].startswith("comad: ")
    return lines[0]


def test_help_is_quick_and_does_without_torch():
    code = (
        "import sys, comad.cli; status = comad.cli.main(['--help']); heavy = {'torch', 'timm', 'tyro', 'pydantic', "
        "'numpy', 'lightning_fabric'} & set(sys.modules); sys.exit(status or f'imported {heavy}' if heavy else 0)"
    )
    seconds = []
    for _ in range(5):
        before = os.times()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()  # of the processor, for a busy machine makes any process wait
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert result.returncode == 0, result.stderr
    assert all(verb in result.stdout for verb in VERBS)
    assert min(seconds) <= 0.5


def test_places_that_cannot_be_written_are_told_in_one_line(capsys, labelled_folder):
    Path("file").touch()
    Path("folder").mkdir()
    assert "file/x: Not a directory" in failure(capsys, "distill", "--run.out=file/x")
    data = f"--data={labelled_folder}"
    assert "is a folder; name a JSON file" in failure(capsys, "evaluate", RANDOM, data, "--out=folder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loader.fixed-views=-1"], "--loader.fixed-views -1 is too small"),
        (["--student.patch-size=0"], "patch size of 0 is too small"),
        (["--run.seed=-1"], "seed -1"),
        (["--optim.batch-size=0"], "--optim.batch-size 0 is too small"),
        (["--run.checkpoint-every=0"], "--run.checkpoint-every 0 is too small"),
    ],
)
def test_numbers_that_are_too_small_are_told(capfd, arguments, words):
    with pytest.raises(SystemExit):
        main(["distill", *arguments])
    told = capfd.readouterr().err
    assert words in " ".join(told.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_in_all_its_ways(capsys, arguments):
    assert main(arguments) == 0
    assert "usage: comad VERB" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


@pytest.mark.parametrize(("verb", "command"), [("distill", "command with --run.resume"), ("compare", "command")])
def test_a_stopped_run_says_how_to_go_on(capsys, monkeypatch, verb, command):
    def stop(arguments):
        raise Interrupted("runs/mine")

    monkeypatch.setitem(VERBS, verb, (VERBS[verb][0], stop))
    assert main([verb]) == 130
    assert capsys.readouterr().err == f"Go on: the same {command}.\n"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("no data"), 1, "no data"),
        (TrainingError("the loss is not finite"), 3, "not finite"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/log.jsonl"), 1, "runs/a/log.jsonl: No space"),
        (MemoryError(), 3, "--optim.microbatch"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), 3, "--optim.microbatch"),
        (KeyError("x"), 70, "report it with mine/comad-error-"),
        (OSError("odd"), 70, "comad-error-"),
        (RecursionError("too deep"), 70, "comad-error-"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_one_line_and_have_a_status(capsys, monkeypatch, error, status, words):
    def fail(arguments):
        raise error

    Path("mine").mkdir()
    monkeypatch.setitem(VERBS, "distill", ("", fail))
    assert main(["distill", "--run.out=mine"]) == status and status in STATUS
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and words in told
    kept = [path.read_text() for path in Path("mine").iterdir()]
    assert len(kept) == (status == 70) and all("Traceback" in text for text in kept)


@pytest.mark.parametrize(
    ("given", "resume"),
    [([], False), (["--run.resume"], True), (["--run.resume", "auto"], "auto"),
     (["--run.resume=auto"], "auto"), (["--run.no-resume"], False), (["--run.resume", "--run.out=x"], True)],
)  # fmt: skip
def test_resume_is_yes_no_or_auto(given, resume):
    from comad.recipes import parse_distillation

    assert parse_distillation(given).run.resume == resume


def test_a_pipe_that_closes_is_told(tmp_path):
    code = (
        "import sys; from comad import cli; text = 'x' * 100000; "
        "cli.VERBS['report'] = ('', lambda arguments: [cli._print(text) for _ in range(100)]); "
        "sys.exit(cli.main(['report']))"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout and running.stderr
    running.stdout.close()
    assert running.wait() == 141
    told = running.stderr.read().decode().splitlines()  # matplotlib says so where it takes long to find its fonts
    assert [line for line in told if not line.startswith("Matplotlib")] == [
        "comad: whoever read the output is gone; send it to a file, or go on with --run.resume."
    ]


def test_an_interrupt_that_a_library_turns_into_an_error_of_its_own_is_one(capsys, monkeypatch):
    def scored(arguments):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None

    monkeypatch.setitem(VERBS, "report", ("", scored))
    assert main(["report"]) == 130 and "ended at once" in capsys.readouterr().err
    monkeypatch.setitem(VERBS, "report", ("", lambda arguments: int("x")))
    assert main(["report"]) == 1  # the interrupt before is forgotten


@pytest.mark.parametrize("verb", ["distill", "pretrain", "evaluate", "evaluate finetune", "compare"])
def test_every_verb_has_help(capsys, verb):
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), "--help"])
    assert end.value.code == 0
    assert "--data" in capsys.readouterr().out


def test_teachers_can_be_looked_at(capsys):
    assert main(["teachers", "--help"]) == 0
    assert "comad teachers list [WORD] | inspect TEACHER | compare" in capsys.readouterr().out
    assert main(["teachers", "list", "stamps"]) == 0
    assert capsys.readouterr().out.split()[::2] == ["ibot-stamps", "mae-stamps", "mocov3-stamps"]
    for sub_command in ("inspect", "compare"):
        with pytest.raises(SystemExit) as end:
            main(["teachers", sub_command, "--help"])
        assert end.value.code == 0 and "--image-size" in capsys.readouterr().out


def test_a_misspelt_verb(capsys):
    assert "no verb 'destill'; did you mean 'distill'?" in failure(capsys, "destill")
    assert ", ".join(VERBS) in failure(capsys, "xyz")


@pytest.mark.parametrize("given", [["--preset", "comad-litteral"], ["--preset=comad-litteral"]])
def test_a_misspelt_preset(capsys, given):
    assert "did you mean 'comad-literal'?" in failure(capsys, "distill", *given)


def test_a_misspelt_pretraining_method(capsys):
    assert "did you mean 'mocov3'?" in failure(capsys, "pretrain", "moco3")
    assert "mae|mocov3|ibot" in failure(capsys, "pretrain")


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("vit_tiny_patch16_22", "vit_tiny_patch16_224"),
        ("mae=nowhere.pth", "nowhere.pth"),
        ("a/b.pth", "a/b.pth"),
    ],
)
def test_a_misspelt_teacher(capsys, labelled_folder, teacher, words):
    message = failure(capsys, "distill", "--data", labelled_folder, "--teachers", teacher, "--optim.batch-size", 8)
    assert words in message
    assert not os.listdir(".")


def test_own_data_without_teachers_asks_for_them(capsys, labelled_folder):
    assert "--teachers" in failure(capsys, "distill", "--data", labelled_folder, "--optim.batch-size", 8)


@pytest.mark.parametrize("verb", [["distill", "--teachers", RANDOM], ["pretrain", "mae"], ["evaluate", RANDOM]])
def test_wrong_data(capsys, tmp_path, verb):
    assert "pass --data FOLDER" in failure(capsys, *verb, "--data", tmp_path / "nowhere")
    assert ".jpg, .jpeg, .png, .webp" in failure(capsys, *verb, "--data", tmp_path)
    assert not os.listdir(".")


@pytest.mark.parametrize("verb", [["distill", "--teachers", RANDOM], ["pretrain", "mae"]])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_too_few_images_for_the_batch(capsys, labelled_folder, verb, accumulate):
    options = ["--data", labelled_folder, "--optim.batch-size", 64, "--optim.accumulate", accumulate]
    message = failure(capsys, *verb, *options)
    assert f"too few for a batch of {64 * accumulate}" in message and "set --optim.batch-size" in message
    assert not os.listdir(".")


def test_the_cache_needs_fixed_views(capsys, labelled_folder):
    options = ["--teachers", RANDOM, "--optim.batch-size", 8, "--cache-teachers"]
    assert "--loader.fixed-views" in failure(capsys, "distill", "--data", labelled_folder, *options)
    assert not os.listdir(".")


def test_no_moving_average_of_a_moving_average(capsys, labelled_folder):
    options = ["--data", labelled_folder, "--optim.batch-size", 8, "--optim.ema", 0.9]
    assert "--optim.ema" in failure(capsys, "pretrain", "ibot", *options)


def test_evaluation_needs_labels(capsys, tmp_path, write_images):
    write_images(tmp_path, [f"{i}.png" for i in range(5)])
    message = failure(capsys, "evaluate", RANDOM, "--data", tmp_path, "--image-size", 16)
    assert "one sub-folder per label" in message


def test_a_recipe_with_a_mistake(capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("optim: {epoch: 3}")
    assert "did you mean 'epochs'?" in failure(capsys, "distill", "--recipe", tmp_path / "r.yaml")
    assert "no recipe" in failure(capsys, "pretrain", "mae", "--recipe", tmp_path / "none.yaml")


def test_an_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main(["distill", "--optim.epoch", "3"])
    assert end.value.code == 2
    assert "--optim.epochs" in capsys.readouterr().err


def test_options_of_the_first_version_still_work(capsys, labelled_folder):
    """They are told, once each, before anything else."""
    old = ["--method.masking.policy=shared", "--method.masking.student", "0.5", "--cache-teachers"]
    data = ["--data", str(labelled_folder), "--teachers", RANDOM, "--optim.batch-size=8"]
    assert main(["distill", *old, *data]) == 1
    first, second, error = capsys.readouterr().err.splitlines()
    assert first == "comad: --method.masking.policy is called --masking now."
    assert second == "comad: --method.masking.student is called --masking.mask-ratio now."
    assert "--loader.fixed-views" in error


def test_evaluate_scores_a_backbone(capsys, labelled_folder, teacher_specs, tmp_path):
    path = teacher_specs[0].split("=")[1]
    assert main(["evaluate", path, "--data", str(labelled_folder), "--image-size", "16", "--out", "s.json"]) == 0
    assert "kNN %" in capsys.readouterr().out and os.path.exists("s.json")


@pytest.mark.parametrize("method", ["mae", "mocov3", "ibot"])
def test_pretraining_leaves_a_teacher_and_goes_on_after_a_stop(labelled_folder, method):
    network = ["--vit.image-size=16", "--vit.patch-size=4", "--vit.width=16", "--vit.depth=1", "--vit.heads=2"]
    length = ["--optim.epochs=2", "--optim.batch-size=8", "--optim.warmup-epochs=1", "--loader.workers=0"]
    run = ["--run.precision=fp32", "--run.no-tensorboard", "--run.checkpoint-every=5", "--run.probe-every=0"]
    command = ["pretrain", method, f"--data={labelled_folder}", *network, *length, *run]
    assert main([*command, "--run.out=whole"]) == 0
    teacher = load_teacher("whole/teacher", 16)
    assert teacher.backbone.token_types == (("patch",) if method == "mae" else ("cls", "patch"))
    card = json.loads(Path("whole/teacher/config.json").read_text())["comad"]
    assert card["preset"] == method and [point["step"] for point in card["curve"]] == [14]
    roles = [row["role"] for row in json.loads(Path("whole/scoreboard.json").read_text())["rows"]]
    assert roles == ["pixels", "untrained", "teacher"]

    assert main([*command, "--run.out=part", "--run.checkpoint-every=5"]) == 0
    os.remove("part/checkpoints/step-00000014.pt")
    assert main([*command, "--run.out=part", "--run.resume"]) == 0
    part, whole = (Path(out, "teacher", "model.safetensors").read_bytes() for out in ("part", "whole"))
    assert part == whole


def test_a_moving_average_is_what_pretraining_exports(labelled_folder, monkeypatch):
    from comad.pretraining import run as run_module

    exported = []
    monkeypatch.setattr(
        run_module, "export_teacher", lambda config, splits, backbone, out, *rest: exported.append(backbone) or out
    )
    network = ["--vit.image-size=16", "--vit.patch-size=4", "--vit.width=16", "--vit.depth=1", "--vit.heads=2"]
    length = ["--optim.epochs=1", "--optim.batch-size=16", "--loader.workers=0", "--run.no-tensorboard"]
    states, real = [], run_module.train_steps
    monkeypatch.setattr(run_module, "train_steps", lambda trainer: states.extend(trainer.states) or real(trainer))
    main(["pretrain", "mae", f"--data={labelled_folder}", *network, *length, "--optim.ema=0.9", "--run.out=r"])
    (state,) = states
    assert [getattr(m, "trained", m) for m in exported] == [state.average.module.trained] != [state.job.module.trained]


def test_kinds_of_evaluation_and_data_are_told(capsys):
    from comad.cli import EVALUATIONS

    for kind in EVALUATIONS:
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", kind, "--help"])
        assert ended.value.code == 0 and "--optim.epochs" in capsys.readouterr().out
    assert main(["data", "--help"]) == 0 and "comad data scenes" in capsys.readouterr().out
    assert "comad data scenes --out FOLDER" in failure(capsys, "data", "scnes")
    assert "comad data scenes --out FOLDER" in failure(capsys, "data")
