"""Where a run's numbers go: a JSON line each, TensorBoard, Weights & Biases, one line of progress."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from comad.runtime.atomic import naming, write_text
from comad.runtime.progress import Working, clock, on_terminal, say, show, warn

LINES = 10.0
"""Seconds between two lines of a run that is watched in a file."""


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
        warn(f"{path} was changed or damaged since the last checkpoint; its figures may be wrong.")
    lines, damaged = read_log(folder)
    kept = [line for line in lines if line["step"] <= step]
    if damaged:
        warn(f"{path}: {damaged} damaged lines are dropped; the run goes on without them.")
    if step and not kept:
        warn(f"{path} has none of the {step} steps that are done; it goes on with the next.")
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


class RunLog:
    """Writes metrics of a run to its folder and shows its progress.

    Args:
        folder: the run's folder; None writes and shows nothing: for all processes but the first.
        total_steps: optimiser steps of the whole run, for the ETA.
        tensorboard, wandb: also write there.
        name: of the run, if several run beside each other.
    """

    def __init__(
        self, folder: Path | None, total_steps: int, tensorboard: bool = True, wandb: bool = False, name: str = ""
    ):
        self.total_steps = total_steps
        self.title = f"{name}: " if name else ""
        self.shown = folder is not None
        self.path = folder / "log.jsonl" if folder else None
        self.file = self.path.open("a", encoding="utf-8") if self.path else None
        self.trackers = open_trackers(folder, tensorboard, wandb) if folder else []
        self.bar = Working(f"{self.title}training", total_steps, "steps", lines=False)
        self.last_knn: float | None = None
        self.told = 0.0

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.__exit__(kind, error, trace)
        if self.file and self.path:
            with naming(self.path):
                self.file.close()
        for tracker in self.trackers:
            tracker.close()

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
        for tracker in self.trackers:
            tracker.numbers(step, numbers)
        self.last_knn = metrics.get("knn", self.last_knn)

    def progress(self, step: int, steps_per_s: float, metrics: Mapping[str, Any]) -> None:
        """Show how far the run is: a bar on a terminal, else a line for the first and last step and now and then."""
        if not self.shown:
            return
        knn = f"  knn {self.last_knn:.1f}" if self.last_knn is not None else ""
        numbers = (
            f"{metrics['images_per_s']:.0f} img/s  {metrics['memory_gib']:.1f} GiB  loss {metrics['loss']:.4f}  "
            f"data_wait {metrics['data_wait']:.1f} %{knn}"
        )
        if on_terminal():
            self.bar.advance(step - self.bar.done, numbers)
        elif not self.told or step == self.total_steps or time.monotonic() - self.told >= LINES:
            self.told = time.monotonic()
            left = (self.total_steps - step) / max(steps_per_s, 1e-9)
            say(f"{self.title}step {step}/{self.total_steps}  ETA {clock(left)}  {numbers}")

    def say(self, message: str) -> None:
        """Show a message on a line of its own, even if all is to be quiet."""
        if self.shown:
            show(message)


def memory_gib() -> float:
    """Peak memory in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class TensorBoard:
    """Events in ``tensorboard`` of the run's folder, under the names of ``log.jsonl``."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder = folder / "tensorboard"
        self.writer: Any = SummaryWriter(str(self.folder))
        self.hook = threading.excepthook
        threading.excepthook = self._hide

    def _hide(self, error: threading.ExceptHookArgs) -> None:
        """The writer's thread keeps an error of the disk for the next call, and would print it as well."""
        if not (issubclass(error.exc_type, OSError) and type(error.thread).__name__ == "_AsyncWriterThread"):
            self.hook(error)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the disk refuses is told once: the run does not need these numbers, which are in its log."""
        try:
            yield
        except OSError as error:
            self.writer = None
            warn(f"{self.folder}: {error.strerror or error}; TensorBoard gets no more numbers, they are in log.jsonl.")

    def numbers(self, step: int, values: Mapping[str, int | float]) -> None:
        """Numbers of one step."""
        with self._told():
            for name, value in values.items() if self.writer else ():
                self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Any) -> None:
        """One image: uint8 (H, W, 3)."""
        with self._told():
            if self.writer:
                self.writer.add_image(name, image, step, dataformats="HWC")

    def table(self, step: int, name: str, titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, which TensorBoard shows as Markdown."""
        lines = [titles, ["---"] * len(titles), *rows]
        with self._told():
            if self.writer:
                self.writer.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), step)

    def close(self) -> None:
        """Write what is left."""
        with self._told():
            if self.writer:
                self.writer.close()
        threading.excepthook = self.hook


class WeightsAndBiases:
    """A run of Weights & Biases, see `TensorBoard`; its id is kept in ``wandb.txt``, for a run that goes on."""

    def __init__(self, folder: Path):
        try:
            self.wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise ValueError(
                "Weights & Biases is not installed; pip install 'comad[wandb]' or leave out --run.wandb."
            ) from error
        kept = folder / "wandb.txt"
        given: dict[str, Any] = {"id": kept.read_text().strip()} if kept.is_file() else {}
        options = {"resume": "allow", "reinit": "create_new", **given}
        self.run = self.wandb.init(project="comad", name=folder.name, dir=str(folder), **options)
        write_text(kept, f"{self.run.id}\n")

    def numbers(self, step: int, values: Mapping[str, int | float]) -> None:
        """See `TensorBoard`."""
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: Any) -> None:
        """See `TensorBoard`."""
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def table(self, step: int, name: str, titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """See `TensorBoard`."""
        cells = [[str(cell) for cell in row] for row in rows]
        self.run.log({name: self.wandb.Table(columns=list(titles), data=cells)}, step=step)

    def close(self) -> None:
        """See `TensorBoard`."""
        self.run.finish()


Tracker = TensorBoard | WeightsAndBiases
"""Where numbers, images and tables of a run go beside its folder."""


def open_trackers(folder: Path, tensorboard: bool, wandb: bool) -> list[Tracker]:
    """Those that a run asks for; a run that is over is opened again.

    Raises:
        ValueError: Weights & Biases is not installed.
    """
    return [kind(folder) for kind, wanted in ((TensorBoard, tensorboard), (WeightsAndBiases, wandb)) if wanted]
