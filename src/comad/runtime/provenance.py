"""Which code ran, and on what."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import torch

from comad import __version__


@cache
def code_version() -> str:
    """The version, and the commit where the package is run from its repository: ``0.1.0 (1a2b3c4, changed)``."""
    here = Path(__file__).parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        commit, changed = _git(here, "rev-parse", "--short", "HEAD"), _git(here, "status", "--porcelain", "--", "..")
    except (OSError, subprocess.CalledProcessError):  # an installed package, or no git
        return __version__
    return f"{__version__} ({commit}{', changed' if changed else ''})"


def hardware(device: torch.device, threads: int) -> str:
    """What a run computed on; ``threads`` of 0 are torch's choice."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = threads or torch.get_num_threads()
    return f"{count} CPU thread{'s' if count > 1 else ''}"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
