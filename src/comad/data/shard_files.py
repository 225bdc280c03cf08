"""Tar shards of any images, in the layout of webdataset: ``comad data shard FOLDER --out DIR``."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from comad.data.decoding import endings
from comad.data.images import SPLIT_NAMES, ImageSet, Splits
from comad.data.load import DataConfig
from comad.data.shards import CLASS_NAMES, load_shards
from comad.runtime.atomic import replacing
from comad.runtime.progress import Working


@dataclass(frozen=True, kw_only=True)
class ShardConfig(DataConfig):
    """Write tar shards of images: train-000000.tar and so on, members KEY.jpg, KEY.cls and KEY.json.

    Args:
        out: the folder to write; it must not exist, or be empty.
        per_shard: images in each tar file.
    """

    out: str = ""
    per_shard: int = 5000

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise ValueError(f"--per-shard {self.per_shard} is too small; use 1 or more.")


def write_shards(config: ShardConfig) -> str:
    """Write the folder, whole or not at all; returns a summary.

    Files are copied as they are, in the order of the set. ``KEY.json`` holds under ``path`` what an image was called
    and under ``labels`` its labels, so that the shards are the same data set: equal names, order, labels and bytes. An
    image that cannot be read is left out and counted; one that can be read but not decoded is copied.

    Raises:
        ValueError: there is something in ``out``, the images are no files, or none can be read.
    """
    out = Path(config.out)
    if not config.out:
        raise ValueError("name images and a place: comad data shard FOLDER --out DIR.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{config.out!r} is not empty; pass --out with a new folder.")
    splits = config.load_images()
    next(images for images in splits[:3] if len(images)).content(0)  # images that are no files are told at once
    left_out: list[str] = []
    with replacing(out) as partial:
        partial.mkdir(parents=True)
        for part, images in zip(SPLIT_NAMES, (splits.train, splits.val, splits.test), strict=True):
            left_out += _write_part(part, images, splits.class_names, partial, config.per_shard)
        if names := next(iter(splits.class_names.values()), ()):
            text = "".join(f"{_one_line(name)}\n" for name in names)
            (partial / CLASS_NAMES).write_text(text, encoding="utf-8", errors="surrogateescape")
    return _summary(splits, out, left_out)


def _write_part(
    part: str, images: ImageSet, class_names: dict[str, tuple[str, ...]], out: Path, per_shard: int
) -> list[str]:
    """The shards of a part; returns the names of images that cannot be read."""
    left_out = []
    with Working(f"writing {part}", len(images), "images") as told:
        for number, first in enumerate(range(0, len(images), per_shard)):
            rows = range(first, min(first + per_shard, len(images)))
            with tarfile.open(out / f"{part}-{number:06}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                left_out += [images.key(row) for row in rows if not _write_image(row, images, class_names, archive)]
            told.advance(len(rows))
    return left_out


def _write_image(row: int, images: ImageSet, class_names: dict[str, tuple[str, ...]], archive: tarfile.TarFile) -> bool:
    """Add an image and what is known of it; False if it cannot be read."""
    try:
        content = images.content(row)
    except (OSError, ValueError):
        content = b""
    if not content:
        return False
    labels = {name: int(images.labels[name][row]) for name in class_names}
    for ending, data in _members(images.key(row), content, labels, class_names).items():
        member = tarfile.TarInfo(f"{row:09}{ending}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return True


def _members(
    key: str, content: bytes, labels: dict[str, int], class_names: dict[str, tuple[str, ...]]
) -> dict[str, bytes]:
    """Ending → content of the files of one image; the number in ``.cls`` is of the first label set."""
    words = {name: class_names[name][label] for name, label in labels.items() if label >= 0}
    about = {"path": key, **({"labels": words} if words else {})}
    found = {_ending(key, content): content}
    if (first := next(iter(labels.values()), -1)) >= 0:
        found[".cls"] = str(first).encode()
    found[".json"] = json.dumps(about, ensure_ascii=True).encode()
    return found


def _ending(key: str, content: bytes) -> str:
    """That of the name, in small letters; else that of the format that the content has."""
    ending = Path(key).suffix.lower()
    if ending in endings():
        return ending
    try:
        with Image.open(io.BytesIO(content)) as image:
            found = f".{(image.format or '').lower()}"
    except (OSError, ValueError):
        found = ""
    return found if found in endings() else ".jpg"  # cannot be decoded here either way


def _one_line(name: str) -> str:
    return " ".join(name.split())


def _summary(splits: Splits, out: Path, left_out: list[str]) -> str:
    shards = sorted(out.glob("*.tar"))
    read = load_shards(out, shards)
    counts = {name: len(part) for name, part in zip(SPLIT_NAMES, (read.train, read.val, read.test), strict=True)}
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    size = sum(shard.stat().st_size for shard in shards)
    lines = [f"{len(shards)} tar files of {size / 1e6:,.1f} MB are in {out}: images {told}; use them: --data {out}"]
    if left_out:
        lines.append(f"{len(left_out):,} images cannot be read and are left out, such as {left_out[0]}.")
    return "\n".join(lines)
