"""The cache gives back exactly what the teachers computed, asks each once, and refuses a disk that is too small."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from comad.data.loader import Batch
from comad.distillation import cache as cache_module
from comad.distillation.cache import PASS_ROWS, CacheSpec, TeacherCache
from comad.distillation.features import TeacherOutput
from comad.distillation.masking import Masks, Superset

NUM_IMAGES = 10
MASKING = Superset()


def batch_of(images: list[int], view: int, num_teachers: int = 2) -> Batch:
    """The samples of some images: pixels and noise are functions of image and view, as the loader's are."""
    generators = [torch.Generator().manual_seed(view * NUM_IMAGES + image) for image in images]
    pixels = torch.stack([torch.randint(0, 256, (3, 8, 8), generator=g, dtype=torch.uint8) for g in generators])
    noise = torch.stack([torch.rand(1 + num_teachers, 16, generator=g) for g in generators])
    index = torch.tensor(images)
    views = torch.full_like(index, view)
    return Batch((pixels, pixels), noise, index, views, torch.ones_like(index, dtype=torch.bool))


def tokens_of(m: int, batch: Batch, masks: Masks) -> TeacherOutput:
    """Teachers whose tokens are functions of the sample; the first has no class token."""
    seen = batch.noise[:, m + 1].gather(1, masks.teachers[m]).unsqueeze(-1)
    patches = (seen * torch.arange(1.0, 5.0 + m)).to((torch.float32, torch.bfloat16)[m % 2])
    return TeacherOutput(patches.mean(dim=1) if m else None, patches)


class CountedTeachers:
    """A cache in a folder, and how often each teacher was asked."""

    def __init__(self, folder: Path, num_teachers: int = 2, num_views: int = 2, key: int = 0):
        self.asked = [0] * num_teachers  # samples
        self.passes: list[list[int]] = [[] for _ in range(num_teachers)]
        self.examples = 0
        keys = [(f"t{m}", {"place": m, "key": key}) for m in range(num_teachers)]
        self.said: list[str] = []
        spec = CacheSpec(folder, keys, NUM_IMAGES, num_views, "computed", self._example)
        stores = spec.stores()
        spec.check_room(stores, self.said.append)
        self.cache = spec.open(stores)

    def _example(self, m: int) -> TeacherOutput:
        self.examples += 1
        batch = batch_of([0], 0, len(self.asked))
        return tokens_of(m, batch, MASKING(batch.noise))

    def ask(self, images: list[int], view: int) -> None:
        """Compare what the cache says with what is true."""
        batch = batch_of(images, view, len(self.asked))
        masks = MASKING(batch.noise)
        found = self.cache(batch, [batch.views[0]] * len(self.asked), masks, self._computing(batch, masks))
        for m, output in enumerate(found):
            true = tokens_of(m, batch, masks)
            assert same(output.cls, true.cls) and same(output.patches, true.patches)
            output.patches.zero_()  # what was returned may be changed without harm

    def _computing(self, batch: Batch, masks: Masks) -> Callable[[int], TeacherOutput]:
        def compute(m: int, rows: Tensor) -> TeacherOutput:
            self.passes[m].append(len(rows))
            self.asked[m] += len(set(rows.tolist()))
            output = tokens_of(m, batch, masks)
            return TeacherOutput(None if output.cls is None else output.cls[rows], output.patches[rows])

        return compute


def same(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y is None or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))


def test_computes_once_and_returns_exactly_that(tmp_path):
    teachers = CountedTeachers(tmp_path)
    for view in (0, 1):
        for images in ([0, 3, 7], [1, 2, 9]):
            teachers.ask(images, view)
    assert teachers.asked == [12, 12]
    for view in (1, 0, 1):  # later epochs, in another order and other batches
        for images in ([9, 0], [7, 1, 2, 3]):
            teachers.ask(images, view)
    assert teachers.asked == [12, 12]


def test_of_a_batch_known_in_part_the_rest_is_computed_in_passes_of_as_many_rows_as_ever(tmp_path):
    teachers = CountedTeachers(tmp_path)
    teachers.ask([0, 1], 0)
    teachers.ask([1, 2], 0)
    assert teachers.asked == [3, 3]
    teachers.ask([2, 0, 1], 0)
    assert teachers.asked == [3, 3]
    assert teachers.passes == [[PASS_ROWS["cpu"]] * 2] * 2


def test_a_later_run_asks_nobody_and_one_more_teacher_alone_is_asked(tmp_path):
    first = CountedTeachers(tmp_path)
    first.ask([4, 5], 1)
    second = CountedTeachers(tmp_path)
    second.ask([5, 4], 1)
    assert second.asked == [0, 0] and second.examples == 0 and "t0 2, t1 2" in second.said[0]
    third = CountedTeachers(tmp_path, num_teachers=3)
    assert third.examples == 1 and "t0 2, t1 2, t2 0" in third.said[0]


def test_another_key_is_another_cache(tmp_path):
    CountedTeachers(tmp_path).ask([4], 0)
    other = CountedTeachers(tmp_path, key=1)
    other.ask([4], 0)
    assert other.asked == [1, 1]


def test_noise_of_one_more_teacher_leaves_the_others_alone():
    rows = []
    for count in (3, 4):
        torch.manual_seed(5)
        rows.append(torch.rand(count, 197))
    assert torch.equal(rows[0], rows[1][:3])


def test_a_small_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"needs .* MB in .*, where .* are free; name another --cache-folder") as error:
        CountedTeachers(tmp_path / "cache")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    usage.free = 10**9
    teachers = CountedTeachers(tmp_path / "cache")
    assert "still to write" in teachers.said[0]
    assert isinstance(teachers.cache, TeacherCache) and shutil.disk_usage(tmp_path) is usage


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="name another --cache-folder"):
        CountedTeachers(tmp_path / "file" / "cache")
