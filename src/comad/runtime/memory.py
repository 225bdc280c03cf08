"""Memory: keep what is freed, since the next step asks for the same again; how much was used, and how much there is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> None:
    """Tell glibc not to give large blocks back to the system: on a CPU a step then faults fewer pages.

    Only where glibc is; the demo's step takes about three quarters of the time.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(M_TOP_PAD, 64 * 2**20)


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` start anew; on a CPU only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)


def peak_bytes(device: torch.device) -> int:
    """Most memory at once since `reset_peak`: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _kib("/proc/self/status", "VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes(device: torch.device) -> int:
    """Memory that this process may have in all: what it has and what is free, within the limit of its cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        available = _kib("/proc/self/status", "VmRSS") + _kib("/proc/meminfo", "MemAvailable")
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no limit is "max"
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available


def _kib(path: str, name: str) -> int:
    """A line ``name: number kB`` of a file, in bytes."""
    lines = Path(path).read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
