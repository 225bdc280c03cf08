"""The second stage of Cascade Mask R-CNN (arXiv:1712.00726), on torchvision's pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

from comad.evaluation.detection.config import DetectorConfig

OFFSET_SCALES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""Of the box offsets, per stage: later stages correct less, so they count in smaller units."""
STAGE_WEIGHTS = (1.0, 0.5, 0.25)
LEVELS = ["0", "1", "2", "3"]

Levels = dict[str, Tensor]
Target = Mapping[str, Tensor]
Shapes = list[tuple[int, int]]


class Matched(NamedTuple):
    """Per image boxes (n, 4), and for each its label, the number of its object and the offset to it."""

    boxes: list[Tensor]
    labels: list[Tensor]
    objects: list[Tensor]
    offsets: Sequence[Tensor]


class BoxPredictor(nn.Module):
    """Class scores and one box offset, whatever the class."""

    def __init__(self, hidden: int, num_classes: int):
        super().__init__()
        self.classify = nn.Linear(hidden, num_classes)
        self.correct = nn.Linear(hidden, 4)

    def forward(self, hidden: Float[Tensor, "n h"]) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n 4"]]:
        """(n, hidden) → (n, K) and (n, 4), in float32."""
        return self.classify(hidden).float(), self.correct(hidden).float()


class BoxStage(RoIHeads):
    """One stage: torchvision's box head with one box per region, for regions that overlap so much with an object.

    Args:
        config: sizes.
        num_classes: with the background, which is class 0.
        number: which stage, from 0 on.
    """

    def __init__(self, config: DetectorConfig, num_classes: int, number: int):
        shape, convs = (config.channels, 7, 7), [config.channels] * config.num_convs[0]
        super().__init__(
            box_roi_pool=MultiScaleRoIAlign(LEVELS, 7, 2),
            box_head=FastRCNNConvFCHead(shape, convs, [config.hidden], norm_layer=lambda width: nn.GroupNorm(4, width)),
            box_predictor=BoxPredictor(config.hidden, num_classes),
            fg_iou_thresh=config.thresholds[number],
            bg_iou_thresh=config.thresholds[number],
            batch_size_per_image=config.regions,
            positive_fraction=0.25,
            bbox_reg_weights=OFFSET_SCALES[number],
            score_thresh=config.least_score,
            nms_thresh=0.5,
            detections_per_img=config.detections,
        )
        self.num_classes = num_classes

    def predict(self, features: Levels, boxes: list[Tensor], shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Class scores (n, K) and offsets (n, 4) for the boxes of all images."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, shapes)))

    def match(self, boxes: list[Tensor], targets: Sequence[Target]) -> Matched:
        """Find the object of each box by this stage's threshold."""
        truth = [target["boxes"] for target in targets]
        objects, labels = self.assign_targets_to_proposals(boxes, truth, [target["labels"] for target in targets])
        wanted = [
            t[index] if len(t) else torch.zeros_like(box) for t, index, box in zip(truth, objects, boxes, strict=True)
        ]
        return Matched(boxes, labels, objects, self.box_coder.encode(wanted, boxes))

    def loss(self, scores: Tensor, correction: Tensor, matched: Matched) -> tuple[Tensor, Tensor]:
        """Losses of classes and boxes."""
        return fastrcnn_loss(scores, self._for_each_class(correction), matched.labels, list(matched.offsets))

    def correct(self, correction: Float[Tensor, "n 4"], boxes: list[Tensor], shapes: Shapes) -> list[Tensor]:
        """Boxes after the correction, within their images; those that would vanish stay as they were."""
        moved = self.box_coder.decode(correction.detach(), boxes).reshape(-1, 4).split([len(part) for part in boxes])
        corrected = []
        for new, old, shape in zip(moved, boxes, shapes, strict=True):
            inside = clip_boxes_to_image(new, shape)
            whole = (inside[:, 2:] - inside[:, :2] > 1e-2).all(dim=1, keepdim=True)
            corrected.append(torch.where(whole, inside, old))
        return corrected

    def select(
        self, probabilities: Float[Tensor, "n K"], correction: Float[Tensor, "n 4"], boxes: list[Tensor], shapes: Shapes
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels of each image after this stage's correction and non-maximum suppression."""
        return self.postprocess_detections(
            probabilities.clamp_min(1e-12).log(), self._for_each_class(correction), boxes, shapes
        )

    def _for_each_class(self, correction: Float[Tensor, "n 4"]) -> Float[Tensor, "n _"]:
        """The one box of a region as the box of each class, which torchvision's functions expect."""
        return correction.repeat(1, self.num_classes)


class CascadeHeads(nn.Module):
    """Boxes that are corrected in stages, each trained on what overlaps more with an object, and masks.

    One stage is plain Mask R-CNN, but for boxes that do not depend on the class. Masks are learnt on the regions of the
    first stage, and predicted for the boxes of the last one.

    Args:
        config: sizes.
        num_classes: with the background, which is class 0.
    """

    def __init__(self, config: DetectorConfig, num_classes: int):
        super().__init__()
        self.stages = nn.ModuleList(BoxStage(config, num_classes, n) for n in range(len(config.thresholds)))
        self.mask_pool = MultiScaleRoIAlign(LEVELS, 14, 2)
        self.mask_head = MaskRCNNHeads(config.channels, [config.channels] * config.num_convs[1], 1)
        self.mask_predictor = MaskRCNNPredictor(config.channels, config.channels, num_classes)

    def losses(
        self, features: Levels, proposals: list[Tensor], shapes: Shapes, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Name → loss.

        Args:
            features: levels of the pyramid.
            proposals: boxes (n, 4) of each image.
            shapes: height and width of each image.
            targets: of each image ``boxes`` (m, 4), ``labels`` (m,) and ``masks`` (m, h, w).
        """
        first = cast(BoxStage, self.stages[0])
        boxes, objects, labels, offsets = first.select_training_samples(proposals, cast(Any, targets))
        matched = Matched(boxes, labels, objects, cast(Any, offsets))
        losses = {"loss_mask": self._mask_loss(features, matched, shapes, targets)}
        for number, stage in enumerate(cast(list[BoxStage], list(self.stages))):
            if number:
                matched = stage.match(boxes, targets)
            scores, correction = stage.predict(features, boxes, shapes)
            class_loss, box_loss = stage.loss(scores, correction, matched)
            losses[f"loss_class_{number}"] = STAGE_WEIGHTS[number] * class_loss
            losses[f"loss_box_{number}"] = STAGE_WEIGHTS[number] * box_loss
            boxes = stage.correct(correction, boxes, shapes)
        return losses

    def detect(self, features: Levels, proposals: list[Tensor], shapes: Shapes) -> list[dict[str, Tensor]]:
        """Of each image ``boxes`` (k, 4), ``labels`` (k,) from 1 on, ``scores`` (k,) and ``masks`` (k, 1, 28, 28).

        The class is by the mean of the stages' probabilities, the box by the last stage.
        """
        boxes, probabilities = proposals, []
        *earlier, last = cast(list[BoxStage], list(self.stages))
        for stage in earlier:
            scores, correction = stage.predict(features, boxes, shapes)
            probabilities.append(scores.softmax(dim=-1))
            boxes = stage.correct(correction, boxes, shapes)
        scores, correction = last.predict(features, boxes, shapes)
        mean = torch.stack([*probabilities, scores.softmax(dim=-1)]).mean(dim=0)
        found, confidence, labels = last.select(mean, correction, boxes, shapes)
        masks = maskrcnn_inference(self._mask_scores(features, found, shapes), labels)
        keys = ("boxes", "labels", "scores", "masks")
        return [dict(zip(keys, parts, strict=True)) for parts in zip(found, labels, confidence, masks, strict=True)]

    def _mask_loss(self, features: Levels, matched: Matched, shapes: Shapes, targets: Sequence[Target]) -> Tensor:
        """Of the regions that belong to an object."""
        chosen = [labels > 0 for labels in matched.labels]
        boxes, objects = (
            [part[own] for part, own in zip(parts, chosen, strict=True)] for parts in (matched.boxes, matched.objects)
        )
        masks, labels = ([target[name] for target in targets] for name in ("masks", "labels"))
        return cast(Tensor, maskrcnn_loss(self._mask_scores(features, boxes, shapes), boxes, masks, labels, objects))

    def _mask_scores(self, features: Levels, boxes: list[Tensor], shapes: Shapes) -> Float[Tensor, "n K 28 28"]:
        return self.mask_predictor(self.mask_head(self.mask_pool(features, boxes, shapes))).float()
