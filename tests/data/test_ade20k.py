import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comad.data.ade20k import IGNORED, load_ade20k
from comad.data.images import UnreadableImageError


@pytest.fixture
def folder(dense_folder, tmp_path):
    return shutil.copytree(dense_folder, tmp_path / "copy")


def test_label_0_is_ignored_and_classes_count_from_0(dense_folder):
    splits = load_ade20k(str(dense_folder))
    assert len(splits.class_names) == 37 and len(splits.train) == 8 and len(splits.validation) == 4
    image, classes = splits.train.load(0)
    raw = np.array(Image.open(splits.train.label_path(0)))
    assert image.shape == (3, *raw.shape) and classes.dtype == torch.uint8
    assert np.array_equal(classes.numpy() == IGNORED, raw == 0)
    assert np.array_equal(classes.numpy()[raw > 0], raw[raw > 0] - 1)


def test_a_wrong_folder_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="no folder of ADE20K's format"):
        load_ade20k(str(tmp_path))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tbuilding\n")
    with pytest.raises(ValueError, match="no images of training"):
        load_ade20k(str(tmp_path))


@pytest.mark.parametrize("text", ["Idx\tName\n2\twall\n", "nothing", ""])
def test_a_damaged_list_of_classes_is_refused(folder, text):
    (folder / "objectInfo37.txt").write_text(text)
    with pytest.raises(ValueError, match="no list of classes"):
        load_ade20k(str(folder))


def test_an_image_without_label_map_is_named(folder):
    next((folder / "annotations" / "training").glob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"1 files of training are alone.*annotations"):
        load_ade20k(str(folder))


def test_a_label_map_of_another_size_is_told(folder):
    images = load_ade20k(str(folder)).validation
    images.check_images()
    Image.fromarray(np.zeros((5, 6), dtype=np.uint8)).save(images.label_path(1))
    with pytest.raises(UnreadableImageError, match="a label map of 5 × 6, its image"):
        images.load(1)
    with pytest.raises(ValueError, match="a label map of 5 × 6"):
        images.check_images()


def test_labels_beyond_the_list_and_colours_are_told(folder):
    images = load_ade20k(str(folder)).train
    shape = np.array(Image.open(images.label_path(0))).shape
    Image.fromarray(np.full(shape, 38, dtype=np.uint8)).save(images.label_path(0))
    with pytest.raises(UnreadableImageError, match="class 38, but the list has 37"):
        images.load(0)
    Image.fromarray(np.zeros((*shape, 3), dtype=np.uint8)).save(images.label_path(0))
    with pytest.raises(UnreadableImageError, match="a label map of mode RGB; save one channel"):
        images.load(0)


def test_a_validation_label_beyond_the_list_is_told_before_the_run(folder):
    images = load_ade20k(str(folder)).validation
    shape = np.array(Image.open(images.label_path(1))).shape
    Image.fromarray(np.full(shape, 38, dtype=np.uint8)).save(images.label_path(1))
    with pytest.raises(ValueError, match="class 38, but the list has 37 classes; correct"):
        images.check_images()


def test_an_image_that_ends_too_early_is_told_before_the_run(folder):
    images = load_ade20k(str(folder)).validation
    path = Path(images.path(1))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be used: restore"):
        images.check_images()


def test_a_damaged_image_is_told(folder):
    images = load_ade20k(str(folder)).validation
    (folder / "images" / "validation" / f"{images.names[0]}.jpg").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=images.names[0]):
        images.load(0)
    with pytest.raises(ValueError, match="cannot be used: restore"):
        images.check_images()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_a_label_map_with_colours_is_told_by_its_header(folder, mode):
    images = load_ade20k(str(folder)).train
    images.check_label_maps()
    grey = Image.open(images.label_path(2)).convert(mode)
    grey.save(images.label_path(2), "TIFF" if mode == "F" else "PNG")
    with pytest.raises(ValueError, match=rf"{images.names[2]}\.png: a label map of mode {mode}; save one channel"):
        images.check_label_maps()
    with pytest.raises(UnreadableImageError, match=f"mode {mode}"):
        images.load(2)


@pytest.mark.parametrize("kind", ["P", "I;16"])
def test_label_maps_with_a_palette_or_of_16_bits_are_read(folder, kind):
    images = load_ade20k(str(folder)).train
    _, expected = images.load(0)
    numbers = np.array(Image.open(images.label_path(0)))
    if kind == "P":
        changed = Image.fromarray(numbers)
        changed.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    else:
        changed = Image.fromarray(numbers.astype(np.uint16))
    changed.save(images.label_path(0))
    assert Image.open(images.label_path(0)).mode == kind
    assert torch.equal(images.load(0)[1], expected)


def test_photos_are_turned_as_their_label_maps_are(folder):
    images = load_ade20k(str(folder)).train
    path = images.path(0)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(np.rot90(pixels)).save(path, "PNG", exif=exif)
    assert np.array_equal(images.load(0)[0].permute(1, 2, 0), pixels)
    Image.fromarray(pixels).save(path, "PNG", exif=exif)
    assert np.array_equal(images.load(0)[0].permute(1, 2, 0), pixels)


def test_a_thin_image_is_refused_before_it_is_made_as_high_as_a_window(folder):
    images = load_ade20k(str(folder)).validation
    Image.new("RGB", (20_000, 2)).save(images.path(0))
    Image.new("L", (20_000, 2)).save(images.label_path(0))
    with pytest.raises(ValueError, match="2 × 20000 pixels are too thin"):
        images.check_images()


def test_a_list_of_classes_in_another_encoding_is_refused_and_a_mark_in_front_is_not(folder):
    path = folder / "objectInfo37.txt"
    text = path.read_text()
    path.write_text(text, encoding="utf-8-sig")
    assert len(load_ade20k(str(folder)).class_names) == 37
    path.write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    with pytest.raises(ValueError, match="cannot be read as text in UTF-8"):
        load_ade20k(str(folder))
