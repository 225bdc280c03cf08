"""Teacher outputs kept on disk and used again: exact, for fixed views make the same inputs in every epoch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from comad.data.loader import Batch
from comad.distillation.features import TeacherOutput
from comad.distillation.masking import Masks
from comad.models.backbone import Tokens
from comad.runtime.atomic import naming, write_text
from comad.runtime.progress import track
from comad.runtime.seal import KEY, sealed

FORMAT = 5
"""Of the files and of what decides over views and masks; a change makes old folders unknown."""

PASS_ROWS = {"cpu": 16, "cuda": 64}
"""Samples in a pass of a teacher whose outputs are kept, always so many: kernels and compiled teachers meet one shape.
The last bit of an output may depend on its place in the pass; what was kept is read back as it was computed."""

Storage = Literal["computed", "int8"]
"""Numbers as they were computed, or in 8 bits with one scale per token."""

FIELDS = ("cls", "patches", "qkv_cls", "qkv_patches")
"""The tensors of a `TeacherOutput`, in the order in which a row holds them."""


class Leaf(NamedTuple):
    """One tensor of a row: its type, and its shape without the batch."""

    dtype: str
    shape: tuple[int, ...]

    def stored(self, storage: Storage) -> tuple[Leaf, ...]:
        """The tensors that it is kept as."""
        if storage == "int8" and getattr(torch, self.dtype).is_floating_point:
            return Leaf("int8", self.shape), Leaf("float32", (*self.shape[:-1], 1))
        return (self,)

    @property
    def num_bytes(self) -> int:
        """Bytes in a row, rounded up so that the next tensor is aligned."""
        size = math.prod(self.shape) * getattr(torch, self.dtype).itemsize
        return -(-size // 8) * 8


class TeacherStore:
    """Rows of one teacher in a folder of its own. Several processes of a machine may share it.

    A row has a checksum over what went in and what came out. A row that was not written to its end, or that was
    computed from another input, does not match it and counts as unknown.

    Args:
        folder: made if need be.
        num_rows: rows that it has room for.
        storage: how numbers are kept.
        example: computes one row (leading dimension 1), asked for only if the folder is new or its layout damaged.
    """

    storage: Storage

    def __init__(self, folder: Path, num_rows: int, storage: Storage, example: Callable[[], TeacherOutput]):
        self.folder, self.num_rows, self.storage = folder, num_rows, storage
        self.leaves = _read_layout(folder / "layout.json") or {
            name: Leaf(str(part.dtype).removeprefix("torch."), tuple(part.shape[1:]))
            for name, part in _tensors(example()).items()
        }
        self.parts = [part for leaf in self.leaves.values() for part in leaf.stored(storage)]
        self.row_bytes = sum(part.num_bytes for part in self.parts)
        self.checked = torch.zeros(num_rows, dtype=torch.bool)

    @property
    def num_bytes(self) -> int:
        """Size of the whole store."""
        return self.num_rows * (self.row_bytes + 4)

    @property
    def num_taken(self) -> int:
        """Bytes of the disk that its files take already."""
        files = [self.folder / name for name in ("rows.bin", "checks.bin")]
        return sum(path.stat().st_blocks * 512 for path in files if path.is_file())

    def num_known(self) -> int:
        """Rows that have a checksum; 0 if the folder does not exist yet."""
        path = self.folder / "checks.bin"
        return int(np.count_nonzero(np.fromfile(path, np.uint32))) if path.is_file() else 0

    def open(self) -> TeacherStore:
        """Make or open the files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = _open_at_size(self.folder / "rows.bin", self.num_rows * self.row_bytes)
        os.close(_open_at_size(self.folder / "checks.bin", self.num_rows * 4))
        name = str(self.folder / "rows.bin")
        self.mapped = torch.from_file(name, shared=True, size=self.num_rows * self.row_bytes, dtype=torch.uint8)
        self.mapped = self.mapped.view(self.num_rows, self.row_bytes)
        self.checks = np.memmap(self.folder / "checks.bin", np.uint32, "r+")
        write_text(self.folder / "layout.json", json.dumps(sealed(self.leaves)))  # last: without it the folder is new
        return self

    def known(self, rows: Int[Tensor, " B"], inputs: Sequence[int]) -> Bool[Tensor, " B"]:
        """Which rows can be read.

        Args:
            rows: numbers of rows.
            inputs: checksum of what each row is computed from.
        """
        known = self.checked[rows]
        new = (~known & torch.from_numpy(self.checks[rows.numpy()] != 0)).nonzero().flatten()
        if len(new):
            sums = checksums(self.mapped[rows[new]], [inputs[i] for i in new.tolist()])
            known[new] = torch.from_numpy(self.checks[rows[new].numpy()] == sums)
            self.checked[rows] = known
        return known

    def read(self, rows: Int[Tensor, " B"]) -> TeacherOutput:
        """The outputs of known rows."""
        pieces = iter(self.mapped[rows].split([part.num_bytes for part in self.parts], dim=1))

        def take(part: Leaf) -> Tensor:
            dtype = getattr(torch, part.dtype)
            data = next(pieces)[:, : math.prod(part.shape) * dtype.itemsize].contiguous()
            return data.view(dtype).view(len(rows), *part.shape)

        found = {}
        for name, leaf in self.leaves.items():
            numbers, *scale = (take(part) for part in leaf.stored(self.storage))
            found[name] = (numbers * scale[0]).to(getattr(torch, leaf.dtype)) if scale else numbers
        qkv = Tokens(found.get("qkv_cls"), found["qkv_patches"]) if "qkv_patches" in found else None
        return TeacherOutput(found.get("cls"), found["patches"], (), qkv)

    def write(self, rows: Int[Tensor, " B"], inputs: Sequence[int], output: TeacherOutput) -> None:
        """Keep what was computed: the numbers first, then the checksum that makes them believed."""
        flat = []
        for name, tensor in _tensors(output).items():
            stored = self.leaves[name].stored(self.storage)
            for part, kept in zip(_quantized(tensor) if len(stored) == 2 else (tensor,), stored, strict=True):
                data = part.detach().cpu().contiguous().flatten(1).view(torch.uint8)
                flat.append(torch.nn.functional.pad(data, (0, kept.num_bytes - data.shape[1])))
        packed = torch.cat(flat, dim=1)
        for row, data in zip(rows.tolist(), packed.numpy(), strict=True):
            with naming(self.folder / "rows.bin"):
                os.pwrite(self.rows, data.data, row * self.row_bytes)
        self.checks[rows.numpy()] = checksums(packed, inputs)
        self.checked[rows] = True


class TeacherCache:
    """One store per teacher, each with one row per image and view.

    Args:
        stores: of every teacher, open.
        num_images: of the training set.
    """

    def __init__(self, stores: Sequence[TeacherStore], num_images: int):
        self.stores = stores
        self.num_images = num_images

    def __call__(
        self, batch: Batch, views: Sequence[Tensor], masks: Masks, compute: Callable[[int, Tensor], TeacherOutput]
    ) -> list[TeacherOutput]:
        """The teacher outputs for a batch, from disk; what is not known yet is computed and kept.

        Args:
            batch: which images and views.
            views: what each teacher sees.
            masks: which patches each teacher sees.
            compute: number of a teacher and rows of the batch, int64 (n,) → its output for them; `PASS_ROWS` at a time,
                filled up with the first of them.
        """
        rows = (batch.view * self.num_images + batch.image).cpu()
        outputs = []
        for m, (store, view, visible) in enumerate(zip(self.stores, views, masks.teachers, strict=True)):
            inputs = input_checksums(view.cpu().contiguous(), visible)
            device = batch.noise.device
            size = PASS_ROWS.get(device.type, 16)
            unknown = (~store.known(rows, inputs)).nonzero().flatten()
            for new in unknown.split(size) if len(unknown) else ():
                filled = torch.cat([new, new[:1].expand(size - len(new))]).to(device)
                own = _mapped(compute(m, filled), lambda part, new=new: part[: len(new)])
                store.write(rows[new], [inputs[i] for i in new.tolist()], own)
            outputs.append(_mapped(store.read(rows), lambda part, to=device: part.to(to, non_blocking=True)))
        return outputs


class CacheSpec(NamedTuple):
    """What a cache is of.

    Attributes:
        folder: where; several runs may share it.
        keys: name of each teacher, and everything that decides its outputs.
        num_images, num_views: of the training set, and fixed views of each.
        storage: how numbers are kept.
        example: number of a teacher → its output for one sample; not called for a teacher that the folder knows.
    """

    folder: Path
    keys: Sequence[tuple[str, Mapping[str, Any]]]
    num_images: int
    num_views: int
    storage: Storage
    example: Callable[[int], TeacherOutput]

    def stores(self, folder: Path | None = None) -> list[TeacherStore]:
        """The store of every teacher, of which nothing is made yet; in another folder if one is named."""
        made = []
        for m, (name, key) in enumerate(self.keys):
            shape = (self.num_images, self.num_views)
            path = (folder or self.folder) / key_name(
                name, {**key, "format": FORMAT, "shape": shape, "storage": self.storage}
            )
            made.append(TeacherStore(path, math.prod(shape), self.storage, lambda m=m: self.example(m)))
        return made

    def check_room(self, stores: Sequence[TeacherStore], say: Callable[[str], object] = lambda text: None) -> list[int]:
        """Say how large the stores are, and look whether the disk has room. Returns how many rows each knows already.

        Raises:
            ValueError: the disk is too small.
        """
        folder, known = self.folder, [store.num_known() for store in stores]
        needed = sum(store.row_bytes * (store.num_rows - count) for store, count in zip(stores, known, strict=True))
        total, rows = sum(store.num_bytes for store in stores), stores[0].num_rows
        counts = ", ".join(f"{name} {count}" for (name, _), count in zip(self.keys, known, strict=True))
        say(f"teacher cache: {_size(total)} in {folder}, {_size(needed)} still to write ({rows} rows; known: {counts})")
        free = shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())).free
        if sum(max(0, store.num_bytes - store.num_taken) for store in stores) > free:
            raise ValueError(
                f"the teacher cache needs {_size(needed)} in {str(folder)!r}, where {_size(free)} are free; name "
                "another --cache-folder, set --cache-storage int8, lower --loader.fixed-views, or pass "
                "--no-cache-teachers."
            )
        return known

    def open(self, stores: Sequence[TeacherStore]) -> TeacherCache:
        """Open the stores, see `check_room`.

        Raises:
            ValueError: the folder cannot be written.
        """
        try:
            opened = [store.open() for store in track(stores, "making room for the teacher cache", "teachers")]
            return TeacherCache(opened, self.num_images)
        except OSError as error:
            raise ValueError(f"cannot write the teacher cache: {error}; name another --cache-folder.") from error


def key_name(name: str, key: Mapping[str, Any]) -> str:
    """A folder's name that says which teacher it is of, and differs where any part of the key does."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return f"{''.join(c if c.isalnum() or c in '-_' else '-' for c in name)[:40]}-{digest[:16]}"


def input_checksums(views: Tensor, visible: Tensor | None) -> list[int]:
    """CRC-32 of the pixels and the visible patches of each sample."""
    sums = [zlib.crc32(view.data) for view in views.numpy()]
    if visible is None:
        return sums
    return [zlib.crc32(row.data, start) for row, start in zip(visible.cpu().numpy(), sums, strict=True)]


def checksums(packed: UInt8[Tensor, "B bytes"], inputs: Sequence[int]) -> np.ndarray:
    """CRC-32 of each row, going on from its input's; never 0, which stands for unknown."""
    sums = [zlib.crc32(row.data, start) or 1 for row, start in zip(packed.numpy(), inputs, strict=True)]
    return np.array(sums, dtype=np.uint32)


def _tensors(output: TeacherOutput) -> dict[str, Tensor]:
    """The tensors that an output has, by name."""
    cls, patches, _, qkv = output
    parts = (cls, patches, None if qkv is None else qkv.cls, None if qkv is None else qkv.patches)
    return {name: part for name, part in zip(FIELDS, parts, strict=True) if part is not None}


def _read_layout(path: Path) -> dict[str, Leaf] | None:
    """The tensors of a row; None if it is not known, and to be found anew."""
    try:
        layout = json.loads(path.read_text())
        if layout.pop(KEY, "") != sealed(layout)[KEY]:
            return None
        leaves = {name: Leaf(str(dtype), tuple(int(side) for side in shape)) for name, (dtype, shape) in layout.items()}
        known = set(leaves) <= set(FIELDS) and "patches" in leaves
        return (
            leaves if known and all(isinstance(getattr(torch, x.dtype), torch.dtype) for x in leaves.values()) else None
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _quantized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit numbers and the scale of each token: its largest magnitude becomes 127."""
    numbers = tensor.detach().float()
    scale = numbers.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return (numbers / scale).round().to(torch.int8), scale


def _mapped(output: TeacherOutput, call: Callable[[Tensor], Tensor]) -> TeacherOutput:
    """An output, each of its tensors changed."""
    cls, patches, _, qkv = output
    parts = [None if part is None else call(part) for part in (cls, patches, *(qkv or ())[:2])]
    return TeacherOutput(parts[0], parts[1], (), Tokens(*parts[2:]) if qkv else None)  # pyright: ignore[reportArgumentType]


def _open_at_size(path: Path, size: int) -> int:
    """A file of that size, whose room is taken now: a disk that is full later would end the process without a word."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with naming(path):
            if os.fstat(file).st_size > size:
                os.ftruncate(file, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)
            else:
                os.ftruncate(file, size)
    except OSError:
        os.close(file)
        raise
    return file


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
