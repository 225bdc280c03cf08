import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from comad.data.backdrops import BACKDROPS
from comad.data.bundled import load_stamps
from comad.data.coco import decode_mask
from comad.data.scene_files import ScenesConfig, run_lengths, write_scenes
from comad.data.scenes import MIN_VISIBLE, Composer, SceneConfig


@pytest.fixture(scope="module")
def stamps():
    return load_stamps()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "new"
    config = ScenesConfig(out=str(out), train=6, validation=3, scene=SceneConfig(crowds=0.5, empty=0.3))
    assert "6 training scenes" in write_scenes(config)
    return out


def scene(stamps, number, **changes):
    composer = Composer(stamps.train, stamps.train.labels["fine"], SceneConfig(**changes))
    return composer(np.random.default_rng((0, number)))


def test_a_scene_is_a_function_of_its_seed(stamps):
    first, again, other = scene(stamps, 1), scene(stamps, 1), scene(stamps, 2)
    assert np.array_equal(first.pixels, again.pixels) and np.array_equal(first.owner, again.owner)
    assert first.pixels.shape != other.pixels.shape or not np.array_equal(first.pixels, other.pixels)


def test_objects_hide_each_other_but_none_vanishes(stamps):
    hidden = 0
    for number in range(12):
        drawn = scene(stamps, number, empty=0.0, crowds=0.0, sides=(96, 96), object_sides=(40, 70), max_objects=8)
        assert drawn.owner.shape == drawn.pixels.shape[:2]
        counts = np.bincount(drawn.owner[drawn.owner >= 0], minlength=len(drawn.things))
        assert len(counts) == len(drawn.things) and (counts >= 40).all()
        alone = scene(stamps, number, empty=0.0, crowds=0.0, sides=(96, 96), object_sides=(40, 70), max_objects=8)
        hidden += alone.owner.max()
    assert hidden > 12 and MIN_VISIBLE < 1  # several objects in most scenes of this small size


def test_there_are_scenes_without_an_object_and_heaps(stamps):
    assert not scene(stamps, 0, empty=1.0).things
    heaps = [thing for n in range(4) for thing in scene(stamps, n, empty=0.0, crowds=1.0).things if thing.crowd]
    assert heaps


@pytest.mark.parametrize("name", BACKDROPS)
def test_backdrops_have_the_size_and_vary(name):
    drawn = [BACKDROPS[name](np.random.default_rng(seed), 20, 30) for seed in (0, 1)]
    assert all(image.shape == (20, 30, 3) and image.min() >= 0 and image.max() <= 255 for image in drawn)
    assert not np.array_equal(*drawn)


def test_both_formats_say_the_same(folder):
    classes = (folder / "objectInfo37.txt").read_text().splitlines()
    assert classes[0].split("\t")[0] == "Idx" and len(classes) == 38
    for part, short in (("training", "train"), ("validation", "val")):
        coco = COCO(folder / "annotations" / f"instances_{short}2017.json")
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == [line.split("\t")[-1] for line in classes[1:]]
        for entry in coco.dataset["images"]:
            stem = entry["file_name"].removesuffix(".jpg")
            labels = np.array(Image.open(folder / "annotations" / part / f"{stem}.png"))
            assert labels.shape == (entry["height"], entry["width"])
            second = folder / f"{short}2017" / entry["file_name"]
            assert second.read_bytes() == (folder / "images" / part / entry["file_name"]).read_bytes()
            drawn = np.zeros_like(labels)
            for annotation in coco.loadAnns(coco.getAnnIds(imgIds=entry["id"])):
                mask = coco.annToMask(annotation).astype(bool)
                assert mask.sum() == annotation["area"] and not drawn[mask].any()
                rows, columns = np.nonzero(mask)
                x, y, w, h = annotation["bbox"]
                assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + w, y + h)
                drawn[mask] = annotation["category_id"]
            assert np.array_equal(drawn, labels)


def test_training_and_validation_share_no_concept(stamps):
    """Composers get the train part and the test part; these are split by concept."""
    train, test = (set(part.groups.tolist()) for part in (stamps.train, stamps.test))
    assert not train & test


def test_choices_are_made_on_validation_concepts(stamps, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "comad.data.scene_files.Composer", lambda images, *rest: shown.append(images) or Composer(images, *rest)
    )
    write_scenes(ScenesConfig(out=str(tmp_path / "new"), train=1, validation=1, concepts="val"))
    groups = [set(images.groups.tolist()) for images in shown]
    assert groups == [set(stamps.train.groups.tolist()), set(stamps.val.groups.tolist())]
    assert "validation scenes val concepts" in (tmp_path / "new" / "README.txt").read_text()


def test_a_folder_in_use_and_empty_parts_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="--out with a new one"):
        write_scenes(ScenesConfig(out=str(folder)))
    with pytest.raises(ValueError, match="at least 1"):
        write_scenes(ScenesConfig(out=str(tmp_path / "x"), validation=0))


def test_run_lengths_begin_with_zeros():
    for corner in (0, 1):
        mask = np.random.default_rng(corner).random((5, 7)) < 0.5
        mask[0, 0] = corner
        lengths = run_lengths(mask)
        assert sum(lengths["counts"]) == 35 and (lengths["counts"][0] == 0) == bool(corner)
        assert np.array_equal(decode_mask(json.loads(json.dumps(lengths)), 5, 7).numpy(), mask)
