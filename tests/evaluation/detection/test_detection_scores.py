import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import masks_to_boxes

from comad.data.coco import load_coco
from comad.evaluation.detection.scores import NAMES, as_results, score_results


@pytest.fixture(scope="module")
def images(dense_folder):
    return load_coco(str(dense_folder)).train


def answers(images, seed=0):
    """Some objects found, some moved, some named wrongly, some found twice, some missed; masks to match."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for index, record in enumerate(images.records):
        _, (masks, labels) = images.load(index)
        masks, labels = torch.cat([masks, masks]).bool(), torch.cat([labels, labels])
        shifts = torch.randint(-3, 4, (len(masks), 2), generator=generator)
        pairs = zip(masks, shifts, strict=True)
        masks = torch.stack([m.roll(shift.tolist(), (0, 1)) for m, shift in pairs]) if len(masks) else masks
        wrong = torch.rand(len(labels), generator=generator) < 0.2
        labels = torch.where(wrong, labels % 37 + 1, labels)
        kept = (torch.rand(len(labels), generator=generator) < 0.8) & masks.flatten(1).any(dim=1)
        masks, labels = masks[kept], labels[kept]
        corners = [(np.argwhere(m.numpy()).min(axis=0), np.argwhere(m.numpy()).max(axis=0) + 1) for m in masks]
        boxes = torch.tensor([[a[1], a[0], b[1], b[0]] for a, b in corners], dtype=torch.float32).reshape(-1, 4)
        found = {"boxes": boxes, "labels": labels, "masks": masks}
        found["scores"] = torch.rand(len(labels), generator=generator)
        results += as_results(found, record.id, images.categories)
    return results


def by_pycocotools(images, results, ids):
    with contextlib.redirect_stdout(io.StringIO()):
        truth, scores = COCO(images.annotations), {}
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            own = [{k: v for k, v in r.items() if kind == "segm" or k != "segmentation"} for r in results]
            reference = COCOeval(truth, truth.loadRes(own), kind)
            reference.params.imgIds = ids
            reference.evaluate()
            reference.accumulate()
            reference.summarize()
            scores[name] = reference.stats
    return scores


@pytest.mark.parametrize("count", [8, 5])
def test_equal_to_pycocotools_crowds_and_empty_images_included(images, count):
    results = answers(images)
    assert any(instance.crowd for found in images.instances for instance in found)
    ids = [record.id for record in images.records[:count]]
    results = [entry for entry in results if entry["image_id"] in ids]
    found, expected = score_results(images, results, ids), by_pycocotools(images, results, ids)
    assert 5 < found.box["ap"] < 95 and found.box["ap"] != found.mask["ap"]
    for kind, values in found.as_dict().items():
        for name, value in zip(NAMES, expected[kind], strict=True):
            assert values[name] == pytest.approx(100 * value if value >= 0 else -1, abs=1e-3), (kind, name)


def test_results_are_coco_s_json(images):
    entry = json.loads(json.dumps(answers(images)))[0]
    assert entry.keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert isinstance(entry["segmentation"]["counts"], str) and len(entry["bbox"]) == 4


def test_finding_nothing_scores_0(images):
    nothing = score_results(images, [], [record.id for record in images.records])
    assert set(nothing.box.values()) == {0.0} and nothing.mask.keys() == set(NAMES)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert as_results({**empty, "masks": torch.zeros(0, 8, 8, dtype=torch.bool)}, 1, images.categories) == []


def each(kind, edit):
    def change(content):
        for entry in content[kind]:
            entry.update(edit(entry))

    return change


def restart_ids(content):
    seen = {}
    for entry in content["annotations"]:
        entry["id"] = seen[entry["image_id"]] = seen.get(entry["image_id"], 0) + 1


def spoil_one(**values):
    return lambda content: content["annotations"][3].update(values)


def text_ids(content):
    each("images", lambda x: {"id": f"image {x['id']}"})(content)
    each("annotations", lambda x: {"image_id": f"image {x['image_id']}"})(content)


def as_corners(box):
    left, top, width, height = box
    return [left, top, left + width, top + height]


VARIANTS = {
    "as published": lambda content: None,
    "ids that restart in every image": restart_ids,
    "no ids": each("annotations", lambda entry: {"id": None}),
    "ids of images as text": each("annotations", lambda entry: {"image_id": str(entry["image_id"])}),
    "ids of images as floats": each("annotations", lambda entry: {"image_id": float(entry["image_id"])}),
    "names for ids of images": text_ids,
    "ids of categories as text": each("categories", lambda entry: {"id": str(entry["id"])}),
    "iscrowd as text": each("annotations", lambda entry: {"iscrowd": str(entry["iscrowd"])}),
    "iscrowd as truth": each("annotations", lambda entry: {"iscrowd": bool(entry["iscrowd"])}),
    "no boxes": each("annotations", lambda entry: {"bbox": None}),
    "boxes as corners": each("annotations", lambda entry: {"bbox": as_corners(entry["bbox"])}),
    "boxes as shares of the image": each("annotations", lambda entry: {"bbox": [side / 64 for side in entry["bbox"]]}),
    "one box elsewhere": spoil_one(bbox=[0, 0, 1, 1]),
    "no areas": each("annotations", lambda entry: {"area": None}),
    "areas as text": each("annotations", lambda entry: {"area": "12"}),
    "one flat polygon": spoil_one(segmentation=[5, 5, 30, 5, 30, 30], bbox=None, area=None),
    "one mask that does not fill": spoil_one(segmentation={"size": [48, 48], "counts": [3]}),
    "one coordinate that is no number": spoil_one(segmentation=[[float("nan"), 5, 30, 5, 30, 30]]),
    "one coordinate far away": spoil_one(segmentation=[[1e9, 5, 30, 5, 30, 30]]),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_perfect_answer_scores_100(dense_folder, tmp_path, variant, encoding):
    folder = shutil.copytree(dense_folder, tmp_path / "copy")
    for part in ("train", "val"):
        path = folder / "annotations" / f"instances_{part}2017.json"
        content = json.loads(path.read_text())
        VARIANTS[variant](content)
        path.write_text(json.dumps(content), encoding=encoding)
    images = load_coco(str(folder)).train
    results = []
    for index, record in enumerate(images.records):
        _, (masks, labels) = images.load(index)
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]) if len(masks) else torch.zeros(0, 4)
        found = {"boxes": boxes, "labels": labels, "masks": masks, "scores": torch.ones(len(labels))}
        results += as_results(found, record.id, images.categories)
    assert len(results) > 5
    score = score_results(images, results, [record.id for record in images.records])
    assert score.box["ap"] == pytest.approx(100) and score.mask["ap"] == pytest.approx(100)
