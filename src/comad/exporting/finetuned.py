"""The verb `comad evaluate finetune`: a backbone trained with labels, and the classifier as files of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from comad.data.images import Splits
from comad.evaluation.finetune import Finetuned, PretrainedModel, build_classifier, check, finetune_backbone
from comad.evaluation.tuning import FinetuneConfig
from comad.evaluation.views import load_one
from comad.exporting.command import Exported, check_source, write_exports
from comad.exporting.config import ExportConfig
from comad.exporting.config import check as check_formats
from comad.exporting.source import Source, at_hand, load_source
from comad.models.backbone import Backbone, Pool
from comad.models.files import sha256_of
from comad.models.teachers import Teacher
from comad.runtime.run import check_free

LABELS = "fine"
"""The label set whose head leaves."""


def finetune(config: FinetuneConfig) -> str:
    """Fine-tune a backbone, export the classifier if it is asked for, and give the result in words.

    Of several processes the first does what comes after training; the others return nothing.

    Raises:
        ValueError: the backbone or the data cannot be loaded, there are no labels, a run folder is in use, or the
            classifier cannot leave in a format; what can be known before training is told before it.
        Interrupted: a signal came; a checkpoint is written.
        TrainingError: the loss is not finite.
    """
    if not config.backbone:
        raise ValueError("name what to fine-tune: comad evaluate finetune BACKBONE --data FOLDER.")
    check_free(config.run)
    splits = config.load_images()
    check(config, splits)
    teacher = load_one(config.backbone, config.data, config.image_size)
    done, exported = finetune_teacher(config, teacher, splits)
    if done is None:
        return ""
    row, (optim, _, validation, _) = done.score.row, done.chosen
    coarse = f", coarse {row.scores['finetune_coarse']:.1f} %" if "finetune_coarse" in row.scores else ""
    text = (
        f"{teacher.card.summary()}\nfine-tuned with --optim.base-lr {optim.base_lr:g} --optim.epochs {optim.epochs:g}: "
        f"{config.split} top-1 {row.scores['finetune']:.1f} %{coarse} on {row.num_images['finetune']:,} images "
        f"(validation {validation['fine']:.1f} %); "
        f"every image's result is in {config.run.out}/finetune.json"
    )
    return f"{text}\n{exported.text}" if exported else text


def finetune_teacher(
    config: FinetuneConfig, teacher: Teacher | Backbone, splits: Splits
) -> tuple[Finetuned | None, Exported | None]:
    """Fine-tune a network that is loaded, and export the classifier into ``export/`` of the run if it is asked for.

    Args:
        config: ``backbone`` says where to look for a card, if the network was loaded by name.
        teacher: of which a copy learns.
        splits: the images.

    Raises:
        ValueError, Interrupted, TrainingError: see `finetune`.
    """
    backbone = teacher.backbone if isinstance(teacher, Teacher) else teacher
    name = teacher.name if isinstance(teacher, Teacher) else type(teacher).__name__
    exporting, out = ExportConfig(to=config.export or ("onnx",)), Path(config.run.out) / "export"
    untrained, source = build_classifier(backbone, splits, config.tuning), None
    if config.export:
        check_formats(exporting)
        source = _source(config, teacher, splits)
        check_source(source._replace(head=(_head(untrained), config.tuning.pool)), out, exporting)
    digest = teacher.card.sha256 if isinstance(teacher, Teacher) else sha256_of(backbone.state_dict())
    done = finetune_backbone(config, PretrainedModel(name, "teacher", backbone, {"sha256": digest}), splits)
    if done is None or source is None:
        return done, None
    classifier = done.chosen.classifier.eval()
    source = source._replace(backbone=classifier.backbone, card=_card(config, source, done, splits))
    names = class_names(splits, _head(classifier).out_features)
    exported = export_classifier(source, _head(classifier), names, out, pool=classifier.pool, to=config.export)
    return done._replace(exported=exported.folder), exported


def export_classifier(
    source: Source,
    head: nn.Linear,
    labels: Sequence[str],
    out: str | Path,
    *,
    pool: Pool,
    to: Sequence[str] = ("timm", "transformers", "onnx"),
    **options: Any,
) -> Exported:
    """Export a fine-tuned classifier: a backbone and a linear head on the class token or the mean patch token.

    Args:
        source: the backbone as it was trained, its card and timm's arguments, and images to compare and to calibrate
            with; the score is top-1 on their validation part. The card's ``labels`` are filled in.
        head: as it was trained, on any device; left as it is.
        labels: names of the classes, in the order of the head's outputs.
        out: the folder to write.
        pool: what the head sees.
        to: names of `comad.exporting.formats.FORMATS`.
        options: fields of `ExportConfig`.

    Raises:
        ValueError: the labels do not fit the head; or see `comad.exporting.command.export`.
    """
    if len(labels) != head.out_features:
        raise ValueError(f"{len(labels)} labels for a head of {head.out_features} classes; give one name per output.")
    config = ExportConfig(to=tuple(to), out=str(out), **options)
    check_formats(config)
    card = replace(source.card, labels=tuple(labels))
    source = source._replace(card=card, head=(head, pool), scoreboard=None)  # the run's scores are of its backbone
    return write_exports(source, Path(out), config)


def class_names(splits: Splits, count: int) -> tuple[str, ...]:
    """Names of the classes of a head, in the order of its outputs; a number where a set does not name one."""
    known = splits.class_names.get(LABELS, ())
    return tuple(known[number] if number < len(known) else str(number) for number in range(count))


def _head(classifier: Any) -> nn.Linear:
    return cast(nn.Linear, classifier.heads[LABELS])


def _source(config: FinetuneConfig, teacher: Teacher | Backbone, splits: Splits) -> Source:
    """What is known about the backbone."""
    if not isinstance(teacher, Teacher):
        return at_hand(teacher, type(teacher).__name__, splits)
    if config.backbone:
        return load_source(config.backbone, config.data, teacher.backbone.image_size, splits)
    known = teacher.card.architecture.partition(".")[0] if teacher.card.format in ("timm", "export") else ""
    source = at_hand(teacher.backbone, teacher.name, splits, known)
    return source._replace(card=replace(source.card, licence=teacher.card.licence, about=teacher.card.about))


def _card(config: FinetuneConfig, source: Source, done: Finetuned, splits: Splits) -> Any:
    """The card of the backbone, with what was done to it and what came of it."""
    row, optim, count = done.score.row, done.chosen.optim, len(splits.train)
    data = Path(config.data).name if config.data else splits.train.name
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    known = source.card.data if source.card.data != "unknown" else "what its backbone learnt from"
    return replace(
        source.card,
        name=f"{source.card.name}, a classifier of {data}",
        about=f"{source.card.about} Fine-tuned with the labels of {count:,} images of {data}, {optim.epochs:g} epochs.",
        eval_crop=splits.val.eval_crop,
        data=f"{known}; then {data} with labels",
        data_images={name: len(images) for name, images in parts.items()},
        data_found=splits.summary().words,
        images_seen=source.card.images_seen + optim.images_seen(count),
        scores=({**row.as_dict(), "role": f"fine-tuned, {config.split} images"},),
        scored_images=row.num_images["finetune"],
        intended_use="Naming the classes that it was trained on. Test it on your own images before you rely on it.",
    )
