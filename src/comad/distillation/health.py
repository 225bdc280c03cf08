"""Whether a run is learning, told without labels: what targets and student still say about the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from comad.evaluation.similarity import cross_image_cosine, effective_rank
from comad.runtime.processes import share_of

MAX_IMAGES = 128
COLLAPSED_SHARE = 0.2
"""A target that keeps less than this share of the information it started with has collapsed."""
RISEN = 10.0
"""A loss that is so many times that of the start is no fluctuation."""
CONSTANT_STD = 1e-5
"""A teacher whose patches differ less than this from image to image says nothing."""
BLANK_STD = 1e-3
"""Of the pixels of an image, in [0, 1]: less than half a step of 8 bits."""
NEEDED = ("loss", "target_information")
CONSTANT_COSINE = 0.98
"""Tokens of different images that are this alike are one and the same token."""


def central_patches(valid: Bool[Tensor, "B N"], *tokens: Float[Tensor, "B N _"]) -> tuple[Float[Tensor, "b _"], ...]:
    """Of a few images the patch that is nearest to the middle of those with a target, detached."""
    distance = (torch.arange(valid.shape[1], device=valid.device) - valid.shape[1] // 2).abs()
    position = torch.where(valid[: share_of(MAX_IMAGES)], distance, valid.shape[1]).argmin(dim=1)
    rows = torch.arange(len(position), device=valid.device)
    return tuple(part.detach()[rows, position] for part in tokens)


def health_metrics(
    student: Float[Tensor, "b D"], target: Float[Tensor, "b K"], shares: Float[Tensor, "M B n"]
) -> dict[str, Tensor]:
    """Numbers for the log.

    ``*_information``: mean KL of a token's softmax from the mean softmax, in nats: 0 when all images look alike.
    ``*_cosine``: mean cosine between tokens of different images. ``*_rank``: effective rank. ``*_std``: mean over
    channels of the standard deviation over images. ``gate_entropy``: of the teachers' weights, as a share of its
    maximum.

    Args:
        student, target: tokens of several images, see `central_patches`.
        shares: of the teachers at every position.
    """
    metrics = {}
    for name, tokens in (("student", student.float()), ("target", target.float())):
        metrics[f"{name}_information"] = information(tokens)
        metrics[f"{name}_cosine"] = cross_image_cosine(tokens)
        metrics[f"{name}_rank"] = effective_rank(tokens)
        metrics[f"{name}_std"] = tokens.std(dim=0).mean()
    weights = shares.float().flatten(1)
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(dim=0).sum() / counted(weights)
    metrics["gate_entropy"] = entropy / torch.tensor(float(max(2, len(weights)))).log()
    return metrics


def mean_shares(shares: Float[Tensor, "M B n"]) -> Float[Tensor, " M"]:
    """Mean share of each teacher over the positions with a target."""
    weights = shares.float().flatten(1)
    return weights.sum(dim=1) / counted(weights)


def counted(weights: Float[Tensor, "M k"]) -> Tensor:
    """Positions at which a teacher counts."""
    return (weights.sum(dim=0) > 0).sum().clamp(min=1)


def information(tokens: Float[Tensor, "b D"]) -> Float[Tensor, ""]:
    """Mean KL(softmax(token) ‖ mean over images of softmax(token)): image and channel share it, in nats."""
    log_p = F.log_softmax(tokens, dim=1)
    p = log_p.exp()
    return (p * (log_p - p.mean(dim=0).clamp(min=1e-12).log())).sum(dim=1).mean()


class CollapseDetector:
    """Compares the health numbers with those of the start, and words the warning.

    Args:
        first: the numbers of the start, of a run that goes on; None takes the first that it sees.
    """

    def __init__(self, first: Mapping[str, Any] | None = None):
        self.first = dict(first or {}) if first and all(name in first for name in NEEDED) else {}

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """A warning with the likely cause, or None. Its words before the colon stay the same from step to step."""
        if metrics.get("image_std", 1.0) < BLANK_STD:
            return "the images are blank: each has one colour all over; look at --data and at --augment.*."
        constant = [n.removeprefix("std_") for n, x in metrics.items() if n.startswith("std_") and x < CONSTANT_STD]
        if constant:
            return (
                f"the same from {', '.join(constant)} for every image: a teacher that teaches nothing, or images that "
                "are all alike; look at --data and with comad teachers inspect."
            )
        if not self.first:
            self.first = dict(metrics)
            return None
        if metrics["loss"] > RISEN * self.first["loss"] > 0:
            return (
                f"the loss rose far above its start: from {self.first['loss']:.3g} to {metrics['loss']:.3g}; try a "
                "lower --optim.base-lr, a longer --optim.warmup-epochs or a smaller --optim.clip."
            )
        if metrics["target_information"] < COLLAPSED_SHARE * self.first["target_information"]:
            left = metrics["target_information"] / max(self.first["target_information"], 1e-12)
            return (
                f"the targets have collapsed: they keep {100 * left:.0f} % of the information they had, while the loss "
                f"went from {self.first['loss']:.3g} to {metrics['loss']:.3g}. Something on the target's side "
                "is trained (aligner, projection); use --preset comad, whose targets are fixed."
            )
        if metrics["student_cosine"] > CONSTANT_COSINE > metrics["target_cosine"] and metrics["epoch"] >= 2:
            return (
                "the student gives nearly the same token for every image: "
                f"their cosine is {metrics['student_cosine']:.2f}; try a lower --optim.base-lr or a lower mask ratio."
            )
        return None
