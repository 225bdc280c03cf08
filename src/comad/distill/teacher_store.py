"""What one teacher said, on disk: a row per image and view, read through a memory map, believed only if it is whole."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

Storage = Literal["computed", "int8"]
"""Numbers as they were computed, or in 8 bits with one scale per token."""


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
        example: computes the value of one row (leading dimension 1), asked for only if the folder is new: a nest of
            NamedTuples of tensors and None.
    """

    storage: Storage

    def __init__(self, folder: Path, num_rows: int, storage: Storage, example: Callable[[], Any]):
        self.folder, self.num_rows, self.storage = folder, num_rows, storage
        path = folder / "layout.json"
        self.layout = json.loads(path.read_text()) if path.is_file() else describe(example())
        self.leaves = [Leaf(leaf[0], tuple(leaf[1])) for leaf in _leaves_of_layout(self.layout)]
        self.parts = [part for leaf in self.leaves for part in leaf.stored(storage)]
        self.row_bytes = sum(part.num_bytes for part in self.parts)
        self.checked = torch.zeros(num_rows, dtype=torch.bool)

    @property
    def num_bytes(self) -> int:
        """Size of the whole store."""
        return self.num_rows * (self.row_bytes + 4)

    def num_known(self) -> int:
        """Rows that have a checksum; 0 if the folder does not exist yet."""
        path = self.folder / "checks.bin"
        return int(np.count_nonzero(np.fromfile(path, np.uint32))) if path.is_file() else 0

    def open(self) -> TeacherStore:
        """Make or open the files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = _open_at_size(self.folder / "rows.bin", self.num_rows * self.row_bytes)
        checks = _open_at_size(self.folder / "checks.bin", self.num_rows * 4)
        name = str(self.folder / "rows.bin")
        self.mapped = torch.from_file(name, shared=True, size=self.num_rows * self.row_bytes, dtype=torch.uint8)
        self.mapped = self.mapped.view(self.num_rows, self.row_bytes)
        self.checks = np.memmap(self.folder / "checks.bin", np.uint32, "r+")
        os.close(checks)
        _write_text(self.folder / "layout.json", json.dumps(self.layout))  # last: without it the folder is new
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

    def read(self, rows: Int[Tensor, " B"]) -> Any:
        """The values of known rows."""
        return self._unpacked(self.mapped[rows])

    def write(self, rows: Int[Tensor, " B"], inputs: Sequence[int], value: Any) -> None:
        """Keep what was computed: the numbers first, then the checksum that makes them believed."""
        packed = self._packed(value)
        for row, data in zip(rows.tolist(), packed.numpy(), strict=True):
            os.pwrite(self.rows, data.data, row * self.row_bytes)  # a full disk is an error here, not a dead process
        self.checks[rows.numpy()] = checksums(packed, inputs)
        self.checked[rows] = True

    def _packed(self, value: Any) -> UInt8[Tensor, "B bytes"]:
        """The bytes of rows."""
        flat = []
        for tensor, leaf in zip(leaves(value), self.leaves, strict=True):
            parts = _quantised(tensor) if len(leaf.stored(self.storage)) == 2 else (tensor,)
            for part, kept in zip(parts, leaf.stored(self.storage), strict=True):
                data = part.detach().cpu().contiguous().flatten(1).view(torch.uint8)
                flat.append(torch.nn.functional.pad(data, (0, kept.num_bytes - data.shape[1])))
        return torch.cat(flat, dim=1)

    def _unpacked(self, packed: UInt8[Tensor, "B bytes"]) -> Any:
        """The value that rows hold."""
        pieces = iter(packed.split([part.num_bytes for part in self.parts], dim=1))

        def take(part: Leaf) -> Tensor:
            dtype = getattr(torch, part.dtype)
            data = next(pieces)[:, : math.prod(part.shape) * dtype.itemsize].contiguous()
            return data.view(dtype).view(len(packed), *part.shape)

        def value(leaf: Leaf) -> Tensor:
            numbers, *scale = (take(part) for part in leaf.stored(self.storage))
            return (numbers * scale[0]).to(getattr(torch, leaf.dtype)) if scale else numbers

        return _rebuilt(self.layout, map(value, self.leaves))


def key_name(name: str, key: Mapping[str, Any]) -> str:
    """A folder's name that says which teacher it is of, and differs where any part of the key does."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return f"{''.join(c if c.isalnum() or c in '-_' else '-' for c in name)[:40]}-{digest[:16]}"


def checksums(packed: UInt8[Tensor, "B bytes"], inputs: Sequence[int]) -> np.ndarray:
    """CRC-32 of each row, going on from its input's; never 0, which stands for unknown."""
    sums = [zlib.crc32(row.data, start) or 1 for row, start in zip(packed.numpy(), inputs, strict=True)]
    return np.array(sums, dtype=np.uint32)


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a nest, in order."""
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else [leaf for part in value for leaf in leaves(part)]


def describe(value: Any) -> Any:
    """The structure of a nest, in JSON's types."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch."), list(value.shape[1:])]
    return {"type": f"{type(value).__module__}:{type(value).__name__}", "parts": [describe(part) for part in value]}


def _leaves_of_layout(layout: Any) -> Iterator[list]:
    if isinstance(layout, dict):
        for part in layout["parts"]:
            yield from _leaves_of_layout(part)
    elif layout is not None:
        yield layout


def _rebuilt(layout: Any, tensors: Iterator[Tensor]) -> Any:
    """A nest of the structure, with these tensors. Its types are comad's own records, or plain tuples."""
    if layout is None:
        return None
    if isinstance(layout, list):
        return next(tensors)
    parts = [_rebuilt(part, tensors) for part in layout["parts"]]
    module, _, name = layout["type"].partition(":")
    if module == "builtins":
        return tuple(parts)
    assert module.startswith("comad."), module
    return getattr(importlib.import_module(module), name)(*parts)


def _quantised(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit numbers and the scale of each token: its largest magnitude becomes 127."""
    numbers = tensor.detach().float()
    scale = numbers.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return (numbers / scale).round().to(torch.int8), scale


def _open_at_size(path: Path, size: int) -> int:
    """A file of that size; what it lacks reads as 0 and takes no room yet."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if os.fstat(file).st_size != size:
        os.ftruncate(file, size)
    return file


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
