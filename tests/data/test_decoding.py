import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from comad.data import decoding
from comad.data.decoding import UnreadableImageError, load_file


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return str(path)


GREY = {
    "16 bits, of 8": (np.arange(256), np.uint16, "png"),
    "16 bits, of 12": (np.arange(256) * 16, np.uint16, "png"),
    "16 bits, of 16": (np.arange(256) * 257, np.uint16, "png"),
    "16 bits in TIFF": (np.arange(256) * 257, np.uint16, "tif"),
    "32 bits": (np.arange(256), np.int32, "tif"),
    "floats up to 1": (np.arange(256) / 255, np.float32, "tif"),
    "floats up to 255": (np.arange(256), np.float32, "tif"),
}


@pytest.mark.parametrize("kind", GREY)
@pytest.mark.parametrize("name", ["right", "wrong.jpg"])
def test_deep_grey_values_are_seen_in_their_range(tmp_path, kind, name):
    values, dtype, ending = GREY[kind]
    Image.fromarray(values.astype(dtype).reshape(16, 16)).save(tmp_path / f"a.{ending}")
    path = str((tmp_path / f"a.{ending}").rename(tmp_path / name))
    image = load_file(path)
    assert torch.equal(image, torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1))


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((4, 4), -1.0, np.float32),
        np.full((4, 4), 256.0, np.float32),
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), -3, np.int32),
        np.full((4, 4), 2**20, np.int32),
    ],
)
def test_values_of_no_known_range_are_refused_by_name(tmp_path, pixels):
    with pytest.raises(UnreadableImageError, match=r"a\.tif: values from .* of no known range; save the image with 8"):
        load_file(save(tmp_path / "a.tif", pixels))


def deep_png(path, pixels):
    """A PNG with 16 bits per colour, which Pillow does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(decoding.PNG_START + content)
    return str(path)


def test_deep_colours_are_seen_or_refused_but_never_black(tmp_path):
    ramp = np.linspace(0, 65535, 5 * 7 * 3).astype(np.uint16).reshape(5, 7, 3)
    image = load_file(deep_png(tmp_path / "a.png", ramp))
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy((ramp >> 8).astype(np.uint8)))
    with pytest.raises(UnreadableImageError, match=r"b\.png: colours of 16 bits that leave the upper ones empty"):
        load_file(deep_png(tmp_path / "b.png", ramp >> 8))


@pytest.mark.parametrize("ending", ["tif", "tiff", "gif", "avif"])
def test_more_formats_are_read_and_of_many_frames_the_first(tmp_path, ending):
    if f".{ending}" not in decoding.endings():
        pytest.skip("this Pillow does not read it")
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    several = {} if ending == "avif" else {"save_all": True, "append_images": frames[1:]}
    frames[0].save(tmp_path / f"a.{ending}", **several)
    image = load_file(str(tmp_path / f"a.{ending}")).float().mean(dim=(1, 2))
    assert image[0] > 240 and image[2] < 10


def test_heic_is_read_where_its_library_is(tmp_path):
    library = pytest.importorskip("pillow_heif")
    assert ".heic" in decoding.endings()
    library.from_pillow(Image.new("RGB", (64, 32), "red")).save(str(tmp_path / "a.heic"))
    image = load_file(str(tmp_path / "a.heic"))
    assert image.shape == (3, 32, 64) and image[0].float().mean() > 230


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("length", [10, 3_000_000, 80_000_000])
def test_texts_of_any_length_in_a_png_do_not_matter(tmp_path, compressed, length):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * length, zip=compressed)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", pixels, pnginfo=text)
    assert np.array_equal(load_file(path).permute(1, 2, 0), pixels)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device"])
def test_only_regular_files_are_read_and_nobody_waits(tmp_path, kind, within):
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    with within(60), pytest.raises(UnreadableImageError, match=r"not a regular file|directory"):
        load_file("/dev/zero" if kind == "device" else str(path))


def test_files_that_are_too_large_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    with path.open("wb") as file:
        file.truncate(decoding.MAX_BYTES + 1)  # no block of it is on the disk
    with pytest.raises(UnreadableImageError, match="more than"):
        load_file(str(path))
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    path.write_bytes(bomb.getvalue())
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        load_file(str(path))


def test_formats_that_run_other_programs_are_not_tried(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    path = (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImageError, match="cannot identify"):
        load_file(str(path))


@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyError("tag"), OverflowError(), AssertionError()])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    path = save(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(decoding.Image, "open", fail)
    with pytest.raises(UnreadableImageError, match=r"a\.png: \S"):
        load_file(path)


def test_a_large_file_is_read_in_pieces(tmp_path):
    path = Path(tmp_path / "a.bin")
    content = os.urandom(100_000)
    path.write_bytes(content)
    assert decoding.read_bytes(str(path)) == content
    assert decoding.read_bytes(str(path), 1000) == content[:1000]
