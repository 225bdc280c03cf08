import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from comad.data.images import UnreadableImageError
from comad.data.load import load_images
from comad.data.loader import EpochBatches, LoaderConfig, ViewDataset, training_batches
from comad.data.shards import expand
from comad.data.transforms import Crop


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_shard(path, images, kind="cls"):
    """A tar file of images: key → (pixels' colour, label)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, (colour, label) in images.items():
            content = io.BytesIO()
            Image.new("RGB", (20, 16), colour).save(content, "PNG")
            text = str(label) if kind == "cls" else json.dumps({"label": label})
            for name, data in (
                (f"{key}.png", content.getvalue()),
                (f"{key}.{kind}", text.encode()),
                (f"{key}.txt", b"x"),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def colours(first, count):
    return {f"{n:04}": ((n, 255 - n, 7), n % 12) for n in range(first, first + count)}


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        write_shard(tmp_path / "set" / f"{number:03}.tar", colours(50 * number, 50), ("cls", "json")[number % 2])
    return tmp_path / "set"


@pytest.mark.parametrize("name", ["", "{000..002}.tar"])
def test_images_and_labels_come_from_their_places(shards, name):
    splits = load_images(str(shards / name))
    assert splits.class_names["fine"] == tuple(f"{n:06}" for n in range(12))
    numbers = []
    for part in splits[:3]:
        for index in range(len(part)):
            number = int(part.load(index)[0, 0, 0])
            assert part.load(index)[:, 3, 5].tolist() == [number, 255 - number, 7]
            assert part.labels["fine"][index] == number % 12 and f"{number:04}.png" in part.path(index)
            numbers.append(number)
    assert sorted(numbers) == list(range(150)) and all(len(part) > 5 for part in splits[:3])


def test_parts_are_named_by_words_of_the_path(tmp_path):
    write_shard(tmp_path / "imagenet-train-0000.tar", colours(0, 30))
    write_shard(tmp_path / "imagenet-validation-00.tar", colours(100, 9))
    splits = load_images(str(tmp_path))
    assert [len(splits.train) + len(splits.val), len(splits.test)] == [30, 9]
    assert "test is val/" in splits.summary().text


def test_the_index_is_kept_until_the_shard_changes(shards, monkeypatch):
    first = [part.fingerprint() for part in load_images(str(shards))[:3]]
    opened = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("read again"))
    assert [part.fingerprint() for part in load_images(str(shards))[:3]] == first
    monkeypatch.setattr(tarfile, "open", opened)
    write_shard(shards / "001.tar", colours(50, 51))
    assert sum(len(part) for part in load_images(str(shards))[:3]) == 151
    os.rename(shards, shards.with_name("moved"))
    write_shard(shards.with_name("moved") / "001.tar", colours(50, 50), "json")
    assert [part.fingerprint() for part in load_images(str(shards.with_name("moved")))[:3]] == first


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace(b'"fine": "1"', b'"fine": "2"'),
        lambda text: text.replace(b"512", b"1" + b"0" * 40, 1),
        lambda text: b"[" * 100_000,
        lambda text: text[: len(text) // 2],
        lambda text: b"",
    ],
)
def test_a_damaged_index_is_made_again(shards, damage):
    first = [part.fingerprint() for part in load_images(str(shards))[:3]]
    for path in (Path(os.environ["XDG_CACHE_HOME"]) / "comad").glob("shard-*"):
        path.write_bytes(damage(path.read_bytes()))
    assert [part.fingerprint() for part in load_images(str(shards))[:3]] == first


def test_words_that_are_no_names_and_no_numbers(shards):
    """Half a pair of surrogates in JSON, superscripts and endless digits beside a list of class names."""
    content = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(content, "PNG")
    with tarfile.open(shards / "000.tar", "w") as archive:
        for name, data in (
            ("a.png", content.getvalue()),
            ("a.json", rb'{"path": "\ud800.png", "label": "\ud800"}'),
            ("b.png", content.getvalue()),
            ("b.cls", "²".encode()),
            ("c.png", content.getvalue()),
            ("c.cls", b"9" * 5000),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    (shards / "classnames.txt").write_text("zero\none\n")
    splits = load_images(str(shards))
    assert {part.key(index) for part in splits[:3] for index in range(len(part))} > {"?.png", "000.tar/b.png"}
    assert {"?", "²", "9" * 5000} < set(splits.class_names["fine"])


def test_pipes_among_shards_are_left_out_and_endless_ranges_refused(shards, within):
    first = [part.fingerprint() for part in load_images(str(shards))[:3]]
    os.mkfifo(shards / "pipe.tar")
    os.mkfifo(shards / "classnames.txt")
    with within(20):
        assert [part.fingerprint() for part in load_images(str(shards))[:3]] == first
        with pytest.raises(ValueError, match="names 1,000,000,000 files"):
            load_images(str(shards / "{0..999999999}.tar"))
    only = shards.parent / "only"
    only.mkdir()
    os.mkfifo(only / "x.parquet")
    with within(20), pytest.raises(ValueError, match="no images below"):
        load_images(str(only))


def test_views_do_not_depend_on_workers(shards):
    images = load_images(str(shards)).train

    def read(workers):
        order = EpochBatches(len(images), 8, 3, (0, 4))
        dataset = ViewDataset(images, Views(), 3, 0)
        return torch.cat([batch.views[0] for batch in training_batches(dataset, order, LoaderConfig(workers=workers))])

    assert torch.equal(read(0), read(1))


class Views:
    def __call__(self, image):
        return (Crop(size=8)(image),), torch.rand(2)


def test_a_shard_that_is_cut_or_no_tar_file_is_refused_and_a_lost_one_is_unreadable(shards, tmp_path):
    images = load_images(str(shards)).train
    content = (shards / "000.tar").read_bytes()
    (shards / "000.tar").write_bytes(content[:2000])
    unreadable = 0
    for index in range(len(images)):
        try:
            images.load(index)
        except UnreadableImageError as error:
            assert "000.tar" in str(error)
            unreadable += 1
    assert 0 < unreadable < len(images)
    (shards / "000.tar").write_bytes(b"no tar file")
    with pytest.raises(ValueError, match=r"000\.tar cannot be read as a tar file that is not compressed"):
        load_images(str(shards))
    with pytest.raises(ValueError, match=r"2 tar files are not there, such as .*003\.tar"):
        expand(shards / "{001..004}.tar")
    write_shard(tmp_path / "empty" / "0.tar", {})
    with pytest.raises(ValueError, match="no images in the 1 tar files"):
        load_images(str(tmp_path / "empty"))
