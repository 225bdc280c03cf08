"""The command line. Add a verb: a function, an entry in `VERBS`. Heavy imports wait until a verb is known."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from comad.defaults import beside, detection, distillation, peek, presets_help, read, segmentation, take, take_all
from comad.runtime.spelling import hint

USAGE = "usage: comad VERB [OPTIONS]; `comad VERB --help` lists a verb's options."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, 1 for an error told in one line, 130 after an interruption."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return 0
    if arguments[0] == "--version":
        from comad import __version__

        _print(__version__)
        return 0
    verb, *rest = arguments
    return _run(verb, rest) if verb in VERBS else _fail(f"no verb {verb!r}; {hint(verb, VERBS)}")


def _run(verb: str, arguments: list[str]) -> int:
    """Run a verb, and tell what went wrong in one line."""
    from comad.runtime.train import Interrupted, TrainingError

    try:
        VERBS[verb][1](arguments)
    except (ValueError, TrainingError) as error:
        return _fail(str(error))
    except OSError as error:
        if not error.strerror:
            raise
        return _fail(
            f"{error.filename or 'a file'}: {error.strerror}; make room or rights for it, or name another place."
        )
    except Interrupted:
        sys.stderr.write(f"Go on: the same command{'' if verb == 'compare' else ' with --run.resume'}.\n")
        return 130
    except KeyboardInterrupt:
        return 130
    return 0


def distill_command(arguments: list[str]) -> None:
    """Distil teachers into a student: with no arguments the demo on bundled images and teachers."""
    from comad.distill.config import DistillConfig
    from comad.distill.run import distill

    students = take_all(arguments, "--student")
    default, text = distillation(arguments, students), f"{distill_command.__doc__} {presets_help()}"
    distill(beside(_parse(DistillConfig, default, arguments, "comad distill", text), students))


def pretrain_command(arguments: list[str]) -> None:
    """Train a teacher from scratch: comad pretrain mae|mocov3|ibot. --recipe FILE.yaml runs a recorded one again."""
    from comad.pretrain.config import METHODS, PretrainConfig, recipe
    from comad.pretrain.run import pretrain

    method = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    if method is None and not {"-h", "--help"} & set(arguments):
        raise ValueError(f"name what to train: comad pretrain {'|'.join(METHODS)}.")
    recipe_file = take(arguments, "--recipe")
    default = read(PretrainConfig, recipe_file) if recipe_file else recipe(method or "mae")
    folder = pretrain(_parse(PretrainConfig, default, arguments, "comad pretrain", pretrain_command.__doc__))
    if folder is not None:
        _print(f"the teacher is in {folder}; use it: comad distill --teachers NAME={folder}")


def evaluate_command(arguments: list[str]) -> None:
    """Score a backbone by kNN and a linear probe: comad evaluate BACKBONE --data FOLDER.

    With `finetune` (all of it, with labels), `segment` or `detect` (a head on it) as the first word it trains the
    backbone; see comad evaluate finetune --help.
    """
    if arguments and arguments[0] in EVALUATIONS:
        return EVALUATIONS[arguments[0]](arguments[1:])
    from comad.evaluate.command import EvaluateConfig
    from comad.evaluate.command import evaluate_command as score

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--backbone", *arguments]
    _print(score(_parse(EvaluateConfig, None, arguments, "comad evaluate", evaluate_command.__doc__)))


def finetune_command(arguments: list[str]) -> None:
    """Fine-tune a backbone with labels: comad evaluate finetune BACKBONE --data FOLDER."""
    from comad.evaluate.finetune import finetune
    from comad.evaluate.tuning import RECIPES, FinetuneConfig, recipe

    preset, data = take(arguments, "--preset") or "", peek(arguments, "--data") or "stamps"
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--backbone", *arguments]
    tuning = recipe(preset, data)
    extra = f"--preset {{{','.join(RECIPES)}}} chooses the values that the options change."
    about = f"{finetune_command.__doc__} {extra}"
    _print(
        finetune(
            _parse(
                FinetuneConfig, FinetuneConfig(backbone="", tuning=tuning), arguments, "comad evaluate finetune", about
            )
        )
    )


def segment_command(arguments: list[str]) -> None:
    """Train UPerNet or a linear head on a backbone: comad evaluate segment BACKBONE --data FOLDER [--preset scenes]."""
    from comad.evaluate.segmentation.config import RECIPES, SegmentConfig
    from comad.evaluate.segmentation.run import segment
    from comad.report.dense import draw_segmentation

    about, default = f"{segment_command.__doc__} {_dense_help(RECIPES)}", segmentation(arguments)
    config = _dense(SegmentConfig, default, arguments, about, "comad evaluate")
    _finish_dense(config, segment(config), draw_segmentation)


def detect_command(arguments: list[str]) -> None:
    """Train Cascade Mask R-CNN on a backbone: comad evaluate detect BACKBONE --data FOLDER [--preset scenes]."""
    from comad.evaluate.detection.config import RECIPES, DetectConfig
    from comad.evaluate.detection.run import detect
    from comad.report.dense import draw_detection

    about, default = f"{detect_command.__doc__} {_dense_help(RECIPES)}", detection(arguments)
    config = _dense(DetectConfig, default, arguments, about, "comad evaluate")
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
    from comad.compare.config import CompareConfig
    from comad.compare.run import compare
    from comad.distill.config import DistillConfig
    from comad.evaluate import tuning

    recipe_file, data = take(arguments, "--recipe"), peek(arguments, "--data") or "stamps"
    recipe = read(DistillConfig, recipe_file) if recipe_file else presets.recipe("comad", demo=data == "stamps")
    recipe = replace(recipe, method=presets.COMAD, run=replace(recipe.run, out="runs/compare"))
    default = CompareConfig(recipe=recipe, tuning=tuning.recipe("", data))
    _print(compare(_parse(CompareConfig, default, arguments, "comad compare", compare_command.__doc__)))


def plan_command(arguments: list[str]) -> None:
    """Say what a run will cost, before it: comad plan [OPTIONS of comad distill], comad plan segment|detect BACKBONE.

    It measures a few real steps and leaves nothing behind. The other machine is --gpus of --gpu-tflops at --mfu.
    """
    task = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "distill"
    defaults = {"distill": distillation, "segment": segmentation, "detect": detection}
    if task not in defaults:
        raise ValueError(f"no plan of {task!r}; say what to plan: comad plan {'|'.join(defaults)}.")
    from comad.plan.command import TASKS, plan

    kind, text = TASKS[task].kind, f"{plan_command.__doc__} {presets_help()}"
    if task == "distill":
        students = take_all(arguments, "--student")
        config = _parse(kind, kind(recipe=distillation(arguments, students)), arguments, "comad plan", text)
        config = replace(config, recipe=beside(config.recipe, students))
    else:
        config = _dense(kind, kind(recipe=defaults[task](arguments)), arguments, plan_command.__doc__, "comad plan")
    _print(plan(task, config))


def data_command(arguments: list[str]) -> None:
    """Make data: comad data scenes --out FOLDER composes pictures of the bundled cut-outs, for segment and detect."""
    from comad.data.scene_files import ScenesConfig, write_scenes

    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        return _print(str(data_command.__doc__))
    if name != "scenes":
        raise ValueError(f"no data {name!r}; say what to make: comad data scenes --out FOLDER.")
    _print(write_scenes(_parse(ScenesConfig, None, rest, "comad data scenes", ScenesConfig.__doc__)))


def teachers_command(arguments: list[str]) -> None:
    """Look at teachers before a run: comad teachers list [WORD] | inspect TEACHER | compare TEACHER TEACHER ..."""
    if {"-h", "--help"} & set(arguments[:1]):
        _print(f"{teachers_command.__doc__}\n\n`comad teachers inspect --help` lists the options of inspect.")
        return
    from comad.evaluate.teachers import COMMANDS

    name, *rest = arguments or [""]
    if name not in COMMANDS:
        if name:
            raise ValueError(f"no sub-command {name!r}; {hint(name, COMMANDS)}")
        raise ValueError(f"say what to do: comad teachers {'|'.join(COMMANDS)}.")
    kind, command = COMMANDS[name]
    about = (command.__doc__ or "").partition("Raises:")[0].strip()
    _print(command(_parse(kind, None, rest, f"comad teachers {name}", about)))


VERBS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "distill": ("distil teachers into a student; without arguments: the demo", distill_command),
    "pretrain": ("train a teacher from scratch: mae, mocov3 or ibot", pretrain_command),
    "evaluate": ("score any backbone: kNN and linear probe, or finetune, segment, detect", evaluate_command),
    "plan": ("what a run will cost, before it: time, memory, disk, FLOPs, here and on GPUs", plan_command),
    "data": ("make pictures with many objects: scenes", data_command),
    "teachers": ("list, inspect and compare teachers before a run", teachers_command),
    "compare": ("methods, teacher sets and seeds side by side, with intervals", compare_command),
}


def _parse(kind: type, default: Any, arguments: list[str], program: str, description: str | None) -> Any:
    import tyro

    given = {} if default is None else {"default": default}
    return tyro.cli(tyro.conf.AvoidSubcommands[kind], args=arguments, prog=program, description=description, **given)


def _dense(kind: type, default: Any, arguments: list[str], description: str | None, program: str) -> Any:
    """The config of a dense evaluation, or of its plan; the backbone may stand first, without its flag."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--backbone", *arguments]
    config = _parse(kind, default, arguments, program, description)
    recipe = getattr(config, "recipe", config)
    if not (recipe.backbone and recipe.data):
        raise ValueError(f"name a backbone and a folder: {program} segment|detect BACKBONE --data FOLDER.")
    return config


def _dense_help(recipes: Iterable[str]) -> str:
    return f"--preset {{{','.join(recipes)}}} and --recipe FILE.yaml choose the values that the options change."


def _finish_dense(config: Any, text: str, draw: Callable[[Path], list[Path]]) -> None:
    """Print the scores and draw the figures; only the first of several processes has any."""
    if text:
        _print(text)
    if text and config.figures:
        _print("figures: " + ", ".join(map(str, draw(Path(config.run.out)))))


def _print_help() -> None:
    lines = [f"  {verb:10} {text}" for verb, (text, _) in VERBS.items()]
    _print(
        "\n".join(
            ["Distil several frozen self-supervised vision teachers into one compact student.", "", USAGE, "", *lines]
        )
    )


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _fail(message: str) -> int:
    sys.stderr.write(f"comad: {' '.join(message.split())}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
