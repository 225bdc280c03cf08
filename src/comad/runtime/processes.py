"""Several processes: who started them, what they agree on in a step, and what is said when one of them is gone."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor
from torch import distributed as dist

PATIENCE = 6.0
"""Seconds that the first process waits for word of the one that is gone."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket", "NCCL", "Gloo", "gloo")
"""Words of torch when another process does not answer."""

_together = False


class Layout(NamedTuple):
    """The processes of a run.

    Attributes:
        here: on this host.
        hosts: how many hosts.
        environment: tells each process its number and where they meet.
    """

    here: int
    hosts: int
    environment: ClusterEnvironment


def layout(devices: int) -> Layout:
    """What torchrun or SLURM started, else so many processes on this host.

    Args:
        devices: as asked for; 1 takes what the launcher says.

    Raises:
        ValueError: the environment is that of several processes, but nobody started them together, or of others than
            were asked for.
    """
    env = os.environ
    tasks, named = int(env.get("SLURM_NTASKS", "1")), env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    if TorchElasticEnvironment.detect():
        launcher, here, hosts = "torchrun", int(env["LOCAL_WORLD_SIZE"]), int(env["GROUP_WORLD_SIZE"])
    elif tasks > 1 and named:
        if "SLURM_STEP_NUM_TASKS" not in env:
            raise ValueError(
                f"this job has {tasks} tasks, and this process was started alone; start it by srun, or by srun "
                "--ntasks=1 for one process."
            )
        launcher, hosts = "srun", int(env.get("SLURM_NNODES", "1"))
        here = tasks // hosts
        if tasks % hosts:
            raise ValueError(f"{tasks} tasks on {hosts} hosts are not as many on each; set --ntasks-per-node.")
        env.setdefault("SLURM_NTASKS_PER_NODE", str(here))  # Fabric asks for it
    else:
        count = int(env.get("WORLD_SIZE", "1"))
        if count > 1 and (count != devices or "LOCAL_RANK" not in env):
            raise ValueError(
                f"WORLD_SIZE says that this is one of {count} processes, which would each train alone; start them by "
                f"torchrun or srun, or unset WORLD_SIZE and set --run.devices {count}."
            )
        return Layout(devices, 1, LightningEnvironment())
    if devices not in (1, here):
        raise ValueError(f"--run.devices {devices}, but {launcher} started {here} on this host; leave the option out.")
    return Layout(here, hosts, TorchElasticEnvironment() if launcher == "torchrun" else SLURMEnvironment())


def refuse_several(devices: int, command: str) -> None:
    """Say that a command is of one process.

    Raises:
        ValueError: several were started, or are to be.
    """
    if (number := math.prod(layout(devices)[:2])) > 1:
        raise ValueError(f"{command} is for one process, not {number}; leave out torchrun, srun and --run.devices.")


@contextmanager
def together() -> Iterator[None]:
    """Within the context all processes do the same, each on its share of a batch, and results are of the whole batch.

    Outside of it, where one of them may be alone, the functions below know of one process.
    """
    global _together
    before, _together = _together, True
    try:
        yield
    finally:
        _together = before


def count() -> int:
    """Processes that share the batch in hand."""
    return dist.get_world_size() if _together and dist.is_initialized() else 1


def sum_of_all(x: Tensor) -> Tensor:
    """Its sum over the processes, without gradient."""
    if count() > 1:
        dist.all_reduce(x := x.detach().clone())
    return x


def mean_of_all(x: Tensor) -> Tensor:
    """Its mean over the processes, without gradient."""
    return sum_of_all(x) / count() if count() > 1 else x


def rows_of_all(x: Tensor) -> Tensor:
    """The rows of all processes in the order of the whole batch, of which each has every n-th. Gradients flow back."""
    if count() == 1:
        return x
    return torch.stack(_Gather.apply(x.contiguous()), dim=1).flatten(0, 1)  # pyright: ignore[reportArgumentType]


def own_rows(x: Tensor) -> Tensor:
    """Of rows of the whole batch those of this process."""
    return x[rank() :: count()] if count() > 1 else x


def collect(x: Tensor, total: int, place: int) -> Tensor:
    """The rows of all processes, so many in all, at the process of number ``place``; the others get none."""
    if count() == 1:
        return x
    device = torch.device("cuda") if dist.get_backend() == "nccl" else x.device
    own = torch.zeros(-(-total // count()), *x.shape[1:], dtype=x.dtype, device=device)
    own[: len(x)] = x
    parts = [torch.empty_like(own) for _ in range(count())] if dist.get_rank() == place else None
    dist.gather(own, parts, dst=place)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].to(x.device) if parts else x[:0]


def rank() -> int:
    """Number of this process among those that share; 0 if it is alone."""
    return dist.get_rank() if count() > 1 else 0


def exchange(found: dict[int, Any]) -> list[Any]:
    """What the processes found, by number from 0, each a part of it: all of it, in order, for every one."""
    parts: list[Any] = [found] * count()
    if count() > 1:
        dist.all_gather_object(parts, found)
    return [value for _, value in sorted((item for part in parts for item in part.items()), key=lambda item: item[0])]


def share_of(number: int) -> int:
    """Of the first images of the whole batch how many this process has, at least one."""
    return max(1, number // count())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        return tuple(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        dist.all_reduce(total := torch.stack(gradients))
        return total[dist.get_rank()]


_children: Sequence[subprocess.Popen] = ()


def watch_children(children: Sequence[subprocess.Popen]) -> None:
    """Remember the processes that this one started, to say which is gone; a second run has those of the first."""
    global _children
    _children = children or _children


def who() -> str:
    """Which of several processes this is, for messages; empty if there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    return f"process {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}"


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def lost_process(error: BaseException) -> str | None:
    """One line, if an error says that another process is gone; it names that one where this process started it."""
    if not who() or not isinstance(error, RuntimeError) or not any(word in str(error) for word in LOST):
        return None
    gone = "another process of this run ended; its own words, or those of torchrun or srun, say which and why"
    until = time.monotonic() + PATIENCE
    while _children and time.monotonic() < until:
        codes = {number: child.poll() for number, child in enumerate(_children, start=1)}
        ended = [(number, code) for number, code in codes.items() if code]
        if ended:
            number, code = ended[0]
            why = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            gone = f"process {number} of this run {why}"
            break
        time.sleep(0.05)
    return f"{gone}; go on with --run.resume."
