"""The cache gives back exactly what the teachers computed, and asks them once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from comad.data.loader import Batch
from comad.distill.masking import Masking, Masks
from comad.distill.teacher_cache import TeacherCache
from comad.distill.teaching import Targets
from comad.models.backbone import Tokens

NUM_IMAGES = 10


def batch_of(images: list[int], view: int) -> Batch:
    """The samples of some images: their noise is a function of image and view, as the loader's is."""
    rows = [torch.rand(3, 16, generator=torch.Generator().manual_seed(view * NUM_IMAGES + image)) for image in images]
    index = torch.tensor(images)
    pixels = torch.zeros(len(images), 3, 8, 8, dtype=torch.uint8)
    views = torch.full_like(index, view)
    return Batch((pixels, pixels), torch.stack(rows), index, views, torch.ones_like(index, dtype=torch.bool))


def tokens_of(batch: Batch, masks: Masks, dtype: torch.dtype) -> Targets:
    """Two teachers whose tokens are functions of the sample; the first has no class token."""
    first, second = (
        batch.noise[:, m + 1].gather(1, visible).unsqueeze(-1) * torch.arange(1.0, 5.0 + m)
        for m, visible in enumerate(masks.teachers)
    )
    return Targets((Tokens(None, first.to(dtype)), Tokens(second.mean(dim=1).to(dtype), second.to(dtype))), masks)


class CountedTeachers:
    def __init__(self, dtype: torch.dtype = torch.float32):
        self.calls = 0
        self.dtype = dtype
        self.masking = Masking()

    def ask(self, cache: TeacherCache, images: list[int], view: int) -> tuple[Targets, Targets]:
        """What the cache says, and what is true."""
        batch = batch_of(images, view)
        masks = self.masking(batch.noise)
        return cache(batch, masks, self.computing(batch, masks)), tokens_of(batch, masks, self.dtype)

    def computing(self, batch: Batch, masks: Masks) -> Callable[[], Targets]:
        def compute() -> Targets:
            self.calls += 1
            return tokens_of(batch, masks, self.dtype)

        return compute


def assert_same(found: Targets, true: Targets) -> None:
    assert torch.equal(found.masks.student, true.masks.student)
    for ours, theirs in zip(found.tokens, true.tokens, strict=True):
        assert same(ours.cls, theirs.cls) and same(ours.patches, theirs.patches)


def same(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y is None or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_once_and_returns_exactly_that(dtype):
    cache, teachers = TeacherCache(NUM_IMAGES, 2), CountedTeachers(dtype)
    for view in (0, 1):
        for images in ([0, 3, 7], [1, 2, 9]):
            assert_same(*teachers.ask(cache, images, view))
    assert teachers.calls == 4
    for view in (1, 0, 1):  # later epochs, in another order and other batches
        for images in ([9, 0], [7, 1, 2, 3]):
            assert_same(*teachers.ask(cache, images, view))
    assert teachers.calls == 4


def test_views_of_one_image_are_kept_apart():
    cache, teachers = TeacherCache(NUM_IMAGES, 2), CountedTeachers()
    teachers.ask(cache, [4], 0)
    assert_same(*teachers.ask(cache, [4], 1))
    assert teachers.calls == 2
    first, _ = teachers.ask(cache, [4], 0)
    second, _ = teachers.ask(cache, [4], 1)
    assert teachers.calls == 2 and not torch.equal(first.tokens[0].patches, second.tokens[0].patches)


def test_a_batch_known_only_in_part_is_computed():
    cache, teachers = TeacherCache(NUM_IMAGES, 1), CountedTeachers()
    teachers.ask(cache, [0, 1], 0)
    assert_same(*teachers.ask(cache, [1, 2], 0))
    assert teachers.calls == 2
    assert_same(*teachers.ask(cache, [2, 0, 1], 0))
    assert teachers.calls == 2


def test_what_was_returned_may_be_changed_without_harm():
    cache, teachers = TeacherCache(NUM_IMAGES, 1), CountedTeachers()
    for _ in range(2):
        found, _ = teachers.ask(cache, [5, 6], 0)
        found.tokens[1].patches.zero_()
    assert_same(*teachers.ask(cache, [5, 6], 0))
