"""What a set of images is, by content: a fingerprint that does not depend on its place, and what two sets differ in."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from comad.runtime.atomic import replacing
from comad.runtime.progress import warn

ROW = np.dtype([("name", "<u8"), ("content", "<i8"), ("label", "<i8")])


@runtime_checkable
class Listed(Protocol):
    """Images that have names, sizes and labels: an `comad.data.images.ImageSet`, or a part of a dense data set."""

    @property
    def labels(self) -> Mapping[str, Tensor]:
        """Label set → one number per image."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name one image wherever the set lies."""
        ...

    def content_numbers(self) -> np.ndarray:
        """int64 (n,): sizes of the files, or other numbers that tell contents apart."""
        ...


def file_size(path: str) -> int:
    """Bytes of a file; -1 of one that is gone or empty."""
    try:
        return os.stat(path).st_size or -1
    except (OSError, ValueError):  # a table may name a file that no system can have
        return -1


def normalised(name: str) -> str:
    """A name in Unicode's form NFC, for some systems write é as two characters."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def writable(name: str) -> str:
    """A name that JSON gave: half a pair of surrogates, which no file can hold, becomes a question mark."""
    return re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", name)  # those between stand for bytes that are no UTF-8


def manifest(images: Listed) -> np.ndarray:
    """A row of 24 bytes per image, in order: hash of its name, size of its file, its labels.

    A run that keeps it (`numpy.save`) can say what changed since; see `changes`. A million files take seconds.
    """
    rows = np.zeros(len(images), dtype=ROW)
    names = (os.fsencode(normalised(images.key(index))) for index in range(len(images)))
    hashes = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    rows["name"] = np.frombuffer(hashes, dtype="<u8")
    rows["content"] = images.content_numbers()
    for _, labels in sorted(images.labels.items()):
        rows["label"] = rows["label"] * 1_000_003 + labels.numpy()
    return rows


def check_manifest(images: Listed, path: Path, resumed: bool) -> None:
    """Keep the manifest of a run's images; of a run that goes on, look whether they are still the same.

    A manifest that is gone or damaged is told: the fingerprint in the run's checkpoint decides.

    Raises:
        ValueError: the images changed; the message says how.
    """
    now = manifest(images)
    before = _read_manifest(path) if resumed else None
    if resumed and before is None:
        warn(f"{path} cannot be read; whether the images changed, the checkpoint says.")
    if before is not None and (changed := tell_changes(before, now)):
        raise ValueError(
            f"cannot resume {str(path.parent)!r}: its images are not those it was started with: {changed}; restore "
            "them, name their new place with --data, or begin a new run with another --run.out."
        )
    if not resumed:
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, now)
            file.write(hashlib.sha256(now.tobytes()).digest())


def _read_manifest(path: Path) -> np.ndarray | None:
    """The rows of a manifest; None if it is gone, or other than its checksum says."""
    try:
        with path.open("rb") as file:
            rows = np.load(file, allow_pickle=False)
            return rows if file.read() == hashlib.sha256(rows.tobytes()).digest() and rows.dtype == ROW else None
    except (OSError, ValueError, EOFError, MemoryError, SyntaxError):
        return None


def fingerprint(images: Listed) -> str:
    """Hash the manifest: names relative to the folder, sizes, labels and order."""
    return hashlib.sha256(manifest(images).tobytes()).hexdigest()


def content_digest(images: Listed) -> str:
    """Hash names, sizes and order alone: what is made of the pixels holds in another place, under other labels."""
    return hashlib.sha256(manifest(images)[["name", "content"]].tobytes()).hexdigest()


def changes(before: np.ndarray, now: np.ndarray) -> dict[str, int]:
    """Count what changed between two manifests.

    Returns:
        Numbers of images ``removed``, ``added``, ``resized`` (content of another size) and ``relabelled``.
    """
    _, old, new = np.intersect1d(before["name"], now["name"], return_indices=True)
    return {
        "removed": len(before) - len(old),
        "added": len(now) - len(new),
        "resized": int((before["content"][old] != now["content"][new]).sum()),
        "relabelled": int((before["label"][old] != now["label"][new]).sum()),
    }


def tell_changes(before: np.ndarray, now: np.ndarray) -> str:
    """The same in words, such as "2 images removed, 1 relabelled"; empty if nothing changed."""
    found = [f"{count} {what}" for what, count in changes(before, now).items() if count]
    if not found:
        return "" if np.array_equal(before, now) else "the order of the images changed"
    first, *others = found
    count, what = first.split()
    return ", ".join([f"{count} image{'s' if count != '1' else ''} {what}", *others])
