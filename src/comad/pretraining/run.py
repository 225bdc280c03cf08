"""One pretraining run, from a config to an exported teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from comad.data.begin import begin_run
from comad.data.images import Splits
from comad.data.loader import TrainingBatches, ViewDataset
from comad.evaluation.probe import KnnProbe
from comad.evaluation.scoreboard import Scoreboard, rehearse, score
from comad.exporting.package import ModelCard, export_backbone
from comad.models.mae_decoder import save_decoder
from comad.models.teachers import TeacherCard, inherited_licence, start_from
from comad.models.timm_backbone import TimmBackbone, math_attention_on_cpu
from comad.pretraining.config import PretrainConfig, recipe
from comad.pretraining.mae import MaeModel
from comad.pretraining.positions import fix_positions
from comad.reporting.folder import read_run
from comad.runtime.lock import holding_runs
from comad.runtime.log import hours_of_training, read_log
from comad.runtime.options import identity_of
from comad.runtime.provenance import code_version, hardware
from comad.runtime.recipe import flags
from comad.runtime.run import check_free, start_fabric
from comad.runtime.trainer import Job, Trainer


@holding_runs()
def pretrain(config: PretrainConfig) -> Path | None:
    """Train a teacher and export its backbone; returns the folder of the export.

    Of several processes the first does what comes after training; the others return None.

    Raises:
        ValueError: bad data, a run folder in use, or a resume that does not fit.
        Interrupted: a signal came; a checkpoint is written.
    """
    check_free(config.run)
    fabric = start_fabric(config.run, config.optim)
    fabric.seed_everything(config.run.seed, verbose=False)
    splits = config.load_images()
    _check(config, splits)
    rehearse(splits)
    config = begin_run(config, fabric, splits).config
    out = Path(config.run.out)
    backbone = config.vit.build_vit(**config.method.vit_arguments)
    start = start_from(config.init, backbone) if config.init else None
    if start is None and config.method.fixed_positions:
        fix_positions(backbone.vit)
    model = config.method.build(backbone)
    math_attention_on_cpu(model, fabric.device)
    seed, size, images = config.run.seed, config.vit.image_size, splits.train
    views = ViewDataset(images, config.method.views(size, backbone.num_patches), seed, 2 * size)
    data = TrainingBatches(views, len(images), images.path, config.optim.pass_size, seed, config.loader)
    knn = KnnProbe(splits, size)
    job = Job(
        module=model,
        run=config.run,
        identity={
            **identity_of(config),
            "init": start.as_dict() if start else None,
            "data": images.fingerprint(),
        },
        probe=lambda module: knn(module.trained),
    )
    with Trainer([job], data, config.optim, fabric) as trainer:
        train_steps(trainer)
    scored = trainer.states[0].scored
    if not fabric.is_global_zero:
        return None
    return export_teacher(config, splits, scored, out, fabric, start)


def train_steps(trainer: Trainer) -> None:
    """The training loop: the model of a method computes its loss from the views."""
    for step in trainer:
        for batch in step:
            with step.microbatch(trainer.states[0]) as state:
                state.backward(*state.module(batch, step.progress))


def _check(config: PretrainConfig, splits: Splits) -> None:
    count, batch = len(splits.train), config.optim.images_per_step
    if count < batch:
        raise ValueError(
            f"{count} training images in {config.data!r} are too few for a batch of {batch}; add images or set "
            f"--optim.batch-size {max(1, count // config.optim.accumulate)}."
        )
    if config.optim.ema and config.method.kind == "ibot":
        raise ValueError("iBOT's teacher is a moving average already; leave out --optim.ema.")


def export_teacher(
    config: PretrainConfig,
    splits: Splits,
    model: Any,
    out: Path,
    fabric: Fabric,
    start: TeacherCard | None,
) -> Path:
    """Export the backbone in 16 bits to ``teacher``, score it beside its untrained self, and put the scores there."""
    backbone: TimmBackbone = model.trained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        untrained = config.vit.build_vit()
    method, size = config.method.kind, config.vit.image_size
    plain = config.vit.build_vit()
    plain.load_state_dict(backbone.state_dict())
    for network in (untrained, plain):
        network.take_pixels_of(backbone)
    plain.token_types = config.method.token_types
    origin = f", starting from {start.source} ({start.licence}): {start.about}" if start else " from scratch."
    card = ModelCard(
        name=f"{method} teacher, {splits.train.name}",
        licence=inherited_licence([*([start.licence] if start else []), *config.vit.start_licences]),
        about=f"Trained by `comad pretrain {method}` on {splits.train.name}{origin}",
        architecture=config.vit.name,
        token_types=config.method.token_types,
        preset=method,
        seed=config.run.seed,
        images_seen=config.optim.images_seen(len(splits.train)),
        command=f"comad pretrain {method} {flags(config, recipe(method))}".rstrip(),
        code=code_version(),
        hardware=hardware(fabric.device, config.run.threads),
        hours=round(hours_of_training(out, config.optim.images_per_step), 2),
        curve=tuple(_curve(out)),
        data=config.data if config.data == "stamps" else Path(config.data).name,
        data_licence=splits.licence,
        eval_crop=splits.train.eval_crop,
        data_found=splits.summary().words,
        warnings=read_run(out).warnings,
    )

    def export(card: ModelCard) -> Path:
        place, arguments = out / "teacher", config.vit.arguments
        folder = export_backbone(plain, place, model_args=arguments, card=card, dtype=torch.float16)
        if isinstance(model, MaeModel):
            save_decoder(model.decoder, folder)
        return folder

    export(card)  # before anything that may fail
    rows = (
        score("pixels", "pixels", None, splits, size).row,
        score("untrained", "untrained", untrained, splits, size).row,
    )
    board = Scoreboard((*rows, score(method, "teacher", plain, splits, size).row), card.warnings)
    board.write(out / "scoreboard.json")
    return export(replace(card, scores=tuple(board.as_dict()["rows"])))


def _curve(out: Path) -> Iterator[dict[str, float]]:
    """Validation kNN during the run."""
    for line in read_log(out)[0]:
        if "knn" in line:
            yield {"step": line["step"], "validation_knn": round(line["knn"], 1)}
