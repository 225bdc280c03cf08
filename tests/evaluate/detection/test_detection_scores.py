import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from comad.data.coco import load_coco
from comad.evaluate.detection.scores import NAMES, as_results, score_results


@pytest.fixture(scope="module")
def images(dense_folder):
    return load_coco(str(dense_folder)).train


def answers(images, seed=0):
    """Some objects found, some moved, some named wrongly, some found twice, some missed; masks to match."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for index, picture in enumerate(images.pictures):
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
        results += as_results(found, picture.id, images.categories)
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
def test_equal_to_pycocotools_crowds_and_empty_pictures_included(images, count):
    results = answers(images)
    assert any(instance.crowd for found in images.instances for instance in found)
    ids = [picture.id for picture in images.pictures[:count]]
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
    nothing = score_results(images, [], [picture.id for picture in images.pictures])
    assert set(nothing.box.values()) == {0.0} and nothing.mask.keys() == set(NAMES)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert as_results({**empty, "masks": torch.zeros(0, 8, 8, dtype=torch.bool)}, 1, images.categories) == []
