"""One process per run folder: a lock of the operating system, which ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from comad.runtime.progress import warn

LOCK = ".lock"
_HELD: dict[Path, int] = {}


@contextmanager
def holding_runs() -> Iterator[None]:
    """Give back, at the end of the context or of the function that it decorates, what `lock_folder` took within."""
    before = set(_HELD)
    try:
        yield
    finally:
        for folder in set(_HELD) - before:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held, so that nobody else's goes
            os.close(_HELD.pop(folder))


def lock_folder(folder: Path) -> None:
    """Take a folder for this process. A lock that a dead process left is free; this process may take its own again.

    Raises:
        ValueError: another process has it; the message says which.
    """
    folder = folder.resolve()
    if folder in _HELD:
        return
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: its workers do not inherit it
        except OSError as error:
            holder = os.pread(file, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(file)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                warn(f"{path}: {error.strerror}; see to it that no other process uses the folder.")
                return
            raise ValueError(
                f"{str(folder)!r} is in use by {holder}; wait for it, end it, or pass --run.out for another folder."
            ) from error
        if path.exists() and os.path.samestat(os.stat(path), os.fstat(file)):
            break
        os.close(file)  # its holder has just removed it
    os.ftruncate(file, 0)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {started}\n".encode(), 0)
    _HELD[folder] = file
