"""The verb `comad teachers inspect`: what a file holds, what its tokens are like, and whether it was ever trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro
from jaxtyping import Bool
from torch import Tensor

from comad.data.images import Splits, load_images
from comad.evaluate import sanity_checks
from comad.evaluate.intervals import paired_interval
from comad.evaluate.probe import MIN_BANK, KnnProbe
from comad.evaluate.sanity_checks import TokenStatistics, reinitialised_copy, token_statistics, weight_structure
from comad.evaluate.views import device, load_one, readable, sample, token_batches, view_size
from comad.models.backbone import Backbone
from comad.models.teachers import Teacher, licence_notice

TOKEN_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Look at one teacher before a run.

    Args:
        teacher: NAME=FILE, a path, an exported folder, a bundled teacher, or a timm model name.
        data: a folder of images, with sub-folders as labels for the kNN part, or the name of a bundled set.
        image_size: pixels on the side of the view; left out, 224, and on stamps as many as give 6 × 6 patches.
        images: at most so many validation images, and twice as many for training; none of the test part is read.
    """

    teacher: tyro.conf.Positional[str] = ""
    data: str = "stamps"
    image_size: int | None = None
    images: int = 1000


def inspect(config: InspectConfig) -> str:
    """Show a teacher's card, statistics of its tokens and a quick kNN, and warn of random or collapsed weights.

    Raises:
        ValueError: the teacher or the data cannot be loaded, or an image cannot be read.
    """
    if not config.teacher:
        raise ValueError("name a teacher: comad teachers inspect FILE_OR_NAME; `comad teachers list` shows names.")
    splits = readable(load_images(config.data))
    images, indices = sample(splits, config.images)
    teacher = load_one(config.teacher, config.data, config.image_size)
    structure, twin = weight_structure(teacher.backbone), reinitialised_copy(teacher.backbone)
    for network in filter(None, (teacher.backbone, twin)):
        network.to(device())
    tokens = torch.cat(list(token_batches(teacher.backbone, images, indices[:TOKEN_IMAGES])))
    found = token_statistics(tokens)
    warnings = sanity_checks.weight_warnings(structure) + sanity_checks.token_warnings(tokens, found)
    lines = [*_card(teacher), f"patch tokens of {len(tokens)} images of {images.name}", *_statistics(found, tokens)]
    lines += [f"  structure of weights    {'not available' if structure is None else f'{structure:.2f}'} (noise: 1)"]
    scores, more = _neighbours(teacher, twin, splits, config.images)
    verdict = [f"WARNING: {warning}" for warning in warnings + more]
    lines += [*scores, *(verdict or ["No sign of random or collapsed weights."])]
    return "\n".join(filter(None, [*lines, licence_notice([teacher])]))


def _card(teacher: Teacher) -> list[str]:
    """The whole card, a field on a line."""
    fields = {key: value for key, value in teacher.card.as_dict().items() if key != "name"}
    side, rows = view_size(teacher.backbone), teacher.backbone.grid[0]
    fields |= {"params": f"{teacher.card.params:,}", "view": f"{side} × {side} pixels, {rows} × {rows} patches"}
    texts = {key: ", ".join(map(_short, value)) if isinstance(value, list) else value for key, value in fields.items()}
    return [teacher.name, *(f"  {key:23} {text}" for key, text in texts.items())]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _statistics(found: TokenStatistics, tokens: Tensor) -> list[str]:
    within = "one patch only" if found.within is None else f"{100 * found.within:.1f} % of their size"
    rank = min(tokens.shape[-1], sanity_checks.RANK_TOKENS, len(tokens) * tokens.shape[1] - 1)
    return [
        f"  mean                    {round(found.mean, 3) + 0.0:.3f}",
        f"  std of a channel        {found.std:.3f} (from {found.smallest_std:.3f} to {found.largest_std:.3f})",
        f"  differ between images   {100 * found.across:.1f} % of their size",
        f"  differ within an image  {within}",
        f"  cosine between images   {found.cosine:.3f}",
        f"  effective rank          {found.rank:.1f} of {rank}",
    ]


def _neighbours(teacher: Teacher, twin: Backbone | None, splits: Splits, limit: int) -> tuple[list[str], list[str]]:
    """Lines and warnings of a quick kNN beside pixels and random weights."""
    probe = KnnProbe(splits, view_size(teacher.backbone), limit)
    if reason := _shortage(probe):
        return [f"kNN left out: {reason}."], []
    own, title = probe.hits(teacher.backbone), f"kNN on {len(probe.queries)} images of {splits.val.name}"
    pixels, score = _best(probe.hits(None)), _best(own)
    lines = [f"{title}, with {len(probe.bank)} of {splits.train.name}"]
    rows = {"pixels": _percent(pixels), teacher.name: _percent(score)}
    below = ["  raw pixels do better on these images"] if _percent(pixels) > _percent(score) else []
    if twin is None:
        return [
            *lines,
            *_rows(rows),
            *below,
            "  random weights: not available, as it is no plain Vision Transformer",
        ], []
    untrained = _best(probe.hits(twin))
    rows["random weights"] = _percent(untrained)
    gain = paired_interval(score, untrained, splits.val.groups[probe.queries])
    span = f"{gain.difference:+.1f} points, 95 % interval {gain.low:.1f} to {gain.high:.1f}"
    lines += [*_rows(rows), *below, f"  above random weights    {span}"]
    if _percent(untrained) >= sanity_checks.TOO_EASY:
        lines.append("  these images are too easy to tell a trained network from an untrained one")
    elif gain.low <= 0 < gain.high:
        lines.append("  too few images to be sure of this difference")
    return lines, sanity_checks.gain_warnings(_percent(score), _percent(untrained))


def _shortage(probe: KnnProbe) -> str:
    """Why there is no kNN; empty if there is."""
    labels = probe.splits.train.labels.get("fine")
    if labels is None:
        return "no labels; put images into one sub-folder per label"
    if len(probe.bank) < MIN_BANK or not len(probe.queries):
        return f"{len(probe.bank)} labelled images to train, {len(probe.queries)} to validate; {MIN_BANK} and 1 needed"
    return "" if len(labels[probe.bank].unique()) > 1 else "all images have the same label"


def _best(hits: dict[str, Bool[Tensor, " n"]]) -> Bool[Tensor, " n"]:
    """The hits of the better pool."""
    return max(hits.values(), key=_percent)


def _percent(hits: Bool[Tensor, " n"]) -> float:
    return 100 * float(hits.float().mean())


def _rows(scores: dict[str, float]) -> list[str]:
    width = max(23, *map(len, scores))
    return [f"  {name:{width}} {score:.1f} %" for name, score in scores.items()]
