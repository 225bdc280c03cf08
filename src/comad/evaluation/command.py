"""The verb `comad evaluate`: one backbone, scored beside raw pixels; as a function, of objects too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from comad.data.images import Splits
from comad.data.load import DataConfig, load_images
from comad.evaluation.evaluation import Evaluation, choose
from comad.evaluation.scoreboard import LABEL_SETS, Candidate, Scoreboard, score_all, shortage
from comad.evaluation.views import device, load_one
from comad.models.backbone import Backbone
from comad.models.teachers import Teacher, load_teacher
from comad.runtime.processes import together
from comad.runtime.run import RunConfig, start_fabric

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig):
    """Score a backbone by kNN and a linear probe on frozen features.

    Args:
        backbone: an exported folder, NAME=FILE, a bundled teacher, or a timm model name.
        image_size: pixels on the side of the view; left out, the size an exported student was trained at, for others
            224, and on stamps as many as give 6 × 6 patches.
        precision: of the network: fp32, or bf16, which is faster where the hardware has it.
        evaluations: names of evaluations, such as knn linear; left out, all there are.
        out: a JSON file for the scores; none is written if left out.
    """

    backbone: str
    image_size: int | None = None
    precision: Precision = "fp32"
    evaluations: tuple[str, ...] = ()
    out: str | None = None


def evaluate_command(config: EvaluateConfig) -> str:
    """Score the backbone, write ``out`` if there is one, and return the table, of several processes in the first one.

    Raises:
        ValueError: see `evaluate`.
    """
    if config.out and Path(config.out).is_dir():
        raise ValueError(f"--out {config.out!r} is a folder; name a JSON file.")
    fabric = start_fabric(RunConfig())  # under torchrun or srun its processes share the images
    chosen, splits = choose(config.evaluations or None), config.load_images()
    teacher = _load(config.backbone, config.data, config.image_size)
    with together():
        board = evaluate(teacher, splits, precision=config.precision, evaluations=chosen)
    if not fabric.is_global_zero:
        return ""
    if config.out:
        board.write(Path(config.out))
    return f"{teacher.card.summary()}\n{board.table()}"


def evaluate(
    backbone: str | Backbone | Teacher,
    data: str | Splits = "stamps",
    *,
    image_size: int | None = None,
    precision: str = "fp32",
    evaluations: tuple[Evaluation | str, ...] | None = None,
) -> Scoreboard:
    """Score a backbone beside raw pixels; what there is to choose is chosen on the validation part.

    Args:
        backbone: a name as for `comad.models.teachers.load_teacher`, or a network, which is left where it is.
        data: a folder, a bundled name, or splits.
        image_size: pixels on the side of the view, of what is loaded by name. None is the size that an exported student
            trained at; for other names 224, and on stamps as many as give 6 × 6 patches. A network has its own.
        precision: bf16 computes features under autocast; cost is measured as the weights are.
        evaluations: names or objects; None is all there are, also of plugins.

    Raises:
        ValueError: the backbone or the data cannot be loaded, there are no labels, or there is no such evaluation.
    """
    chosen = choose(evaluations)
    if precision not in get_args(Precision):
        raise ValueError(f"no precision {precision!r}; there are: {', '.join(get_args(Precision))}.")
    splits, name = (load_images(data), data) if isinstance(data, str) else (data, "")
    if reason := shortage(splits, next(iter(LABEL_SETS))):
        where = f"{name or splits.train.name!r} cannot be scored"
        raise ValueError(f"{where}: {reason} Put images into one sub-folder per label.")
    if isinstance(backbone, str):
        backbone = _load(backbone, name, image_size)
    title, network = backbone[:2] if isinstance(backbone, Teacher) else (type(backbone).__name__, backbone)
    if image_size not in (None, network.image_size):
        own = f"{title} was built for images of {network.image_size} pixels"
        raise ValueError(f"{own}, not {image_size}; leave image_size out, or name a file or folder to load.")
    candidates = [Candidate("pixels", "pixels", None), Candidate(title, "teacher", network)]
    dtype = torch.bfloat16 if precision == "bf16" else None
    return Scoreboard(tuple(score.row for score in score_all(candidates, splits, dtype, chosen)))


def _load(spec: str, data: str, image_size: int | None) -> Teacher:
    """Load a network at the size that is wanted, or at its own if it was exported with one, where it is to compute."""
    size = trained_size(spec) if image_size is None else image_size
    teacher = load_one(spec, data) if size is None else load_teacher(spec, size)
    teacher.backbone.to(device())
    return teacher


def trained_size(spec: str) -> int | None:
    """Pixels on the side of the images of a student that comad exported; None for everything else."""
    path = Path(spec if Path(spec).exists() else spec.partition("=")[2] or spec)
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        return int(content["pretrained_cfg"]["input_size"][-1]) if "comad" in content else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
