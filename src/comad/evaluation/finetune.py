"""A whole backbone trained with labels, on the loop that distils: the work of `comad evaluate finetune`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor

from comad.data.begin import begin_run
from comad.data.images import ImageSet, Splits
from comad.data.loader import Sample, TrainingBatches, ViewDataset
from comad.data.transforms import ColourChange, Crop, random_views
from comad.evaluation.classifier import Classifier, correct_answers, cross_entropy, mix, mixed_labels, set_drop_path
from comad.evaluation.evaluation import LABEL_SETS, PerImage
from comad.evaluation.scoreboard import Role, Score, cost, shortage
from comad.evaluation.scores import write_scores
from comad.evaluation.tuning import FinetuneConfig, Tuning
from comad.evaluation.views import view_size
from comad.models.backbone import Backbone
from comad.models.timm_backbone import math_attention_on_cpu
from comad.runtime.lock import holding_runs
from comad.runtime.log import hours_of_training
from comad.runtime.optim import OptimConfig
from comad.runtime.options import identity_of
from comad.runtime.provenance import code_version, hardware
from comad.runtime.run import RunConfig, start_fabric
from comad.runtime.trainer import Job, Trainer


@dataclass(frozen=True)
class PretrainedModel:
    """What is fine-tuned.

    Attributes:
        name, role: for the row of scores.
        backbone: the network. It is left as it is: a copy learns.
        identity: plain values that tell these weights from others; a run does not go on with other ones.
    """

    name: str
    role: Role
    backbone: Backbone
    identity: dict[str, Any]


class Trial(NamedTuple):
    """A setting and what came of it.

    Attributes:
        optim: the setting.
        classifier: the trained network.
        validation: label set → top-1 percent of the validation images.
        seconds: of training.
    """

    optim: OptimConfig
    classifier: Classifier
    validation: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class ClassifierViews:
    """One crop and flip with changed colours: what a student sees in a distillation."""

    crop: Crop
    colour: ColourChange | None

    def __call__(self, image: Tensor) -> Sample:
        """uint8 image → one view."""
        return Sample(random_views(image, [(self.crop, self.colour)]), torch.empty(0))


class Finetuned(NamedTuple):
    """What came of a fine-tuning.

    Attributes:
        score: ``finetune`` and ``finetune_coarse`` of the chosen trial.
        chosen: that trial.
        exported: the folder in which the classifier left, if it was to.
    """

    score: Score
    chosen: Trial
    exported: Path | None = None


def check(config: FinetuneConfig, splits: Splits) -> None:
    """Say what is wrong before anything is trained.

    Raises:
        ValueError: there are no labels, too few images for a batch, or an odd batch that is to be mixed.
    """
    if reason := shortage(splits, "fine"):
        raise ValueError(f"{config.data!r} cannot be learnt: {reason} Put images into one sub-folder per label.")
    optim, count, pairs = config.tuning.optim, len(splits.train), 2 * config.run.devices
    if count < optim.images_per_step:
        raise ValueError(
            f"{count} training images in {config.data!r} are too few to fine-tune with a batch of "
            f"{optim.images_per_step}; add images or set its --optim.batch-size "
            f"{max(pairs, count // optim.accumulate // pairs * pairs)}."
        )
    if (config.tuning.mixup or config.tuning.cutmix) and optim.pass_size % pairs:
        raise ValueError(
            f"images are mixed in pairs, and {optim.pass_size} is no multiple of {pairs}; change --optim.batch-size "
            "of the fine-tuning, or set --mixup 0 --cutmix 0."
        )


@holding_runs()
def finetune_backbone(config: FinetuneConfig, subject: PretrainedModel, splits: Splits) -> Finetuned | None:
    """Train every setting, choose by the validation images, score the choice once, write ``finetune.json``.

    Of several processes the first does what comes after training; the others return None.

    Args:
        config: its ``backbone``, ``image_size`` and ``export`` are not read, for the subject is loaded.
        subject: the network.
        splits: the images.

    Raises:
        ValueError: a run folder is in use.
        Interrupted: a signal came; a checkpoint is written.
        TrainingError: the loss is not finite.
    """
    fabric = start_fabric(config.run, config.tuning.optim)
    settings = _settings(config)
    runs = begin_run(config, fabric, splits, list(settings)).runs
    trials = [
        finetune_once(replace(config, tuning=tuning, run=run), subject, splits, fabric)
        for tuning, run in zip(settings.values(), runs, strict=True)
    ]
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
        "seconds": round(sum(trial.seconds for trial in trials), 3),
        "code": code_version(),
        "hardware": hardware(fabric.device, config.run.threads),
    }
    write_scores(Path(config.run.out) / "finetune.json", [score], facts)
    return Finetuned(score, best)


def build_classifier(backbone: Backbone, splits: Splits, tuning: Tuning) -> Classifier:
    """A copy of a network with heads of random weights for the labels of a set.

    Raises:
        ValueError: it has no class token, and that is to be classified.
    """
    backbone = copy.deepcopy(backbone)
    set_drop_path(backbone, tuning.drop_path)
    return Classifier(backbone, _num_classes(splits), tuning.pool)


def finetune_once(config: FinetuneConfig, subject: PretrainedModel, splits: Splits, fabric: Fabric) -> Trial:
    """Train a classifier by ``config.tuning`` in the folder ``config.run.out``, and score it on the validation images.

    Raises:
        Interrupted, TrainingError, ValueError: see `comad.runtime.trainer.Trainer`.
    """
    tuning, optim, seed, images = config.tuning, config.tuning.optim, config.run.seed, splits.train
    fabric.seed_everything(seed, verbose=False)
    num_classes, classifier = _num_classes(splits), build_classifier(subject.backbone, splits, tuning)
    math_attention_on_cpu(classifier, fabric.device)
    size = view_size(classifier.backbone)
    colour = ColourChange(strength=tuning.jitter, hue=tuning.jitter / 4) if tuning.jitter else None
    views = ViewDataset(images, ClassifierViews(Crop(size=size, scale=tuning.crop_scale), colour), seed, 2 * size)
    data = TrainingBatches(views, len(images), images.path, optim.pass_size, seed, config.loader)

    def probe(module: Classifier) -> dict[str, float]:
        return _by_score(top1(answers(module, splits.val, config.run)))

    job = Job(
        module=classifier,
        run=config.run,
        identity={**identity_of(config), "subject": subject.identity, "data": images.fingerprint()},
        probe=probe,
        groups=classifier.parameter_groups(optim.weight_decay, tuning.layer_decay),
    )
    with Trainer([job], data, optim, fabric) as trainer:
        train_steps(trainer, tuning, {name: images.labels[name] for name in num_classes}, num_classes)
    trained = trainer.states[0].scored
    seconds = 3600 * hours_of_training(Path(config.run.out), optim.images_per_step)
    return Trial(optim, trained, top1(answers(trained, splits.val, config.run)), seconds)


def train_steps(trainer: Trainer, tuning: Tuning, labels: Mapping[str, Tensor], num_classes: Mapping[str, int]) -> None:
    """The training loop: mixed images, and the cross-entropy of each label set.

    Args:
        trainer: of one classifier.
        tuning: how images and labels are mixed.
        labels: label set → int64 (n,), the class of each training image, -1 for none.
        num_classes: label set → number of its classes.
    """
    labels = {name: values.to(trainer.fabric.device) for name, values in labels.items()}
    for step in trainer:
        for batch in step:
            with step.microbatch(trainer.states[0]) as state:
                images, shares = mix(batch.views[0].float() / 255, tuning.mixup, tuning.cutmix)
                losses = {}
                for name, scores in state.module(images).items():
                    own = labels[name][batch.image].where(
                        batch.readable, -1
                    )  # of an unreadable image another stands in
                    targets = mixed_labels(shares, own, num_classes[name], tuning.smoothing)
                    losses[name] = cross_entropy(scores, targets)
                found = {name: loss.detach() for name, loss in losses.items()}
                state.backward(torch.stack(list(losses.values())).mean(), lambda found=found: found)


def answers(classifier: Classifier, images: ImageSet, run: RunConfig) -> dict[str, Tensor]:
    """Label set → bool (n,): is each labelled image named rightly, in the precision of the run."""
    dtype = run.autocast
    return correct_answers(classifier, images, view_size(classifier.backbone), dtype)


def top1(hits: dict[str, Tensor]) -> dict[str, float]:
    """Percent of right answers per label set."""
    return {name: 100 * correct.double().mean().item() for name, correct in hits.items()}


def _num_classes(splits: Splits) -> dict[str, int]:
    """Label set → number of classes, of the label sets that can be scored."""
    parts = (splits.train, splits.val, splits.test)
    known = [name for name in LABEL_SETS if shortage(splits, name) is None]
    return {name: 1 + max(int(images.labels[name].max()) for images in parts) for name in known}


def _by_score(values: Mapping[str, Any]) -> dict[str, Any]:
    """Label set → value, by the name of the score."""
    return {"finetune" + LABEL_SETS[name]: value for name, value in values.items()}


def _settings(config: FinetuneConfig) -> dict[str, Tuning]:
    """Each setting to try, by the name of its folder below the run's; one alone has none."""
    tuning = config.tuning
    pairs = list(product(config.try_lr or (tuning.optim.base_lr,), config.try_epochs or (tuning.optim.epochs,)))
    names = [""] if len(pairs) == 1 else [f"lr-{lr:g}-epochs-{epochs:g}" for lr, epochs in pairs]
    tunings = [replace(tuning, optim=replace(tuning.optim, base_lr=lr, epochs=epochs)) for lr, epochs in pairs]
    return dict(zip(names, tunings, strict=True))


def _score(subject: PretrainedModel, classifier: Classifier, images: ImageSet, run: RunConfig) -> Score:
    row = replace(cost(classifier.backbone, view_size(subject.backbone)), name=subject.name, role=subject.role)
    found = {
        "finetune" + LABEL_SETS[name]: PerImage(correct, images.groups[images.labels[name] >= 0])
        for name, correct in answers(classifier, images, run).items()
    }
    return Score(row, {}, {}).joined(found)
