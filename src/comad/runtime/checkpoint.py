"""Checkpoints: atomic, tensors and plain values only, with everything a bitwise resume needs."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Capture the state of every generator in this process: torch, CUDA, numpy, Python."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": json.dumps([version, list(internal), gauss]),
        "numpy": json.dumps([str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]),
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put every generator back to a captured state."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, internal, gauss = json.loads(states["python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = json.loads(states["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


class RngState:
    """torch's generators, of the CPU and of the GPU in use, in a state of one's own: what others draw changes nothing.

    It starts with the state that they are in when it is made.
    """

    def __init__(self):
        self._capture()

    def _capture(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    @contextmanager
    def use(self) -> Iterator[None]:
        """Draw from them within the context."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        yield
        self._capture()


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write ``step-NNNNNNNN.pt`` by way of a temporary file, then remove all but the last ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = folder / ".writing"  # what a killed process leaves here, the next one overwrites
    try:
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling objects.

    Raises:
        ValueError: the file is damaged or was not written by comad.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint; remove it to resume from the one before.") from error


def differences(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the leaves in which two nested dictionaries differ, as ``a.b: old → new``."""
    lines = []
    for key in sorted({*stored, *current}):
        old, new = stored.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} → {new}")
    return lines
