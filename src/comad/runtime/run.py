"""Where a run lives: its options, its folder, the engine, and how it may end early."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor

from comad.runtime.atomic import check_name, remove_leftovers
from comad.runtime.checkpoint import newest_checkpoint, set_aside_after
from comad.runtime.lock import LOCK, lock_folder
from comad.runtime.log import truncate_log
from comad.runtime.optim import OptimConfig
from comad.runtime.options import COMMON, NO_EFFECT
from comad.runtime.processes import layout, watch_children
from comad.runtime.progress import warn

Metrics = Mapping[str, Any]
LossAndMetrics = tuple[Tensor, Callable[[], Metrics]]
"""Of a forward pass; the metrics are computed only for steps that are logged."""


RUN_FILES = ("checkpoints", "config.yaml", "log.jsonl", "data.npy", "facts.json", "teacher-cache", "tensorboard")
"""Of these one at least is in the folder of a run that has begun."""


INTERRUPTS: list[int] = []
"""Signals for which `interrupt` raised."""


def interrupt(number: int, frame: object) -> None:
    """A handler of signals that raises KeyboardInterrupt, and notes it: libraries turn that into errors of theirs."""
    INTERRUPTS.append(number)
    raise KeyboardInterrupt


MEETING = timedelta(hours=6)
"""So long processes wait for one that scores a network; one that is gone is noticed at once."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run after a checkpoint was written."""


class TrainingError(Exception):
    """The run cannot go on: a non-finite loss or teacher, images that do not come, a collapse that is to end it."""


Precision = Literal["bf16", "fp16", "tf32", "fp32"]


def quickest_precision() -> Precision:
    """bf16 on a GPU and on a CPU with AVX-512; fp32 on others, where torch has no quick products in bf16."""
    return "bf16" if torch.cuda.is_available() or "AVX512" in torch.backends.cpu.get_cpu_capability() else "fp32"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it is watched.

    Args:
        out: folder of the run.
        resume: go on from the last checkpoint in ``out``; its options are those of the run, others may not change the
            result. ``auto`` begins where there is none: one command for a scheduler, whatever happened before.
        seed: of weights, order, views and masks.
        precision: of matrix products; weights are float32. The default is what is quick here: bf16 on a GPU and on a
            CPU with AVX-512, else fp32. ``fp16`` scales the loss, for GPUs without bf16; ``tf32``
            rounds inputs to 10 bits, on GPUs that have it.
        log_every: optimiser steps between two log lines.
        probe_every: optimiser steps between two kNN scores on the validation part; 0: only at the end.
        checkpoint_every: optimiser steps between two checkpoints.
        keep: how many checkpoints to keep.
        tensorboard: write the numbers for TensorBoard too.
        wandb: send the numbers to Weights & Biases too.
        devices: processes on this host, one per GPU or CPU share; under torchrun or srun those that it started, on all
            its hosts.
        threads: CPU threads of the training step; 0: torch's choice. With small images fewer are faster where the
            loader's workers need cores, for threads wait for each other.
        stop_on_collapse: end the run when it is found to have collapsed, rather than only warn.
    """

    out: str = field(default="runs/demo", metadata=COMMON | NO_EFFECT)
    resume: bool | Literal["auto"] = field(default=False, metadata=COMMON | NO_EFFECT)
    seed: int = field(default=0, metadata=COMMON)
    precision: Precision = field(default_factory=quickest_precision, metadata=COMMON)
    log_every: int = field(default=20, metadata=NO_EFFECT)
    probe_every: int = field(default=0, metadata=NO_EFFECT)
    checkpoint_every: int = field(default=200, metadata=NO_EFFECT)
    keep: int = field(default=2, metadata=NO_EFFECT)
    tensorboard: bool = field(default=True, metadata=NO_EFFECT)
    wandb: bool = field(default=False, metadata=NO_EFFECT)
    devices: int = field(default=1, metadata=COMMON | NO_EFFECT)
    threads: int = field(default=0, metadata=NO_EFFECT)
    stop_on_collapse: bool = field(default=False, metadata=NO_EFFECT)

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"--run.{name.replace('_', '-')} {getattr(self, name)} is too small; use 1 or more.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} is no number of 32 bits; use one from 0 on.")

    @property
    def autocast(self) -> torch.dtype | None:
        """Type to score in under autocast; None computes as the weights are."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)


def start_fabric(run: RunConfig, optim: OptimConfig | None = None) -> Fabric:
    """Start the engine: one process, or DDP over several on one host or more, on NVIDIA's GPUs or the CPU.

    Args:
        run: its options.
        optim: its batch is that of all processes together, which must be able to share it.

    Raises:
        ValueError: see `comad.runtime.processes.layout`; or the batch cannot be shared.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of dimensions of one element
    here, hosts, environment = layout(run.devices)
    if optim and optim.pass_size % (here * hosts):
        flag = "microbatch" if optim.microbatch else "batch-size"
        raise ValueError(
            f"--optim.{flag} {optim.pass_size} cannot be shared by {here * hosts} processes; use a multiple."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high" if run.precision == "tf32" else "highest")
    os.environ["LOCAL_WORLD_SIZE"] = str(here)  # the loaders share this host's cores
    fabric = Fabric(
        accelerator=device,
        devices=here,
        num_nodes=hosts,
        strategy=DDPStrategy(timeout=MEETING) if here * hosts > 1 else "auto",
        plugins=[environment, *_mixed(run.precision, device)],
    )
    fabric.launch()
    watch_children(getattr(fabric.strategy.launcher, "procs", ()))
    return fabric


def _mixed(precision: str, device: str) -> list[MixedPrecision]:
    """Autocast of the engine, which scales the loss for fp16."""
    named: Any = {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(precision)
    return [MixedPrecision(named, device)] if named else []


def open_runs(run: RunConfig, names: Sequence[str], fabric: Fabric) -> list[RunConfig]:
    """Make the folders of the parts of a run, below its own, and take them for this process.

    Returns the run of each part, its ``resume`` a plain yes or no: a part that was killed before its first checkpoint
    does not go on, but begins again. Checkpoints that cannot be read are told and set aside.

    Raises:
        ValueError: there is a run already and ``resume`` is off, another process has it, or there is nothing to resume,
            that is, no part has a checkpoint; with ``auto`` the run begins then.
    """
    out, runs = Path(run.out), [replace(run, out=str(Path(run.out, name))) for name in names]
    held = check_free(run)
    found = [newest_checkpoint(Path(own.out) / "checkpoints") if run.resume else (None, []) for own in runs]
    faults = [fault for _, faults in found for fault in faults]
    begun = [path is not None for path, _ in found]
    _check_checkpoints(run, any(begun), faults)
    if held and not any(begun) and not held & {*RUN_FILES, *names}:
        raise ValueError(f"{run.out!r} holds something else than a run; pass --run.out for a new folder.")
    seen = [path and path.name for path, _ in found]
    if fabric.broadcast(seen) != seen:  # every process looks before one writes
        raise ValueError(f"{run.out!r} has other checkpoints here than on the first host; hosts must share it.")
    fabric.barrier()
    first_for_all(lambda: _lock({out, *(Path(own.out) for own in runs)}), fabric)
    for own, (path, faults) in zip(runs, found, strict=True):
        if fabric.is_global_zero:
            _clean(Path(own.out), path, faults)
    fabric.barrier()
    return [replace(own, resume=going_on) for own, going_on in zip(runs, begun, strict=True)]


def check_free(run: RunConfig) -> set[str]:
    """Refuse a folder with something in it, before anything is loaded. Returns what is there, if it may be.

    Raises:
        ValueError: there is something, and ``resume`` is off; or it is a file.
    """
    out = Path(run.out)
    check_name(out, "--run.out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{run.out!r} is a file; pass --run.out with a folder for the run.")
    held = {path.name for path in out.iterdir()} - {LOCK} if out.exists() else set()
    if held and not run.resume:
        raise ValueError(f"{run.out!r} holds a run already; pass --run.resume to go on or --run.out for a new folder.")
    return held


def _check_checkpoints(run: RunConfig, begun: bool, faults: Sequence[str]) -> None:
    """Refuse to resume what cannot be resumed."""
    if run.resume is True and not begun:
        if faults:
            raise ValueError(f"no checkpoint of {run.out!r} can be read: {' '.join(faults)}")
        raise ValueError(
            f"no checkpoint to resume in {run.out!r}; start without --run.resume, in a new folder, or pass "
            "--run.resume auto, which begins again."
        )


def first_for_all(call: Callable[[], object], fabric: Fabric) -> None:
    """Let the first process do something; if it is refused, all are.

    Raises:
        ValueError: as the first process did.
    """
    refused = ""
    if fabric.is_global_zero:
        try:
            call()
        except ValueError as error:
            refused = str(error)
    if refused := fabric.broadcast(refused):
        raise ValueError(refused)


def _lock(folders: Collection[Path]) -> None:
    """Make folders, and take them."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)


def _clean(out: Path, newest: Path | None, faults: Sequence[str]) -> None:
    """Make a folder what it was when the newest good checkpoint was written, or before the run."""
    for folder in (out, out / "checkpoints"):
        remove_leftovers(folder)
    for fault in faults:
        warn(fault)
    if faults:
        start = f"goes on from {newest.name}" if newest else "begins again"
        warn(f"the run {start}; the damaged files are set aside as .damaged.")
        set_aside_after(out / "checkpoints", newest)
    if newest is None and (out / "log.jsonl").exists():
        truncate_log(out, 0)
