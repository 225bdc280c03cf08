"""One training of a classifier: a backbone, a setting, the loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from comad.data.images import ImageSet, Splits
from comad.data.loader import Batch, EpochBatches, Sample, ViewDataset, training_batches
from comad.data.transforms import ColourChange, Crop, random_views
from comad.evaluate.classifier import Classifier, correct_answers, cross_entropy, mix, mixed_labels, set_drop_path
from comad.evaluate.scoreboard import LABEL_SETS, Role, shortage
from comad.evaluate.tuning import FinetuneConfig
from comad.evaluate.views import view_size
from comad.models.backbone import Backbone
from comad.models.timm_backbone import math_attention_on_cpu
from comad.runtime.job import identity_of
from comad.runtime.log import hours_of_training
from comad.runtime.optim import OptimConfig
from comad.runtime.train import Job, Metrics, RunConfig, Step, train


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


def finetune_once(config: FinetuneConfig, subject: PretrainedModel, splits: Splits, fabric: Fabric) -> Trial:
    """Train a classifier by ``config.tuning`` in the folder ``config.run.out``, and score it on the validation images.

    Raises:
        Interrupted, TrainingError, ValueError: see `comad.runtime.train.train`.
    """
    fabric.seed_everything(config.run.seed, verbose=False)
    backbone, optim = copy.deepcopy(subject.backbone), config.tuning.optim
    set_drop_path(backbone, config.tuning.drop_path)
    classifier = Classifier(backbone, _num_classes(splits), config.tuning.pool)
    math_attention_on_cpu(classifier, fabric.device)
    trained = train(_job(config, subject, classifier, splits, fabric), optim, config.run, fabric)
    seconds = 3600 * hours_of_training(Path(config.run.out), optim.batch_size * optim.accumulate)
    return Trial(optim, trained, top1(answers(trained, splits.val, config.run)), seconds)


def answers(classifier: Classifier, images: ImageSet, run: RunConfig) -> dict[str, Tensor]:
    """Label set → bool (n,): is each labelled image named rightly, in the precision of the run."""
    dtype = torch.bfloat16 if run.precision == "bf16" else None
    return correct_answers(classifier, images, view_size(classifier.backbone), dtype)


def top1(hits: dict[str, Tensor]) -> dict[str, float]:
    """Percent of right answers per label set."""
    return {name: 100 * correct.double().mean().item() for name, correct in hits.items()}


def _num_classes(splits: Splits) -> dict[str, int]:
    """Label set → number of classes, of the label sets that can be scored."""
    parts = (splits.train, splits.val, splits.test)
    known = [name for name in LABEL_SETS if shortage(splits, name) is None]
    return {name: 1 + max(int(images.labels[name].max()) for images in parts) for name in known}


def _job(
    config: FinetuneConfig, subject: PretrainedModel, classifier: Classifier, splits: Splits, fabric: Fabric
) -> Job:
    tuning, optim, seed = config.tuning, config.tuning.optim, config.run.seed
    size, num_classes = view_size(subject.backbone), _num_classes(splits)
    colour = ColourChange(strength=tuning.jitter, hue=tuning.jitter / 4) if tuning.jitter else None
    views = ViewDataset(splits.train, ClassifierViews(Crop(size=size, scale=tuning.crop_scale), colour), seed, 2 * size)
    labels = {name: splits.train.labels[name].to(fabric.device) for name in num_classes}

    def batches(first: int, last: int) -> DataLoader:
        span, share, fixed = (first, last), (fabric.global_rank, fabric.world_size), config.loader.fixed_views
        order = EpochBatches(len(views.images), optim.batch_size, seed, span, fixed_views=fixed, share=share)
        return training_batches(views, order, config.loader)

    def step(module: nn.Module, batch: Batch, progress: float) -> Step:
        images, shares = mix(batch.views[0].float() / 255, tuning.mixup, tuning.cutmix)
        losses = {}
        for name, scores in module(images).items():
            own = labels[name][batch.image].where(batch.readable, -1)  # of an unreadable image another one stands in
            losses[name] = cross_entropy(scores, mixed_labels(shares, own, num_classes[name], tuning.smoothing))
        return Step(torch.stack(list(losses.values())).mean(), lambda: {k: loss.detach() for k, loss in losses.items()})

    def probe(module: Classifier) -> Metrics:
        found = top1(answers(module, splits.val, config.run))
        return {f"finetune{LABEL_SETS[name]}": percent for name, percent in found.items()}

    plain = identity_of(config, "backbone", "split", "try_lr", "try_epochs")
    return Job(
        module=classifier,
        step=step,
        batches=batches,
        steps_per_epoch=optim.steps_per_epoch(len(views.images)),
        identity={**plain, "subject": subject.identity},
        probe=probe,
        watch=lambda done, metrics: None,
        name_image=views.images.path,
        groups=classifier.parameter_groups(optim.weight_decay, tuning.layer_decay),
    )
