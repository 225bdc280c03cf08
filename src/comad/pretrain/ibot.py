"""iBOT (arXiv:2111.07832); without the patch loss it is DINO (arXiv:2104.14294)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import tyro
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.models.modules import DINOProjectionHead
from torch import Tensor, nn

from comad.data.loader import Batch, Sample
from comad.data.transforms import ColourChange, Crop, random_views
from comad.models.timm_backbone import TimmBackbone
from comad.pretrain.momentum import Momentum
from comad.runtime.run import LossAndMetrics


@dataclass(frozen=True, kw_only=True)
class Ibot:
    """Self-distillation on class tokens across crops and on masked patches within a crop.

    Args:
        local_crops: small crops seen by the student alone.
        local_size: their side as a share of the global crops' side, rounded to whole patches.
        global_scale: smallest and largest share of the image's area in a global crop.
        local_scale: the same for a local crop.
        prototypes: outputs of the head that class and patch tokens share.
        hidden_width: hidden units of the head.
        bottleneck_width: of the head, before the prototypes.
        patch_loss: weight of the masked patch loss; 0 makes it DINO.
        mask_ratio: range of the share of hidden patches in a masked crop.
        masked_share: how many of the global crops are masked.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's softmax, at the start and after ``temperature_warmup``.
        temperature_warmup: share of the run in which the teacher's temperature rises.
        momentum: of the teacher's weights at the start; it rises to 1 along a cosine.
        freeze_head: share of the run in which the head's last layer stays fixed.
        jitter: strength of brightness, contrast, saturation and hue changes.
        grey: how often a crop loses its colours.
        blur: how often a crop is blurred.
    """

    kind: tyro.conf.Suppress[Literal["ibot"]] = "ibot"
    token_types: ClassVar[tuple[str, ...]] = ("cls", "patch")
    vit_arguments: ClassVar[dict[str, Any]] = {"dynamic_img_size": True}  # local crops have fewer patches
    fixed_positions: ClassVar[bool] = False
    local_crops: int = 4
    local_size: float = 0.5
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    prototypes: int = 256
    hidden_width: int = 512
    bottleneck_width: int = 128
    patch_loss: float = 1.0
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    masked_share: float = 0.5
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.04)
    temperature_warmup: float = 0.3
    momentum: float = 0.996
    freeze_head: float = 0.02
    jitter: float = 0.4
    grey: float = 0.1
    blur: float = 0.2

    def build(self, backbone: TimmBackbone) -> IbotModel:
        """Add the head and the momentum teacher to a backbone."""
        return IbotModel(backbone, self)

    def views(self, image_size: int, num_patches: int) -> IbotViews:
        """The views of one training image."""
        grid = math.isqrt(num_patches)
        patch = image_size // grid
        local = patch * max(1, round(self.local_size * grid))
        return IbotViews(
            Crop(size=image_size, scale=self.global_scale),
            Crop(size=local, scale=self.local_scale),
            ColourChange(strength=self.jitter, grey=self.grey, blur=self.blur),
            grid,
            self,
        )


@dataclass(frozen=True)
class IbotViews:
    """Two global crops with their block masks, and local crops."""

    large: Crop
    small: Crop
    colour: ColourChange
    grid: int
    config: Ibot

    def __call__(self, image: Tensor) -> Sample:
        """uint8 image → global crops first; the noise is 1 at hidden patches, else 0."""
        pairs = [(self.large, self.colour)] * 2 + [(self.small, self.colour)] * self.config.local_crops
        masks = [self._mask() for _ in range(2)]
        return Sample(random_views(image, pairs), torch.stack(masks).float())

    def _mask(self) -> Tensor:
        if not self.config.patch_loss or torch.rand(()) >= self.config.masked_share:
            return torch.zeros(self.grid, self.grid, dtype=torch.bool)
        low, high = self.config.mask_ratio
        return block_mask(self.grid, round(self.grid**2 * float(torch.empty(()).uniform_(low, high))))


def block_mask(grid: int, count: int) -> Tensor:
    """Hide at most ``count`` patches in random rectangles, as BEiT draws them: bool (grid, grid)."""
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    for _ in range(10 * grid):
        left = count - int(mask.sum())
        if left <= 0:
            break
        area = float(torch.empty(()).uniform_(min(4.0, left), left)) if left > 1 else 1.0
        aspect = math.exp(float(torch.empty(()).uniform_(math.log(0.3), -math.log(0.3))))
        height = max(1, min(grid, round(math.sqrt(area * aspect))))
        width = max(1, min(grid, round(math.sqrt(area / aspect))))
        top = int(torch.randint(0, grid - height + 1, ()))
        start = int(torch.randint(0, grid - width + 1, ()))
        block = mask[top : top + height, start : start + width]
        if int((~block).sum()) <= left:
            block.fill_(True)
    return mask


class IbotModel(nn.Module):
    """Student and momentum teacher, the head that class and patch tokens share, and both losses."""

    def __init__(self, backbone: TimmBackbone, config: Ibot):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(backbone.width))
        sizes = backbone.width, config.hidden_width, config.bottleneck_width, config.prototypes
        self.head = DINOProjectionHead(*sizes)
        self.teacher_head = DINOProjectionHead(*sizes).requires_grad_(False)
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.momentum = Momentum(config.momentum, ((self.backbone, self.teacher), (self.head, self.teacher_head)))
        self.class_loss = DINOLoss(config.prototypes, student_temp=config.student_temperature)
        self.patch_loss = IBOTPatchLoss(config.prototypes, student_temp=config.student_temperature)
        self.head_is_frozen = config.freeze_head > 0
        cast(nn.Parameter, self.head.last_layer.weight_v).register_hook(
            lambda g: torch.zeros_like(g) if self.head_is_frozen else g
        )

    @property
    def trained(self) -> TimmBackbone:
        """The momentum teacher, as the official files."""
        return self.teacher

    def forward(self, batch: Batch, progress: float) -> LossAndMetrics:
        """One step: L_[CLS] over crops (equation 1) + L_MIM on hidden patches (equation 2)."""
        self.head_is_frozen = progress < self.config.freeze_head
        if self.training:
            self.momentum.move(progress)
        start, end = self.config.teacher_temperature
        temperature = start + (end - start) * min(1.0, progress / self.config.temperature_warmup)
        images = [view.float() / 255 for view in batch.views]
        large, small = torch.cat(images[:2]), torch.cat(images[2:]) if images[2:] else None
        hidden = batch.noise.transpose(0, 1).flatten(0, 1) > 0.5  # (2B, rows, columns)

        with torch.no_grad():
            target = self.teacher(large)
            target_cls, target_patches = (
                self.teacher_head(target.cls),
                self.teacher_head(target.patches[hidden.flatten(1)]),
            )
        student = self.backbone(large, ~hidden.flatten(1), "token", self.mask_token)
        outputs = [*self.head(student.cls).float().chunk(2)]
        if small is not None:
            outputs += self.head(self.backbone(small).cls).float().chunk(self.config.local_crops)
        patches = self.head(student.patches[hidden.flatten(1)]).float()
        with torch.autocast(large.device.type, enabled=False):  # the losses' products in float32
            class_loss = self.class_loss([*target_cls.float().chunk(2)], outputs, teacher_temp=temperature)
            if not self.config.patch_loss:
                return class_loss, dict
            patch_loss = patches.sum()  # 0 if no patch of the batch is hidden: its mean would spoil the centre for good
            if len(patches):
                patch_loss = self.patch_loss(target_patches.float(), patches, hidden, teacher_temp=temperature)
        metrics = {"class_loss": class_loss.detach(), "patch_loss": patch_loss.detach()}
        return class_loss + self.config.patch_loss * patch_loss, lambda: metrics
