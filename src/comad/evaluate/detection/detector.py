"""A backbone with a simple feature pyramid, a region proposal network and the second stage."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.transforms.v2 import functional as F

from comad.data.dense import GREY
from comad.evaluate.detection.cascade import CascadeHeads
from comad.evaluate.detection.config import DetectorConfig
from comad.models.maps import FeatureMaps
from comad.models.pyramid import STRIDES, SimplePyramid
from comad.runtime.run import LossAndMetrics

RATIOS = (0.5, 1.0, 2.0)


class Detector(nn.Module):
    """Images in, boxes with classes and masks out.

    Args:
        maps: the backbone.
        num_classes: without the background.
        config: the sizes.
    """

    def __init__(self, maps: FeatureMaps, num_classes: int, config: DetectorConfig):
        super().__init__()
        self.maps = maps
        self.pyramid = SimplePyramid(maps.widths, maps.strides, config.channels)
        sizes = tuple((config.anchor * stride,) for stride in (*STRIDES, 2 * STRIDES[-1]))
        training, testing = config.proposals
        self.proposals = RegionProposalNetwork(
            AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
            RPNHead(config.channels, len(RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": training, "testing": testing},
            post_nms_top_n={"training": training, "testing": testing},
            nms_thresh=0.7,
        )
        self.heads = CascadeHeads(config, num_classes + 1)

    def forward(self, images: UInt8[Tensor, "B 3 H W"], targets: list[dict[str, Tensor]]) -> LossAndMetrics:
        """The sum of all losses, in training mode.

        Args:
            images: views.
            targets: of each view ``boxes`` (m, 4), ``labels`` (m,) from 1 on and ``masks`` (m, H, W).
        """
        shapes = [(images.shape[2], images.shape[3])] * len(images)
        levels, proposals, losses = self._propose(images.float() / 255, shapes, targets)
        losses |= self.heads.losses(levels, proposals, shapes, targets)
        total = torch.stack(list(losses.values())).sum()
        return total, lambda: {name: value.detach() for name, value in losses.items()}

    def detect(self, images: Float[Tensor, "B 3 H W"], shapes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Detections in views in [0, 1], in eval mode, within the part of each view that its image fills."""
        levels, proposals, _ = self._propose(images, shapes, None)
        return self.heads.detect(levels, proposals, shapes)

    def _propose(
        self, pixels: Float[Tensor, "B 3 H W"], shapes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None
    ) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
        """Levels of the pyramid, regions that may show an object, and in training the losses of those."""
        levels = {name: level.float() for name, level in self.pyramid(self.maps(pixels)).items()}
        proposals, losses = self.proposals(ImageList(pixels, shapes), levels, targets)
        return levels, proposals, losses

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of the backbone, for layer decay; everything else is the last one."""
        return self.maps.group_matcher("maps.")


@torch.inference_mode()
def detect_in_image(detector: Detector, image: UInt8[Tensor, "3 h w"], image_size: int) -> dict[str, Tensor]:
    """What a detector in eval mode finds in an image whose longer side is brought to ``image_size`` pixels.

    Returns:
        On the CPU ``boxes`` (k, 4) in pixels of the image as left, top, right, bottom, ``labels`` (k,) from 1 on,
        ``scores`` (k,) and ``masks``, bool (k, h, w).
    """
    device = detector.maps.pixel_mean.device
    height, width = image.shape[1:]
    factor = image_size / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    view = F.pad(F.resize(image, list(size), antialias=True), [0, 0, image_size - size[1], image_size - size[0]], GREY)
    found = {name: part.cpu() for name, part in detector.detect(view[None].to(device).float() / 255, [size])[0].items()}
    stretch = torch.tensor([width / size[1], height / size[0]] * 2)
    boxes = found["boxes"].float() * stretch
    masks = paste_masks_in_image(found["masks"].float(), boxes, (height, width))[:, 0] > 0.5
    return {"boxes": boxes, "labels": found["labels"], "scores": found["scores"], "masks": masks}
