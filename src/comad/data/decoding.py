"""One image file to pixels: upright, 8 bits, three channels; bounded in time and memory whatever the file holds."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from PIL import ExifTags, Image, features
from torch import Tensor

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
HEIF_ENDINGS = (".heic", ".heif")
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "HEIF", "PPM", "JPEG2000")
"""Pillow knows more, and some of them start other programs."""
MAX_BYTES = 1 << 30
"""Of one file; Pillow itself refuses more than 179 million pixels."""
JPEG_START, METADATA, PIXELS = b"\xff\xd8", b"\xff\xe1", b"\xff\xda"  # the markers SOI, APP1 and SOS
PNG_START, PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
LABEL_MODES = ("L", "P", "1", "I;16", "I;16B", "I")
"""Pillow's modes of one channel of whole numbers."""
ORIENTATION = ExifTags.Base.Orientation.value
TIFF_BITS = 258
TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation in a file → what brings the image upright."""


class UnreadableImageError(ValueError):
    """One file could not be decoded; the message names it. Training goes on without it."""


def load_file(path: str, min_side: int = 0, upright: bool = True) -> Tensor:
    """Decode an image file to uint8 (3, h, w); of several frames the first.

    Args:
        path: of a regular file.
        min_side: a decoder may shrink the image while it decodes, to no less than this; 0: it does not.
        upright: turn the image as its EXIF data asks.

    Raises:
        UnreadableImageError: the file is missing, truncated, too large, not an image, or one of unknown range.
    """
    with naming(path):
        return decode_bytes(read_bytes(path), min_side, upright)


def decode_bytes(content: bytes, min_side: int = 0, upright: bool = True) -> Tensor:
    """Decode the content of an image file, see `load_file`. Raises whatever a decoder raises; see `naming`."""
    pixels = _decode_plain_jpeg(content, min_side) if upright else None
    return torch.from_numpy(_decode(content, min_side, upright) if pixels is None else pixels).permute(2, 0, 1)


def load_label_map(path: str) -> np.ndarray:
    """Decode an image of class numbers, one channel of whole numbers: (h, w), upright.

    Raises:
        UnreadableImageError: the file cannot be decoded, or has colours.
    """
    with naming(path), _opened(read_bytes(path)) as image:
        _check_mode(image)
        return np.array(_upright(image))


def check_label_map(path: str) -> None:
    """See by its header whether a file can be a label map.

    Raises:
        UnreadableImageError: it cannot.
    """
    with naming(path), _opened(read_bytes(path)) as image:
        _check_mode(image)


def _check_mode(image: Image.Image) -> None:
    if image.mode not in LABEL_MODES:
        raise ValueError(f"a label map of mode {image.mode}; save one channel with the number of each pixel's class")


def to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of an image of any mode, uint8 (h, w, 3), transparent parts on white; see `_to_eight_bits`.

    Raises:
        ValueError: its values have no known range.
    """
    if image.mode.startswith("I") or image.mode == "F":  # Pillow itself would cut off all above 255
        image = _to_eight_bits(image)
    if not image.has_transparency_data:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def read_bytes(path: str, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file: a pipe or a device, which may never end, is refused without waiting.

    Args:
        path: of the file.
        most: bytes to read from its start.

    Raises:
        OSError: no such file, another kind of file, or more than `MAX_BYTES`.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"{status.st_size} bytes, more than {MAX_BYTES}")
        length = min(status.st_size, most)
        content = file.read(length)
        while len(content) < length and (more := file.read(length - len(content))):  # a network's file in pieces
            content += more
        return content


@lru_cache
def endings() -> tuple[str, ...]:
    """The endings of files that can be decoded here."""
    return (*ENDINGS, *((".avif",) if features.check("avif") else ()), *(HEIF_ENDINGS if _reads_heif() else ()))


@lru_cache
def jpeg_library() -> ModuleType | None:
    """simplejpeg where it is installed: libjpeg-turbo, as in Pillow."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


@lru_cache
def _reads_heif() -> bool:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


@lru_cache
def _formats() -> tuple[str, ...]:
    _reads_heif()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Whatever a decoder raises for a file that is not sound, which may be anything, becomes one error."""
    try:
        yield
    except Exception as error:
        raise UnreadableImageError(f"{path}: {str(error) or type(error).__name__}") from error


def _opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=_formats())


def _decode(content: bytes, min_side: int, upright: bool) -> np.ndarray:
    """Pixels of any image that Pillow reads, uint8 (h, w, 3). A PNG whose texts are too long is read without them."""
    try:
        with _opened(content) as image:
            if min_side:  # JPEG only: decodes at 1/2, 1/4 or 1/8, never below min_side
                image.draft("RGB", (min_side, min_side))
            image.load()
            pixels = to_rgb(_upright(image) if upright else image)
            if _has_deep_colours(image, content) and pixels.max() < 64:
                raise ValueError("colours of 16 bits that leave the upper ones empty; save the image with 8 bits")
            return pixels
    except ValueError:
        plain = _without_texts(content)
        if plain is content:
            raise
    return _decode(plain, min_side, upright)


def _has_deep_colours(image: Image.Image, content: bytes) -> bool:
    """Whether Pillow took the upper 8 of 16 bits by itself, as it does of all but grey."""
    if image.format == "PNG":
        return content[24] == 16 and not image.mode.startswith("I")
    return image.format == "TIFF" and max(getattr(image, "tag_v2", {}).get(TIFF_BITS, (8,))) > 8 and len(image.mode) > 1


def _without_texts(content: bytes) -> bytes:
    """A PNG file less its texts and colour profile; the same object if it has none."""
    if not content.startswith(PNG_START):
        return content
    view, place, kept = memoryview(content), len(PNG_START), [memoryview(PNG_START)]
    while place < len(content):
        end = place + 12 + int.from_bytes(view[place : place + 4], "big")
        if view[place + 4 : place + 8] not in PNG_TEXTS:
            kept.append(view[place:end])
        place = end
    shorter = b"".join(kept)
    return content if len(shorter) == len(content) else shorter


def _upright(image: Image.Image) -> Image.Image:
    """Orientation is read and nothing else: Pillow's own way writes EXIF data anew, and fails where it is damaged."""
    turn = TURN.get(image.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits as 8, so that none comes out black.

    Whole numbers count as of 8, 10, 12, 14 or 16 bits, the fewest that hold the largest. Floats are in [0, 1], or in
    [0, 255] if one is above 1.

    Raises:
        ValueError: values are negative, above that, or no numbers.
    """
    values = np.asarray(image)
    low, high = values.min(initial=0), values.max(initial=0)
    floats = image.mode == "F"
    if not (low >= 0 and high <= (255 if floats else 65535)):
        raise ValueError(f"values from {low} to {high}, of no known range; save the image with 8 or 16 bits")
    if floats:
        return Image.fromarray((values * (255 if high <= 1 else 1) + 0.5).astype(np.uint8))
    bits = max(8, int(high).bit_length() + 1 & ~1)
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


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
    with _opened(content) as image:
        return image.getexif().get(ORIENTATION, 1) == 1
