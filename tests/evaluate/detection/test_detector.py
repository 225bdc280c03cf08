import pytest
import torch
from torchvision.ops import box_iou

from comad.data.dense import targets_of
from comad.evaluate.detection.cascade import BoxStage, CascadeHeads
from comad.evaluate.detection.config import DetectorConfig
from comad.evaluate.detection.detector import Detector, detect_in_image
from comad.models.maps import load_maps

SMALL = DetectorConfig(channels=16, num_convs=(0, 1), hidden=32, anchor=4, proposals=(40, 20), regions=16, detections=5)
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
NOTHING["masks"] = torch.zeros(0, 64, 64, dtype=torch.uint8)


def scene():
    """One image with two squares, one with none."""
    images = torch.full((2, 3, 64, 64), 90, dtype=torch.uint8)
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 6:26, 8:30], masks[1, 34:60, 30:58] = 1, 1
    images[0, 0][masks[0].bool()], images[0, 2][masks[1].bool()] = 255, 255
    return images, [targets_of(masks, torch.tensor([1, 3])), NOTHING]


@pytest.fixture(scope="module", params=["cascade", "plain"])
def detector(request, teacher_specs):
    torch.manual_seed(0)
    maps, _ = load_maps(teacher_specs[0], 64)
    sizes = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    return Detector(maps, 3, DetectorConfig(**{**sizes, "kind": request.param}))


def test_a_loss_for_each_stage_and_a_gradient_for_each_weight(detector):
    torch.manual_seed(0)
    result = detector.train()(*scene())
    names = {name for name in result[1]() if name.startswith("loss_class")}
    stages = len(detector.heads.stages)
    assert names == {f"loss_class_{number}" for number in range(stages)} and stages in (1, 3)
    detector.zero_grad()
    result[0].backward()
    assert torch.isfinite(result[0])
    assert [name for name, weight in detector.named_parameters() if weight.grad is None] == []


def test_a_batch_without_any_object_trains(detector):
    images, _ = scene()
    result = detector.train()(images, [NOTHING, NOTHING])
    detector.zero_grad()
    result[0].backward()
    assert torch.isfinite(result[0]) and result[1]()["loss_mask"] == 0
    assert [name for name, weight in detector.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("size", [(64, 64), (30, 90), (101, 50)])
def test_answers_lie_within_the_image(detector, size):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    for stage in detector.heads.stages:
        stage.score_thresh = 0.0
    found = detect_in_image(detector.eval(), image, 64)
    boxes = found["boxes"]
    assert 0 < len(boxes) <= 5 and found["masks"].shape == (len(boxes), *size) and found["masks"].dtype == torch.bool
    assert (boxes >= 0).all() and (boxes[:, 2] <= size[1] + 1e-3).all() and (boxes[:, 3] <= size[0] + 1e-3).all()
    assert ((found["labels"] >= 1) & (found["labels"] <= 3)).all()
    for box, mask in zip(boxes, found["masks"], strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows):
            assert columns.min() >= box[0] - 2 and rows.max() <= box[3] + 2
    for stage in detector.heads.stages:
        stage.score_thresh = 0.05


def test_nothing_found_is_an_answer(detector):
    for stage in detector.heads.stages:
        stage.score_thresh = 1.1
    found = detect_in_image(detector.eval(), torch.zeros(3, 20, 30, dtype=torch.uint8), 64)
    assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 20, 30)
    for stage in detector.heads.stages:
        stage.score_thresh = 0.05


def test_later_stages_ask_for_more_overlap():
    heads = CascadeHeads(SMALL, 4)
    truth = torch.tensor([[10.0, 10.0, 30.0, 30.0]])
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0 - gap] for gap in (0, 5, 7, 9, 14)])
    overlaps = box_iou(boxes, truth)[:, 0]
    target = {"boxes": truth, "labels": torch.tensor([2])}
    for stage, threshold in zip(heads.stages, (0.5, 0.6, 0.7), strict=True):
        matched = stage.match([boxes], [target])
        assert matched.labels[0].tolist() == [2 if overlap >= threshold else 0 for overlap in overlaps]
        back = stage.correct(matched.offsets[0], [boxes], [(64, 64)])
        assert torch.allclose(back[0], truth.expand(5, 4), atol=1e-3)  # offsets lead to the object


def test_boxes_stay_in_the_image_and_never_vanish():
    stage = BoxStage(SMALL, 4, 0)
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    far = torch.tensor([[-200.0, 0.0, 0.0, 0.0], [9.0, 9.0, 10.0, 10.0]])
    moved = stage.correct(far, [boxes], [(64, 64)])[0]
    assert torch.equal(moved[0], boxes[0])  # it would lie outside
    assert (moved >= 0).all() and (moved <= 64).all() and (moved[1, 2:] > moved[1, :2]).all()
    assert stage.correct(torch.zeros(0, 4), [torch.zeros(0, 4)], [(64, 64)])[0].shape == (0, 4)


def test_the_class_is_by_the_mean_of_the_stages():
    heads = CascadeHeads(SMALL, 4).eval()
    features = {level: torch.rand(1, 16, 16 >> n, 16 >> n) for n, level in enumerate("0123")}
    box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    logits = [
        torch.tensor([[0.0, 4.0, 0.0, 0.0]]),
        torch.tensor([[0.0, 0.0, 9.0, 0.0]]),
        torch.tensor([[0.0, 3.0, 0, 0]]),
    ]
    for stage, scores in zip(heads.stages, logits, strict=True):
        stage.predict = lambda features, boxes, shapes, scores=scores: (scores, torch.zeros(1, 4))
    found = heads.detect(features, [box], [(64, 64)])[0]
    mean = torch.stack([scores.softmax(dim=1) for scores in logits]).mean(dim=0)[0]
    first = int(found["scores"].argmax())
    assert found["labels"][first] == int(mean[1:].argmax()) + 1
    assert torch.allclose(found["scores"][first], mean[1:].max(), atol=1e-5)
    assert torch.allclose(found["boxes"][first], box[0], atol=1e-4)


@pytest.mark.slow
def test_it_can_learn_an_image_by_heart(teacher_specs):
    torch.manual_seed(0)
    maps, _ = load_maps(teacher_specs[0], 64)
    model = Detector(maps, 3, SMALL)
    images, targets = scene()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(images, targets)[0].backward()
        optimizer.step()
    found = detect_in_image(model.eval(), images[0], 64)
    assert box_iou(targets[0]["boxes"], found["boxes"]).max(dim=1).values.min() > 0.7
    assert sorted(found["labels"][found["scores"] > 0.5].unique().tolist()) == [1, 3]
    assert len(detect_in_image(model, images[1], 64)["boxes"]) == 0
