import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from comad.data import decoding
from comad.data import index as index_module
from comad.data.folders import FolderImages
from comad.data.images import UnreadableImageError
from comad.data.load import load_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def index_folder(root):
    return index_module.index_folder(root).files


def files_of(images):
    return list(images.files)


def test_labels_are_the_names_of_sub_folders(tmp_path, write_images):
    write_images(tmp_path, [f"{label}/{i}.png" for label in ("dog", "cat") for i in range(30)])
    splits = load_images(str(tmp_path))
    assert splits.class_names == {"fine": ("cat", "dog")}
    parts = (splits.train, splits.val, splits.test)
    names = [name for part in parts for name in files_of(part)]
    assert sorted(names) == sorted(f"{label}/{i}.png" for label in ("dog", "cat") for i in range(30))
    for part in parts:
        assert len(part) == len(part.groups)
        assert [splits.class_names["fine"][n] for n in part.labels["fine"]] == [f.split("/")[0] for f in files_of(part)]


def test_deeper_folders_keep_the_label_of_the_first(tmp_path, write_images):
    write_images(tmp_path, ["cat/a/1.png", "dog/b/c/2.png", "dog/3.png"])
    assert load_images(str(tmp_path)).class_names == {"fine": ("cat", "dog")}


def test_own_train_val_test_folders_are_taken_as_they_are(tmp_path, write_images):
    names = [f"{part}/{c}/{i}.png" for part in ("train", "val", "test") for c in "ab" for i in range(3)]
    write_images(tmp_path, names)
    splits = load_images(str(tmp_path))
    for part, images in zip(("train", "val", "test"), splits[:3], strict=True):
        assert files_of(images) == [name for name in sorted(names) if name.startswith(part)]
        assert images.labels["fine"].tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.class_names == {"fine": ("a", "b")}


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_missing_part_is_cut_from_train(tmp_path, write_images, held_out):
    write_images(tmp_path, [f"train/a/{i}.png" for i in range(60)] + [f"{held_out}/a/{i}.png" for i in range(5)])
    splits = load_images(str(tmp_path))
    assert files_of(splits.test) == [f"{held_out}/a/{i}.png" for i in range(5)]
    assert len(splits.val) > 0
    assert len(splits.train) + len(splits.val) == 60
    assert not set(files_of(splits.train)) & set(files_of(splits.val))


def test_own_splits_without_labels(tmp_path, write_images):
    write_images(tmp_path, ["train/1.png", "train/2.png", "val/3.png", "test/4.png"])
    splits = load_images(str(tmp_path))
    assert splits.class_names == {} and splits.train.labels == {}
    assert [len(part) for part in splits[:3]] == [2, 1, 1]


@pytest.mark.parametrize(
    "train, held_out", [("train", "valid"), ("Train", "Test"), ("training", "validation"), ("TRAIN", "testing")]
)
def test_other_spellings_of_the_parts_are_known(tmp_path, write_images, train, held_out):
    names = [f"{train}/{c}/{i}.png" for c in ("cat", "dog") for i in range(40)]
    write_images(tmp_path, [*names, f"{held_out}/cat/1.png", f"{held_out}/dog/2.png"])
    splits = load_images(str(tmp_path))
    assert splits.class_names == {"fine": ("cat", "dog")}
    assert files_of(splits.test) == [f"{held_out}/cat/1.png", f"{held_out}/dog/2.png"]
    assert sorted(files_of(splits.train) + files_of(splits.val)) == sorted(names)


def test_train_alone_is_split_and_its_sub_folders_are_labels(tmp_path, write_images):
    splits = load_images(str(write_images(tmp_path, [f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(40)])))
    assert splits.class_names == {"fine": ("cat", "dog")}
    assert all(0 < len(part) < 80 for part in splits[:3])


def test_train_alone_without_sub_folders_has_no_labels(tmp_path, write_images):
    assert load_images(str(write_images(tmp_path, [f"train/{i}.png" for i in range(40)]))).class_names == {}


def test_a_class_may_have_the_name_of_a_part(tmp_path, write_images):
    write_images(tmp_path, [f"{c}/{i}.png" for c in ("boat", "train") for i in range(9)])
    assert load_images(str(tmp_path)).class_names == {"fine": ("boat", "train")}


def test_two_folders_for_one_part_are_refused(tmp_path, write_images):
    write_images(tmp_path, ["train/1.png", "val/2.png", "valid/3.png"])
    with pytest.raises(ValueError, match=r"two folders for one part: train, val, valid; merge or rename"):
        load_images(str(tmp_path))


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path, write_images):
    write_images(tmp_path / "elsewhere", ["cat/1.png", "dog/2.png"])
    (tmp_path / "elsewhere" / "cat" / "around").symlink_to(tmp_path / "data")
    write_images(tmp_path / "data", ["val/cat/3.png", "val/dog/4.png"])
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "val" / "self").symlink_to(tmp_path / "data" / "val")
    assert index_folder(tmp_path / "data") == ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png"]
    assert load_images(str(tmp_path / "data")).class_names == {"fine": ("cat", "dog")}


def test_the_index_is_read_anew_when_a_linked_folder_changes(tmp_path, write_images):
    write_images(tmp_path / "elsewhere", ["1.png"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere", (0, 0))
    assert index_folder(tmp_path / "data") == ["a/1.png"]
    write_images(tmp_path / "elsewhere", ["2.png"])
    assert index_folder(tmp_path / "data") == ["a/1.png", "a/2.png"]


def test_a_stray_image_has_no_label_and_takes_none_away(tmp_path, write_images):
    names = [f"{part}/{c}/{i}.png" for part in ("train", "val", "test") for c in "ab" for i in range(3)]
    write_images(tmp_path, [*names, "test/stray.png"])
    splits = load_images(str(tmp_path))
    assert splits.class_names == {"fine": ("a", "b")}
    assert splits.test.labels["fine"].tolist() == [0, 0, 0, 1, 1, 1, -1]


def test_a_flat_part_has_no_labels_beside_one_that_has(tmp_path, write_images):
    write_images(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(3)] + ["val/a/1.png", "test/1.png"])
    splits = load_images(str(tmp_path))
    assert splits.val.labels["fine"].tolist() == [0] and splits.test.labels["fine"].tolist() == [-1]


def test_a_folder_beside_flat_images_is_no_class(tmp_path, write_images):
    write_images(tmp_path, [*(f"{i}.png" for i in range(9)), "more/1.png"])
    assert load_images(str(tmp_path)).class_names == {}


def test_the_fingerprint_changes_with_names_labels_and_sizes(tmp_path, write_images):
    def fingerprint():
        return [part.fingerprint() for part in load_images(str(tmp_path))[:3]]

    write_images(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(3)] + ["val/a/1.png", "test/a/1.png"])
    first = fingerprint()
    assert fingerprint() == first
    write_images(tmp_path, ["train/a/1.png"], size=13)
    second = fingerprint()
    assert second[0] != first[0] and second[1:] == first[1:]
    (tmp_path / "test" / "a").rename(tmp_path / "test" / "b")
    assert fingerprint()[2] != second[2]


def test_a_flat_folder_has_no_labels(tmp_path, write_images):
    splits = load_images(str(write_images(tmp_path, [f"{i}.jpg" for i in range(40)])))
    assert splits.class_names == {}
    assert all(part.labels == {} for part in splits[:3])
    assert sum(len(part) for part in splits[:3]) == 40


def test_the_split_of_a_file_does_not_move_when_files_are_added(tmp_path, write_images):
    write_images(tmp_path, [f"a/{i}.png" for i in range(30)], size=4)
    before = [set(files_of(part)) for part in load_images(str(tmp_path))[:3]]
    write_images(tmp_path, [f"b/{i}.png" for i in range(30)], size=4)
    after = [set(files_of(part)) for part in load_images(str(tmp_path))[:3]]
    assert all(old <= new for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_every_format_and_mode_becomes_three_channels(tmp_path, ending, mode):
    if mode in ("P", "RGBA") and ending.lower().startswith("jp"):
        pytest.skip("JPEG has no such mode")
    pixels = np.full((10, 14, 3), (200, 40, 90), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / f"one.{ending}")
    train = load_images(str(tmp_path)).train
    images = train if len(train) else next(part for part in load_images(str(tmp_path))[:3] if len(part))
    image = images.load(0)
    assert image.shape == (3, 10, 14)
    if mode == "RGB":
        assert (image.float().mean(dim=(1, 2)).numpy() - (200, 40, 90)).__abs__().max() < 6


def test_sixteen_bits_of_grey_keep_their_upper_eight(tmp_path):
    ramp = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    image = FolderImages("one", tmp_path, ["a.png"]).load(0)
    assert torch.equal(image, torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_data_asks_even_if_another_tag_is_damaged(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        upright = np.array(ImageOps.exif_transpose(image))
    turned = struct.pack("<HHLHH", 0x112, 3, 1, orientation, 0)
    damaged = struct.pack("<HHLf", 0x117, 11, 1, 1.5)  # StripByteCounts is no float
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + turned + damaged + bytes(4)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = FolderImages("one", tmp_path, ["a.png"]).load(0)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), upright)


def test_a_jpeg_is_shrunk_while_it_is_decoded_but_not_below_what_is_asked(tmp_path, write_images):
    images = load_images(
        str(write_images(tmp_path / "x", [f"train/{i}.jpg" for i in range(3)] + ["val/1.jpg", "test/1.jpg"], 160))
    )
    assert images.train.load(0).shape == (3, 160, 160)
    assert images.train.load(0, min_side=40).shape == (3, 40, 40)
    assert images.train.load(0, min_side=41).shape == (3, 80, 80)


def test_other_and_hidden_files_are_left_out(tmp_path, write_images):
    write_images(tmp_path, ["a/1.png", "a/.2.png", ".hidden/3.png"])
    (tmp_path / "a" / "notes.txt").write_text("x")
    assert index_folder(tmp_path) == ["a/1.png"]


def test_names_that_are_not_unicode_are_images_too(tmp_path, write_images):
    write_images(tmp_path, ["a.png"])
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff\xe9.png")
    splits = load_images(str(tmp_path))
    (images,) = (part for part in splits[:3] if len(part))
    assert images.load(0).shape == (3, 24, 24)


@pytest.mark.parametrize("name", ["nowhere", "file.png"])
def test_a_wrong_path_names_the_remedy(tmp_path, name):
    (tmp_path / "file.png").touch()
    with pytest.raises(ValueError, match=r"no folder .*pass --data FOLDER.*stamps"):
        load_images(str(tmp_path / name))


def test_an_empty_folder_names_the_endings(tmp_path):
    with pytest.raises(ValueError, match=r"no images below .*\.jpg.*\.png.*\.webp"):
        load_images(str(tmp_path))


def test_the_index_is_read_from_the_cache(tmp_path, write_images, monkeypatch):
    write_images(tmp_path, ["a/1.png", "b/2.png"])
    first = index_folder(tmp_path)
    monkeypatch.setattr(index_module.os, "scandir", lambda root: pytest.fail("the folder was read again"))
    assert index_folder(tmp_path) == first == ["a/1.png", "b/2.png"]


@pytest.mark.parametrize("change", ["add", "remove", "new folder", "remove folder", "rename"])
def test_the_index_is_read_anew_when_the_folder_changes(tmp_path, write_images, change):
    write_images(tmp_path, ["a/1.png", "a/deep/2.png", "b/3.png"])
    for folder in (tmp_path, *filter(Path.is_dir, tmp_path.rglob("*"))):
        os.utime(folder, (0, 0))  # clocks of file systems are coarse
    index_folder(tmp_path)
    if change == "add":
        write_images(tmp_path, ["a/deep/9.png"])
    elif change == "remove":
        (tmp_path / "a" / "1.png").unlink()
    elif change == "new folder":
        write_images(tmp_path, ["c/d/9.png"])
    elif change == "remove folder":
        (tmp_path / "b" / "3.png").unlink()
        (tmp_path / "b").rmdir()
    else:
        (tmp_path / "b").rename(tmp_path / "z")
    expected = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert index_folder(tmp_path) == expected


def test_two_folders_do_not_share_a_cache(tmp_path, write_images):
    first, second = write_images(tmp_path / "x", ["1.png"]), write_images(tmp_path / "y", ["2.png"])
    assert index_folder(first) == ["1.png"]
    assert index_folder(second) == ["2.png"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', "[[1, 2]]\nx", "cut", "cut" * 20])
def test_a_damaged_cache_is_written_anew(tmp_path, write_images, content):
    write_images(tmp_path / "x", ["1.png"])
    index_folder(tmp_path / "x")
    (cache,) = (Path(os.environ["XDG_CACHE_HOME"]) / "comad").iterdir()
    good = cache.read_bytes()
    cache.write_bytes(good[: len(content)] if content.startswith("cut") else content.encode())
    assert index_folder(tmp_path / "x") == ["1.png"]
    assert cache.read_bytes() == good
    for position in range(len(good)):  # one bit of each byte
        cache.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        assert index_folder(tmp_path / "x") == ["1.png"]


def test_a_place_where_no_cache_can_be_written_does_not_matter(tmp_path, write_images, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert index_folder(write_images(tmp_path / "x", ["1.png"])) == ["1.png"]


def test_twenty_thousand_files_are_indexed_in_seconds(tmp_path):
    for folder in range(20):
        (tmp_path / f"{folder:02}").mkdir()
        for i in range(1000):
            os.close(os.open(tmp_path / f"{folder:02}" / f"{i:04}.jpg", os.O_CREAT))
    start = time.process_time()  # of this process alone, whatever else the machine does
    splits = load_images(str(tmp_path))
    cold = time.process_time() - start
    assert sum(len(part) for part in splits[:3]) == 20_000
    start = time.process_time()
    index_folder(tmp_path)
    cached = time.process_time() - start
    assert cold < 10 and cached < 1, (cold, cached)


def test_damaged_bytes_are_always_reported_as_unreadable(tmp_path, write_images):
    """Cut and scramble files of each format: a decoder may give an image or `UnreadableImageError`, nothing else."""
    random = np.random.default_rng(0)
    names = [f"train/{i}.{ending}" for ending in ("jpg", "png", "webp", "bmp", "tif", "gif", "avif") for i in range(25)]
    write_images(tmp_path, [*names, "val/1.png", "test/1.png"], size=12)
    for number, name in enumerate(names):
        content = bytearray((tmp_path / name).read_bytes())
        for position in random.integers(0, min(120, len(content)), 4):
            content[position] = random.integers(256)
        end = int(random.integers(0, len(content))) if number % 2 else len(content)
        (tmp_path / name).write_bytes(content[:end])
    train = load_images(str(tmp_path)).train
    unreadable = 0
    for index in range(len(train)):
        try:
            assert train.load(index, 8).shape[0] == 3
        except UnreadableImageError as error:
            assert train.path(index) in str(error)
            unreadable += 1
    assert unreadable > 40


def test_a_file_that_is_gone_or_empty_is_unreadable(tmp_path, write_images):
    write_images(tmp_path, ["train/1.png", "train/2.png", "val/3.png", "test/4.png"])
    train = load_images(str(tmp_path)).train
    (tmp_path / "train/1.png").write_bytes(b"")
    (tmp_path / "train/2.png").unlink()
    (tmp_path / "train/2.png").symlink_to("nowhere")
    for index in range(2):
        with pytest.raises(UnreadableImageError, match=rf"{index + 1}\.png"):
            train.load(index)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("min_side", [0, 20, 40])
def test_a_faster_decoder_gives_the_same_pixels(tmp_path, monkeypatch, mode, orientation, min_side):
    pytest.importorskip("simplejpeg")
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(noise).convert(mode).save(tmp_path / "a.jpg", exif=exif)
    images = FolderImages("one", tmp_path, ["a.jpg"])
    fast = images.load(0, min_side)
    monkeypatch.setattr(decoding, "jpeg_library", lambda: None)
    assert torch.equal(images.load(0, min_side), fast)


def test_a_comment_or_a_profile_before_the_orientation_does_not_hide_it(tmp_path):
    pytest.importorskip("simplejpeg")
    exif = Image.Exif()
    exif[0x112] = 6
    profile = b"\xff\xda" * 40_000  # in two segments, full of what ends the header
    Image.new("RGB", (60, 90)).save(tmp_path / "a.jpg", exif=exif, comment=b"\xff\xda", icc_profile=profile)
    content = (tmp_path / "a.jpg").read_bytes()
    start = content.index(b"\xff\xe1")
    stop = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
    quantization = content.index(b"\xff\xdb")
    moved = content[:start] + content[stop:quantization] + content[start:stop] + content[quantization:]
    (tmp_path / "a.jpg").write_bytes(moved)
    images = FolderImages("one", tmp_path, ["a.jpg"])
    assert images.load(0).shape == (3, 60, 90)


def test_a_truncated_jpeg_is_unreadable_with_either_decoder(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:3000])
    images = FolderImages("one", tmp_path, ["a.jpg"])
    for library in (decoding.jpeg_library, lambda: None):
        monkeypatch.setattr(decoding, "jpeg_library", library)
        with pytest.raises(UnreadableImageError, match=r"a\.jpg"):
            images.load(0)
