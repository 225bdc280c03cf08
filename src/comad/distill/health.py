"""Whether a run is learning, told without labels: what targets and student still say about the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from comad.evaluate.similarity import cross_image_cosine, effective_rank

MAX_IMAGES = 128
COLLAPSED_SHARE = 0.2
"""A target that keeps less than this share of the information it started with has collapsed."""
CONSTANT_COSINE = 0.98
"""Tokens of different images that are this alike are one and the same token."""


class Evidence(NamedTuple):
    """Detached tokens of a few images, one position of each; what the health numbers are computed from."""

    student: Float[Tensor, "b D"]
    target: Float[Tensor, "b K"]
    weights: Float[Tensor, "M B n"]

    @classmethod
    def take(
        cls,
        student: Float[Tensor, "B N D"],
        target: Float[Tensor, "B N K"],
        weights: Float[Tensor, "M B N1"],
        valid: Bool[Tensor, "B N"],
    ) -> Evidence:
        """Take the patch of each image that is nearest to the middle of those with a target."""
        distance = (torch.arange(valid.shape[1], device=valid.device) - valid.shape[1] // 2).abs()
        position = torch.where(valid[:MAX_IMAGES], distance, valid.shape[1]).argmin(dim=1)
        rows = torch.arange(len(position), device=valid.device)
        return cls(student.detach()[rows, position], target.detach()[rows, position], weights.detach())


def health_metrics(evidence: Evidence) -> dict[str, Tensor]:
    """Numbers for the log.

    ``*_information``: mean KL of a token's softmax from the mean softmax, in nats: 0 when all images look alike.
    ``*_cosine``: mean cosine between tokens of different images. ``*_rank``: effective rank. ``*_std``: mean over
    channels of the standard deviation over images. ``gate_entropy``: of the teachers' weights, as a share of its
    maximum. ``share_m``: mean weight of teacher m.
    """
    metrics = {}
    for name, tokens in (("student", evidence.student.float()), ("target", evidence.target.float())):
        metrics[f"{name}_information"] = information(tokens)
        metrics[f"{name}_cosine"] = cross_image_cosine(tokens)
        metrics[f"{name}_rank"] = effective_rank(tokens)
        metrics[f"{name}_std"] = tokens.std(dim=0).mean()
    weights = evidence.weights.float().flatten(1)
    total = weights.sum(dim=0)
    counted = (total > 0).sum().clamp(min=1)
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(dim=0).sum() / counted
    metrics["gate_entropy"] = entropy / torch.tensor(float(max(2, len(weights)))).log()
    for m, share in enumerate(weights.sum(dim=1) / counted):
        metrics[f"share_{m}"] = share
    return metrics


def information(tokens: Float[Tensor, "b D"]) -> Float[Tensor, ""]:
    """Mean KL(softmax(token) ‖ mean over images of softmax(token)): image and channel share it, in nats."""
    log_p = F.log_softmax(tokens, dim=1)
    p = log_p.exp()
    return (p * (log_p - p.mean(dim=0).clamp(min=1e-12).log())).sum(dim=1).mean()


class Watch:
    """Compares the health numbers with those of the start, and words the warning.

    Args:
        first: the numbers of the start, of a run that goes on; None takes the first that it sees.
    """

    def __init__(self, first: Mapping[str, Any] | None = None):
        self.first = dict(first or {})

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """A warning with the likely cause, or None. Its words before the colon stay the same from step to step."""
        if not self.first:
            self.first = dict(metrics)
            return None
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
