"""The same images as a folder, tar files, arrow, parquet and a table: the same order, pixels, labels and batches."""

import io
import json
import pickle
import random
import shutil
import tarfile
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from comad.data.images import UnreadableImageError
from comad.data.load import load_images
from comad.data.loader import LoaderConfig, TrainingBatches, ViewDataset, check_order, shard_order
from comad.data.transforms import Crop

CLASSES = ("cat", "dog", "owl")
COUNT = {"train": 40, "test": 12}
KINDS = ("tar", "arrow", "arrow-file", "parquet", "csv")


def write_rows(table, path):
    """An arrow stream or a parquet file, by the ending."""
    if path.suffix == ".parquet":
        return pq.write_table(table, path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, in the order of their names."""
    root, noise = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for part, count in COUNT.items():
        for number in range(count):
            place = root / part / CLASSES[number * 3 // count]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place / f"{number:03}.png")
    return root


def rows_of(folder, part):
    """Path, content and class of each image of a part."""
    files = sorted((folder / part).rglob("*.png"), key=str)
    return [(str(file.relative_to(folder)), file.read_bytes(), CLASSES.index(file.parent.name)) for file in files]


def halves(rows):
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def write_tar(folder, out):
    for part in COUNT:
        for number, rows in enumerate(halves(rows_of(folder, part))):
            with tarfile.open(out / f"set-{part}-{number:03}.tar", "w") as archive:
                for key, (_, content, label) in enumerate(rows):
                    for ending, data in (("png", content), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{key:05}.{ending}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
    (out / "classnames.txt").write_text("\n".join(CLASSES))


def tables_of(folder):
    """As Hugging Face's library has them: part → tables of some rows each."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    for part in COUNT:
        tables = []
        for rows in halves(rows_of(folder, part)):
            images = [{"bytes": content, "path": None} for _, content, _ in rows]
            table = pa.table({"image": images, "label": [label for *_, label in rows]}, schema=kind)
            tables.append(table.replace_schema_metadata(about))
        yield part, tables


def write_arrow(folder, out, open_file=pa.ipc.new_stream):
    for part, tables in tables_of(folder):
        (out / part).mkdir()
        for number, table in enumerate(tables):
            path = out / part / f"data-{number:05}-of-00002.arrow"
            with pa.OSFile(str(path), "wb") as sink, open_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
        (out / part / "state.json").write_text("{}")
    (out / "dataset_dict.json").write_text(json.dumps({"splits": list(COUNT)}))


def write_parquet(folder, out):
    (out / "data").mkdir()
    for part, tables in tables_of(folder):
        for number, table in enumerate(tables):
            pq.write_table(table, out / "data" / f"{part}-{number:05}-of-00002.parquet", row_group_size=6)


def write_csv(folder, out):
    shutil.copytree(folder, out / "images")
    rows = [
        f"images/{path},{CLASSES[label]},{'training' if part == 'train' else part}"
        for part in COUNT
        for path, _, label in rows_of(folder, part)
    ]
    (out / "list.csv").write_text("\n".join(["path,label,split", *rows]))


WRITERS = {
    "tar": write_tar,
    "arrow": write_arrow,
    "arrow-file": lambda folder, out: write_arrow(folder, out, pa.ipc.new_file),
    "parquet": write_parquet,
    "csv": write_csv,
}


@pytest.fixture(params=KINDS)
def source(request, folder, tmp_path):
    out = tmp_path / "source"
    out.mkdir()
    WRITERS[request.param](folder, out)
    return str(out / "list.csv" if request.param == "csv" else out)


class Views:
    def __call__(self, image):
        return (Crop(size=8)(image),), torch.rand(2)


def batches(images, workers, share=(0, 1)):
    data = TrainingBatches(
        ViewDataset(images, Views(), 3, 0), len(images), images.path, 8, 3, LoaderConfig(workers=workers)
    )
    return [batch.views[0] for batch in data.load(1, 7, *share)]


def test_all_sources_of_the_same_images_are_the_same(folder, source):
    plain, other = load_images(str(folder)), load_images(source)
    assert other.class_names == plain.class_names == {"fine": CLASSES}
    # a missing val is cut from train by names, which differ between sources
    assert len(other.train) + len(other.val) == COUNT["train"]
    assert torch.equal(other.test.labels["fine"], plain.test.labels["fine"])
    for index in range(COUNT["test"]):
        assert torch.equal(other.test.load(index), plain.test.load(index))
        assert other.test.content(index) == plain.test.content(index)
    assert other.test.fingerprint() == load_images(source).test.fingerprint()
    assert "test is test/" in other.summary().text


def test_batches_are_the_same_in_any_number_of_workers_and_processes(folder, source):
    plain, other = load_images(str(folder)).test, load_images(source).test
    expected = batches(plain, 0)
    for workers in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(batches(other, workers), expected, strict=True))
    shares = [batches(other, 0, (rank, 2)) for rank in range(2)]
    assert all(
        torch.equal(torch.cat([a[i::2] for i in (0, 1)]), torch.cat(b)) for a, *b in zip(expected, *shares, strict=True)
    )
    again = pickle.loads(pickle.dumps(other))
    assert torch.equal(again.load(3), other.load(3))


def test_an_image_that_is_none_is_skipped_and_named(folder, tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    good = next(iter(rows_of(folder, "test")))[1]
    (tmp_path / "apart.png").write_bytes(good)
    images = [
        {"bytes": good, "path": "a.png"},
        {"bytes": b"no image", "path": None},
        {"bytes": None, "path": str(tmp_path / "apart.png")},
        {"bytes": None, "path": "nowhere.png"},
        None,
        {"bytes": b"", "path": None},
    ]
    table = pa.table({"image": pa.array(images, kind), "label": [0, 1, -1, 1, None, 0]})
    for ending in ("arrow", "parquet"):
        out = tmp_path / ending
        out.mkdir()
        path = out / f"test.{ending}"
        write_rows(table, path)
        splits = load_images(str(path))
        rows = [(part, index) for part in splits[:3] for index in range(len(part))]
        found = {part.key(index): (part, index) for part, index in rows}
        assert len(found) == 6 and splits.class_names == {"fine": ("000000", "000001")}
        for row in range(6):
            part, index = found[f"test.{ending}/{row:08}"]
            if row == 0 or (row == 2 and ending == "arrow"):
                assert part.load(index).shape == (3, 20, 24)
            else:
                with pytest.raises(UnreadableImageError, match=f"{row:08}.*test.{ending}"):
                    part.load(index)


def test_tables_that_are_no_images_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column of images among text"):
        load_images(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"image": [[1, 2], [3, 4]]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="the column image holds no files but list"):
        load_images(str(tmp_path / "b.parquet"))
    for ending in ("parquet", "arrow"):
        (tmp_path / f"c.{ending}").write_bytes(b"nothing of that kind")
        with pytest.raises(ValueError, match=f"c.{ending} cannot be read as {ending}"):
            load_images(str(tmp_path / f"c.{ending}"))
    table = pa.table({"image": pa.array([b"x" * 3000], pa.binary())})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema, options=options) as w,
    ):
        w.write_table(table)
    with pytest.raises(ValueError, match=r"d\.arrow is compressed; save"):
        load_images(str(tmp_path / "d.arrow"))


def test_a_csv_file_of_names_that_no_file_has_and_of_columns_twice(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("path,label\na\0b.png,x\nnowhere.png,x\n" + "c" * 5000 + ".png,y\n")
    splits = load_images(str(table))
    assert sum(len(part) for part in splits[:3]) == 3
    for part in splits[:3]:
        assert (part.content_numbers() == -1).all()
        for index in range(len(part)):
            with pytest.raises(UnreadableImageError):
                part.load(index)
    table.write_text("path,label,label\na.png,x,y\n")
    with pytest.raises(ValueError, match=r"list\.csv: the first line names label twice"):
        load_images(str(table))


@pytest.mark.parametrize("kind", ["arrow", "arrow-file", "parquet"])
def test_a_damaged_table_is_refused_by_its_name_or_read(kind, folder, tmp_path):
    """Cut anywhere, and flipped where its structure stands: pyarrow has many kinds of errors for that."""
    (tmp_path / "whole").mkdir()
    WRITERS[kind](folder, tmp_path / "whole")
    path = min((tmp_path / "whole").rglob(f"*.{kind.partition('-')[0]}"))
    whole, rng = path.read_bytes(), random.Random(0)
    footer = int.from_bytes(whole[-8:-4], "little") + 8 if kind == "parquet" else 0  # pyarrow aborts on some of these
    end = len(whole) - footer
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(10)]
    for _ in range(60):
        flipped = bytearray(whole)
        for _ in range(3):
            place = rng.choice([rng.randrange(600), end - rng.randrange(1, 1500)])
            flipped[place] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for number, content in enumerate(damaged):
        one = tmp_path / str(number) / f"test{path.suffix}"
        one.parent.mkdir()
        one.write_bytes(content)
        try:
            splits = load_images(str(one))
        except ValueError as error:
            assert str(one.parent) in str(error), error
            refused += 1
            continue
        for index in range(len(splits.train)):
            with suppress(UnreadableImageError):
                splits.train.load(index)
    assert refused >= 10


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_columns_of_odd_values(ending, tmp_path):
    def write(table, name):
        path = tmp_path / f"{name}.{ending}"
        write_rows(table, path)
        return str(path)

    content = io.BytesIO()
    Image.new("RGB", (24, 20), "red").save(content, "PNG")
    images = [content.getvalue()] * 12
    late = pa.array([2**55] * 12, pa.timestamp("ms"))
    with pytest.raises(ValueError, match=f"late.{ending} cannot be read as {ending}"):
        load_images(write(pa.table({"image": images, "label": late}), "late"))
    with pytest.raises(ValueError, match=f"twice.{ending} cannot be read as {ending}"):
        load_images(write(pa.table([images, images], names=["image", "image"]), "twice"))
    deep = pa.table({"image": images}).replace_schema_metadata({"huggingface": "[" * 100_000})
    assert sum(map(len, load_images(write(deep, "deep"))[:3])) == 12
    nothing = load_images(write(pa.table({"image": pa.array([None] * 12, pa.binary())}), "nothing")).train
    with pytest.raises(UnreadableImageError, match="0 bytes"):
        nothing.load(0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,label\n", "no image in it"),
        ("path,label,split\na.png,x,holdout\n", "holdout in the column split is no part"),
        ("path,label\na.png,x\n./a.png,y\n", "a.png comes twice; give one row each"),
        ("label\nx\n", "must name a column path"),
    ],
)
def test_a_list_of_images_that_says_too_little_is_refused(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "list.csv"))


def test_other_members_than_images_are_counted_and_masks_are_none(folder, tmp_path):
    content = rows_of(folder, "test")[0][1]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (
            ("a/b.c/1.png", content),
            ("a/b.c/1.seg.png", content),
            ("a/b.c/1.cls", b"4"),
            ("2.txt", b"x"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    splits = load_images(str(tmp_path / "0.tar"))
    (images,) = [part for part in splits[:3] if len(part)]
    assert images.key(0) == "0.tar/a/b.c/1.png" and splits.class_names == {"fine": ("000004",)}
    assert splits.source.left_out == {".seg.png": 1, ".txt": 1}
    with pytest.raises(ValueError, match="brings labels of its own; leave out --label-depth"):
        load_images(str(tmp_path / "0.tar"), label_depth=2)


@pytest.mark.parametrize("kind", ["tar", "arrow", "parquet"])
def test_shards_are_read_one_after_another_and_a_run_resumes_in_the_middle(folder, tmp_path, kind):
    WRITERS[kind](folder, tmp_path)
    images = load_images(str(tmp_path)).train
    shards = images.shard_numbers()
    assert len(set(shards.tolist())) > 1 and (np.diff(shards) >= 0).all()
    config = LoaderConfig(workers=0, shuffle_buffer=5)
    data = TrainingBatches(ViewDataset(images, Views(), 3, 0), len(images), images.path, 4, 3, config)
    steps = 3 * (len(images) // 4)
    whole = list(data.load(0, steps))
    assert images.ahead > 0  # the disk is asked for what comes
    epochs = [torch.cat([b.image for b in whole[i * steps // 3 : (i + 1) * steps // 3]]).tolist() for i in range(3)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs) and epochs[0] != epochs[1]
    for middle in (1, steps // 2):
        rest = list(replace(data, config=replace(config, workers=1)).load(middle, steps))
        assert all(torch.equal(a.views[0], b.views[0]) for a, b in zip(rest, whole[middle:], strict=True))
    shares = [list(data.load(0, steps, rank, 2)) for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.stack([part.image for part in parts], 1).flatten(), batch.image)


def test_no_image_is_read_long_before_the_shard_is_at_it(folder, tmp_path):
    shards = np.repeat([3, 0, 7, 1], [50, 10, 100, 40])
    for buffer in (1, 8, 500):
        order = shard_order(shards, buffer, torch.Generator().manual_seed(0))
        assert sorted(order) == list(range(200))
        begun = list(dict.fromkeys(shards[order].tolist()))
        stream = np.concatenate([np.flatnonzero(shards == shard) for shard in begun]).tolist()
        if buffer < 10:  # no shard is passed over in the buffer
            lead = [stream.index(image) - place for place, image in enumerate(order)]
            assert max(lead) <= buffer and (buffer == 1) == (order == stream)
    orders = {tuple(shard_order(shards, 8, torch.Generator().manual_seed(seed))) for seed in range(5)}
    assert len(orders) == 5


def test_files_of_their_own_have_no_shards_to_read(folder, tmp_path):
    config, images = LoaderConfig(shuffle_buffer=5), load_images(str(folder)).train
    with pytest.raises(ValueError, match=r"--loader\.shuffle-buffer reads shards in their order.*comad data shard"):
        check_order(config, images)
    with pytest.raises(ValueError, match=r"--loader\.shuffle-buffer -1 is too small"):
        LoaderConfig(shuffle_buffer=-1)
