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
    with pytest.raises(ValueError, match="no pictures of training"):
        load_ade20k(str(tmp_path))


@pytest.mark.parametrize("text", ["Idx\tName\n2\twall\n", "nothing", ""])
def test_a_damaged_list_of_classes_is_refused(folder, text):
    (folder / "objectInfo37.txt").write_text(text)
    with pytest.raises(ValueError, match="no list of classes"):
        load_ade20k(str(folder))


def test_a_picture_without_label_map_is_named(folder):
    next((folder / "annotations" / "training").glob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"1 files of training are alone.*annotations"):
        load_ade20k(str(folder))


def test_a_label_map_of_another_size_is_told(folder):
    images = load_ade20k(str(folder)).validation
    images.check_pictures()
    Image.fromarray(np.zeros((5, 6), dtype=np.uint8)).save(images.label_path(1))
    with pytest.raises(UnreadableImageError, match="5 × 6, its picture"):
        images.load(1)
    with pytest.raises(ValueError, match="a label map of 5 × 6"):
        images.check_pictures()


def test_labels_beyond_the_list_and_colours_are_told(folder):
    images = load_ade20k(str(folder)).train
    shape = np.array(Image.open(images.label_path(0))).shape
    Image.fromarray(np.full(shape, 38, dtype=np.uint8)).save(images.label_path(0))
    with pytest.raises(UnreadableImageError, match="class 38, but the list has 37"):
        images.load(0)
    Image.fromarray(np.zeros((*shape, 3), dtype=np.uint8)).save(images.label_path(0))
    with pytest.raises(UnreadableImageError, match="× 3, its picture"):
        images.load(0)


def test_a_validation_label_beyond_the_list_is_told_before_the_run(folder):
    images = load_ade20k(str(folder)).validation
    shape = np.array(Image.open(images.label_path(1))).shape
    Image.fromarray(np.full(shape, 38, dtype=np.uint8)).save(images.label_path(1))
    with pytest.raises(ValueError, match="class 38, but the list has 37 classes; correct"):
        images.check_pictures()


def test_a_picture_that_ends_too_early_is_told_before_the_run(folder):
    images = load_ade20k(str(folder)).validation
    path = Path(images.path(1))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read; restore it"):
        images.check_pictures()


def test_a_damaged_picture_is_told(folder):
    images = load_ade20k(str(folder)).validation
    (folder / "images" / "validation" / f"{images.names[0]}.jpg").write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match="label map"):
        images.load(0)
    with pytest.raises(ValueError, match="cannot be read; restore it"):
        images.check_pictures()
