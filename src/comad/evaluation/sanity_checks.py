"""Signs that a network was never trained, or that it collapsed."""

from __future__ import annotations

import copy
import statistics
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from comad.evaluation.similarity import cross_image_cosine, effective_rank
from comad.models.backbone import Backbone
from comad.models.timm_backbone import TimmBackbone

MIN_STRUCTURE = 1.15
"""Random matrices have 1.00, give or take 0.05; the bundled teachers 1.8 to 1.95."""
MIN_DIFFERENCE = 0.01
MIN_RANK = 2.0
MIN_GAIN = 2.0
TOO_EASY = 98.0
MIN_SIDE = 16
MOST_LAYERS = 24
RANK_TOKENS = 2048


class TokenStatistics(NamedTuple):
    """What patch tokens of several images are like.

    Attributes:
        mean: over all of them.
        std, smallest_std, largest_std: of a channel over all tokens: the mean of the channels, and the extremes.
        across: how much the tokens of one position differ between images, as a share of their size (root mean square).
        within: how much the tokens of one image differ between positions; None for a single position.
        cosine: mean cosine of tokens of different images at the same position.
        rank: effective rank of at most 2048 tokens.
    """

    mean: float
    std: float
    smallest_std: float
    largest_std: float
    across: float
    within: float | None
    cosine: float
    rank: float


def token_statistics(tokens: Float[Tensor, "n N E"]) -> TokenStatistics:
    """Describe the patch tokens of n images."""
    flat = tokens.flatten(0, 1)
    std = flat.std(dim=0)
    size = flat.square().mean().sqrt().clamp(min=1e-12)
    chosen = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:RANK_TOKENS]
    cosines = torch.stack([cross_image_cosine(position) for position in tokens.unbind(1)])
    return TokenStatistics(
        mean=float(flat.mean()),
        std=float(std.mean()),
        smallest_std=float(std.min()),
        largest_std=float(std.max()),
        across=float(tokens.var(dim=0).mean().sqrt() / size),
        within=float(tokens.var(dim=1).mean().sqrt() / size) if tokens.shape[1] > 1 else None,
        cosine=float(cosines.mean()),
        rank=float(effective_rank(flat[chosen])) if bool(flat.isfinite().all()) else float("nan"),
    )


def token_warnings(tokens: Float[Tensor, "n N E"], found: TokenStatistics) -> list[str]:
    """Say what is degenerate about tokens; empty if nothing is."""
    if not bool(tokens.isfinite().all()):
        return ["its tokens are NaN or infinite; the weights are damaged, or do not belong to this architecture."]
    warnings = []
    if found.across < MIN_DIFFERENCE:
        warnings.append(f"it collapsed: tokens of different images differ by {100 * found.across:.2g} % of their size.")
    if found.within is not None and found.within < MIN_DIFFERENCE:
        warnings.append(f"all patches of an image have the same token; they differ by {100 * found.within:.2g} %.")
    if found.rank < MIN_RANK:
        warnings.append(f"it collapsed: its tokens lie along one line, their effective rank is {found.rank:.1f}.")
    return warnings


def weight_structure(backbone: Backbone) -> float | None:
    """How far the weights are from noise: the largest singular value of a matrix, over that of its shuffled entries.

    Training aligns rows and columns, so the ratio grows; entries drawn independently of each other, as every usual
    initialisation does, give 1. Needs no images.

    Returns:
        The median over linear and convolutional weights of 16 rows and columns or more, at most 24 of them, evenly from
        all depths; None if there are none.
    """
    generator = torch.Generator().manual_seed(0)
    ratios = []
    layers = [part for part in backbone.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    layers = [part for part in layers if min(len(part.weight), part.weight[0].numel()) >= MIN_SIDE]
    for layer in layers[:: -(-len(layers) // MOST_LAYERS) or 1]:
        matrix = layer.weight.detach().float().cpu().flatten(1)
        if min(matrix.shape) < MIN_SIDE or not matrix.isfinite().all() or not matrix.any():
            continue
        shuffled = matrix.flatten()[torch.randperm(matrix.numel(), generator=generator)].view_as(matrix)
        ratios.append(_largest(matrix) / _largest(shuffled))
    return statistics.median(ratios) if ratios else None


def _largest(matrix: Float[Tensor, "m n"]) -> float:
    """The largest singular value."""
    short = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    return float(torch.linalg.eigvalsh(short @ short.T)[-1].sqrt())


def weight_warnings(structure: float | None) -> list[str]:
    """Say whether weights look random; empty if they do not."""
    if structure is None or structure >= MIN_STRUCTURE:
        return []
    return [f"its weights look random: they have {structure:.2f} times the structure of noise; was it ever trained?"]


def reinitialised_copy(backbone: Backbone, seed: int = 1) -> TimmBackbone | None:
    """The same architecture with new random weights, by timm's initialisation; None if it is no plain ViT.

    The random state of the caller is left alone.
    """
    if not isinstance(backbone, TimmBackbone):
        return None
    twin = copy.deepcopy(backbone).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for part in twin.vit.modules():
            if hasattr(part, "reset_parameters"):
                cast(Any, part).reset_parameters()
        twin.vit.init_weights()
    return twin


def gain_warnings(own: float, twin: float) -> list[str]:
    """Say whether a kNN score is no better than that of random weights; percent. Silent if the task is too easy."""
    if own - twin >= MIN_GAIN or twin >= TOO_EASY:
        return []
    beside = f"its kNN of {own:.1f} % is not {MIN_GAIN:g} points above the {twin:.1f} % of random weights"
    return [f"{beside}; on these images it is worth no more than an untrained network."]
