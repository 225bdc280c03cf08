import csv
import json

import numpy as np
import pytest
import torch

from comad.data.load import load_images
from comad.evaluation import embed as module
from comad.evaluation.embed import EmbedConfig, embed
from comad.evaluation.features import extract_features
from comad.evaluation.views import load_one


@pytest.fixture
def config(teacher_specs, labelled_folder, tmp_path):
    """Features of 72 labelled images by a tiny backbone, 16 pixels wide."""

    def make(**options):
        given = {"backbone": teacher_specs[0], "data": str(labelled_folder), "out": str(tmp_path / "f.npy")}
        return EmbedConfig(**{**given, "image_size": 16, "batch_size": 16, **options})

    return make


def expected(config, pool="cls"):
    """Features and paths of all images, by the function that scores use."""
    splits = load_images(config.data)
    backbone = load_one(config.backbone, config.data, 16).backbone
    parts = [images for images in splits[:3] if len(images)]
    features = torch.cat([extract_features(backbone, images, 16)[pool] for images in parts]).numpy()
    return features, [images.path(i) for images in parts for i in range(len(images))]


@pytest.mark.parametrize("pool", ["cls", "patch"])
def test_npy_with_paths_and_labels(config, tmp_path, pool):
    text = embed(config(pool=pool))
    features, paths = expected(config(), pool)
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), features, atol=1e-5)
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == paths
    assert all(row["label"] == row["path"].split("/")[-2] for row in rows)
    assert {row["split"] for row in rows} == {"train", "val", "test"} and {row["coarse"] for row in rows} == {""}
    assert f"72 features of width 24 ({pool})" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.csv", "f.json", "f.npy"]


def test_parquet(config, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    embed(config(out=str(tmp_path / "f.parquet")))
    table = parquet.read_table(tmp_path / "f.parquet")
    features, paths = expected(config())
    np.testing.assert_allclose(np.stack(table["feature"].to_numpy()), features, atol=1e-5)
    assert table["path"].to_pylist() == paths and set(table["label"].to_pylist()) == {"ant", "bee", "cat"}
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]


def test_a_stopped_run_goes_on_and_a_finished_one_is_not_repeated(config, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_IMAGES", 20)
    encoded = []
    original = module._encode_part

    def counted(backbone, rows, span, *rest):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(span.start)
        return original(backbone, rows, span, *rest)

    monkeypatch.setattr(module, "_encode_part", counted)
    with pytest.raises(KeyboardInterrupt):
        embed(config())
    assert not (tmp_path / "f.npy").exists()
    monkeypatch.setattr(module, "_encode_part", lambda *given: (encoded.append(given[2].start), original(*given))[1])
    embed(config())
    assert encoded == [0, 20, 40, 60]
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), expected(config())[0], atol=1e-5)
    assert "already" in embed(config()) and len(encoded) == 4
    embed(config(pool="patch"))  # another question: nothing of the old answer is used
    assert len(encoded) == 8
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), expected(config(), "patch")[0], atol=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: b"[" * 5000,
        lambda content: b"",
    ],
    ids=["cut", "flipped", "text", "empty"],
)
@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_damaged_parts_and_tables_are_told_and_written_again(
    config, labelled_folder, tmp_path, monkeypatch, capsys, damage, ending
):
    monkeypatch.setattr(module, "PART_IMAGES", 20)
    out, join = tmp_path / f"f.{ending}", module._join
    monkeypatch.setattr(module, "_join", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embed(config(out=str(out)))
    monkeypatch.setattr(module, "_join", join)
    part = tmp_path / f".f.{ending}.parts/000001.npz"
    part.write_bytes(damage(part.read_bytes()))
    embed(config(out=str(out)))
    assert f"{part} is damaged" in capsys.readouterr().err
    whole = out.read_bytes()
    out.write_bytes(damage(whole))
    try:
        embed(config(out=str(out), nearest=str(labelled_folder / "bee/07.png")))
    except ValueError as error:
        assert f"{out} is damaged; remove it" in str(error)
        out.unlink()
        embed(config(out=str(out)))
    else:
        assert f"{out} is damaged" in capsys.readouterr().err
    assert out.read_bytes() == whole


def test_unreadable_images_are_left_out_and_counted(config, write_images, tmp_path):
    folder = write_images(tmp_path / "images", [f"{label}/{i}.png" for label in "ab" for i in range(12)])
    (folder / "a/3.png").write_bytes(b"no image")
    text = embed(config(data=str(folder), out=str(tmp_path / "g.npy")))
    assert "1 images cannot be read" in text and len(np.load(tmp_path / "g.npy")) == 23
    assert "a/3.png" not in (tmp_path / "g.csv").read_text()
    assert json.loads((tmp_path / "g.json").read_text())["unreadable"] == 1


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_neighbours_of_an_image(config, labelled_folder, tmp_path, monkeypatch, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(module, "PART_IMAGES", 7)
    query = labelled_folder / "bee/07.png"
    text = embed(config(nearest=str(query), top=5, out=str(tmp_path / f"f.{ending}")))
    found = [line.split() for line in text.splitlines()[-5:]]
    features, paths = expected(config())
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similar = unit @ unit[paths.index(str(query))]
    order = np.argsort(-similar, kind="stable")[:5]
    assert [line[1] for line in found] == [paths[i] for i in order] and found[0][1] == str(query)
    np.testing.assert_allclose([float(line[0]) for line in found], similar[order], atol=1e-4)
    assert found[0][2] == "(bee)"


def test_refusals_name_the_remedy(config, teacher_specs, tmp_path):
    (tmp_path / "mine.csv").write_text("mine")
    (tmp_path / "text.jpg").write_text("no image")
    for options, words in (
        ({"out": "f.parket"}, "did you mean '.parquet'"),
        ({"out": str(tmp_path / "mine.npy")}, "would write over"),
        ({"nearest": str(tmp_path / "text.jpg")}, "name an image"),
        ({"backbone": ""}, "comad embed BACKBONE"),
        ({"backbone": teacher_specs[1], "pool": "cls"}, "--pool patch"),
    ):
        with pytest.raises(ValueError, match=words):
            embed(config(**options))
    with pytest.raises(ValueError, match="--top 0 is too small"):
        EmbedConfig(top=0)
    assert (tmp_path / "mine.csv").read_text() == "mine"
