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
    for index, record in enumerate(images.records):
        image, (masks, labels) = images.load(index)
        assert image.shape == (3, record.height, record.width)
        entries = [a for a in reference.loadAnns(reference.getAnnIds(record.id)) if not a["iscrowd"]]
        assert labels.tolist() == [a["category_id"] for a in entries]
        assert masks.shape == (len(entries), record.height, record.width)
        assert all(np.array_equal(mask, reference.annToMask(a)) for mask, a in zip(masks, entries, strict=True))


def test_crowds_are_known_and_not_learnt(dense_folder):
    images = load_coco(str(dense_folder)).train
    crowds = [sum(instance.crowd for instance in found) for found in images.instances]
    assert sum(crowds) > 0
    index = int(np.argmax(crowds))
    assert len(images.load(index)[1][1]) == len(images.instances[index]) - crowds[index]


def test_images_without_objects_are_kept(dense_folder):
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
    "with a box outside the image": break_entry(bbox=[1000, 5, 10, 10]),
    "with a mask of another size": break_entry(segmentation={"size": [3, 3], "counts": [9]}),
    "with a polygon of fewer than 3 points": break_entry(segmentation=[[1, 2, 3, 4]]),
    "without a mask": break_entry(segmentation=[]),
    "of images that are not listed": break_entry(image_id=99999),
    "of categories that are not listed": break_entry(category_id=99999),
}


FAULTS |= {
    "with a box that is not four numbers": break_entry(bbox=["1", 2, 3, 4]),
    "with an iscrowd that is neither 0 nor 1": break_entry(iscrowd="maybe"),
    "with a polygon that is not pairs of numbers": break_entry(segmentation=[[1, 2, 3, None, 5, 6]]),
    "with a polygon that crosses the image too often": break_entry(segmentation=[[0, 0, 40, 40] * 5000]),
    "with a polygon far outside the image": break_entry(segmentation=[[1, 2, 1e9, 4, 5, 6]]),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_objects_that_cannot_be_used_are_counted(change, dense_folder, reason):
    before = sum(map(len, load_coco(str(dense_folder)).train.instances))
    images = load_coco(change(FAULTS[reason])).train
    assert images.skipped == {reason: 1} and sum(map(len, images.instances)) == before - 1
    assert f"1 objects {reason} are left out, the first 1 of image " in images.notes()[0]


def test_boxes_that_are_not_those_of_the_masks_are_told(change, dense_folder):
    before = load_coco(str(dense_folder)).train

    def to_corners(content):
        for entry in content["annotations"]:
            left, top, width, height = entry["bbox"]
            entry["bbox"] = [left, top, left + width, top + height]

    images = load_coco(change(to_corners)).train
    assert images.instances == before.instances
    assert "boxes are left, top, right and bottom, not left, top, width and height" in images.notes()[0]
    assert not before.notes()


def test_a_box_that_is_not_around_its_mask_gives_way_to_it(change):
    images = load_coco(change(break_entry(bbox=[0, 0, 1, 1]))).train
    assert [instance.box for found in images.instances for instance in found].count(None) == 1
    assert images.notes()[0].endswith("1 boxes are not around their masks and left out.")
    amodal = load_coco(change(break_entry(bbox=[0, 0, 48, 48]))).train
    assert all(instance.box is not None for found in amodal.instances for instance in found)


def run_lengths(counts):
    return lambda record: {"size": [record["height"], record["width"]], "counts": counts}


@pytest.mark.parametrize(
    "segmentation",
    [
        [[float("nan"), 2, 3, 4, 5, 6]],
        [[1e300, 2, 3, 4, 5, 6]],
        [[10**400, 2, 3, 4, 5, 6]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [["1", "2", "3", "4", "5", "6"]],
        [[True, 2, 3, 4, 5, 6]],
        [[[1, 2], [3, 4], [5, 6]]],
        ["polygon"],
        [None],
        "polygon",
        17,
        {},
        {"counts": [1], "size": None},
        run_lengths([9]),
        run_lengths([-1, 10**9]),
        run_lengths(["1"]),
        run_lengths([2**70]),
        run_lengths("0000"),
        run_lengths("\u20ac"),
        run_lengths("ooooooooooooooooooooooooooooo"),
        run_lengths(None),
    ],
)
def test_no_mask_of_a_wrong_kind_is_used(change, segmentation):
    def edit(content):
        value = segmentation(content["images"][0]) if callable(segmentation) else segmentation
        content["annotations"].insert(0, {**content["annotations"][0], "image_id": 1, "segmentation": value})

    images = load_coco(change(edit)).train
    assert sum(images.skipped.values()) == 1 and "of image 1" in images.notes()[0]


@pytest.mark.parametrize("entry", [None, 3, [], {}, {"image_id": [1]}, {"image_id": 1, "category_id": {}}])
def test_what_is_no_object_is_left_out(change, entry):
    images = load_coco(change(lambda content: content["annotations"].append(entry))).train
    assert sum(images.skipped.values()) == 1


def test_compressed_run_lengths_are_read_as_the_tools_write_them():
    generator = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 1.0):
        mask = np.asfortranarray((generator.random((37, 53)) < share).astype(np.uint8))
        mask[:9] = mask[20:25] = 1
        lengths = coco_module.run_lengths_of(coco_tools("mask").encode(mask)["counts"].decode())
        flat = np.concatenate([np.full(length, place % 2) for place, length in enumerate(lengths)])
        assert np.array_equal(flat.reshape(mask.shape, order="F"), mask)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"file_name": "../../secret.jpg"}, r"image 1: file_name '../../secret.jpg' leaves the folder"),
        ({"file_name": "/etc/x.jpg"}, "leaves the folder"),
        ({"file_name": "..\\..\\x.jpg"}, "leaves the folder"),
        ({"file_name": "."}, "leaves the folder"),
        ({"height": -48, "width": -48}, "has a size of -48 × -48 pixels"),
        ({"file_name": None}, "image 1 has no id or no file_name"),
        ({"id": None}, "image number 0 has no id"),
        ({"id": 2}, "image 2 is listed twice"),
        ({"height": None}, r"image 1 \(000000000001.jpg\) has a size of None"),
        ({"height": 10**9, "width": 10**9}, "has a size of 1000000000 × 1000000000 pixels"),
    ],
)
def test_images_that_cannot_be_known_are_refused_by_name(change, values, message):
    with pytest.raises(ValueError, match=message):
        load_coco(change(lambda content: content["images"][0].update(values)))


def test_names_that_no_file_has_are_missing(change):
    odd = [
        {"id": 90_001 + n, "file_name": name, "height": 9, "width": 9} for n, name in enumerate(("a" * 5000, "\ud800"))
    ]

    def edit(content):
        content["images"] += odd
        content["categories"][0]["name"] = "\ud800"

    for part in ("train", "val"):
        splits = change(edit, part)
    splits = load_coco(splits)
    assert splits.train.missing == ["a" * 5000, "?"] and splits.class_names[0] == "?"
    splits.summary().text.encode()


def test_photos_are_turned_as_their_masks_are(folder):
    """As in folders; where the JSON has the size of the unturned photo, its masks belong to that."""
    images = load_coco(str(folder)).train
    record, path = images.records[0], Path(images.path(0))
    pixels = np.asarray(Image.open(path).convert("RGB"))
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(np.rot90(pixels)).save(path, "PNG", exif=exif)  # lies on its side, and says so
    assert np.array_equal(images.load_image(0).permute(1, 2, 0), pixels)
    assert record.height != record.width
    Image.fromarray(pixels).save(path, "PNG", exif=exif)
    assert np.array_equal(images.load_image(0).permute(1, 2, 0), pixels)


def test_a_file_without_one_usable_object_is_refused(change):
    def wreck(content):
        content["annotations"] = [{**a, "image_id": -1} for a in content["annotations"]]

    with pytest.raises(ValueError, match=r"not one of its objects can be used: .* of images that are not listed"):
        load_coco(change(wreck))


def test_missing_images_are_left_out_of_training_and_an_error_in_validation(folder):
    for part in ("train2017", "val2017"):
        sorted((folder / part).glob("*.jpg"))[0].unlink()
    splits = load_coco(str(folder))
    assert len(splits.train) == 7 and splits.train.missing == ["000000000001.jpg"]
    with pytest.raises(ValueError, match=r"lacks 1 images.*complete the folder"):
        splits.validation.check_images()
    shutil.rmtree(folder / "train2017")
    with pytest.raises(ValueError, match="fits no image"):
        load_coco(str(folder))


def test_an_image_of_another_size_or_damaged_is_told(folder):
    images = load_coco(str(folder)).validation
    images.check_images()
    Image.new("RGB", (7, 5)).save(images.path(0))
    with pytest.raises(UnreadableImageError, match="5 × 7 pixels, the JSON says"):
        images.load(0)
    with pytest.raises(ValueError, match="use the images that belong to it"):
        images.check_images()
    (folder / "val2017" / images.records[0].file).write_bytes(b"no image")
    with pytest.raises(UnreadableImageError):
        images.load(0)
    with pytest.raises(ValueError, match="restore it"):
        images.check_images()


def test_an_image_that_ends_too_early_is_told_before_the_run(folder):
    images = load_coco(str(folder)).validation
    path = Path(images.path(1))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read; restore it"):
        images.check_images()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "1" * 5000,
        '{"images": 3}',
        "\0",
        "{",
        "[]",
        "{}",
        '{"images": [], "annotations": [], "categories": [{}]}',
    ],
)
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


def test_a_summary_counts_what_is_used(change):
    def edit(content):
        content["annotations"][0]["segmentation"] = None

    splits = load_coco(change(edit))
    text, facts = splits.summary()
    assert facts["images"] == {"train": 8, "validation": 4} and facts["classes"] == 37
    assert facts["objects"]["train"] == sum(map(len, splits.train.instances))
    trained = {instance.label for found in splits.train.instances for instance in found}
    shown = {instance.label for found in splits.validation.instances for instance in found}
    assert len(facts["classes_without_training"]) == len(shown - trained)
    assert "1 objects without a mask are left out" in text and "train 8, validation 4" in text
