"""Files and folders that are whole or not there: a temporary name, fsync, rename."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary place for a file or a folder, which takes the place of ``path`` when the block ends well.

    Before the rename everything is on the disk, with the modes of the umask. What a killed process left is removed;
    a folder that it had moved out of the way is put back.

    Args:
        path: the place; folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    partial, former = (path.with_name(f".{path.name}.{_us()}.{kind}") for kind in ("partial", "former"))
    try:
        with naming(path):
            yield partial
        _settle(partial)
        if path.is_dir():
            os.replace(path, former)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        _remove(partial)
        if path.exists():
            _remove(former)
        elif former.exists():
            os.replace(former, path)


def is_utf8(place: str | Path) -> bool:
    """Whether a name is UTF-8; bytes of names that are none are half a pair of surrogates in Python."""
    return re.search("[\ud800-\udfff]", str(place)) is None


def check_name(place: str | Path, option: str) -> None:
    """Refuse a place whose name PyTorch, safetensors and others cannot take.

    Raises:
        ValueError: it is no UTF-8.
    """
    if not is_utf8(place):
        raise ValueError(f"{str(place)!r} is no name in UTF-8, which PyTorch needs; pass another {option}.")


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or not there; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left at temporary names in a folder; what they had moved away is put back.

    The folder must be locked for this process: what other hosts left goes, too.
    """
    for left in [*folder.glob(".*.partial"), *folder.glob(".*.former")]:
        if name := re.fullmatch(r"\.(.+)\.(?:[^.]+-)?\d+\.(?:partial|former)", left.name):
            _clear_leftovers(folder / name[1], locked=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the disk name this file, as those of an open one do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _settle(place: Path) -> None:
    """Give files and folders the modes of the umask, and write them to the disk, insides first."""
    umask = os.umask(0o022)
    os.umask(umask)
    for folder, _, files in os.walk(place, topdown=False):
        for name in files:
            os.chmod(Path(folder, name), 0o666 & ~umask)
            _sync(Path(folder, name))
        os.chmod(folder, 0o777 & ~umask)
        _sync(Path(folder))
    if place.is_file():
        os.chmod(place, 0o666 & ~umask)
        _sync(place)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_leftovers(path: Path, locked: bool = False) -> None:
    """Remove what processes that are gone left at temporary names of this path."""
    for left in [*path.parent.glob(f".{_escaped(path.name)}.*.former")]:
        if not _is_at_work(left, locked) and not path.exists():
            os.replace(left, path)
    for left in [*path.parent.glob(f".{_escaped(path.name)}.*.*")]:
        if left.suffix in (".partial", ".former") and not _is_at_work(left, locked):
            _remove(left)


def _us() -> str:
    """This process among those of all hosts, for temporary names: in containers numbers are alike."""
    return f"{socket.gethostname().replace('.', '_')}-{os.getpid()}"


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _is_at_work(left: Path, locked: bool) -> bool:
    """Whether another process that lives has the number in a temporary name; of other hosts only a lock tells."""
    host, _, number = left.name.split(".")[-2].rpartition("-")
    if not number.isdigit():
        return True
    if host and host != _us().rpartition("-")[0]:
        return not locked
    if int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
