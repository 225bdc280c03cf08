"""Sets of labelled or unlabelled images: what every command reads. Own folders here, the bundled set in `bundled`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from comad.data.index import EXTENSIONS, index_folder

SPLIT_NAMES = ("train", "val", "test")
SPLIT_FOLDERS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
SPLIT_FOLDERS |= {name: name for name in SPLIT_NAMES}
JPEG_START, METADATA, PIXELS = b"\xff\xd8", b"\xff\xe1", b"\xff\xda"  # the markers SOI, APP1 and SOS
ORIENTATION = ExifTags.Base.Orientation.value
DAMAGE = (OSError, ValueError, SyntaxError, RuntimeError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are not sound."""
TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation in a file → what brings the picture upright."""


class UnreadableImageError(ValueError):
    """One file could not be decoded; the message names it. Training goes on without it."""


class ImageSet(ABC):
    """One split of a set of images.

    Attributes:
        name: for messages and cards.
        labels: label set name ("fine", "coarse") → int64 (n,), -1 where unlabelled; empty without labels.
        groups: int64 (n,), images of one concept share a number: the unit of the bootstrap.
        eval_crop: share of the shorter side that an evaluation view shows.
    """

    name: str
    labels: dict[str, Tensor]
    groups: Tensor
    eval_crop: float = 0.875

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, min_side: int = 0) -> Tensor:
        """Decode one image to uint8 (3, h, w), or (4, h, w) with alpha and premultiplied colours.

        Args:
            index: which image.
            min_side: a decoder may shrink the image while it decodes, to no less than this; 0: it does not.

        Raises:
            UnreadableImageError: the file is missing, truncated or not an image.
        """

    @abstractmethod
    def path(self, index: int) -> str:
        """Name one image in a message."""

    def fingerprint(self) -> str:
        """Hash what the images are called and how they are labelled, and where they are files their sizes."""
        digest = hashlib.sha256()
        for name, labels in self.labels.items():
            digest.update(name.encode() + labels.numpy().tobytes())
        for index in range(len(self)):
            path = self.path(index)
            size = os.path.getsize(path) if os.path.exists(path) else 0
            digest.update(os.fsencode(f"{path}\0{size}\0"))
        return digest.hexdigest()


class Splits(NamedTuple):
    """The parts of a set: students learn from ``train``, choices are made on ``val``, scores come from ``test``."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    class_names: dict[str, tuple[str, ...]]
    licence: str


class FolderImages(ImageSet):
    """Image files below a folder. ``classes``: label of each file, or None."""

    def __init__(self, name: str, root: Path, files: Sequence[str], classes: Sequence[int] | None):
        self.name = name
        self.root = root
        self.files = np.array(files, dtype=np.str_)  # one block of memory, cheap to share with worker processes
        self.labels = {} if classes is None else {"fine": torch.tensor(classes, dtype=torch.int64)}
        self.groups = torch.arange(len(files))

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """See `ImageSet.path`."""
        return str(self.root / str(self.files[index]))

    def load(self, index: int, min_side: int = 0) -> Tensor:
        """See `ImageSet.load`."""
        path = self.path(index)
        try:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
            pixels = _decode_plain_jpeg(content, min_side)
            return torch.from_numpy(_decode(content, min_side) if pixels is None else pixels).permute(2, 0, 1)
        except DAMAGE as error:
            raise UnreadableImageError(f"{self.path(index)}: {error}") from error


def _decode(content: bytes, min_side: int) -> np.ndarray:
    """Pixels of any picture that Pillow reads, uint8 (h, w, 3)."""
    with Image.open(io.BytesIO(content)) as image:
        if min_side:  # JPEG only: decodes at 1/2, 1/4 or 1/8, never below min_side
            image.draft("RGB", (min_side, min_side))
        return np.array(_upright_rgb(image))


def _decode_plain_jpeg(content: bytes, min_side: int) -> np.ndarray | None:
    """The same pixels for a JPEG file with three channels that lies upright, in two thirds of the time; else None."""
    library = jpeg_library()
    if library is None or not content.startswith(JPEG_START):
        return None
    with contextlib.suppress(ValueError):  # damaged: what can be done with it is left to Pillow
        height, width, colours, _ = library.decode_jpeg_header(content)
        if colours in ("YCbCr", "RGB") and height * width <= (Image.MAX_IMAGE_PIXELS or 0) and _is_upright(content):
            room = min(height, width) // min_side if min_side else 1
            shrink = next((factor for factor in (8, 4, 2) if factor <= room), 0)
            least = (-(-height // shrink), -(-width // shrink)) if shrink else (0, 0)
            return library.decode_jpeg(content, min_height=least[0], min_width=least[1])
    return None


def _is_upright(content: bytes) -> bool:
    """Walk over the segments in front of the pixels; if one may hold an orientation, Pillow is asked for it."""
    place = len(JPEG_START)
    while content[place : place + 1] == b"\xff" and content[place : place + 2] not in (METADATA, PIXELS):
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    if content[place : place + 2] == PIXELS:
        return True
    with Image.open(io.BytesIO(content)) as image:
        return image.getexif().get(ORIENTATION, 1) == 1


@lru_cache
def jpeg_library() -> ModuleType | None:
    """simplejpeg where it is installed: libjpeg-turbo, as in Pillow."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF data asks, keep the upper 8 of 16 bits, and lay transparent parts on white.

    A plain RGB picture is not copied. Orientation is read and nothing else: Pillow's own way writes EXIF data anew, and
    fails where a tag in it is damaged.
    """
    turn = TURN.get(image.getexif().get(ORIENTATION, 1))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I"):  # Pillow itself would make white of all that is above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def load_images(data: str) -> Splits:
    """Open the bundled set by its name (``stamps``) or a folder of images by its path.

    A folder may hold ``train`` and ``val`` or ``test`` sub-folders, also spelt as in `SPLIT_FOLDERS` and in capitals.
    Without them images are split by a hash of their path, so that the split stays the same when files are added; so
    are those of ``train`` where nothing lies beside it. Labels are the names of the sub-folders, if most training
    images lie in some; an image that lies in none has no label.

    Raises:
        ValueError: no such folder, no image in it, or two sub-folders for the same part.
    """
    from comad.data.bundled import BUNDLED

    if data in BUNDLED:
        return BUNDLED[data]()
    root = Path(data).expanduser()
    if not root.is_dir():
        raise ValueError(f"no folder {data!r}; pass --data FOLDER with images, or one of: {', '.join(BUNDLED)}.")
    files = index_folder(root)
    if not files:
        raise ValueError(f"no images below {data!r}; expected files ending in {', '.join(EXTENSIONS)}.")
    return _split_folder(root, files)


def _split_folder(root: Path, files: list[str]) -> Splits:
    tops = {file.partition("/")[0] for file in files}
    folders = {top: SPLIT_FOLDERS[top.lower()] for top in sorted(tops) if top.lower() in SPLIT_FOLDERS}
    named = {part: [f for f in files if folders.get(f.partition("/")[0]) == part] for part in SPLIT_NAMES}
    has_splits = bool(named["train"]) and bool(named["val"] or named["test"])
    if has_splits and len(set(folders.values())) < len(folders):
        raise ValueError(f"{str(root)!r} has two folders for one part: {', '.join(folders)}; merge or rename one.")
    depth = 1 if has_splits or (len(folders) == len(tops) == 1) else 0
    parts = _named_parts(named) if has_splits else _hashed_parts(files, depth)
    names = sorted({file.split("/")[depth] for part in parts for file in part if file.count("/") > depth})
    labelled = _are_labelled(parts[0] or files, depth)
    number = {name: i for i, name in enumerate(names)}

    def build(part: str, listed: list[str]) -> FolderImages:
        classes = [number[file.split("/")[depth]] if file.count("/") > depth else -1 for file in listed]
        return FolderImages(f"{root.name}/{part}", root, listed, classes if labelled else None)

    train, val, test = (build(part, listed) for part, listed in zip(SPLIT_NAMES, parts, strict=True))
    return Splits(train, val, test, {"fine": tuple(names)} if labelled else {}, "your own")


def _named_parts(named: dict[str, list[str]]) -> list[list[str]]:
    """Use the folder's own splits. A missing test is all of ``val``; a missing val is a hashed tenth of ``train``."""
    train, val, test = (named[part] for part in SPLIT_NAMES)
    if not test:
        val, test = [], val
    if not val:
        val = [file for file in train if _bucket(file) < 0.1]
        train = [file for file in train if _bucket(file) >= 0.1]
    return [train, val, test]


def _are_labelled(files: list[str], depth: int) -> bool:
    """Whether most lie in the folder of a class; the others then have no label."""
    return 2 * sum(file.count("/") > depth for file in files) > len(files)


def _hashed_parts(files: list[str], depth: int) -> list[list[str]]:
    val, test = (0.1, 0.2) if _are_labelled(files, depth) else (0.05, 0.05)
    buckets = [(file, _bucket(file)) for file in files]
    return [
        [file for file, bucket in buckets if bucket >= test],
        [file for file, bucket in buckets if bucket < val],
        [file for file, bucket in buckets if val <= bucket < test],
    ]


def _bucket(file: str) -> float:
    return int.from_bytes(hashlib.blake2b(os.fsencode(file), digest_size=4).digest(), "big") / 2**32


ImageFile.LOAD_TRUNCATED_IMAGES = False
