"""Images in a few large files, read by their place in them: tar files in the layout of webdataset, and arrow files.

Members of a tar file are ``KEY.jpg`` beside ``KEY.cls`` or ``KEY.json``; the key is what stands before the first dot of
a name. An arrow file holds a column of encoded images, and they lie in it as they are in a tar file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from comad.data.decoding import MAX_BYTES, endings, naming
from comad.data.identity import writable
from comad.data.images import PackedImages, Splits
from comad.data.index import PathTable, cache_file, read_blocks, write_blocks
from comad.data.parts import LabelOptions, Labels, Listing, divide, labels_of, part_of
from comad.runtime.progress import track

LABEL_ENDINGS = (".cls", ".json")
MAX_LABEL_BYTES = 1 << 20
MOST_SHARDS = 10**6
CLASS_NAMES = "classnames.txt"
"""Beside tar files: the names of the numbers in ``.cls``, one a line."""


class ShardImages(PackedImages):
    """Images in shards, read by their place in them: any order, no state, as quick as files.

    Args:
        name: of the set.
        shards: the files.
        files: what each image is called.
        places: int64 (n, 3): number of the shard, first byte, number of bytes; no bytes: there is no image.
        labels: label set → label of each image.
    """

    def __init__(
        self, name: str, shards: Sequence[Path], files: Iterable[str], places: np.ndarray, labels: dict[str, Tensor]
    ):
        self.name = name
        self.shards = PathTable(map(str, shards))
        self.files = PathTable(files)
        self.places = places
        self.labels = labels
        self.groups = torch.arange(len(places))

    def path(self, index: int) -> str:
        """See `ImageSet.path`."""
        return f"{self.files[index]} in {self.shards[self.places[index, 0]]}"

    def content(self, index: int) -> bytes:
        """See `ImageSet.content`."""
        shard, start, length = self.places[index].tolist()
        with naming(self.path(index)):
            if not 0 < length <= MAX_BYTES:
                raise ValueError(f"{length} bytes; an image has 1 to {MAX_BYTES}")
            with open(self.shards[shard], "rb", buffering=0) as file:
                if self.ahead and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), start, self.ahead, os.POSIX_FADV_WILLNEED)
                file.seek(start)
                return file.read(length) or b""

    def shard_numbers(self) -> np.ndarray:
        """See `ImageSet.shard_numbers`."""
        return self.places[:, 0]

    def content_numbers(self) -> np.ndarray:
        """See `ImageSet.content_numbers`: sizes in bytes."""
        return np.where(self.places[:, 2] > 0, self.places[:, 2], -1)


class Member(NamedTuple):
    """An image in a tar file.

    Attributes:
        name: of the member; or what the image was called before, if its ``.json`` has that under ``path``.
        own: whether it is that of the member.
        start, length: first byte, and number of bytes.
        labels: label set → label.
    """

    name: str
    own: bool
    start: int
    length: int
    labels: dict[str, str]


def expand(path: Path) -> list[Path]:
    """The files of a name with a range such as ``train-{000..127}.tar``.

    Raises:
        ValueError: one of them is not there.
    """
    if found := re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}", path.name):
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        if len(numbers) > MOST_SHARDS:
            raise ValueError(f"{str(path)!r} names {len(numbers):,} files; correct the range.")
        names = [f"{path.name[: found.start()]}{n:0{len(first)}}{path.name[found.end() :]}" for n in numbers]
    else:
        names = [path.name]
    shards = [path.with_name(name) for name in names]
    if missing := [shard for shard in shards if not shard.is_file()]:
        kind = path.suffix.removeprefix(".")
        raise ValueError(f"{len(missing)} {kind} files are not there, such as {str(missing[0])!r}; correct --data.")
    if not shards:
        raise ValueError(f"{str(path)!r} names no file; the range goes up.")
    return shards


def load_shards(root: Path, shards: Sequence[Path], options: LabelOptions | None = None) -> Splits:
    """Open tar files. A shard belongs to a part if one word of its path below ``root`` names it, see `PART_NAMES`.

    What holds of folders holds of them: `comad.data.folders.load_folder`. Images come in the order of the members.
    Labels are those under ``labels`` of ``.json``, else its ``label`` or ``cls``, else the number in ``.cls``, which
    a file `CLASS_NAMES` beside the shards gives a name. Labels that are numbers stand in their order.

    Raises:
        ValueError: a file is no tar file, or no image is in them.
    """
    names: list[str] = []
    parts: list[str] = []
    words: list[dict[str, str]] = []
    places: list[tuple[int, int, int]] = []
    left_out: Counter[str] = Counter()
    for number, shard in enumerate(track(shards, f"indexing {root}", "tar files")):
        called = shard.relative_to(root).as_posix()
        members, others = _read_index(shard)
        left_out.update(others)
        for member in members:
            names.append(f"{called}/{member.name}" if member.own else member.name)
            places.append((number, member.start, member.length))
            words.append(member.labels)
        parts += [part_of(called)] * len(members)
    if not names:
        raise ValueError(f"no images in the {len(shards)} tar files of {str(root)!r}; members are KEY.jpg and KEY.cls.")
    listing = Listing(names, _label_sets(words, root / CLASS_NAMES), parts, dict(left_out.most_common()))
    table = np.array(places, dtype=np.int64)

    def build(part: str, rows: np.ndarray, numbered: dict[str, Tensor]) -> ShardImages:
        return ShardImages(f"{root.name}/{part}", shards, (names[int(row)] for row in rows), table[rows], numbered)

    return divide(root, listing, options or LabelOptions(), build)


def _label_sets(words: Sequence[dict[str, str]], class_names: Path) -> dict[str, Labels]:
    """Label set → labels; numbers are filled with zeros, so that they stand in their order, or get their names."""
    found = {name: labels_of(own.get(name) for own in words) for name in dict.fromkeys(k for own in words for k in own)}
    for name, labels in found.items():
        if labels.names and all(map(_is_number, labels.names)):
            found[name] = labels._replace(names=[word.zfill(6) for word in labels.names])
    with contextlib.suppress(OSError):
        listed = (
            class_names.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            if class_names.is_file()
            else []
        )
        fine = found.get("fine")
        if fine and all(_is_number(word) and int(word) < len(listed) for word in fine.names):
            new = np.array([*map(int, fine.names), -1])
            found["fine"] = Labels(new[fine.numbers], listed, in_order=True)
    return found


def _is_number(word: str) -> bool:
    return word.isdecimal() and len(word) <= 9


def _read_index(shard: Path) -> tuple[list[Member], dict[str, int]]:
    """Images, and ending → number of others; kept until the shard changes, for a large one takes long to walk."""
    status = shard.stat()
    cache, identity = cache_file("shard", shard), [3, status.st_size, status.st_mtime_ns, *endings()]
    for block in read_blocks(cache) or ():
        stored = json.loads(block)
        if stored["of"] == identity:
            return [Member(*member) for member in stored["members"]], stored["left_out"]
    members, left_out = _walk(shard)
    write_blocks(cache, [json.dumps({"of": identity, "members": members, "left_out": left_out}).encode()])
    return members, left_out


def _walk(shard: Path) -> tuple[list[Member], dict[str, int]]:
    """Read the headers of a tar file and its labels; images stay where they are.

    Raises:
        ValueError: it is no tar file, is compressed, or ends too early.
    """
    images: list[tuple[str, str, int, int]] = []
    told: dict[str, dict[str, Any]] = {}
    left_out: Counter[str] = Counter()
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                key, dot, ending = name.partition(".")
                if not member.isreg() or not key:
                    continue
                key, ending = f"{folder}/{key}", (dot + ending).lower()
                if ending in endings():
                    images.append((key, member.name, member.offset_data, member.size))
                elif ending not in LABEL_ENDINGS:
                    left_out[ending or "no ending"] += 1
                elif member.size <= MAX_LABEL_BYTES and (file := archive.extractfile(member)):
                    told.setdefault(key, {}).update(_told(file.read(), ending))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{shard} cannot be read as a tar file that is not compressed; restore it: {error}") from error
    members = []
    for key, name, start, size in images:
        own = told.get(key, {})
        labels = own.get("labels") or ({"fine": own["label"]} if own.get("label") else {})
        members.append(Member(own.get("path", name), "path" not in own, start, size, labels))
    return members, dict(left_out)


def _told(content: bytes, ending: str) -> dict[str, Any]:
    """What the file beside an image says: ``label``, ``labels`` of several sets, and the ``path`` of before."""
    text = content.decode("utf-8", errors="replace").strip()
    if ending == ".cls":
        return {"label": text}
    found: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(text)
        if isinstance(values, dict):
            label, labels, path = values.get("label", values.get("cls")), values.get("labels"), values.get("path")
            if isinstance(label, (int, str)):
                found["label"] = writable(str(label))
            if isinstance(labels, dict):
                known = {name: word for name, word in labels.items() if word is not None}
                found["labels"] = {writable(name): writable(str(word)) for name, word in known.items()}
            if isinstance(path, str) and path:
                found["path"] = writable(path)
    return found
