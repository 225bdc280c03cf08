"""Checkpoints: atomic, checked, tensors and plain values only, with everything a bitwise resume needs."""

from __future__ import annotations

import errno
import json
import random
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comad.runtime.atomic import replacing

PARTS = {"step", "module", "optimizer", "average", "random", "identity"}
"""What a checkpoint of a run holds."""


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
    """Write ``step-NNNNNNNN.pt`` by way of a temporary file, then remove all but the last ``keep``.

    Raises:
        OSError: the disk is full or cannot be written; the checkpoints before are still there.
    """
    path = folder / f"step-{step:08d}.pt"
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # torch's words for a failed write
            cause = error.__context__ if isinstance(error.__context__, OSError) else None
            number = cause.errno if cause and cause.errno else errno.ENOSPC
            raise OSError(number, cause.strerror if cause else "cannot be written", str(path)) from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8,}", path.stem))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling objects, after a look at the checksum of each of its records.

    Raises:
        ValueError: the file is damaged or was not written by comad.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if record := archive.testzip():
                raise ValueError(f"the checksum of {record} is wrong")
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint; remove it to resume from the one before.") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is not a readable checkpoint; remove it to resume from the one before.")
    return stored


def check_parts(stored: Mapping[str, Any], path: Path) -> None:
    """Look whether a checkpoint has all parts, and the step of its name.

    Raises:
        ValueError: it does not.
    """
    if missing := PARTS - set(stored):
        raise ValueError(f"{path} is no checkpoint of this version: it has no {', '.join(sorted(missing))}.")
    if not isinstance(stored["step"], int) or path.stem != f"step-{stored['step']:08d}":
        raise ValueError(f"{path} says that it is of step {stored['step']}, and its name says another.")


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, and of each newer one what is wrong with it."""
    faults = []
    for path in reversed(checkpoints(folder)):
        try:
            check_parts(load_checkpoint(path), path)
        except ValueError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


def set_aside_after(folder: Path, path: Path | None) -> None:
    """Rename the checkpoints after a good one to ``.damaged``, so that none of them is taken for the newest."""
    for newer in checkpoints(folder):
        if path is None or newer > path:
            newer.replace(newer.with_suffix(".damaged"))


def differences(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the leaves in which two nested dictionaries differ, as ``a.b: old → new``, and branches gone or new."""
    lines = []
    for key in sorted({*stored, *current}):
        old, new = stored.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif isinstance(old or new, Mapping):
            lines.append(f"{prefix}{key}: {'gone' if new is None else 'new'}")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} → {new}")
    return lines
