"""Which image files lie below a folder, and what else does; the list is kept until a folder changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, SupportsIndex

from comad.data.decoding import endings
from comad.data.identity import normalised
from comad.runtime.progress import working

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

    files: list[str]
    left_out: dict[str, int]
    ignored: list[str]


class PathTable(Sequence[str]):
    """Many paths in two blocks of memory, cheap to share with worker processes; a long one costs its own length."""

    def __init__(self, paths: Iterable[str]):
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = b"".join(encoded)
        self._ends = array("q", accumulate(map(len, encoded), initial=0))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: SupportsIndex) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] no slices
        index = range(len(self))[index]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


def index_folder(root: Path) -> FolderIndex:
    """List what lies below a folder; the list is cached until a folder changes.

    The cache holds each directory's modification time, so that a changed tree is read anew.
    """
    cache = cache_file("index", root)
    stored = _read_index(root, cache)
    if stored is not None:
        return stored
    folders: dict[str, int] = {}
    with working(f"indexing {root}", unit="files") as told:
        index = _walk(root, folders, told)
    with contextlib.suppress(OSError):  # without a place for the cache the folder is read every time
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"endings": endings(), "folders": folders, **index._asdict()}))
        temporary.replace(cache)
    return index


def cache_file(kind: str, path: Path) -> Path:
    """Where the index of a path is kept."""
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "comad" / f"{kind}-{key}.json"


def _walk(root: Path, folders: dict[str, int], told: working) -> FolderIndex:
    """Read the tree; ``folders`` gets the modification time of each directory."""
    files: list[str] = []
    left_out: Counter[str] = Counter()
    ignored: list[str] = []
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            folders[prefix] = os.stat(root / prefix).st_mtime_ns
            with os.scandir(root / prefix) as entries:
                listed = list(entries)
        except OSError:
            left_out[NOT_READABLE] += 1
            continue
        told.advance(len(listed))
        for entry in listed:
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                continue
            if _holds(entry.is_dir):
                _enter(entry, prefix, waiting, ignored)
            elif reason := _fault(entry):
                left_out[reason] += 1
            else:
                files.append(prefix + entry.name)
    return FolderIndex(sorted(files, key=normalised), dict(left_out.most_common()), sorted(ignored))


def _enter(entry: os.DirEntry[str], prefix: str, waiting: list[str], ignored: list[str]) -> None:
    """Put a sub-folder on the list, unless it is a system's or a link to one that it lies in."""
    if entry.name.lower() in SYSTEM_FOLDERS:
        ignored.append(prefix + entry.name)
    elif not (entry.is_symlink() and _leads_back(entry.path)):
        waiting.append(f"{prefix}{entry.name}/")


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
    try:
        stored = json.loads(cache.read_text())
        index = FolderIndex(stored["files"], stored["left_out"], stored["ignored"])
        current = all(os.stat(root / folder).st_mtime_ns == time for folder, time in stored["folders"].items())
        sound = all(isinstance(file, str) for file in index.files) and isinstance(index.left_out, dict)
        return index if current and sound and tuple(stored["endings"]) == endings() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
