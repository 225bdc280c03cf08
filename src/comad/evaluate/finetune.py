"""The verb `comad evaluate finetune`: a whole backbone trained with labels, on the loop that distils."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from lightning_fabric import Fabric

from comad.data.images import ImageSet, Splits, load_images
from comad.evaluate.classifier import Classifier
from comad.evaluate.evaluation import LABEL_SETS, PerImage
from comad.evaluate.scoreboard import Score, cost, shortage
from comad.evaluate.scores import write_scores
from comad.evaluate.trial import PretrainedModel, Trial, answers, finetune_once
from comad.evaluate.tuning import FinetuneConfig
from comad.evaluate.views import load_one, view_size
from comad.runtime.provenance import code_version, hardware
from comad.runtime.train import RunConfig, open_runs, start_fabric


class Finetuned(NamedTuple):
    """The score (``finetune``, ``finetune_coarse``) of the chosen trial, and that trial."""

    score: Score
    chosen: Trial


def finetune(config: FinetuneConfig) -> str:
    """Fine-tune a backbone and write ``finetune.json`` into the run's folder. Returns the result in words.

    Of several processes the first does what comes after training; the others return nothing.

    Raises:
        ValueError: the backbone or the data cannot be loaded, there are no labels, or a run folder is in use.
        Interrupted: a signal came; a checkpoint is written.
        TrainingError: the loss is not finite.
    """
    if not config.backbone:
        raise ValueError("name what to fine-tune: comad evaluate finetune BACKBONE --data FOLDER.")
    splits = load_images(config.data)
    check(config, splits)
    teacher = load_one(config.backbone, config.data, config.image_size)
    subject = PretrainedModel(teacher.name, "teacher", teacher.backbone, {"sha256": teacher.card.sha256})
    done = finetune_backbone(config, subject, splits)
    if done is None:
        return ""
    row, (optim, _, validation, _) = done.score.row, done.chosen
    coarse = f", coarse {row.scores['finetune_coarse']:.1f} %" if "finetune_coarse" in row.scores else ""
    return (
        f"{teacher.card.summary()}\nfine-tuned with --optim.base-lr {optim.base_lr:g} --optim.epochs {optim.epochs:g}: "
        f"{config.split} top-1 {row.scores['finetune']:.1f} %{coarse} on {row.num_images['finetune']:,} images "
        f"(validation {validation['fine']:.1f} %); "
        f"every image's result is in {config.run.out}/finetune.json"
    )


def check(config: FinetuneConfig, splits: Splits) -> None:
    """Say what is wrong before anything is trained.

    Raises:
        ValueError: there are no labels, too few images for a batch, or an odd batch that is to be mixed.
    """
    if reason := shortage(splits, "fine"):
        raise ValueError(f"{config.data!r} cannot be learnt: {reason} Put images into one sub-folder per label.")
    optim, count, pairs = config.tuning.optim, len(splits.train), 2 * config.run.devices
    if count < optim.batch_size * optim.accumulate:
        raise ValueError(
            f"{count} training images in {config.data!r} are too few to fine-tune with a batch of "
            f"{optim.batch_size * optim.accumulate}; add images or set its --optim.batch-size "
            f"{max(pairs, count // optim.accumulate // pairs * pairs)}."
        )
    if (config.tuning.mixup or config.tuning.cutmix) and optim.batch_size % pairs:
        raise ValueError(
            f"images are mixed in pairs, and {optim.batch_size} is no multiple of {pairs}; change --optim.batch-size "
            "of the fine-tuning, or set --mixup 0 --cutmix 0."
        )


def finetune_backbone(config: FinetuneConfig, subject: PretrainedModel, splits: Splits) -> Finetuned | None:
    """Train every setting, choose by the validation images, score the choice once; see `finetune`.

    Args:
        config: its ``backbone`` and ``image_size`` are not read, for the subject is loaded.
        subject: the network.
        splits: the images.
    """
    fabric = start_fabric(config.run)
    trials = [finetune_once(setting, subject, splits, fabric) for setting in _settings(config, fabric)]
    if not fabric.is_global_zero:
        return None
    best = max(trials, key=lambda trial: trial.validation["fine"])
    score = _score(subject, best.classifier, getattr(splits, config.split), config.run)
    facts = {
        "split": config.split,
        "subject": subject.identity,
        "trials": [{"base_lr": t.optim.base_lr, "epochs": t.optim.epochs, "validation": t.validation} for t in trials],
        "chosen": trials.index(best),
        "seed": config.run.seed,
        "images_seen": best.optim.images_seen(len(splits.train)),
        "seconds": round(sum(trial.seconds for trial in trials), 1),
        "code": code_version(),
        "hardware": hardware(fabric.device, config.run.threads),
    }
    write_scores(Path(config.run.out) / "finetune.json", [score], facts)
    return Finetuned(score, best)


def _settings(config: FinetuneConfig, fabric: Fabric) -> list[FinetuneConfig]:
    """One config per setting to try, each with a folder of its own if there are several."""
    tuning = config.tuning
    pairs = list(product(config.try_lr or (tuning.optim.base_lr,), config.try_epochs or (tuning.optim.epochs,)))
    names = [""] if len(pairs) == 1 else [f"lr-{lr:g}-epochs-{epochs:g}" for lr, epochs in pairs]
    tunings = [replace(tuning, optim=replace(tuning.optim, base_lr=lr, epochs=epochs)) for lr, epochs in pairs]
    runs = open_runs(config.run, names, fabric)
    return [replace(config, tuning=tuning, run=run) for tuning, run in zip(tunings, runs, strict=True)]


def _score(subject: PretrainedModel, classifier: Classifier, images: ImageSet, run: RunConfig) -> Score:
    row = replace(cost(classifier.backbone, view_size(subject.backbone)), name=subject.name, role=subject.role)
    found = {
        "finetune" + LABEL_SETS[name]: PerImage(correct, images.groups[images.labels[name] >= 0])
        for name, correct in answers(classifier, images, run).items()
    }
    return Score(row, {}, {}).joined(found)
