"""Where a run's numbers go: a JSON line each, TensorBoard, Weights & Biases, one line of progress."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from comad.runtime.atomic import naming, write_text


def read_log(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's log that can be read, and how many cannot: a killed process or a bad disk left those."""
    path, lines, damaged = folder / "log.jsonl", [], 0
    text = path.read_bytes() if path.is_file() else b""
    for raw in text.splitlines(keepends=True):
        line: Any = None
        try:
            line = json.loads(raw)
            whole = isinstance(line, dict) and type(line["step"]) is int and raw.endswith(b"\n")
        except (ValueError, KeyError, RecursionError):
            whole = False
        if whole:
            lines.append(line)
        else:
            damaged += 1
    return lines, damaged


def first_metrics(folder: Path) -> dict[str, Any] | None:
    """The first logged step of a run, or None."""
    return next((line for line in read_log(folder)[0] if "loss" in line), None)


def hours_of_training(folder: Path, images_per_step: int) -> float:
    """Hours that the logged steps of a run took, resumed or not, without the scoring between them."""
    timed = [line for line in read_log(folder)[0] if line.get("images_per_s")]
    before = [0, *(line["step"] for line in timed)]
    return (
        sum(
            (line["step"] - start) * images_per_step / line["images_per_s"]
            for line, start in zip(timed, before, strict=False)
        )
        / 3600
    )


def digest_log(folder: Path, size: int | None = None) -> str:
    """Size and hash of the first ``size`` bytes of a log, of all of them if None; for the checkpoint."""
    path = folder / "log.jsonl"
    text = path.read_bytes()[:size] if path.is_file() else b""
    return f"{len(text)} {hashlib.sha256(text).hexdigest()}"


def truncate_log(folder: Path, step: int, digest: str = "") -> None:
    """Drop the lines that a killed run wrote after its last checkpoint; its continuation writes them again.

    Lines that cannot be read are dropped, too, and told. So is a log that is gone, or other than its `digest_log` says.
    """
    path = folder / "log.jsonl"
    if digest and digest_log(folder, int(digest.partition(" ")[0])) != digest:
        sys.stderr.write(f"comad: {path} was changed or damaged since the last checkpoint; its figures may be wrong.\n")
    lines, damaged = read_log(folder)
    kept = [line for line in lines if line["step"] <= step]
    if damaged:
        sys.stderr.write(f"comad: {path}: {damaged} damaged lines are dropped; the run goes on without them.\n")
    if step and not kept:
        sys.stderr.write(f"comad: {path} has none of the {step} steps that are done; it goes on with the next.\n")
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


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
        stream: Any = sys.stderr,
        name: str = "",
    ):
        self.total_steps = total_steps
        self.stream = stream
        self.title = f"{name}: " if name else ""
        self.in_place = stream is not None and stream.isatty() and not name
        self.path = folder / "log.jsonl" if folder else None
        self.file = self.path.open("a", encoding="utf-8") if self.path else None
        self.writer = _tensorboard_writer(folder) if folder and tensorboard else None
        self.wandb = _wandb_run(folder) if folder and wandb else None
        self.start = time.monotonic()
        self.last_knn: float | None = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.in_place:
            self._print("")
        if self.file and self.path:
            with naming(self.path):
                self.file.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics of one step."""
        if self.file is None or self.path is None:
            return
        if not self.path.exists():
            self.say(f"WARNING at step {step}: {self.path} is gone; the run goes on, with a new log.")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        with naming(self.path):
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
        self._print(f"\r\033[K{line}" if self.in_place else line, end="" if self.in_place else "\n")

    def say(self, message: str) -> None:
        """Show a message on a line of its own."""
        self._print(("\r\033[K" if self.in_place else "") + message)

    def _print(self, text: str, end: str = "\n") -> None:
        """Show it; a terminal that is gone does not end the run, whose numbers are in the log."""
        try:
            if self.stream:
                print(text, end=end, file=self.stream, flush=True)
        except OSError:
            self.stream, self.in_place = None, False


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
