"""The command line. Add a verb: a function, an entry in `VERBS`. Heavy imports wait until a verb is known."""

from __future__ import annotations

import errno
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from comad.runtime.command import get_flag, parse, pop_all, pop_flag
from comad.runtime.spelling import hint

USAGE = "usage: comad VERB [OPTIONS]; `comad VERB --help` lists a verb's options."
EXAMPLES = """\
examples:
  comad distill                                             the demo: minutes, nothing to download
  comad distill --data FOLDER --teachers dino=dino.pth vit_small_patch14_dinov2.lvd142m --run.out runs/mine
  comad plan --data FOLDER --teachers dino=dino.pth         what that would cost
  comad report runs/mine                                    the page about it
  comad export runs/mine --to onnx                          the student for another program"""
HELP = {"-h", "--help", "--help-all"}
OUTPUT = """\
--quiet shows warnings, errors and results alone; NO_COLOR=1 takes the colours away. Progress goes to the error stream:
bars on a terminal, plain lines in a file. `comad completion bash|zsh|fish` prints what the tab key needs."""

STATUS = {
    0: "done",
    1: "refused or failed, for the reason in one line",
    2: "a wrong option",
    3: "training failed",
    70: "unexpected, with the traceback in a file",
    130: "stopped by a signal",
    141: "the output's reader is gone",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status, one of `STATUS`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        return _print_help()
    silent = "--quiet" in arguments
    verb, *rest = [argument for argument in arguments if argument != "--quiet"] or ["--help"]
    if verb == "--help":
        return _print_help()
    if verb == "--version":
        from comad import __version__

        return _print(__version__)
    if verb not in VERBS:
        return _fail(f"no verb {verb!r}; {hint(verb, VERBS)}")
    from comad.runtime.progress import quiet

    with quiet(silent):
        return _run(verb, rest)


def _run(verb: str, arguments: list[str]) -> int:
    """Run a verb, and tell what went wrong in one line."""
    if verb == "teachers" and arguments[:1] in (["inspect"], ["compare"]) and not HELP & set(arguments):
        from comad.runtime.progress import say

        say("loading PyTorch and timm")  # seconds, in which nothing else can be said
    from comad.runtime.run import INTERRUPTS, Interrupted, interrupt

    given = list(arguments)
    INTERRUPTS.clear()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        VERBS[verb][1](arguments)
    except Interrupted:
        sys.stderr.write(f"Go on: the same command{'' if verb == 'compare' else ' with --run.resume'}.\n")
        return 130
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or INTERRUPTS:
            return _fail("ended at once; a run goes on from its last checkpoint with --run.resume.", 130)
        return _tell(error, get_flag(given, "--run.out"))
    return 0


def _tell(error: Exception, out: str | None) -> int:
    """Say in one line what went wrong. Returns the exit status."""
    from comad.runtime.run import TrainingError

    if isinstance(error, TrainingError):
        return _fail(str(error), 3)
    if isinstance(error, ValueError):
        return _fail(str(error))
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to be printed goes nowhere
        return _fail("whoever read the output is gone; send it to a file, or go on with --run.resume.", 141)
    if isinstance(error, OSError) and error.strerror:
        return _fail(f"{error.filename or 'a file'}: {error.strerror}; {_remedy(error)}.")
    from comad.runtime.processes import lost_process
    from comad.runtime.trainer import reader_fault

    if words := lost_process(error) or _out_of_memory(error) or reader_fault(error):
        return _fail(words, 3)
    return _unexpected(error, out)


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room or name another place; a run goes on from its last checkpoint with --run.resume"
    return "make room or rights for it, or name another place"


def _out_of_memory(error: Exception) -> str:
    """One line, if that is what an error says; else nothing."""
    text = str(error)
    if not (isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text):
        return ""
    return "out of memory; pass --optim.microbatch, for the same batch in smaller parts, or pass --teachers-in offload."


def _unexpected(error: Exception, out: str | None) -> int:
    """Keep the traceback in a file, and say where: this is a fault of the program, not of its user."""
    folder = Path(out) if out and Path(out).is_dir() else Path()
    path = folder / f"comad-error-{os.getpid()}.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
    except OSError:
        path = Path(os.devnull)
    words = f"{type(error).__name__}: {str(error)[:300]}"
    return _fail(f"unexpected, a fault of comad or of a plugin: {words}; please report it with {path}.", 70)


def distill_command(arguments: list[str]) -> None:
    """Distil teachers into a student; with no arguments the demo on bundled images and teachers.

    $ comad distill --data FOLDER --teachers dino=dino.pth vit_small_patch14_dinov2.lvd142m --run.out runs/mine
    $ comad distill --data FOLDER --teachers dino=dino.pth --student vit_small_patch16_224 --preset unic
    $ comad distill --run.resume --run.out runs/mine
    """
    from comad.distillation.run import distill
    from comad.recipes import parse_distillation

    config = parse_distillation(arguments, "comad distill", _about(distill_command))
    if config.budget:
        from comad.planning.budget import within_budget

        config = within_budget(config)
    distill(config)


def pretrain_command(arguments: list[str]) -> None:
    """Train a teacher from scratch: comad pretrain mae|mocov3|ibot. --recipe FILE.yaml runs a recorded one again."""
    from comad.pretraining.config import METHODS, PretrainConfig, recipe
    from comad.pretraining.run import pretrain

    method, named = _first_word(arguments), get_flag(arguments, "--recipe")
    default = _recorded(PretrainConfig, arguments, recipe("mae").run.out)
    default = default if named or (default and method in (None, default.method.kind)) else None
    if not (method or default or HELP & set(arguments)):
        raise ValueError(f"name what to train: comad pretrain {'|'.join(METHODS)}.")
    default = default or recipe(method or "mae")
    folder = pretrain(parse(PretrainConfig, default, arguments, "comad pretrain", _about(pretrain_command)))
    if folder is not None:
        _print(f"the teacher is in {folder}; use it: comad distill --teachers NAME={folder}")


def evaluate_command(arguments: list[str]) -> None:
    """Score a backbone by kNN and a linear probe: comad evaluate BACKBONE --data FOLDER.

    With `finetune` (all of it, with labels), `segment` or `detect` (a head on it) as the first word it trains the
    backbone; see comad evaluate finetune --help.
    """
    if arguments and arguments[0] in EVALUATIONS:
        return EVALUATIONS[arguments[0]](arguments[1:])
    from comad.evaluation.command import EvaluateConfig
    from comad.evaluation.command import evaluate_command as score

    _load_plugins(arguments)
    config = parse(EvaluateConfig, None, _backbone_first(arguments), "comad evaluate", _about(evaluate_command))
    _say(score(config))


def finetune_command(arguments: list[str]) -> None:
    """Fine-tune a backbone with labels: comad evaluate finetune BACKBONE --data FOLDER [--export timm onnx]."""
    from comad.evaluation.tuning import RECIPES, FinetuneConfig, recipe
    from comad.exporting.finetuned import finetune

    tuning = recipe(pop_flag(arguments, "--preset") or "", get_flag(arguments, "--data") or "stamps")
    default = FinetuneConfig(backbone="", tuning=tuning)
    default, about = _recorded(FinetuneConfig, arguments, default.run.out) or default, _about(finetune_command, RECIPES)
    _say(finetune(parse(FinetuneConfig, default, _backbone_first(arguments), "comad evaluate finetune", about)))


def segment_command(arguments: list[str]) -> None:
    """Train UPerNet or a linear head on a backbone: comad evaluate segment BACKBONE --data FOLDER [--preset scenes]."""
    from comad.evaluation.segmentation.config import RECIPES, SegmentConfig
    from comad.evaluation.segmentation.run import segment
    from comad.reporting.dense import draw_segmentation

    config = _dense(SegmentConfig, _segmentation(arguments), arguments, _about(segment_command, RECIPES))
    _finish_dense(config, segment(config), draw_segmentation)


def detect_command(arguments: list[str]) -> None:
    """Train Cascade Mask R-CNN on a backbone: comad evaluate detect BACKBONE --data FOLDER [--preset scenes]."""
    from comad.evaluation.detection.config import RECIPES, DetectConfig
    from comad.evaluation.detection.run import detect
    from comad.reporting.dense import draw_detection

    config = _dense(DetectConfig, _detection(arguments), arguments, _about(detect_command, RECIPES))
    _finish_dense(config, detect(config), draw_detection)


EVALUATIONS: dict[str, Callable[[list[str]], None]] = {
    "finetune": finetune_command,
    "segment": segment_command,
    "detect": detect_command,
}
"""What `comad evaluate` does if its first word is one of these; else the word is a backbone."""


def compare_command(arguments: list[str]) -> None:
    """Compare methods, teacher sets and seeds on one data set: comad compare --presets comad mean --seeds 0 1 2.

    Takes the options of `comad distill`, for all rows; --recipe FILE.yaml chooses the values that they change. The same
    command again goes on where it was stopped.
    """
    from comad import presets
    from comad.comparison.config import CompareConfig
    from comad.comparison.run import RECORD, compare
    from comad.evaluation import tuning
    from comad.recipes import take_defaults
    from comad.runtime.recipe import read_recipe, resumed_recipe

    default = resumed_recipe(lambda path: read_recipe(CompareConfig, path), arguments, "runs/compare", RECORD)
    rest, students, recipe = take_defaults(arguments, default and default.recipe)
    if len(students) > 1:
        raise ValueError("a row has one student; name one --student.")
    if default is None:
        recipe = replace(recipe, method=presets.COMAD, run=replace(recipe.run, out="runs/compare"))
        default = CompareConfig(tuning=tuning.recipe("", get_flag(arguments, "--data") or "stamps"))
    default = replace(default, recipe=recipe)
    _print(compare(parse(CompareConfig, default, rest, "comad compare", _about(compare_command))))


def plan_command(arguments: list[str]) -> None:
    """Say what a run will cost, before it: comad plan [OPTIONS of comad distill], comad plan segment|detect BACKBONE.

    It measures a few real steps and leaves nothing behind. The other machine is --gpus of --gpu-tflops at --mfu.
    """
    task = _first_word(arguments) or "distill"
    tasks = {"distill": None, "segment": _segmentation, "detect": _detection}
    if task not in tasks:
        raise ValueError(f"no plan of {task!r}; say what to plan: comad plan {'|'.join(tasks)}.")
    from comad.planning.command import TASKS, plan
    from comad.recipes import choices_help, take_defaults, with_students

    kind, about, default = TASKS[task].kind, _about(plan_command), tasks[task]
    if default is None:
        rest, students, recipe = take_defaults(arguments, fit=True)
        config = parse(kind, kind(recipe=recipe), rest, "comad plan", f"{about} {choices_help()}")
        config = replace(config, recipe=with_students(config.recipe, students))
    else:
        config = _dense(kind, kind(recipe=default(arguments)), arguments, about, "comad plan")
    _print(plan(task, config))


def export_command(arguments: list[str]) -> None:
    """Write a student for other programs: comad export RUN|BACKBONE --to timm onnx int8 openvino ...

    Each file is opened by its own runtime and compared with the student on real images.
    """
    from comad.exporting.command import export
    from comad.exporting.config import ExportConfig

    _print(export(parse(ExportConfig, None, _backbone_first(arguments), "comad export", _about(export_command))))


def embed_command(arguments: list[str]) -> None:
    """Write features of a folder of images: comad embed BACKBONE --data FOLDER --out features.parquet."""
    from comad.evaluation.embed import EmbedConfig, embed

    _print(embed(parse(EmbedConfig, None, _backbone_first(arguments), "comad embed", _about(embed_command))))


def doctor_command(arguments: list[str]) -> None:
    """Say what this machine has, and what to install for speed: comad doctor."""
    if HELP & set(arguments):
        _print(_about(doctor_command))
        return
    if arguments:
        raise ValueError(f"comad doctor takes no options; leave out {' '.join(arguments)}.")
    from comad.runtime.doctor import examine

    _print(examine())


def completion_command(arguments: list[str]) -> None:
    """Print what the tab key needs: comad completion bash|zsh|fish.

    $ comad completion bash > ~/.local/share/bash-completion/completions/comad
    $ comad completion zsh >> ~/.zshrc
    $ comad completion fish > ~/.config/fish/completions/comad.fish
    """
    from comad.runtime.completion import SHELLS, options_of, script

    shell = _first_word(arguments) or ""
    if shell not in SHELLS and HELP & set(arguments):
        _print(_about(completion_command))
        return
    script(shell, {})  # a wrong name is told at once
    _print(script(shell, {verb: options_of(command) for verb, (_, command) in VERBS.items()}))


def report_command(arguments: list[str]) -> None:
    """Write one HTML page about runs and comparisons: comad report RUN..."""
    from comad.reporting.page import ReportConfig, report

    _print(report(parse(ReportConfig, None, arguments, "comad report", _about(report_command))))


def data_command(arguments: list[str]) -> None:
    """Write data: comad data shard FOLDER --out DIR writes tar shards of images, for large sets and slow disks.

    comad data scenes --out FOLDER composes images of the bundled cut-outs, for segment and detect.
    """
    name, *rest = arguments or [""]
    if name in HELP:
        _print(_about(data_command))
    elif name == "shard":
        from comad.data.shard_files import ShardConfig, write_shards

        rest = ["--data", *rest] if rest and not rest[0].startswith("-") else rest
        _print(write_shards(parse(ShardConfig, None, rest, "comad data shard")))
    elif name == "scenes":
        from comad.data.scene_files import ScenesConfig, write_scenes

        _print(write_scenes(parse(ScenesConfig, None, rest, "comad data scenes")))
    else:
        raise ValueError(
            f"no data {name!r}; write comad data shard FOLDER --out FOLDER, or comad data scenes --out FOLDER."
        )


def teachers_command(arguments: list[str]) -> None:
    """Look at teachers before a run: comad teachers list [WORD] | inspect TEACHER | compare TEACHER TEACHER ..."""
    if HELP & set(arguments[:1]):
        _print(f"{_about(teachers_command)}\n\n`comad teachers inspect --help` lists the options of inspect.")
        return
    from comad.evaluation.teachers import COMMANDS

    name, *rest = arguments or [""]
    if name not in COMMANDS:
        if name:
            raise ValueError(f"no sub-command {name!r}; {hint(name, COMMANDS)}")
        raise ValueError(f"say what to do: comad teachers {'|'.join(COMMANDS)}.")
    kind, command = COMMANDS[name]
    about = (command.__doc__ or "").partition("Raises:")[0].strip()
    _print(command(parse(kind, None, rest, f"comad teachers {name}", about)))


VERBS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "distill": ("distil teachers into a student; without arguments: the demo", distill_command),
    "pretrain": ("train a teacher from scratch: mae, mocov3 or ibot", pretrain_command),
    "plan": ("what a run will cost, before it: time, memory, disk, FLOPs, here and on GPUs", plan_command),
    "teachers": ("list, inspect and compare teachers before a run", teachers_command),
    "doctor": ("what this machine has, and what to install for speed", doctor_command),
    "evaluate": ("score any backbone: kNN and linear probe, or finetune, segment, detect", evaluate_command),
    "compare": ("methods, teacher sets and seeds side by side, with intervals", compare_command),
    "report": ("one HTML page about runs and comparisons", report_command),
    "export": ("write a student for other programs: timm, transformers, ONNX, 8 bits, ...", export_command),
    "embed": ("features of a folder of images as a table", embed_command),
    "data": ("tar shards of images, or images with many objects: shard, scenes", data_command),
    "completion": ("verbs and options for the tab key of bash, zsh or fish", completion_command),
}
GROUPS = {
    "train": ("distill", "pretrain"),
    "before a run": ("plan", "teachers", "doctor"),
    "after it": ("evaluate", "compare", "report"),
    "use the student": ("export", "embed"),
    "more": ("data", "completion"),
}
"""How `comad --help` lists the verbs."""


def _first_word(arguments: list[str]) -> str | None:
    """Take the first word away, unless it is an option."""
    return arguments.pop(0) if arguments and not arguments[0].startswith("-") else None


def _backbone_first(arguments: list[str]) -> list[str]:
    """The backbone may stand first, without its flag."""
    return ["--backbone", *arguments] if arguments and not arguments[0].startswith("-") else arguments


def _load_plugins(arguments: list[str]) -> None:
    from comad.runtime.slots import load_plugins

    load_plugins(pop_all(arguments, "--plugin"))


def _recorded(kind: type, arguments: list[str], out: str) -> Any:
    """The config in the file of ``--recipe``, which is taken away, or of the run that is to go on; else None."""
    from comad.runtime.recipe import read_recipe, resumed_recipe

    if file := pop_flag(arguments, "--recipe"):
        return read_recipe(kind, Path(file))
    return resumed_recipe(lambda path: read_recipe(kind, path), arguments, out)


def _segmentation(arguments: list[str]) -> Any:
    from comad.evaluation.segmentation.config import SegmentConfig, recipe

    default = recipe(pop_flag(arguments, "--preset") or "ade20k", get_flag(arguments, "--head") or "upernet")
    return _recorded(SegmentConfig, arguments, default.run.out) or default


def _detection(arguments: list[str]) -> Any:
    from comad.evaluation.detection.config import DetectConfig, recipe

    default = recipe(pop_flag(arguments, "--preset") or "coco")
    return _recorded(DetectConfig, arguments, default.run.out) or default


def _dense(kind: type, default: Any, arguments: list[str], about: str, program: str = "comad evaluate") -> Any:
    """The config of a dense evaluation, or of its plan."""
    config = parse(kind, default, _backbone_first(arguments), program, about)
    recipe = getattr(config, "recipe", config)
    if not (recipe.backbone and recipe.data):
        raise ValueError(f"name a backbone and a folder: {program} segment|detect BACKBONE --data FOLDER.")
    return config


def _finish_dense(config: Any, text: str, draw: Callable[[Path], list[Path]]) -> None:
    """Print the scores and draw the figures; only the first of several processes has any."""
    if text:
        _print(text)
    if text and config.figures:
        _print("figures: " + ", ".join(map(str, draw(Path(config.run.out)))))


def _about(command: Callable[..., Any], recipes: Any = ()) -> str:
    """What ``--help`` says of a verb."""
    text = inspect.cleandoc(command.__doc__ or "")
    if not recipes:
        return text
    return f"{text} --preset {{{','.join(recipes)}}} and --recipe FILE.yaml choose the values that the options change."


def _print_help() -> int:
    lines = []
    for group, verbs in GROUPS.items():
        lines += [f"{group}:", *(f"  {verb:10} {VERBS[verb][0]}" for verb in verbs), ""]
    title = "Distil several frozen vision teachers into one compact student."
    ends = "Exit status: " + ", ".join(f"{status} {text}" for status, text in STATUS.items()) + "."
    return _print("\n".join([title, "", USAGE, "", *lines, EXAMPLES, "", OUTPUT, "", ends]))


def _print(text: str) -> int:
    sys.stdout.write(text + "\n")
    return 0


def _which_process() -> str:
    """Which of several processes speaks; torch is not imported for that."""
    known = sys.modules.get("comad.runtime.processes")
    return f"{who}: " if known and (who := known.who()) else ""


def _say(text: str) -> None:
    """Print, if this is the process that has something to say."""
    if text:
        _print(text)


def _fail(message: str, status: int = 1) -> int:
    with suppress(OSError):  # nobody may be left to read it
        sys.stderr.write(f"comad: {_which_process()}{' '.join(message.split())}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
