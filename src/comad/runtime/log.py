"""Where a run's numbers go: a JSON line each, TensorBoard, Weights & Biases, one line of progress."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch


def first_metrics(folder: Path) -> dict[str, Any] | None:
    """The first logged line of a run, or None."""
    with (folder / "log.jsonl").open(encoding="utf-8") as file:
        line = file.readline()
    return json.loads(line) if line else None


def hours_of_training(folder: Path, images_per_step: int) -> float:
    """Hours that the logged steps of a run took, resumed or not, without the scoring between them."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = [line for line in lines if "images_per_s" in line]
    before = [0, *(line["step"] for line in timed)]
    return (
        sum(
            (line["step"] - start) * images_per_step / line["images_per_s"]
            for line, start in zip(timed, before, strict=False)
        )
        / 3600
    )


def truncate_log(folder: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint; its continuation writes them again."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")


class RunLog:
    """Writes metrics of a run to its folder and shows its progress.

    Args:
        folder: the run's folder; None writes nothing: for all processes but the first.
        total_steps: optimiser steps of the whole run, for the ETA.
        tensorboard, wandb: also write there.
        stream: where the progress line goes; None is silent.
        name: of the run, if several run beside each other; then each has lines of its own on a terminal, too.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        tensorboard: bool = True,
        wandb: bool = False,
        stream: TextIO | None = sys.stderr,
        name: str = "",
    ):
        self.total_steps = total_steps
        self.stream = stream
        self.title = f"{name}: " if name else ""
        self.in_place = stream is not None and stream.isatty() and not name
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8") if folder else None
        self.writer = _tensorboard_writer(folder) if folder and tensorboard else None
        self.wandb = _wandb_run(folder) if folder and wandb else None
        self.start = time.monotonic()
        self.last_knn: float | None = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.in_place:
            print(file=self.stream)
        if self.file:
            self.file.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics of one step."""
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)
        self.last_knn = metrics.get("knn", self.last_knn)

    def progress(self, step: int, steps_per_s: float, metrics: Mapping[str, Any]) -> None:
        """Show one line for the whole run; without a terminal a line every tenth of it."""
        if not self.stream:
            return
        left = (self.total_steps - step) / max(steps_per_s, 1e-9)
        knn = f"  knn {self.last_knn:.1f}" if self.last_knn is not None else ""
        line = (
            f"{self.title}step {step}/{self.total_steps}  ETA {_clock(left)}  {metrics['images_per_s']:.0f} img/s  "
            f"{metrics['memory_gib']:.1f} GiB  loss {metrics['loss']:.4f}  data_wait {metrics['data_wait']:.1f} %{knn}"
        )
        if self.in_place:
            print(f"\r\033[K{line}", end="", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)

    def say(self, message: str) -> None:
        """Show a message on a line of its own."""
        if self.stream:
            print(("\r\033[K" if self.in_place else "") + message, file=self.stream, flush=True)


def memory_gib() -> float:
    """Peak memory in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _tensorboard_writer(folder: Path) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def _wandb_run(folder: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ValueError(
            "Weights & Biases is not installed; pip install 'comad[wandb]' or leave out --run.wandb."
        ) from error
    return wandb.init(project="comad", name=folder.name, dir=str(folder), reinit="create_new")
