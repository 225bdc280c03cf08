"""Momentum networks: moving averages of trained ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightly.models.utils import update_momentum
from torch import nn


class Momentum:
    """Moves networks towards trained ones, once per optimiser step, by a share that falls to 0 along a cosine.

    Args:
        start: share of the old values that is kept at the start of the run; at its end all is kept.
        pairs: (trained, moving).
    """

    def __init__(self, start: float, pairs: Sequence[tuple[nn.Module, nn.Module]]):
        self.start = start
        self.pairs = pairs
        self.last: float | None = None

    def move(self, progress: float) -> None:
        """Move, unless it was done for this share of the run: parts of one accumulated batch share it."""
        if progress == self.last:
            return
        self.last = progress
        kept = 1 - (1 - self.start) * (math.cos(math.pi * progress) + 1) / 2
        for trained, moving in self.pairs:
            update_momentum(trained, moving, kept)
