"""Which image files lie below a folder; the list is kept until a folder changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def index_folder(root: Path) -> list[str]:
    """List the image files below a folder as sorted relative paths; the list is cached until a folder changes.

    The cache holds each directory's modification time, so that a changed tree is read anew.
    """
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "comad" / f"index-{key}.json"
    stored = _read_index(root, cache)
    if stored is not None:
        return stored
    files, folders = [], {}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and not _leads_back(folder, name)]
        relative = os.path.relpath(folder, root)
        folders[relative] = os.stat(folder).st_mtime_ns
        prefix = "" if relative == "." else f"{relative}/"
        files += [prefix + name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    files.sort()
    with contextlib.suppress(OSError):  # without a place for the cache the folder is read every time
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"folders": folders, "files": files}))
        temporary.replace(cache)
    return files


def _leads_back(folder: str, name: str) -> bool:
    """Whether a sub-folder is a link to one that it lies in, however many links lie between."""
    path = Path(folder, name).absolute()
    return path.is_symlink() and path.resolve() in {parent.resolve() for parent in path.parents}


def _read_index(root: Path, cache: Path) -> list[str] | None:
    """The cached list; None if there is none, if it is damaged, or if a folder has changed since."""
    try:
        stored = json.loads(cache.read_text())
        current = all(os.stat(root / folder).st_mtime_ns == time for folder, time in stored["folders"].items())
        return stored["files"] if current else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
