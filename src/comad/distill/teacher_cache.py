"""Teacher outputs kept on disk and used again: exact, for fixed views make the same inputs in every epoch."""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comad import __version__
from comad.data.images import ImageSet
from comad.data.loader import Batch, ViewDataset
from comad.distill.config import Method
from comad.distill.masking import Masks
from comad.distill.teacher_store import Storage, TeacherStore, key_name, leaves
from comad.distill.teaching import Said, Targets, gathered
from comad.models.quantized import precision_of
from comad.models.teachers import Teacher

FORMAT = 1
"""Of the files and of what decides over views and masks; a change makes old folders unknown."""
NOT_OF_THE_OUTPUT = ("name", "source", "about", "licence")
"""Facts on a teacher's card that its outputs do not depend on."""


class TeacherCache:
    """One store per teacher, each with one row per image and view.

    Args:
        stores: of every teacher, open.
        num_images: of the training set.
    """

    def __init__(self, stores: Sequence[TeacherStore], num_images: int):
        self.stores = stores
        self.num_images = num_images

    def __call__(self, batch: Batch, masks: Masks, compute: Callable[[int, Tensor], Said]) -> Targets:
        """The targets of a batch, from disk; what is not known yet is computed and kept.

        Args:
            batch: its first view is the teachers'.
            masks: which patches each teacher sees.
            compute: (number of a teacher, samples of the batch) → what it says of these samples.
        """
        rows = (batch.view * self.num_images + batch.image).cpu()
        views = batch.views[0].cpu().contiguous()
        said = []
        for m, (store, visible) in enumerate(zip(self.stores, masks.teachers, strict=True)):
            inputs = input_checksums(views, visible)
            new = (~store.known(rows, inputs)).nonzero().flatten()
            if len(new):
                store.write(rows[new], [inputs[i] for i in new.tolist()], compute(m, new))
            said.append(_to(store.read(rows), batch.noise.device))
        return gathered(said, masks)


def open_cache(
    folder: Path,
    keys: Sequence[tuple[str, Mapping[str, Any]]],
    shape: tuple[int, int],
    example: Callable[[int], Any],
    storage: Storage,
    say: Callable[[str], object],
) -> TeacherCache:
    """Open the stores of all teachers in a folder; say first how large they are and look whether the disk has room.

    Args:
        folder: of the cache; several runs may share it.
        keys: name of each teacher and everything that decides what it says.
        shape: images of the training set, fixed views of each.
        example: number of a teacher → what it says of one sample; not called for a teacher that the folder knows.
        storage: how numbers are kept.
        say: shows a message.

    Raises:
        ValueError: the disk is too small, or the folder cannot be written.
    """
    stores = closed_stores(folder, keys, shape, example, storage)
    check_room(folder, [name for name, _ in keys], stores, say)
    try:
        return TeacherCache([store.open() for store in stores], shape[0])
    except OSError as error:
        raise ValueError(f"cannot write the teacher cache: {error}; name another --cache-folder.") from error


def closed_stores(
    folder: Path,
    keys: Sequence[tuple[str, Mapping[str, Any]]],
    shape: tuple[int, int],
    example: Callable[[int], Any],
    storage: Storage,
) -> list[TeacherStore]:
    """The store of every teacher in a folder, of which nothing is made yet; arguments as of `open_cache`."""
    stores = []
    for m, (name, key) in enumerate(keys):
        key = {**key, "format": FORMAT, "version": __version__, "shape": shape, "storage": storage}
        path = folder / key_name(name, key)
        stores.append(TeacherStore(path, shape[0] * shape[1], storage, lambda m=m: example(m)))
    return stores


def check_room(
    folder: Path, names: Sequence[str], stores: Sequence[TeacherStore], say: Callable[[str], object]
) -> list[int]:
    """Say how large the stores are, and look whether the disk has room. Returns how many rows each knows already.

    Raises:
        ValueError: the disk is too small.
    """
    known = [store.num_known() for store in stores]
    needed = sum(store.row_bytes * (store.num_rows - count) for store, count in zip(stores, known, strict=True))
    total, rows = sum(store.num_bytes for store in stores), stores[0].num_rows
    counts = ", ".join(f"{name} {count}" for name, count in zip(names, known, strict=True))
    say(f"teacher cache: {_size(total)} in {folder}, {_size(needed)} still to write ({rows} rows; known: {counts})")
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise ValueError(
            f"the teacher cache needs {_size(needed)} in {str(folder)!r}, where {_size(free)} are free; name another "
            "--cache-folder, lower --loader.fixed-views, set --cache-storage int8, or pass --no-cache-teachers."
        )
    return known


def key_of(teacher: Teacher, place: int, views: ViewDataset, method: Method) -> dict[str, Any]:
    """Everything that decides what a teacher says of the samples of a run.

    The number of teachers is not part of it: masks are drawn row by row, so that a further teacher leaves the others'
    alone. Its own place is.
    """
    card = teacher.card.as_dict()
    make = {name: repr(value) for name, value in vars(views.make).items() if name != "noise_rows"}
    return {
        "teacher": {name: value for name, value in card.items() if name not in NOT_OF_THE_OUTPUT},
        "image_size": teacher.backbone.grid[0] * teacher.backbone.patch_size,
        "dtype": precision_of(teacher.backbone),
        "place": place,
        "masking": repr(replace(method.masking, hidden="drop", unmasked_share=0.0)),  # these are the student's alone
        "reads": repr(method.reads),
        "views": make,
        "seed": views.seed,
        "images": _digest(views.images),
    }


def input_checksums(views: Tensor, visible: Tensor | None) -> list[int]:
    """CRC-32 of the pixels and the visible patches of each sample."""
    sums = [zlib.crc32(view.data) for view in views.numpy()]
    if visible is None:
        return sums
    return [zlib.crc32(row.data, start) for row, start in zip(visible.cpu().numpy(), sums, strict=True)]


def _digest(images: ImageSet) -> str:
    digest = hashlib.sha256(images.name.encode("utf-8", "surrogateescape"))
    for index in range(len(images)):
        digest.update(images.path(index).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _to(value: Any, device: torch.device) -> Any:
    """A nest of tensors on a device."""
    if not leaves(value) or all(leaf.device == device for leaf in leaves(value)):
        return value
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    parts = [None if part is None else _to(part, device) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
