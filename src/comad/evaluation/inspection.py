"""The verb `comad teachers inspect`: what a file holds, what its tokens are like, and whether it was ever trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from comad.data.images import ImageSet, Splits
from comad.data.load import DataConfig
from comad.data.loader import evaluation_views
from comad.evaluation import sanity_checks
from comad.evaluation.features import PIXELS, evaluating, pixel_rows, pool_tokens
from comad.evaluation.intervals import paired_interval
from comad.evaluation.knn import KNN
from comad.evaluation.probe import MIN_BANK, NEIGHBOURS, KnnProbe
from comad.evaluation.sanity_checks import TokenStatistics, reinitialised_copy, token_statistics, weight_structure
from comad.evaluation.views import (
    MAX_IMAGES,
    MIN_IMAGES,
    batch_size,
    device,
    load_one,
    readable,
    sample,
    view_size,
)
from comad.models.backbone import Backbone, map_tokens
from comad.models.networks import depth_of, final_norm
from comad.models.teachers import Teacher, licence_notice
from comad.runtime.progress import say

TOKEN_IMAGES = 64
TWIN_IMAGES = 64
"""Validation images that random weights are scored on at least, or all."""
CPU_FLOPS = 3e12
"""What two cores compute in half a minute; `inspect` shares it between the network and random weights."""
BLOCK_BATCH = 16
"""Images at a time where the outputs of all blocks are kept."""


class Counts(NamedTuple):
    """Images of the kNN: for training, for validation, and of these those that random weights see."""

    bank: int
    queries: int
    twin: int


@dataclass(frozen=True, kw_only=True)
class InspectConfig(DataConfig):
    """Look at one teacher before a run.

    Args:
        teacher: NAME=FILE, a path, an exported folder, a bundled teacher, or a timm model name.
        image_size: pixels on the side of the view; left out, 224, and on stamps as many as give 6 × 6 patches.
        images: at most so many validation images, and twice as many for training; none of the test part is read. Left
            out, as many as a small CPU computes in half a minute, 1000 beside a GPU. Where they take long, there are
            fewer for training, and still fewer for random weights.
    """

    teacher: tyro.conf.Positional[str] = ""
    image_size: int | None = None
    images: int | None = None


def inspect(config: InspectConfig) -> str:
    """Show a teacher's card, statistics of its tokens and a quick kNN, and warn of random or collapsed weights.

    Raises:
        ValueError: the teacher or the data cannot be loaded, or an image cannot be read.
    """
    if not config.teacher:
        raise ValueError("name a teacher: comad teachers inspect FILE_OR_NAME; `comad teachers list` shows names.")
    say(f"reading {config.data} and loading {config.teacher}")
    splits = readable(config.load_images())
    images, indices = sample(splits, MAX_IMAGES if config.images is None else config.images)
    teacher = load_one(config.teacher, config.data, config.image_size)
    for line in (card := _card(teacher)):
        say(line)
    say("comparing its weights with noise")
    structure, twin = weight_structure(teacher.backbone), reinitialised_copy(teacher.backbone)
    for network in filter(None, (teacher.backbone, twin)):
        network.to(device())
    counts = _affordable(teacher.backbone, config.images)
    probe = KnnProbe(splits, view_size(teacher.backbone), counts.queries)
    if reason := _shortage(probe):
        own = look(teacher.backbone, images, indices[:TOKEN_IMAGES], keep=TOKEN_IMAGES)
        scores, more = [f"kNN left out: {reason}."], []
    else:
        room = counts.bank + counts.queries - len(probe.queries)  # what few validation images leave
        images, looked = splits.val, Looked(probe.bank[_spread(len(probe.bank), room)], probe.queries)
        say(f"kNN: {len(looked.bank)} + {len(looked.queries)} images by {teacher.name}")
        own = look(teacher.backbone, images, looked.queries, keep=TOKEN_IMAGES)
        bank = look(teacher.backbone, splits.train, looked.bank)
        scores, more = _neighbours(teacher, twin, splits, looked, (bank, own), counts.twin)
    found = token_statistics(own.tokens)
    warnings = sanity_checks.weight_warnings(structure) + sanity_checks.token_warnings(own.tokens, found)
    lines = [*card, f"patch tokens of {len(own.tokens)} images of {images.name}", *_statistics(found, own.tokens)]
    lines += [f"  structure of weights    {'not available' if structure is None else f'{structure:.2f}'} (noise: 1)"]
    verdict = [f"WARNING: {warning}" for warning in warnings + more]
    lines += [*scores, *(verdict or ["No sign of random or collapsed weights."])]
    return "\n".join(filter(None, [*lines, licence_notice([teacher])]))


class Seen(NamedTuple):
    """What one pass over some images leaves.

    Attributes:
        pixels: of small copies of the images.
        last: pool → features of the network.
        blocks: the same after each block and the final norm; empty if it has no row of blocks.
        tokens: patch tokens of the first images.
    """

    pixels: Tensor
    last: dict[str, Tensor]
    blocks: tuple[dict[str, Tensor], ...]
    tokens: Tensor


def look(backbone: Backbone, images: ImageSet, indices: Int[Tensor, " n"], keep: int = 0, blocks: bool = True) -> Seen:
    """Go through images once: all that is looked at is computed of the same decoded image, in the same forward.

    Args:
        backbone: computes where it is.
        images, indices: which.
        keep: of so many images the patch tokens are kept.
        blocks: look at the output of every block too.
    """
    depth = depth_of(next(backbone.children())) if blocks else 0
    numbers, norm = range(1, depth + 1), final_norm(next(backbone.children()))
    pools = ("cls", "patch") if "cls" in backbone.token_types else ("patch",)
    rows: list[tuple[Tensor, list[dict[str, Tensor]]]] = []
    kept: list[Tensor] = []
    sizes = view_size(backbone), PIXELS
    size = min(BLOCK_BATCH, batch_size(backbone)) if depth else batch_size(backbone)
    with evaluating(backbone) as place, torch.inference_mode(), _precision():
        for views, small in evaluation_views(images, sizes, size, indices):
            tokens = backbone(views.to(place), intermediates=numbers)
            each = [pool_tokens(part) for part in (tokens, *(map_tokens(norm, part) for part in tokens.intermediates))]
            rows.append((pixel_rows(small), [{pool: x[pool].cpu() for pool in pools if pool in x} for x in each]))
            if len(kept) * size < keep:
                kept.append(tokens.patches.float().cpu())
    last, *every = [
        {pool: torch.cat([parts[number][pool] for _, parts in rows]) for pool in rows[0][1][number]}
        for number in range(depth + 1)
    ]
    return Seen(
        torch.cat([small for small, _ in rows]), last, tuple(every), torch.cat(kept)[:keep] if kept else torch.empty(0)
    )


def _precision() -> torch.autocast:
    """bf16 on CPUs that compute in it, twice as fast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def _affordable(backbone: Backbone, wanted: int | None) -> Counts:
    """How many images are looked at; from the work of one image where it is not given."""
    if device().type != "cpu":
        queries = wanted or MAX_IMAGES
        return Counts(2 * queries, queries, queries)
    side = view_size(backbone)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, side, side))
    total = int(CPU_FLOPS / max(1, counter.get_total_flops()))
    if wanted is not None:
        bank = 2 * wanted if 3 * wanted <= 2 * total else wanted
        return Counts(bank, wanted, min(wanted, max(TWIN_IMAGES, total // 3 - wanted)))
    limit = min(MAX_IMAGES, max(MIN_IMAGES, total // 6))
    return Counts(2 * limit, limit, limit)


def _card(teacher: Teacher) -> list[str]:
    """The whole card, a field on a line."""
    fields = {key: value for key, value in teacher.card.as_dict().items() if key != "name"}
    side, rows = view_size(teacher.backbone), teacher.backbone.grid[0]
    fields |= {"params": f"{teacher.card.params:,}", "view": f"{side} × {side} pixels, {rows} × {rows} patches"}
    texts = {key: ", ".join(map(_short, value)) if isinstance(value, list) else value for key, value in fields.items()}
    told = {key: text for key, text in texts.items() if text not in ("", 0)}
    return [teacher.name, *(f"  {key:23} {text}" for key, text in told.items())]


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


class Looked(NamedTuple):
    """Numbers of training images that are the bank, and of validation images that are named by it."""

    bank: Int[Tensor, " m"]
    queries: Int[Tensor, " n"]


def _neighbours(
    teacher: Teacher, twin: Backbone | None, splits: Splits, looked: Looked, seen: tuple[Seen, Seen], limit: int
) -> tuple[list[str], list[str]]:
    """Lines and warnings of a quick kNN beside pixels, block by block, and beside random weights.

    Args:
        teacher: the network.
        twin: the same with random weights, if there is one.
        splits, looked: the images.
        seen: what the network made of bank and queries.
        limit: validation images that random weights see, at most.
    """
    bank, queries = seen
    pixels = _hits(({"pixels": bank.pixels}, {"pixels": queries.pixels}), splits, looked)
    score = _hits((bank.last, queries.last), splits, looked)
    title = f"kNN on {len(looked.queries)} images of {splits.val.name}"
    lines = [f"{title}, with {len(looked.bank)} of {splits.train.name}"]
    lines += _rows({"pixels": _percent(pixels), teacher.name: _percent(score)})
    lines += ["  raw pixels do better on these images"] if _percent(pixels) > _percent(score) else []
    lines += _by_block(bank, queries, splits, looked, score)
    if twin is None:
        return [*lines, "  random weights: not available, as it is no plain Vision Transformer"], []
    mine = bank.last, queries.last
    if limit < len(looked.queries):
        places = _spread(len(looked.bank), 2 * limit), _spread(len(looked.queries), limit)
        looked = Looked(looked.bank[places[0]], looked.queries[places[1]])
        few = [{pool: x[place] for pool, x in part.items()} for part, place in zip(mine, places, strict=True)]
        score = _hits(few, splits, looked)
        lines += [f"kNN on {len(looked.queries)} of them, with {len(looked.bank)}"]
        lines += _rows({teacher.name: _percent(score)})
    say(f"kNN: {len(looked.bank)} + {len(looked.queries)} images by random weights")
    parts = zip((splits.train, splits.val), looked, strict=True)
    untrained = _hits([look(twin, images, x, blocks=False).last for images, x in parts], splits, looked)
    gain = paired_interval(score, untrained, splits.val.groups[looked.queries])
    span = f"{gain.difference:+.1f} points, 95 % interval {gain.low:.1f} to {gain.high:.1f}"
    lines += [*_rows({"random weights": _percent(untrained)}), f"  above random weights    {span}"]
    if _percent(untrained) >= sanity_checks.TOO_EASY:
        lines.append("  these images are too easy to tell a trained network from an untrained one")
    elif gain.low <= 0 < gain.high:
        lines.append("  too few images to be sure of this difference")
    return lines, sanity_checks.gain_warnings(_percent(score), _percent(untrained))


def _by_block(bank: Seen, queries: Seen, splits: Splits, looked: Looked, last: Tensor) -> list[str]:
    """kNN after each block, and whether one is surely better than the last."""
    pairs = zip(bank.blocks, queries.blocks, strict=True)
    scores = [_hits(pair, splits, looked) for pair in pairs]
    if len(scores) < 2:
        return []
    rows = _rows({f"block {number}": _percent(hits) for number, hits in enumerate(scores, start=1)})
    best = max(range(len(scores)), key=lambda number: _percent(scores[number]))
    gain = paired_interval(scores[best], last, splits.val.groups[looked.queries])
    if gain.low > 0:
        return [
            *rows,
            f"  block {best + 1} is better than the last by {gain.difference:.1f} points, 95 % interval "
            f"{gain.low:.1f} to {gain.high:.1f}: add :depth={best + 1} to its name",
        ]
    return [*rows, "  no block is surely better than the last on these images"]


def _hits(found: Sequence[dict[str, Tensor]], splits: Splits, looked: Looked) -> Bool[Tensor, " n"]:
    """Whether each query's label was found, by the better pool."""
    labels, truth = (part.labels["fine"][x] for part, x in zip((splits.train, splits.val), looked, strict=True))
    (bank, queries), knn = found, KNN(neighbours=NEIGHBOURS)
    return max((knn.classify(bank[pool], labels, queries[pool])[0] == truth for pool in bank), key=_percent)


def _spread(count: int, wanted: int) -> Int[Tensor, " n"]:
    """At most so many places, evenly spread."""
    return torch.linspace(0, count - 1, min(count, wanted)).long()


def _shortage(probe: KnnProbe) -> str:
    """Why there is no kNN; empty if there is."""
    labels = probe.splits.train.labels.get("fine")
    if labels is None:
        return "no labels; put images into one sub-folder per label"
    if len(probe.bank) < MIN_BANK or not len(probe.queries):
        return f"{len(probe.bank)} labelled images to train, {len(probe.queries)} to validate; {MIN_BANK} and 1 needed"
    return "" if len(labels[probe.bank].unique()) > 1 else "all images have the same label"


def _percent(hits: Bool[Tensor, " n"]) -> float:
    return 100 * float(hits.float().mean())


def _rows(scores: dict[str, float]) -> list[str]:
    width = max(23, *map(len, scores))
    return [f"  {name:{width}} {score:.1f} %" for name, score in scores.items()]
