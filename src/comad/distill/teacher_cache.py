"""Teacher outputs kept in memory and used again: exact, for fixed views make the same inputs in every epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from comad.data.loader import Batch
from comad.distill.masking import Masks
from comad.distill.teaching import Targets
from comad.models.backbone import Tokens


class TeacherCache:
    """One row per image and view, in the precision the teachers computed in.

    Args:
        num_images: of the training set.
        num_views: fixed views per image.
    """

    def __init__(self, num_images: int, num_views: int):
        self.num_images = num_images
        self.known = torch.zeros(num_images * num_views, dtype=torch.bool)
        self.stores: list[tuple[Tensor | None, Tensor]] = []

    def __call__(self, batch: Batch, masks: Masks, compute: Callable[[], Targets]) -> Targets:
        """The targets of a batch: from memory if all its rows are known, else computed and kept."""
        rows = (batch.view * self.num_images + batch.image).cpu()
        device = batch.noise.device
        if not bool(self.known[rows].all()):
            targets = compute()
            self._keep(rows, targets)
            return targets
        found = tuple(_read(store, rows, device) for store in self.stores)
        num_teachers = len(masks.teachers)
        return Targets(found[:num_teachers], masks, found[num_teachers:])

    def _keep(self, rows: Int[Tensor, " B"], targets: Targets) -> None:
        if not self.stores:
            rows_kept = len(self.known)
            self.stores = [
                (None if t.cls is None else _empty(t.cls, rows_kept), _empty(t.patches, rows_kept))
                for t in (*targets.tokens, *targets.qkv)
            ]
        for (cls, patches), tokens in zip(self.stores, (*targets.tokens, *targets.qkv), strict=True):
            patches[rows] = tokens.patches.cpu()
            if cls is not None and tokens.cls is not None:
                cls[rows] = tokens.cls.cpu()
        self.known[rows] = True


def _empty(like: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, *like.shape[1:], dtype=like.dtype)


def _read(store: tuple[Tensor | None, Tensor], rows: Tensor, device: torch.device) -> Tokens:
    cls, patches = store
    return Tokens(None if cls is None else cls[rows].to(device), patches[rows].to(device))
