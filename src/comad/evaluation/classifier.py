"""A backbone with classifying heads, all of it trained: mixed images and labels, loss, layer-wise learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from timm.data.mixup import Mixup
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

from comad.data.images import ImageSet
from comad.data.loader import evaluation_batches
from comad.evaluation.features import evaluating
from comad.models.backbone import Backbone, Pool
from comad.runtime.optim import not_decayed

DROP_PATHS = ("drop_path", "drop_path1", "drop_path2", "drop_path3")
"""Where timm's blocks keep their stochastic depth."""


class Classifier(nn.Module):
    """One linear head per label set on the pooled tokens of one backbone, which learns with them.

    Args:
        backbone: trained from here on, every parameter; what was frozen is released.
        num_classes: label set → number of its classes.
        pool: what the heads see: the mean patch token, or the class token.

    Raises:
        ValueError: the class token is wanted, and the backbone has none.
    """

    def __init__(self, backbone: Backbone, num_classes: Mapping[str, int], pool: Pool = "patch"):
        super().__init__()
        if pool == "cls" and "cls" not in backbone.token_types:
            raise ValueError("this backbone has no trained class token; leave out --pool, or pass --pool patch.")
        self.backbone = backbone.requires_grad_(True).train()
        self.pool: Pool = pool
        side = backbone.image_size
        with evaluating(backbone) as place, torch.no_grad():
            width = backbone.pooled(torch.zeros(1, 3, side, side, device=place), pool).shape[1]
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in num_classes.items()})
        for head in self.heads.values():
            trunc_normal_(cast(nn.Linear, head).weight, std=0.02)
            nn.init.zeros_(cast(nn.Linear, head).bias)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B _"]]:
        """Class scores of each label set, for pixels in [0, 1]."""
        pooled = self.backbone.pooled(images, self.pool)
        return {name: head(pooled) for name, head in self.heads.items()}

    def parameter_groups(self, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW: the learning rate falls by ``layer_decay`` with each layer below the heads.

        Layers are those of timm's ``group_matcher`` (as in BEiT, arXiv:2106.08254); a network without one counts as one
        layer. Biases, norms, tokens and positions are not decayed.
        """
        network = next(self.backbone.children())
        spared = {*not_decayed(network), *cast(Any, getattr(network, "no_weight_decay", set))()}
        if hasattr(network, "group_matcher"):
            groups = param_groups_layer_decay(network, weight_decay, spared, layer_decay=layer_decay)
        else:
            groups = param_groups_weight_decay(network, weight_decay, no_weight_decay_list=spared)
        for group in groups:
            group["lr_scale"] = layer_decay * group.get("lr_scale", 1.0)
        return [*groups, *param_groups_weight_decay(self.heads, weight_decay)]


def mix(
    images: Float[Tensor, "B 3 H W"], mixup: float, cutmix: float
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B B"]]:
    """Mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899) by timm, one draw per batch from numpy's global generator.

    timm is given numbers of images in place of labels: what it returns serves any number of label sets, and an image
    without a label takes part and pulls towards none.

    Args:
        images: an even number of them.
        mixup, cutmix: parameters of the beta distributions; 0 leaves one out.

    Returns:
        Mixed images, and how much of each image is in each.
    """
    count = len(images)
    if not mixup and not cutmix:
        return images, torch.eye(count, device=images.device)
    mixed = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=count)
    return mixed(images.clone(), torch.arange(count, device=images.device))


def mixed_labels(
    shares: Float[Tensor, "B B"], labels: Int[Tensor, " B"], num_classes: int, smoothing: float = 0.0
) -> Float[Tensor, "B C"]:
    """Soft labels of mixed images; a row adds up to the share of its image that is labelled.

    Args:
        shares: how much of each image is in each.
        labels: class numbers, -1 for none.
        num_classes: C.
        smoothing: share of every label that is spread over all classes.
    """
    sharp = F.one_hot(labels.clamp(min=0), num_classes).to(shares.dtype)
    soft = sharp * (1 - smoothing) + smoothing / num_classes
    return shares @ (soft * (labels >= 0).unsqueeze(1))


def cross_entropy(scores: Float[Tensor, "B C"], targets: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """Cross-entropy with soft labels, in float32: the mean over what is labelled, 0 if nothing is."""
    return -(targets * scores.float().log_softmax(dim=-1)).sum() / targets.sum().clamp(min=1e-6)


def set_drop_path(network: nn.Module, rate: float) -> int:
    """Give a network stochastic depth (arXiv:1603.09382), from 0 at the first block up to ``rate`` at the last.

    Returns:
        How many blocks have it; 0 for networks whose blocks keep no ``drop_path``, as timm's do.
    """
    blocks = [part for part in network.modules() if any(hasattr(part, name) for name in DROP_PATHS)]
    for number, block in enumerate(blocks):
        own = rate * number / max(1, len(blocks) - 1)
        for name in DROP_PATHS:
            if hasattr(block, name):
                setattr(block, name, DropPath(own) if own else nn.Identity())
    return len(blocks)


def correct_answers(
    classifier: Classifier,
    images: ImageSet,
    image_size: int,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Say of each labelled image whether it is named rightly: label set → bool (n,), in order."""
    answers: dict[str, list[Tensor]] = {name: [] for name in classifier.heads}
    with evaluating(classifier) as device, torch.inference_mode():
        for batch in evaluation_batches(images, image_size):
            with torch.autocast(device.type, dtype, enabled=dtype not in (None, torch.float32)):
                scores = classifier(batch.to(device))
            for name, values in scores.items():
                answers[name].append(values.argmax(dim=-1).cpu())
    return {
        name: (torch.cat(parts) == labels)[labels >= 0]
        for name, parts in answers.items()
        for labels in (images.labels[name],)
    }
