"""Images in tar files, in the layout of webdataset: members ``KEY.jpg`` beside ``KEY.cls`` or ``KEY.json``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comad.data.decoding import MAX_BYTES, decode_bytes, endings, naming
from comad.data.folders import PART_NAMES, LabelOptions, split_files
from comad.data.images import ImageSet, Splits
from comad.data.index import PathTable, cache_file
from comad.runtime.progress import track

LABEL_ENDINGS = (".cls", ".json")
MAX_LABEL_BYTES = 1 << 20
Entry = tuple[int, int, str | None]
"""First byte of an image in its shard, number of bytes, label."""


class ShardImages(ImageSet):
    """Images in tar files, read by their place in them: any order, no state, as quick as files.

    Args:
        name: of the set.
        shards: the tar files.
        files: what each image is called.
        places: int64 (n, 3): number of the shard, first byte, number of bytes.
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

    def __len__(self) -> int:
        return len(self.places)

    def path(self, index: int) -> str:
        """See `ImageSet.path`."""
        return f"{self.files[index]} in {self.shards[self.places[index, 0]]}"

    def key(self, index: int) -> str:
        """See `ImageSet.key`: part, shard and member."""
        return self.files[index]

    def load(self, index: int, min_side: int = 0) -> Tensor:
        """See `ImageSet.load`."""
        shard, start, length = self.places[index].tolist()
        with naming(self.path(index)):
            if length > MAX_BYTES:
                raise ValueError(f"{length} bytes, more than {MAX_BYTES}")
            with open(self.shards[shard], "rb", buffering=0) as file:
                file.seek(start)
                return decode_bytes(file.read(length) or b"", min_side)

    def content_numbers(self) -> np.ndarray:
        """See `ImageSet.content_numbers`: sizes in bytes."""
        return self.places[:, 2].copy()


def expand(path: Path) -> list[Path]:
    """The tar files of a name with a range such as ``train-{000..127}.tar``.

    Raises:
        ValueError: one of them is not there.
    """
    if found := re.search(r"\{(\d+)\.\.(\d+)\}", path.name):
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        names = [f"{path.name[: found.start()]}{n:0{len(first)}}{path.name[found.end() :]}" for n in numbers]
    else:
        names = [path.name]
    shards = [path.with_name(name) for name in names]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise ValueError(f"{len(missing)} tar files are not there, such as {str(missing[0])!r}; correct --data.")
    if not shards:
        raise ValueError(f"{str(path)!r} names no file; the range goes up.")
    return shards


def load_shards(root: Path, shards: Sequence[Path], labels: Any = None, subset: str | Path | None = None) -> Splits:
    """Open tar files. A shard belongs to a part if one word of its path below ``root`` names it, see `PART_NAMES`.

    What holds of folders holds of them: `comad.data.folders.load_folder`. Labels are the numbers of ``.cls``, or
    ``label`` or ``cls`` of ``.json``.

    Raises:
        ValueError: a file is no tar file, or no image is in them.
    """
    places: dict[str, tuple[int, int, int]] = {}
    table: dict[str, str] = {}
    for number, shard in enumerate(track(shards, f"indexing {root}", "tar files")):
        name = shard.relative_to(root).as_posix()
        part = next((PART_NAMES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in PART_NAMES), "")
        for member, (start, length, label) in _read_index(shard).items():
            file = f"{part}/{name}/{member}".lstrip("/")
            places[file] = (number, start, length)
            if label is not None:
                table[file] = label.zfill(6) if label.isdigit() else label
    if not places:
        raise ValueError(f"no images in the {len(shards)} tar files of {str(root)!r}; members are KEY.jpg and KEY.cls.")

    def build(part: str, files: list[str], numbered: dict[str, Tensor]) -> ShardImages:
        rows = np.array([places[file] for file in files], dtype=np.int64).reshape(-1, 3)
        return ShardImages(f"{root.name}/{part}", shards, files, rows, numbered)

    return split_files(root, sorted(places), build, LabelOptions(1, table if labels is None else labels, subset))


def _read_index(shard: Path) -> dict[str, Entry]:
    """Member → its place and label; kept until the shard changes, for a large one takes a while to walk through."""
    status = shard.stat()
    cache = cache_file("shard", shard)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(cache.read_text())
        if stored["of"] == [status.st_size, status.st_mtime_ns, *endings()]:
            return {
                name: (int(start), int(length), label) for name, (start, length, label) in stored["members"].items()
            }
    members = _walk(shard)
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"of": [status.st_size, status.st_mtime_ns, *endings()], "members": members}))
        temporary.replace(cache)
    return members


def _walk(shard: Path) -> dict[str, Entry]:
    """Read the headers of a tar file and its labels; images stay where they are.

    Raises:
        ValueError: it is no tar file, is compressed, or ends too early.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str | None] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                stem, ending = os.path.splitext(member.name)
                if not member.isreg() or os.path.basename(stem).startswith("."):
                    continue
                if ending.lower() in endings():
                    images[member.name] = (member.offset_data, member.size)
                elif (
                    ending in LABEL_ENDINGS and member.size <= MAX_LABEL_BYTES and (file := archive.extractfile(member))
                ):
                    labels[stem] = _label(file.read(), ending) or labels.get(stem)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{shard} cannot be read as a tar file that is not compressed; restore it: {error}") from error
    return {name: (*place, labels.get(os.path.splitext(name)[0])) for name, place in images.items()}


def _label(content: bytes, ending: str) -> str | None:
    """A label as text; None if there is none in it."""
    text = content.decode("utf-8", errors="replace").strip()
    if ending == ".cls":
        return text or None
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(text)
        found = values.get("label", values.get("cls")) if isinstance(values, dict) else None
        return str(found) if isinstance(found, (int, str)) else None
    return None
