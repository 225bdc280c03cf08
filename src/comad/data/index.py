"""Which image files lie below a folder, and what else does; the list is kept until a folder changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from operator import eq
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np

from comad.data.decoding import endings
from comad.data.identity import normalised
from comad.runtime.progress import Working

SYSTEM_FOLDERS = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information", "#recycle"}
SYSTEM_FOLDERS |= {"@recycle", "#snapshot", "@recently-snapshot", "_gsdata_", "thumbnails"}
"""Thumbnails, waste bins and the like, in small letters; so are all whose names start with a dot."""
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"}
NOT_REGULAR = "pipes, devices and broken links"
NOT_READABLE = "folders that cannot be read"


class FolderIndex(NamedTuple):
    """What lies below a folder.

    Attributes:
        files: paths of image files relative to it, sorted.
        left_out: ending, `NOT_REGULAR` or `NOT_READABLE` → number of others; hidden and system files do not count.
        ignored: system folders that were not entered, relative paths.
    """

    files: PathTable
    left_out: dict[str, int]
    ignored: list[str]


class PathTable(Sequence[str]):
    """Many paths in two blocks of memory, cheap to share with worker processes; a long one costs its own length."""

    def __init__(self, paths: Iterable[str]):
        joined, self._ends = bytearray(), array("q", [0])
        for path in paths:
            joined += os.fsencode(path)
            self._ends.append(len(joined))
        self._bytes = bytes(joined)

    @classmethod
    def read(cls, lengths: bytes, joined: bytes) -> PathTable:
        """What `lengths` and `joined` gave."""
        table, counts = cls(()), np.frombuffer(lengths, dtype="<u4")
        table._bytes = joined
        table._ends.frombytes(np.cumsum(counts, dtype=np.int64).tobytes())
        return table

    @property
    def lengths(self) -> bytes:
        """The number of bytes of each path, four bytes each."""
        return np.diff(np.frombuffer(self._ends, dtype=np.int64)).astype("<u4").tobytes()

    @property
    def joined(self) -> bytes:
        """The bytes of all."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(self._bytes[start:end]) for start, end in pairwise(self._ends))

    def __getitem__(self, index: SupportsIndex) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] no slices
        index = range(len(self))[index]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))


def index_folder(root: Path) -> FolderIndex:
    """List what lies below a folder; the list is cached until a folder changes.

    The cache holds each directory's modification time, so that a changed tree is read anew.
    """
    cache = cache_file("index", root)
    stored = _read_index(root, cache)
    if stored is not None:
        return stored
    with Working(f"indexing {root}", unit="files") as told:
        walk = _Walk(root, told)
        files = PathTable(walk.files())
    index = FolderIndex(files, dict(walk.left_out.most_common()), sorted(walk.ignored))
    about = {"endings": endings(), "folders": walk.folders, "left_out": index.left_out, "ignored": index.ignored}
    write_blocks(cache, [json.dumps(about).encode(), index.files.lengths, index.files.joined])
    return index


def cache_file(kind: str, path: Path) -> Path:
    """Where the index of a path is kept."""
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "comad" / f"{kind}-{key}.paths"


def write_blocks(cache: Path, blocks: Sequence[bytes]) -> None:
    """Keep blocks with their checksums; where there is no place for a cache, nothing."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        with temporary.open("wb") as file:
            file.write(json.dumps([[len(block), zlib.crc32(block)] for block in blocks]).encode() + b"\n")
            file.writelines(blocks)
        temporary.replace(cache)


def read_blocks(cache: Path) -> list[bytes] | None:
    """What `write_blocks` kept; None if there is nothing, or if it is damaged."""
    try:
        with cache.open("rb") as file:
            sizes = json.loads(file.readline(1000))
            blocks = [file.read(min(int(size), cache.stat().st_size)) for size, _ in sizes]
        return blocks if [zlib.crc32(block) for block in blocks] == [check for _, check in sizes] else None
    except (OSError, ValueError, TypeError, RecursionError, OverflowError):
        return None


class _Walk:
    """A walk through a tree in the order of the paths, as a sort of them all would have it.

    Attributes:
        folders: each directory → its modification time.
        left_out, ignored: see `FolderIndex`.
    """

    def __init__(self, root: Path, told: Working):
        self.root, self.told = root, told
        self.folders: dict[str, int] = {}
        self.left_out: Counter[str] = Counter()
        self.ignored: list[str] = []

    def files(self) -> Iterator[str]:
        """Paths of image files, relative to the root."""
        waiting = [iter(self._listed(""))]
        while waiting:
            name = next(waiting[-1], None)
            if name is None:
                waiting.pop()
            elif name.endswith("/"):
                waiting.append(iter(self._listed(name)))
            else:
                yield name

    def _listed(self, prefix: str) -> list[str]:
        """Files and folders in a directory, in order; folders end in ``/``."""
        try:
            self.folders[prefix] = os.stat(self.root / prefix).st_mtime_ns
            with os.scandir(self.root / prefix) as entries:
                seen = list(entries)
        except OSError:
            self.left_out[NOT_READABLE] += 1
            return []
        self.told.advance(len(seen))
        names: list[str] = []
        for entry in seen:
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                continue
            if _holds(entry.is_dir):
                _enter(entry, prefix, names, self.ignored)
            elif reason := _fault(entry):
                self.left_out[reason] += 1
            else:
                names.append(prefix + entry.name)
        return sorted(names, key=lambda name: (normalised(name), name))


def _enter(entry: os.DirEntry[str], prefix: str, names: list[str], ignored: list[str]) -> None:
    """Put a sub-folder on the list, unless it is a system's or a link to one that it lies in."""
    if entry.name.lower() in SYSTEM_FOLDERS:
        ignored.append(prefix + entry.name)
    elif not (entry.is_symlink() and _leads_back(entry.path)):
        names.append(f"{prefix}{entry.name}/")


def _fault(entry: os.DirEntry[str]) -> str:
    """Why a file is not an image; empty if it may be."""
    if not entry.name.lower().endswith(endings()):
        return os.path.splitext(entry.name)[1].lower() or "no ending"
    return "" if _holds(entry.is_file) else NOT_REGULAR


def _holds(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind, which only links need a look at the disk for; a link to itself is of none."""
    try:
        return kind()
    except OSError:
        return False


def _leads_back(path: str) -> bool:
    """Whether a link leads to a folder that it lies in, however many links lie between."""
    link = Path(path).absolute()
    return link.resolve() in {parent.resolve() for parent in link.parents}


def _read_index(root: Path, cache: Path) -> FolderIndex | None:
    """The cached list; None if there is none, if it is damaged, or if a folder has changed since."""
    if (blocks := read_blocks(cache)) is None:
        return None
    try:
        about, lengths, joined = json.loads(blocks[0]), *blocks[1:]
        current = all(os.stat(root / folder).st_mtime_ns == time for folder, time in about["folders"].items())
        if not current or tuple(about["endings"]) != endings():
            return None
        return FolderIndex(PathTable.read(lengths, joined), about["left_out"], about["ignored"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
