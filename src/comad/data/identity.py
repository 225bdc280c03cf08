"""What a set of images is, by content: a fingerprint that does not depend on its place, and what two sets differ in."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from comad.data.images import ImageSet

ROW = np.dtype([("name", "<u8"), ("content", "<i8"), ("label", "<i8")])


def normalised(name: str) -> str:
    """A name in Unicode's form NFC, for some systems write é as two characters."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def manifest(images: ImageSet) -> np.ndarray:
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


def fingerprint(images: ImageSet) -> str:
    """Hash the manifest: names relative to the folder, sizes, labels and order."""
    return hashlib.sha256(manifest(images).tobytes()).hexdigest()


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
