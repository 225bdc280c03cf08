"""The end of a run: scores of everyone on one board, and the student as a folder to take away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from lightning_fabric import Fabric
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from comad.data.images import Splits
from comad.distillation.config import DistillConfig
from comad.distillation.distiller import Distiller
from comad.distillation.samples import leave_samples
from comad.evaluation.scoreboard import Candidate, Score, Scoreboard, score_all
from comad.evaluation.scores import write_scores
from comad.exporting.package import ModelCard, export_backbone, module_of, programs_of
from comad.models.backbone import Backbone
from comad.models.files import read_json
from comad.models.teachers import Teacher, inherited_licence
from comad.reporting.folder import read_run
from comad.reporting.page import write_report
from comad.reporting.samples import SAMPLES, read_samples
from comad.reporting.visuals import gate_images
from comad.runtime.log import hours_of_training, open_trackers, read_log
from comad.runtime.processes import together
from comad.runtime.progress import Working, warn
from comad.runtime.provenance import code_version, hardware
from comad.runtime.run import RunConfig


@dataclass(frozen=True)
class DistillResult:
    """What a run leaves behind.

    Attributes:
        folder: of the run.
        scores: every row of the scoreboard, with the result on each test image.
        scoreboard: the student beside its teachers, itself untrained, and pixels.
        module: the student, where it is not timm's.
        others: the results of the further students, if there are any.
    """

    folder: Path
    scores: tuple[Score, ...]
    scoreboard: Scoreboard
    module: nn.Module | None = None
    others: tuple[DistillResult, ...] = ()

    @property
    def student_folder(self) -> Path:
        """The exported student, which is loaded without comad: by timm and transformers, or as its README says."""
        return self.folder / "student"

    @cached_property
    def student(self) -> nn.Module:
        """In eval mode, as timm's model: normalised images (B, 3, H, W) → features (B, D). Else it is ``module``."""
        if self.module is not None:
            return self.module.eval()
        return timm.create_model(f"local-dir:{self.student_folder}", pretrained=True).eval()

    @cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """From a PIL image to what ``student`` takes."""
        facts = read_json(self.student_folder / "config.json", "distil again")["pretrained_cfg"]
        return cast(Any, create_transform(**resolve_data_config(pretrained_cfg=facts)))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log: one dictionary for each logged step, probe or warning."""
        return read_log(self.folder)[0]


class TrainedStudent(NamedTuple):
    """A student at the end of training: the config that it would have alone, itself before, and what was trained."""

    config: DistillConfig
    untrained: Backbone
    distiller: Distiller


def finish(
    students: Sequence[TrainedStudent], splits: Splits, teachers: Sequence[Teacher], fabric: Fabric
) -> DistillResult | None:
    """Score everything on the wanted part, write scoreboard, export and report of each student, and say how to use it.

    Pixels and teachers are scored once and stand on the board of every student.
    """
    config, scores, others = students[0].config, (), ()
    scored = splits if config.split == "none" else splits._replace(test=getattr(splits, config.split))
    for trained in students:
        trained.distiller.to(fabric.device)
    if config.split != "none":
        for trained in students if fabric.is_global_zero else ():  # before anything that may fail
            _export(trained, scored, teachers, Scoreboard(()), fabric)
        rows = [candidates(trained) for trained in students]
        shared = [Candidate("pixels", "pixels", None, config.student.image_size)]
        shared += [Candidate(t.name, "teacher", t.backbone, t.backbone.image_size) for t in teachers]
        with together():
            scores = score_all([*shared, *(row for own in rows for row in own)], scored, config.run.autocast)
        others, scores = scores[: len(shared)], scores[len(shared) :]
    if not fabric.is_global_zero:
        return None
    results, each = [], len(scores) // len(students)
    for number, trained in enumerate(students):
        own = (*others, *_with_untrained(trained.config, scores[number * each : (number + 1) * each]))
        results.append(_leave(trained, scored, teachers, own, fabric))
    return replace(results[0], others=tuple(results[1:]))


def _leave(
    trained: TrainedStudent, splits: Splits, teachers: Sequence[Teacher], scores: tuple[Score, ...], fabric: Fabric
) -> DistillResult:
    """Write what one student leaves behind."""
    config, out = trained.config, Path(trained.config.run.out)
    board = Scoreboard(tuple(part.row for part in scores))
    for text in (below := board.below_untrained()):
        warn(f"{text}; the run taught it nothing that this score needs.")
    board = replace(board, warnings=(*read_run(out).warnings, *below))
    board.write(out / "scoreboard.json")
    write_scores(out / "scores.json", scores, {"split": config.split})
    if scores:
        fabric.print(board.table())
    folder, title, program = _export(trained, splits, teachers, board, fabric)
    with Working("images for the page"):
        leave_samples(trained.distiller, teachers, splits, scores, out)
        _track(config.run, board)
    fabric.print(f"the run on a page, with curves, gate and features: {write_report([out])}")
    fabric.print(f"the student is in {folder}; load it anywhere {title.lower()} alone:\n\n{program}")
    return DistillResult(out, scores, board, module_of(trained.distiller.student))


def _export(
    trained: TrainedStudent, splits: Splits, teachers: Sequence[Teacher], board: Scoreboard, fabric: Fabric
) -> tuple[Path, str, str]:
    """Export the student with what is known of it; gives the folder, and a program with its title.

    Whoever loads it reads no token that nothing trained.
    """
    student, config = copy.copy(trained.distiller.student), trained.config
    student.token_types = trained.distiller.token_types
    card = _card(trained, splits, teachers, board, fabric)
    place = Path(config.run.out) / "student"
    folder = export_backbone(student, place, model_args=config.student.arguments, card=card)
    return folder, *programs_of(student, folder, card)[0]


def _track(run: RunConfig, board: Scoreboard) -> None:
    """Hand the scoreboard and the gate's maps to TensorBoard and Weights & Biases, if the run has them."""
    out = Path(run.out)
    lines, samples = read_log(out)[0], read_samples(out / SAMPLES)
    step = lines[-1]["step"] if lines else 0
    for tracker in open_trackers(out, run.tensorboard, run.wandb):
        titles, *rows = board.cells()
        tracker.table(step, "scoreboard", titles, rows)
        for name, image in gate_images(samples).items():
            tracker.image(step, f"gate/{name}", image)
        tracker.close()


def candidates(trained: TrainedStudent) -> list[Candidate]:
    """Rows to be scored: the student without any training where it began with some, at its start, and trained."""
    config, size = trained.config, trained.config.student.image_size
    rows = [
        Candidate("init-only", "init_only", trained.untrained, size),
        Candidate("student", "student", trained.distiller.student, size),
    ]
    if config.student != config.student.from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            random = config.student.from_scratch.build()
        rows.insert(0, Candidate("untrained", "untrained", random, size))
    return rows


def _with_untrained(config: DistillConfig, scores: Sequence[Score]) -> tuple[Score, ...]:
    """A student from scratch is untrained at its start, and is scored once."""
    if config.student != config.student.from_scratch or not scores:
        return tuple(scores)
    first = scores[0]
    return first._replace(row=replace(first.row, name="untrained", role="untrained")), *scores


def _start(config: DistillConfig) -> str:
    """What the student began with, in words; nothing of one from scratch."""
    pretrained = f", starting from timm's weights of {config.student.name}" if config.student.pretrained else ""
    return f", starting from {Path(config.student.start).name}" if config.student.start else pretrained


def _card(
    trained: TrainedStudent, splits: Splits, teachers: Sequence[Teacher], board: Scoreboard, fabric: Fabric
) -> ModelCard:
    config, found = trained.config, read_run(Path(trained.config.run.out))
    data_found = found.facts.get("data")
    names = ", ".join(teacher.name for teacher in teachers)
    return ModelCard(
        name=f"{config.preset} student of {names}",
        licence=inherited_licence([*(teacher.card.licence for teacher in teachers), *config.student.start_licences]),
        about=f"Distilled from the frozen teachers {names} by comad{_start(config)}.",
        architecture=config.student.label if "=" in config.student.name else config.student.name,
        token_types=trained.distiller.token_types,
        preset=config.preset,
        seed=config.run.seed,
        images_seen=config.optim.images_seen(len(splits.train)),
        code=code_version(),
        hardware=hardware(fabric.device, config.run.threads),
        hours=round(hours_of_training(Path(config.run.out), config.optim.images_per_step), 2),
        data=config.data if config.data == "stamps" else Path(config.data).name,
        data_licence=splits.licence,
        eval_crop=splits.train.eval_crop,
        data_found={str(k): str(v) for k, v in data_found.items()} if isinstance(data_found, dict) else {},
        warnings=board.warnings or found.warnings,
        teachers=tuple(teacher.card for teacher in teachers),
        scores=tuple(board.as_dict()["rows"]) if config.split == "test" else (),
    )
