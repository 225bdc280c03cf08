"""`comad data shard`: tar files that are the same data set."""

import json
import tarfile

import numpy as np
import pytest

from comad import cli
from comad.data.identity import manifest
from comad.data.load import load_images
from comad.data.shard_files import ShardConfig, write_shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def same(one, two):
    assert one.class_names == two.class_names
    for a, b in zip(one[:3], two[:3], strict=True):
        assert np.array_equal(manifest(a), manifest(b))
        assert all(a.content(index) == b.content(index) for index in range(len(a)))


def test_they_read_back_as_the_same_data_set(tmp_path, write_images, capsys):
    names = [f"{a}/{b.upper()}/{i}.{'v2.' * (i == 3)}png" for a in ("cat", "dög 1") for b in "xy" for i in range(20)]
    root, out = write_images(tmp_path / "set", [*names, "stray.jpg"]), tmp_path / "shards"
    given = ["--label-depth", "2", "--per-shard", "7"]
    assert cli.main(["data", "shard", str(root), "--out", str(out), *given]) == 0
    plain, read = load_images(str(root), label_depth=2), load_images(str(out))
    same(plain, read)
    assert set(read.class_names) == {"fine", "coarse"}
    shards = sorted(path.name for path in out.iterdir())
    assert "train-000008.tar" in shards and len(shards) == 1 + sum(-(-len(part) // 7) for part in plain[:3])
    count = f"images train {len(plain.train)}, val {len(plain.val)}, test {len(plain.test)}"
    assert f"{len(shards) - 1} tar files of" in (text := capsys.readouterr().out) and count in text
    with tarfile.open(out / "train-000000.tar") as archive:
        members = archive.getnames()
        assert members[:3] == ["000000000.png", "000000000.cls", "000000000.json"] and len(members) == 21
        beside = [archive.extractfile(f"000000000.{ending}") for ending in ("json", "cls")]
        about, number = (json.loads(file.read()) for file in beside if file)
    assert about["path"] == plain.train.key(0)
    assert about["labels"]["fine"] == (out / "classnames.txt").read_text().splitlines()[number]
    again = write_shards(ShardConfig(data=str(out), out=str(tmp_path / "again"), per_shard=9))  # shards of shards
    assert "use them: --data" in again
    same(plain, load_images(str(tmp_path / "again")))


def test_named_parts_stay_what_they_are(tmp_path, write_images):
    names = [f"{part}/{c}/{i}.png" for part in ("train", "val") for c in "ab" for i in range(30)]
    root = write_images(tmp_path / "set", names)
    write_shards(ShardConfig(data=str(root), out=str(tmp_path / "shards")))
    same(load_images(str(root)), load_images(str(tmp_path / "shards")))


def test_an_image_that_is_gone_is_left_out_and_a_place_that_is_taken_is_refused(tmp_path, write_images, capsys):
    root = write_images(tmp_path / "set", [f"train/{i}.png" for i in range(9)] + ["test/1.png"])
    (root / "train" / "4.png").write_bytes(b"")
    arguments = ["data", "shard", str(root), "--out", str(tmp_path / "shards")]
    assert cli.main(arguments) == 0
    assert "1 images cannot be read and are left out, such as train/4.png" in capsys.readouterr().out
    before = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert cli.main(arguments) == 1
    assert "is not empty; pass --out with a new folder" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == before
    assert cli.main(["data", "shard", "stamps", "--out", str(tmp_path / "x")]) == 1
    assert "are no files" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_what_is_interrupted_leaves_nothing(tmp_path, write_images, monkeypatch):
    root = write_images(tmp_path / "set", [f"{i}.png" for i in range(9)])
    monkeypatch.setattr("comad.data.shard_files._members", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_shards(ShardConfig(data=str(root), out=str(tmp_path / "shards")))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
