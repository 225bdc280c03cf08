import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from comad.data import coco as coco_module
from comad.data.coco import coco_tools, decode_mask, load_coco
from comad.data.images import UnreadableImageError


@pytest.fixture
def folder(dense_folder, tmp_path):
    return shutil.copytree(dense_folder, tmp_path / "copy")


@pytest.fixture
def change(folder):
    """Rewrite the JSON of a part by a function of its content."""

    def change(edit, part="train"):
        path = folder / "annotations" / f"instances_{part}2017.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return str(folder)

    return change


def test_masks_and_labels_are_those_of_pycocotools(dense_folder):
    images = load_coco(str(dense_folder)).train
    reference = COCO(images.annotations)
    for index, picture in enumerate(images.pictures):
        image, (masks, labels) = images.load(index)
        assert image.shape == (3, picture.height, picture.width)
        entries = [a for a in reference.loadAnns(reference.getAnnIds(picture.id)) if not a["iscrowd"]]
        assert labels.tolist() == [a["category_id"] for a in entries]
        assert masks.shape == (len(entries), picture.height, picture.width)
        assert all(np.array_equal(mask, reference.annToMask(a)) for mask, a in zip(masks, entries, strict=True))


def test_crowds_are_known_and_not_learnt(dense_folder):
    images = load_coco(str(dense_folder)).train
    crowds = [sum(instance.crowd for instance in found) for found in images.instances]
    assert sum(crowds) > 0
    index = int(np.argmax(crowds))
    assert len(images.load(index)[1][1]) == len(images.instances[index]) - crowds[index]


def test_pictures_without_objects_are_kept(dense_folder):
    images = load_coco(str(dense_folder)).train
    empty = [index for index, found in enumerate(images.instances) if not found]
    assert empty
    image, (masks, labels) = images.load(empty[0])
    assert masks.shape == (0, *image.shape[1:]) and labels.shape == (0,)


def test_polygons_and_both_kinds_of_run_lengths_give_pycocotools_masks(dense_folder):
    reference = COCO(load_coco(str(dense_folder)).train.annotations)
    reference.imgs = {1: {"height": 20, "width": 30}}
    polygons = [[2.0, 2.0, 20.5, 3.0, 12.0, 17.0], [22, 10, 29, 10, 29, 19, 22, 19]]
    mask = np.asfortranarray(decode_mask(polygons, 20, 30).numpy())
    assert np.array_equal(mask, reference.annToMask({"image_id": 1, "segmentation": polygons}))
    packed = coco_tools("mask").encode(mask)
    assert np.array_equal(decode_mask(packed, 20, 30).numpy(), mask)


def test_category_ids_with_gaps_become_labels_from_1(change):
    def spread(content):
        content["categories"] = [{**c, "id": 3 * c["id"]} for c in content["categories"][::-1]]
        content["annotations"] = [{**a, "category_id": 3 * a["category_id"]} for a in content["annotations"]]

    change(spread)
    images = load_coco(change(spread, "val")).train
    assert images.categories == [3 * n for n in range(1, 38)] and images.class_names[0] == "aircraft"
    assert all(1 <= instance.label <= 37 for found in images.instances for instance in found)


def break_entry(**values):
    return lambda content: content["annotations"][0].update(values)


FAULTS = {
    "with a box outside the picture": break_entry(bbox=[1000, 5, 10, 10]),
    "with a mask of another size": break_entry(segmentation={"size": [3, 3], "counts": [9]}),
    "with a polygon of fewer than 3 points": break_entry(segmentation=[[1, 2, 3, 4]]),
    "without a mask": break_entry(segmentation=[]),
    "of pictures that are not listed": break_entry(image_id=99999),
    "of categories that are not listed": break_entry(category_id=99999),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_objects_that_cannot_be_used_are_counted(change, dense_folder, reason):
    before = sum(map(len, load_coco(str(dense_folder)).train.instances))
    images = load_coco(change(FAULTS[reason])).train
    assert images.skipped == {reason: 1} and sum(map(len, images.instances)) == before - 1


def test_a_file_without_one_usable_object_is_refused(change):
    def wreck(content):
        content["annotations"] = [{**a, "image_id": -1} for a in content["annotations"]]

    with pytest.raises(ValueError, match=r"not one of its objects can be used: .* of pictures that are not listed"):
        load_coco(change(wreck))


def test_missing_pictures_are_left_out_of_training_and_an_error_in_validation(folder):
    for part in ("train2017", "val2017"):
        sorted((folder / part).glob("*.jpg"))[0].unlink()
    splits = load_coco(str(folder))
    assert len(splits.train) == 7 and splits.train.missing == ["000000000001.jpg"]
    with pytest.raises(ValueError, match=r"lacks 1 pictures.*complete the folder"):
        splits.validation.check_pictures()
    shutil.rmtree(folder / "train2017")
    with pytest.raises(ValueError, match="fits no picture"):
        load_coco(str(folder))


def test_a_picture_of_another_size_or_damaged_is_told(folder):
    images = load_coco(str(folder)).validation
    images.check_pictures()
    Image.new("RGB", (7, 5)).save(images.path(0))
    with pytest.raises(UnreadableImageError, match="5 × 7 pixels, the JSON says"):
        images.load(0)
    with pytest.raises(ValueError, match="use the pictures that belong to it"):
        images.check_pictures()
    (folder / "val2017" / images.pictures[0].file).write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError):
        images.load(0)
    with pytest.raises(ValueError, match="restore it"):
        images.check_pictures()


def test_a_picture_that_ends_too_early_is_told_before_the_run(folder):
    images = load_coco(str(folder)).validation
    path = Path(images.path(1))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read; restore it"):
        images.check_pictures()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"images": [], "annotations": [], "categories": [{}]}'])
def test_a_json_of_something_else_is_refused(folder, text):
    (folder / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(ValueError, match="restore the published file"):
        load_coco(str(folder))


def test_a_wrong_folder_and_two_data_sets_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="no folder of COCO's format"):
        load_coco(str(tmp_path))
    with pytest.raises(ValueError, match="list other categories"):
        load_coco(change(lambda content: content["categories"].pop(), "val"))


def test_without_faster_coco_eval_the_extra_is_named(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(coco_module.importlib, "import_module", refuse)
    with pytest.raises(ValueError, match=r"comad\[dense\]"):
        coco_tools("mask")
