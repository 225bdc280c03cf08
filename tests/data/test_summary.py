import json
import os
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from comad.data import summary as summary_module
from comad.data.identity import changes, check_manifest, manifest, tell_changes
from comad.data.index import NOT_READABLE, NOT_REGULAR, PathTable, index_folder
from comad.data.load import load_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def names_of(images):
    return [images.key(index) for index in range(len(images))]


def labels_of(splits, images, name="fine"):
    return [splits.class_names[name][n] if n >= 0 else None for n in images.labels[name]]


def test_a_summary_says_what_is_there_and_what_is_not(tmp_path, write_images):
    parts = [f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(30)]
    parts += ["test/cat/1.png", "test/dog/2.png", "test/emu/3.png", "test/stray.png"]
    write_images(tmp_path, [*parts, "val/cat/1.png"])
    for name in ("train/cat/a.psd", "train/owl/1.psd", "train/notes.txt", "train/none"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in (".DS_Store", "Thumbs.db", "train/._1.png", "train/.thumbnails/1.png", "train/cat/@eaDir/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "train/cat/1.png").read_bytes())
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.jpg")
    (tmp_path / "train" / "cat" / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "train" / "cat" / "7.png").write_bytes(b"")
    (tmp_path / "train" / "dog" / "8.png").write_bytes((tmp_path / "test" / "emu" / "3.png").read_bytes())
    text, facts = load_images(str(tmp_path)).summary()
    assert facts["images"] == {"train": 60, "val": 1, "test": 4}
    assert facts["split"] == "train is train/, val is val/, test is test/"
    assert facts["classes"] == {"fine": 3}
    assert facts["unlabelled"] == {"train": 0, "val": 0, "test": 1}
    assert facts["left_out"] == {".psd": 2, NOT_REGULAR: 2, ".txt": 1, "no ending": 1}
    assert facts["classes_without_training"] == {"val": [], "test": ["emu"]}
    assert facts["unreadable"]["train"] == ["train/cat/7.png"]
    assert facts["duplicates"]["train and test"] == 1
    assert "Folders of the system are ignored: train/cat/@eaDir." in facts["notes"]
    for part in (
        "train 60, val 1, test 4 (train is train/",
        "2 .psd",
        "test: emu",
        "train/cat/7.png",
        "one is 25.0 points",
    ):
        assert part in text
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    "names, expected",
    [
        (
            ["train/a/1.png", "dev/a/2.png"],
            "train is the rest of train/, val is a tenth of train/, by a hash of each path, test is dev/",
        ),
        (
            ["train/a/1.png", "test/a/2.png"],
            "train is the rest of train/, val is a tenth of train/, by a hash of each path, test is test/",
        ),
        (["train2017/a/1.png", "val2017/a/2.png"], "test is val2017/"),
        (["a/1.png", "b/2.png"], "by a hash of each path about 80, 10 and 10 % are train, val and test"),
        (["1.png", "2.png"], "by a hash of each path about 95 and 5 % are train and val"),
    ],
)
def test_how_the_parts_were_made_is_said(tmp_path, write_images, names, expected):
    splits = load_images(str(write_images(tmp_path, names)))
    assert expected in splits.source.split and expected in splits.summary().text


def test_folders_beside_the_parts_and_parts_that_are_classes_are_said(tmp_path, write_images):
    splits = load_images(str(write_images(tmp_path / "x", ["train/a/1.png", "test/a/2.png", "extra/3.png", "4.png"])))
    assert "2 images outside of the parts are left out: 1 in no folder, 1 extra." in splits.source.notes
    splits = load_images(str(write_images(tmp_path / "y", ["train/1.png", "holdout/2.png"])))
    assert any("train/ counts as a class" in note for note in splits.source.notes)


def test_few_images_and_classes_are_said(tmp_path, write_images):
    names = [f"train/{c}/{i}.png" for c, n in (("many", 30), ("few", 5)) for i in range(n)]
    notes = load_images(str(write_images(tmp_path, [*names, "test/few/1.png"]))).summary().facts["notes"]
    assert any("1 of 2 fine classes have fewer than 20 training images: few" in note for note in notes)


def test_equal_images_are_found_at_a_bounded_cost(tmp_path, monkeypatch):
    noise = np.random.default_rng(0)
    for part, count in (("train", 60), ("val", 20), ("test", 20)):
        (tmp_path / part).mkdir()
        for i in range(count):  # bitmaps of one size
            Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / part / f"{i}.bmp")
    for i in range(5):
        (tmp_path / "test" / f"{i}.bmp").write_bytes((tmp_path / "train" / f"{50 + i}.bmp").read_bytes())
    (tmp_path / "test" / "9.bmp").write_bytes((tmp_path / "val" / "9.bmp").read_bytes())
    splits = load_images(str(tmp_path))
    assert splits.summary().facts["duplicates"] == {"train and test": 5, "val and test": 1}
    monkeypatch.setattr(summary_module, "MAX_COMPARED", 50)
    opened = []
    original = summary_module.read_bytes
    monkeypatch.setattr(summary_module, "read_bytes", lambda *a: opened.append(a) or original(*a))
    facts = splits.summary().facts
    assert len(opened) <= 100 and "Equal images were looked for among 50 files only." in facts["notes"]


def test_one_name_in_two_forms_is_one_class_and_one_image(tmp_path, write_images):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_images(tmp_path, [f"train/{composed}/{i}.png" for i in range(3)] + [f"test/{decomposed}/9.png"])
    splits = load_images(str(tmp_path))
    assert splits.class_names == {"fine": (composed,)}
    other = write_images(tmp_path / "copy", [f"train/{decomposed}/{i}.png" for i in range(3)])
    write_images(other, [f"test/{composed}/9.png"])
    for name in names_of(splits.train) + names_of(splits.val):
        (other / unicodedata.normalize("NFD", name)).write_bytes((tmp_path / name).read_bytes())
    (other / f"test/{composed}/9.png").write_bytes((tmp_path / f"test/{decomposed}/9.png").read_bytes())
    assert [part.fingerprint() for part in load_images(str(other))[:3]] == [part.fingerprint() for part in splits[:3]]


@pytest.mark.parametrize("depth, classes", [(1, ("bird", "cat")), (2, ("bird/owl", "cat/big", "cat/small"))])
def test_labels_may_be_nested(tmp_path, write_images, depth, classes):
    names = [f"train/{c}/{i}.png" for c in ("cat/big", "cat/small", "bird/owl/old") for i in range(9)]
    splits = load_images(
        str(write_images(tmp_path, [*names, "test/cat/small/1.png", "test/cat/2.png"])), label_depth=depth
    )
    assert splits.class_names["fine"] == classes
    if depth == 2:
        assert splits.class_names["coarse"] == ("bird", "cat")
        assert labels_of(splits, splits.test) == [None, "cat/small"]
        assert labels_of(splits, splits.test, "coarse") == ["cat", "cat"]


@pytest.mark.parametrize("separator, encoding", [(",", "utf-8"), ("\t", "utf-8-sig")])
def test_labels_may_come_from_a_table(tmp_path, write_images, separator, encoding):
    root = write_images(tmp_path / "x", [f"train/{i}.png" for i in range(9)] + ["test/1.png", "test/2.png"])
    rows = [("species", "path", "kind", "hue")]
    rows += [("owl" if i % 2 else "cat", f"train/{i}.png", "bird" if i % 2 else "mammal", "grey") for i in range(8)]
    rows += [("emu", "test/1.png", "bird", ""), ("emu", "nowhere.png", "bird", "")]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(separator.join(row) for row in rows), encoding=encoding)
    splits = load_images(str(root), labels=table)
    assert splits.class_names == {"fine": ("cat", "emu", "owl"), "coarse": ("bird", "mammal"), "hue": ("grey",)}
    expected = {f"train/{i}.png": "owl" if i % 2 else "cat" for i in range(8)} | {"train/8.png": None}
    for part in (splits.train, splits.val):
        assert labels_of(splits, part) == [expected[name] for name in names_of(part)]
    assert labels_of(splits, splits.test) == ["emu", None] and labels_of(splits, splits.test, "hue") == [None, None]
    assert "labels.csv has 10 rows; 9 of 11 images have one." in splits.source.notes


@pytest.mark.parametrize(
    "text, message",
    [
        ("name,label\nx,1\n", "first line must name a column path"),
        ("path\nx\n", "first line must name a column path"),
        ("", "first line must name a column path"),
        ("path,label\ntrain/1.png\n", "line 2: 1 values, the first line has 2"),
        ("path,label\nelsewhere.png,cat\n", "none of its 1 paths, such as 'elsewhere.png', is below --data"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, write_images, text, message):
    root = write_images(tmp_path / "x", ["train/1.png", "test/1.png"])
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_images(str(root), labels=tmp_path / "labels.csv")
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        load_images(str(root), labels=tmp_path / "nowhere.csv")


def test_a_list_names_a_subset(tmp_path, write_images):
    root = write_images(tmp_path / "x", [f"train/a/{i}.png" for i in range(9)] + ["val/a/1.png", "test/a/1.png"])
    (tmp_path / "few.txt").write_text("train/a/3.png\n./a/5.png\n\nnowhere.png\n")
    splits = load_images(str(root), subset=tmp_path / "few.txt")
    assert names_of(splits.train) == ["train/a/3.png", "train/a/5.png"]
    assert names_of(splits.test) == ["test/a/1.png"]  # it names none of that part
    assert "few.txt names 3 images; 2 are there, of 11." in splits.source.notes
    flat = write_images(tmp_path / "y", [f"{c}/{i}.png" for c in "ab" for i in range(40)])
    (tmp_path / "few.txt").write_text("\n".join(f"a/{i}.png" for i in range(30)))
    splits = load_images(str(flat), subset=tmp_path / "few.txt")
    assert sorted(name for part in splits[:3] for name in names_of(part)) == sorted(f"a/{i}.png" for i in range(30))
    (tmp_path / "few.txt").write_text("b.png")
    with pytest.raises(ValueError, match="none of its 1 paths is below --data"):
        load_images(str(flat), subset=tmp_path / "few.txt")


def test_options_of_folders_are_refused_elsewhere():
    with pytest.raises(ValueError, match="options of own folders"):
        load_images("stamps", label_depth=2)
    with pytest.raises(ValueError, match="options of folders"):
        load_images([np.zeros((3, 4, 4), np.uint8)], subset="x.txt")


def test_the_same_data_elsewhere_is_the_same(tmp_path, write_images):
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(9)] + ["test/a/1.png"]
    first = load_images(str(write_images(tmp_path / "x", names)))
    second = load_images(str(write_images(tmp_path / "deep" / "y", names)))
    assert [part.fingerprint() for part in first[:3]] == [part.fingerprint() for part in second[:3]]
    assert tell_changes(manifest(first.train), manifest(second.train)) == ""


def test_what_changed_is_counted(tmp_path, write_images):
    root = write_images(
        tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(20)] + ["val/a/1.png", "test/a/1.png"]
    )
    table = tmp_path.parent / f"{tmp_path.name}.csv"
    table.write_text("path,label\n" + "".join(f"train/a/{i}.png,{'x' if i < 5 else 'y'}\n" for i in range(20)))
    before = manifest(load_images(str(root), labels=table).train)
    for name in ("train/b/1.png", "train/b/2.png"):
        (root / name).unlink()
    write_images(root, ["train/c/1.png"])
    write_images(root, ["train/a/1.png"], size=13)
    table.write_text("path,label\n" + "".join(f"train/a/{i}.png,{'x' if i < 8 else 'y'}\n" for i in range(20)))
    after = manifest(load_images(str(root), labels=table).train)
    assert changes(before, after) == {"removed": 2, "added": 1, "resized": 1, "relabelled": 3}
    assert tell_changes(before, after) == "2 images removed, 1 added, 1 resized, 3 relabelled"
    assert changes(before, before) == dict.fromkeys(("removed", "added", "resized", "relabelled"), 0)
    assert tell_changes(before, before[::-1]) == "the order of the images changed"


DAMAGE = {
    "flipped": lambda content: content[:150] + bytes([content[150] ^ 4]) + content[151:],
    "cut": lambda content: content[:-40],
    "empty": lambda content: b"",
    "text": lambda content: b"[" * 5000,
    "no checksum": lambda content: content[:-32],
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_manifest_that_is_damaged_is_told_and_not_believed(tmp_path, write_images, capsys, damage):
    root = write_images(tmp_path / "data", [f"train/{i}.png" for i in range(9)] + ["val/1.png", "test/1.png"])
    images, path = load_images(str(root)).train, tmp_path / "data.npy"
    check_manifest(images, path, resumed=False)
    check_manifest(images, path, resumed=True)
    assert capsys.readouterr().err == ""
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(DAMAGE[damage](content))
    check_manifest(images, path, resumed=True)
    told = f"comad: {path} cannot be read; whether the images changed, the checkpoint says.\n"
    assert capsys.readouterr().err == told


def test_a_run_that_goes_on_refuses_other_images(tmp_path, write_images):
    root = write_images(tmp_path / "data", [f"train/{i}.png" for i in range(9)] + ["val/1.png", "test/1.png"])
    check_manifest(load_images(str(root)).train, tmp_path / "data.npy", resumed=False)
    (root / "train" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"not those it was started with: 1 image removed; restore them") as error:
        check_manifest(load_images(str(root)).train, tmp_path / "data.npy", resumed=True)
    assert "\n" not in str(error.value)


def test_images_of_which_none_can_be_read_are_refused(tmp_path, write_images):
    root = write_images(tmp_path, [f"train/{i}.png" for i in range(40)] + ["val/1.png", "test/1.png"])
    for path in root.glob("train/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"all 32 training images that were tried are unreadable \(.*train/0\.png"):
        load_images(str(root)).summary()
    write_images(root, ["train/0.png"])
    assert len(load_images(str(root)).summary().facts["unreadable"]["train"]) == 31


def test_one_long_name_costs_its_own_length_alone():
    paths = [f"folder/{i:06}.jpg" for i in range(5000)]
    long = "x" * 250 + ".jpg"
    short, mixed = PathTable(paths), PathTable([*paths, long])
    size = lambda table: sum(map(sys.getsizeof, vars(table).values()))  # noqa: E731
    assert size(mixed) - size(short) < 300 and size(short) < 30 * 5000
    assert list(mixed) == [*paths, long] and mixed[-1] == long and len(mixed) == 5001
    assert list(PathTable([])) == []
    with pytest.raises(IndexError):
        mixed[5001]


def test_thumbnails_and_waste_bins_are_no_classes(tmp_path, write_images):
    system = ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "a/@eaDir", "System Volume Information")
    write_images(tmp_path, [*(f"{folder}/1.png" for folder in system), "a/1.png", "b/2.png"])
    index = index_folder(tmp_path)
    assert index.files == ["a/1.png", "b/2.png"] and sorted(index.ignored) == sorted(system)


def test_a_folder_of_files_that_cannot_be_read_names_them(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"x")
    monkeypatch.setattr("comad.data.index.endings", lambda: (".jpg",))
    with pytest.raises(ValueError, match=r"no images below .*; there are 1 \.heic; pip install 'comad\[heic\]'"):
        load_images(str(tmp_path))


def test_the_bundled_set_has_a_summary():
    text, facts = load_images("stamps").summary()
    assert facts["images"] == {"train": 7573, "val": 1095, "test": 2167} and facts["classes"]["fine"] == 37
    assert text.startswith("data stamps\n  images        train 7,573, val 1,095, test 2,167 (as published)")


def test_links_to_themselves_and_folders_that_cannot_be_read_are_told(tmp_path, write_images, monkeypatch):
    write_images(tmp_path, ["a/1.png", "closed/2.png"])
    (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(os.path.normpath(path)) == "closed":
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr("comad.data.index.os.scandir", refuse)
    index = index_folder(tmp_path)
    assert index.files == ["a/1.png"] and index.left_out == {NOT_REGULAR: 1, NOT_READABLE: 1}
