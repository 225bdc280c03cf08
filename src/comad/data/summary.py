"""What was found in a set of images, as text and as plain values: what a run should say before it starts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from comad.data.decoding import HEIF_ENDINGS, read_bytes

if TYPE_CHECKING:
    from comad.data.images import ImageSet, Splits

FEW = 20
"""Fewer images of a class or a part than this say little."""
FEW_TEST = 100
TRIED = 32
"""Images of each part that are decoded, evenly spread, to see whether they can be."""
MAX_COMPARED = 2048
"""Files of equal size that are opened to find the same image in two parts."""
HEAD = 4096


class Summary(NamedTuple):
    """What `summarise` found.

    Attributes:
        text: for the screen and the card.
        facts: the same as plain values for JSON: ``split``, ``images``, ``classes``, ``unlabelled``, ``left_out``,
            ``unreadable``, ``classes_without_training``, ``duplicates`` and ``notes``.
    """

    text: str
    facts: dict[str, Any]

    @property
    def words(self) -> dict[str, str]:
        """The facts that there are, each in words."""
        return {key: _words(value) for key, value in self.facts.items() if value}


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items() if part)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def summarise(splits: Splits) -> Summary:
    """Count what is there and what is not. Reads the size of each file, decodes a few, compares those of equal size.

    Raises:
        ValueError: none of the training images that are tried can be read.
    """
    _check_readable(splits.train)
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    sizes = {name: images.content_numbers() for name, images in parts.items()}
    notes = list(splits.source.notes) + _few(splits)
    if set(HEIF_ENDINGS) & splits.source.left_out.keys():
        notes.append("HEIC images are left out; pip install 'comad[heic]' reads them.")
    duplicates, looked_at_all = _duplicates(parts, sizes)
    if not looked_at_all:
        notes.append(f"Equal images were looked for among {MAX_COMPARED} files only.")
    facts: dict[str, Any] = {
        "name": splits.train.name.partition("/")[0],
        "split": splits.source.split,
        "images": {name: len(images) for name, images in parts.items()},
        "classes": {name: len(names) for name, names in splits.class_names.items()},
        "unlabelled": {name: int((images.labels[first] < 0).sum()) for name, images in parts.items()}
        if (first := next(iter(splits.class_names), ""))
        else {},
        "left_out": dict(splits.source.left_out),
        "unreadable": {name: _unreadable(images, sizes[name]) for name, images in parts.items()},
        "classes_without_training": _untrained(splits, first),
        "duplicates": duplicates,
        "notes": notes,
    }
    return Summary(_text(facts), facts)


def _few(splits: Splits) -> list[str]:
    """What is too little to say much."""
    notes = []
    if len(splits.test) < FEW_TEST:
        notes.append(
            f"Scores on {len(splits.test)} test images are rough: one is {100 / max(1, len(splits.test)):.1f} points."
        )
    for name, names in splits.class_names.items():
        labels = splits.train.labels[name]
        counts = labels[labels >= 0].bincount(minlength=len(names))
        small = [names[i] for i in range(len(names)) if 0 < counts[i] < FEW]
        if small:
            notes.append(
                f"{len(small)} of {len(names)} {name} classes have fewer than {FEW} training images: {some(small)}."
            )
    return notes


def _untrained(splits: Splits, first: str) -> dict[str, list[str]]:
    """Classes of val and test that no training image has."""
    if not first:
        return {}
    names, known = splits.class_names[first], set(splits.train.labels[first].tolist())
    found = {"val": splits.val, "test": splits.test}
    return {
        part: [names[label] for label in sorted(set(images.labels[first].tolist()) - known - {-1})]
        for part, images in found.items()
    }


def _check_readable(images: ImageSet) -> None:
    faults = []
    for index in _tried(images):
        if not (fault := _fault(images, index)):
            return
        faults.append(fault)
    if faults:
        raise ValueError(f"all {len(faults)} training images that were tried are unreadable ({faults[0]}); check them.")


def _unreadable(images: ImageSet, sizes: np.ndarray) -> list[str]:
    """Files that are gone or empty, and those of a few that cannot be decoded."""
    gone = np.flatnonzero(sizes < 0).tolist()
    return [images.key(index) for index in sorted({*gone, *(i for i in _tried(images) if _fault(images, i))})]


def _tried(images: ImageSet) -> list[int]:
    """A few images, evenly spread."""
    return np.unique(np.linspace(0, len(images) - 1, min(TRIED, len(images))).astype(int)).tolist()


def _fault(images: ImageSet, index: int) -> str:
    """Why an image cannot be read; empty if it can."""
    try:
        images.load(index, 32)
    except ValueError as error:
        return str(error) or "no reason given"
    return ""


def _duplicates(parts: dict[str, ImageSet], sizes: dict[str, np.ndarray]) -> tuple[dict[str, int], bool]:
    """``train and test`` → images of the later part that are in the earlier one too; and whether all were compared."""
    by_size: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for name, numbers in sizes.items():
        for index in np.flatnonzero(numbers > 0).tolist():
            by_size[int(numbers[index])].append((name, index))
    groups = sorted((group for group in by_size.values() if len({name for name, _ in group}) > 1), key=len)
    found: Counter[str] = Counter()
    budget = MAX_COMPARED
    for group in groups:
        for names in _equal(group[len(group) - min(budget, len(group)) :], parts):
            for earlier, later in combinations(parts, 2):
                if earlier in names:
                    found[f"{earlier} and {later}"] += names.count(later)
        budget -= min(budget, len(group))
    return {pair: count for pair, count in found.items() if count}, sum(map(len, groups)) <= MAX_COMPARED


def _equal(group: list[tuple[str, int]], parts: dict[str, ImageSet]) -> Iterator[list[str]]:
    """Of images of equal size those of equal content: the names of their parts. Whole files are read if heads agree."""
    for length in (HEAD, None):
        together: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
        for name, index in group:
            together[_digest(parts[name], index, length)].append((name, index))
        alike = [same for same in together.values() if len({name for name, _ in same}) > 1]
        group = [member for same in alike for member in same]
    yield from ([name for name, _ in same] for same in alike)


def _digest(images: ImageSet, index: int, length: int | None) -> bytes:
    """Of the first bytes of a file, of all if None; of the pixels of an image that is no file."""
    path = images.path(index)
    try:
        if not os.path.isfile(path):
            content = images.load(index).contiguous().numpy().tobytes()
        else:
            content = read_bytes(path) if length is None else read_bytes(path, length)
    except (OSError, ValueError):
        content = path.encode(errors="surrogateescape")
    return hashlib.blake2b(content, digest_size=16).digest()


def _text(facts: dict[str, Any]) -> str:
    """The facts that say something, one a line."""
    left_out = {name: count for name, count in facts["left_out"].items() if count}
    untrained = [f"{part}: {some(names)}" for part, names in facts["classes_without_training"].items() if names]
    unreadable = [name for names in facts["unreadable"].values() for name in names]
    lines = {
        "images": f"{_listed(facts['images'])} ({facts['split']})",
        "classes": _listed(facts["classes"]) or "none: no labels",
        "unlabelled": _listed({part: count for part, count in facts["unlabelled"].items() if count}),
        "left out": some(left_out) and f"{some(left_out)} files",
        "unreadable": some(unreadable) and f"{some(unreadable)}, of {TRIED} of each part that were tried",
        "never trained": "; ".join(untrained),
        "in two parts": _listed(facts["duplicates"]) and f"{_listed(facts['duplicates'])} (the same image)",
    }
    shown = [f"  {name:13} {text}" for name, text in lines.items() if text]
    return "\n".join([f"data {facts['name']}", *shown, *(f"  note: {note}" for note in facts["notes"])])


def dense_text(name: str, facts: dict[str, Any]) -> str:
    """The facts of a set with objects or label maps."""
    lines = {
        "images": _listed(facts["images"]),
        "objects": _listed(facts.get("objects", {})),
        "classes": f"{facts['classes']:,}",
        "never trained": some(facts.get("classes_without_training", [])),
    }
    shown = [f"  {key:13} {text}" for key, text in lines.items() if text]
    return "\n".join([f"data {name}", *shown, *(f"  note: {note}" for note in facts.get("notes", []))])


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def some(listed: Collection[str] | dict[str, int], most: int = 8) -> str:
    """The first few of many names, with their counts if they have some."""
    shown = [f"{listed[name]:,} {name}" if isinstance(listed, dict) else name for name in list(listed)[:most]]
    return ", ".join(shown) + (f" and {len(listed) - most} more" if len(listed) > most else "")
