"""One row and one seed: train what is to be trained, score it, keep the result. What is done is not done again."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric

from comad.comparison.config import CompareConfig
from comad.comparison.entries import ComparisonRow, Kind
from comad.data.images import Splits
from comad.distillation.config import DistillConfig
from comad.distillation.run import distill
from comad.distillation.setup import Inputs, prepare
from comad.evaluation.evaluation import Evaluation
from comad.evaluation.finetune import Finetuned, PretrainedModel, build_classifier, finetune_backbone
from comad.evaluation.scoreboard import Role, Score, score
from comad.evaluation.scores import Scores, read_scores, write_scores
from comad.evaluation.tuning import FinetuneConfig, Tuning
from comad.evaluation.views import device, view_size
from comad.models.backbone import Backbone
from comad.models.files import read_json, sha256
from comad.models.teachers import load_on_grid, load_teacher
from comad.planning.budget import fit_epochs
from comad.runtime.atomic import write_text
from comad.runtime.log import hours_of_training
from comad.runtime.options import identity_of
from comad.runtime.progress import warn
from comad.runtime.provenance import code_version
from comad.runtime.run import RunConfig
from comad.runtime.seal import is_intact, sealed

ROLES: dict[Kind, Role] = {
    "student": "student",
    "teacher": "teacher",
    "untrained": "untrained",
    "supervised": "student",
    "pixels": "pixels",
}


class TrainedModel(NamedTuple):
    """A network to be scored, and facts about its training."""

    backbone: Backbone | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class RowRun:
    """A row for one seed.

    Attributes:
        entry, seed: which.
        config: of the comparison.
        splits: the images.
        hashes: teacher as named on the command line → hash of its weights and of how they are read.
        pictures: hash of the images and labels.
    """

    entry: ComparisonRow
    seed: int
    config: CompareConfig
    splits: Splits
    hashes: dict[str, str]
    pictures: str

    @cached_property
    def row_folder(self) -> Path:
        """Named by everything that the result depends on but the seed: what changed is a new row."""
        identity = {
            "kind": self.entry.kind,
            "config": _plain(self.entry.config, self.entry.kind),
            "teachers": [self.hashes[spec] for spec in self.entry.teachers],
            "pictures": self.pictures,
            "tuning": asdict(_tuning(self)) if self.entry.kind == "supervised" else None,
        }
        name = "untrained" if self.entry.kind == "untrained" else self.entry.preset.split()[0]
        return Path(self.config.recipe.run.out) / "runs" / f"{name}-{digest_of(identity)}"

    @property
    def folder(self) -> Path:
        """Of this seed."""
        return self.row_folder / f"seed-{self.seed}"

    @property
    def fitted(self) -> DistillConfig:
        """The row's config; with a budget as many epochs as train in that time, measured once for all seeds."""
        config, path = self.entry.config, self.row_folder / "epochs.json"
        if not config.budget:
            return config
        chosen = self._epochs(path)
        if chosen is None:
            out = replace(config.run, out=str(self.row_folder))
            optim = fit_epochs(replace(config, run=out, cache_folder=""), training_only=True)
            self.row_folder.mkdir(parents=True, exist_ok=True)
            chosen = {"epochs": optim.epochs, "warmup_epochs": optim.warmup_epochs}
            write_text(path, json.dumps(sealed(chosen)) + "\n")
        return replace(config, budget="", optim=replace(config.optim, **chosen))

    def _epochs(self, path: Path) -> dict[str, float] | None:
        """What was measured; None if nothing was, or if it is told to be damaged."""
        if not path.is_file():
            return None
        with suppress(ValueError, KeyError):
            found = read_json(path, "begin again")
            if is_intact(found):
                return {"epochs": found["epochs"], "warmup_epochs": found["warmup_epochs"]}
        warn(f"{path} is damaged; how many epochs fit the budget is measured again.")
        return None

    def run(self, name: str) -> RunConfig:
        """A run in a sub-folder of the unit, resumed if it has begun."""
        return replace(self.config.recipe.run, out=str(self.folder / name), seed=self.seed, resume="auto")


def measure(unit: RowRun) -> Scores:
    """kNN, linear probe and, if wanted, fine-tuning of one row for one seed: one score, and the facts of its training.

    Raises:
        ValueError, Interrupted, TrainingError: see `comad.distillation.run.distill`.
    """
    kind = unit.entry.kind
    constant = kind in ("teacher", "pixels")  # the same for every seed
    path = (unit.row_folder if constant else unit.folder) / f"scores-{unit.config.recipe.split}.json"
    found = read_scores(path)
    if found is None or not Evaluation.members.keys() <= set(found.facts.get("evaluations", ())):
        made = MAKERS[kind](unit)
        facts = made.facts | {"evaluations": list(Evaluation.members)}
        found = Scores((_score(unit, made.backbone),), facts)
        write_scores(path, *found)
    (frozen,), facts = found
    if kind == "pixels" or not (unit.config.finetune or kind == "supervised"):
        return Scores((frozen,), facts)
    return Scores((frozen.joined((_learnt(unit) or _learn(unit).score).found),), facts)


def check(unit: RowRun, fabric: Fabric) -> None:
    """Load all that a row needs and build all that it trains, so that nothing is found missing hours later.

    Raises:
        ValueError: see `comad.distillation.setup.prepare` and `comad.evaluation.finetune.build_classifier`.
    """
    kind = unit.entry.kind
    if kind == "pixels":
        return
    if kind == "student":
        setup = prepare(replace(unit.entry.config, budget=""), fabric, Inputs(splits=unit.splits))
        distiller = setup.students[0].distiller
        backbone: Any = copy.copy(distiller.student)
        backbone.token_types = distiller.token_types
    else:
        backbone = (_teacher if kind == "teacher" else _untrained)(unit).backbone
    if unit.config.finetune or kind == "supervised":
        build_classifier(backbone, unit.splits, _tuning(unit))


def _score(unit: RowRun, backbone: Backbone | None) -> Score:
    """KNN and linear probe on the split that is asked for."""
    recipe, splits = unit.config.recipe, unit.splits
    scored = splits._replace(test=getattr(splits, recipe.split))
    dtype = recipe.run.autocast
    if backbone is None:
        return score(unit.entry.label, "pixels", None, scored, unit.entry.config.student.image_size)
    return score(unit.entry.label, ROLES[unit.entry.kind], backbone.to(device()), scored, view_size(backbone), dtype)


def _distilled(unit: RowRun) -> TrainedModel:
    """Distil the student, or go on, or find it done."""
    student, config = unit.folder / "run" / "student", unit.fitted
    card = _card(student / "config.json")
    if card is None:
        shared = config.cache_folder or str(Path(unit.config.recipe.run.out) / "teacher-cache")
        own = "" if unit.entry.config.budget else shared  # or the first row would fill it for all, in its own time
        run = replace(config, run=unit.run("run"), split="none", cache_folder=own)
        distill(run)
        card = read_json(student / "config.json", "begin again")["comad"]
    seconds = 3600 * hours_of_training(student.parent, config.optim.images_per_step)
    facts = {"images_seen": card["images_seen"], "seconds": round(seconds, 3), "code": card["code"]}
    return TrainedModel(load_teacher(str(student), config.student.image_size).backbone, facts)


def _card(path: Path) -> dict[str, Any] | None:
    """What an export says of itself; None if there is none, or it is told to be damaged."""
    if not path.is_file():
        return None
    with suppress(ValueError, KeyError, OSError):
        content = read_json(path, "begin again")
        if is_intact(content) and content["comad"]["sha256"] == sha256(path.with_name("model.safetensors")):
            return content["comad"]
    warn(f"{path.parent} is damaged; the student is exported again from its last checkpoint.")
    return None


def _teacher(unit: RowRun) -> TrainedModel:
    student = _untrained(unit).backbone
    assert student is not None
    (teacher,) = load_on_grid(unit.entry.teachers, student.grid[0], student.patch_size)
    return TrainedModel(teacher.backbone, _no_training())


def _untrained(unit: RowRun) -> TrainedModel:
    """The student as a run of this seed begins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(unit.seed)
        return TrainedModel(unit.entry.config.student.build(), _no_training())


def _supervised(unit: RowRun) -> TrainedModel:
    """The untrained student, trained with labels."""
    done, written = _learn(unit), read_scores(_tuned_folder(unit) / "finetune.json")
    assert written is not None
    facts = written.facts
    return TrainedModel(
        done.chosen.classifier.backbone, {name: facts[name] for name in ("images_seen", "seconds", "code")}
    )


def _pixels(unit: RowRun) -> TrainedModel:
    return TrainedModel(None, _no_training())


MAKERS: dict[Kind, Callable[[RowRun], TrainedModel]] = {
    "student": _distilled,
    "teacher": _teacher,
    "untrained": _untrained,
    "supervised": _supervised,
    "pixels": _pixels,
}


def _learn(unit: RowRun) -> Finetuned:
    """Fine-tune the network of the unit, or go on, or score again what is trained."""
    recipe, supervised = unit.config.recipe, unit.entry.kind == "supervised"
    backbone = (_untrained if supervised else MAKERS[unit.entry.kind])(unit).backbone
    assert backbone is not None
    config = FinetuneConfig(
        backbone=unit.entry.label,
        **recipe.data_options,
        tuning=_tuning(unit),
        split="val" if recipe.split == "val" else "test",
        loader=recipe.loader if supervised else replace(recipe.loader, fixed_views=0),
        run=unit.run(_tuned_folder(unit).name),
    )
    identity = {"row": unit.row_folder.name, "seed": unit.seed}
    done = finetune_backbone(
        config, PretrainedModel(unit.entry.label, ROLES[unit.entry.kind], backbone, identity), unit.splits
    )
    assert done is not None
    return done


def _learnt(unit: RowRun) -> Score | None:
    """What `_learn` has written, if it is there and of the same split."""
    written = read_scores(_tuned_folder(unit) / "finetune.json")
    return written.scores[0] if written and written.facts["split"] == unit.config.recipe.split else None


def _tuning(unit: RowRun) -> Tuning:
    """The fine-tuning that is asked for; a supervised row has the students' views and schedule, all layers alike."""
    if unit.entry.kind != "supervised":
        return unit.config.tuning
    own = unit.entry.config
    views = {"crop_scale": own.augment.crop_scale, "jitter": own.augment.jitter}
    return replace(unit.config.tuning, optim=own.optim, layer_decay=1.0, **views)


def _tuned_folder(unit: RowRun) -> Path:
    if unit.entry.kind == "supervised":
        return unit.folder / "supervised"
    return unit.folder / f"finetune-{digest_of(asdict(unit.config.tuning))}"


def _no_training() -> dict[str, Any]:
    return {"images_seen": 0, "seconds": 0.0, "code": code_version()}


def _plain(config: DistillConfig, kind: Kind) -> dict[str, Any]:
    """What a result depends on, as nested plain values; teachers apart, by their weights."""
    plain = identity_of(config)
    del plain["run"]["seed"]
    if config.budget:
        plain["budget"] = config.budget
    if not config.cache_teachers:
        plain["cache_storage"] = "computed"
    return plain if kind == "student" else {name: plain[name] for name in ("student", "run")}


def digest_of(plain: Any) -> str:
    """Name plain values."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]
