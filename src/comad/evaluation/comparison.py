"""The verb `comad teachers compare`: how much several teachers repeat each other on the images they are wanted for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from comad.data.images import ImageSet
from comad.data.load import DataConfig
from comad.evaluation.knn import KNN
from comad.evaluation.similarity import centred_rows, linear_cka
from comad.evaluation.views import BATCH, device, load_many, readable, sample, token_batches, view_size
from comad.models.backbone import gather_patches
from comad.models.teachers import Teacher, licence_notice
from comad.runtime.atomic import write_text
from comad.runtime.progress import track

ADDS_LITTLE = 0.95
"""Two teachers whose pooled and token CKA are both above this say nearly the same."""
POSITIONS = 16
"""Patches per image that the agreement of tokens is measured on."""
AGREES = 0.2
"""Below this a teacher's view of which images are alike has little in common with that of the others."""
NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True)
class CompareConfig(DataConfig):
    """Compare teachers on images; labels, where there are some, tell what several teachers can add to the best one.

    Args:
        teachers: two or more, each NAME=FILE, a path, an exported folder, a bundled teacher, or a timm model name.
        image_size: pixels on the side of the student's images, 224 by default, 48 on stamps. Its patches have 16
            pixels, 8 on stamps; every teacher is loaded for this grid of patches.
        images: at most so many.
        out: a JSON file for the numbers; none is written if left out.
    """

    teachers: tyro.conf.Positional[tuple[str, ...]] = ()
    image_size: int | None = None
    images: int = 1000
    out: str | None = None


class Pair(NamedTuple):
    """How alike two teachers are, 0 to 1.

    Attributes:
        a, b: their names.
        pooled_cka: linear CKA of the mean patch token of each image.
        token_cka: linear CKA of patch tokens at the same positions of the same images, on the common grid.
    """

    a: str
    b: str
    pooled_cka: float
    token_cka: float


class Knowledge(NamedTuple):
    """What a teacher knows about images, beside the others.

    Attributes:
        name: of the teacher.
        agreement: mean correlation of its and the others' rows of cosines from an image to all others, -1 to 1.
        knn: accuracy of its mean patch token, %; None without labels.
        without: that of all other teachers side by side, %; None without labels.
    """

    name: str
    agreement: float
    knn: float | None
    without: float | None


def compare(config: CompareConfig) -> str:
    """Measure how alike teachers are, two by two, on the same images, and say which adds little or looks random.

    With labels: kNN of each alone, and of all side by side, whose lead over the best one is the ceiling of what several
    teachers can add; half of the images are the bank, the others are asked. Pooled CKA is of one vector per image.
    Token CKA is of 16 patches per image, drawn once and the same for all. Vision Transformers get images of the size
    that gives them the common grid; the map of other networks is resampled to it.

    Raises:
        ValueError: fewer than two teachers, one that cannot be loaded, unreadable data, or tokens that are not finite.
    """
    if len(config.teachers) < 2:
        raise ValueError("name two teachers or more: comad teachers compare A B; for one use comad teachers inspect.")
    if config.out and Path(config.out).is_dir():
        raise ValueError(f"--out {config.out} is a folder; name a file, such as {config.out}/compare.json.")
    images, indices = sample(readable(config.load_images()), config.images)
    teachers = load_many(config.teachers, config.data, config.image_size)
    pooled, pairs = _pairs(teachers, images, indices)
    labels = next(iter(images.labels.values()))[indices] if images.labels else None
    known, together = _knowledge(pooled, labels)
    words = " ".join([_conclusion(pairs), *_advice(known, together)])
    if config.out:
        facts = {"data": images.name, "images": len(indices), "side_by_side_knn": together}
        _write(Path(config.out), teachers, facts | {"known": [k._asdict() for k in known]}, pairs, words)
    lines = [*(teacher.card.summary() for teacher in teachers), licence_notice(teachers), *_table(pairs)]
    lines += ["", *_known_table(known, together)]
    widest = max(teacher.backbone.width for teacher in teachers)
    if len(indices) < widest:
        lines.append(f"{len(indices)} images for tokens of width {widest} are few: pooled CKA reads too high.")
    return "\n".join(filter(None, [*lines, words]))


def _pairs(
    teachers: Sequence[Teacher], images: ImageSet, indices: Int[Tensor, " n"]
) -> tuple[dict[str, Tensor], list[Pair]]:
    """The mean patch tokens of every teacher; and each compared with each that follows."""
    num_patches = teachers[0].backbone.num_patches
    noise = torch.rand(len(indices), num_patches, generator=torch.Generator().manual_seed(0))
    positions = noise.argsort(dim=1)[:, :POSITIONS]
    pooled, tokens = {}, {}
    for name, backbone, _ in track(teachers, "tokens", "teachers"):
        batches = zip(token_batches(backbone.to(device()), images, indices), positions.split(BATCH), strict=True)
        kept = [(patches.mean(dim=1), gather_patches(patches, rows).flatten(0, 1)) for patches, rows in batches]
        pooled[name], tokens[name] = (torch.cat(part) for part in zip(*kept, strict=True))
        if not pooled[name].isfinite().all():
            raise ValueError(f"{name}: its tokens are NaN or infinite; look at it with comad teachers inspect.")
    return pooled, [
        Pair(a, b, linear_cka(pooled[a], pooled[b]), linear_cka(tokens[a], tokens[b]))
        for a, b in itertools.combinations(pooled, 2)
    ]


def _knowledge(pooled: Mapping[str, Tensor], labels: Tensor | None) -> tuple[list[Knowledge], float | None]:
    """Each teacher beside the others, and kNN of all side by side."""
    units = {name: F.normalize(x.float() - x.float().mean(dim=0), dim=1) for name, x in pooled.items()}
    rows = torch.stack([F.normalize(centred_rows(x), dim=1) for x in units.values()])
    agreement = torch.einsum("mna,kna->mk", rows, rows) / rows.shape[1]
    means = (agreement.sum(dim=1) - agreement.diagonal()) / (len(rows) - 1)

    def knn(names: Sequence[str]) -> float | None:
        return None if labels is None else _knn(torch.cat([units[name] for name in names], dim=1), labels)

    known = [
        Knowledge(name, float(mean), knn([name]), knn([other for other in units if other != name]))
        for name, mean in zip(units, means, strict=True)
    ]
    return known, knn(list(units))


def _knn(features: Float[Tensor, "n E"], labels: Int[Tensor, " n"]) -> float | None:
    """Accuracy of the second half of the labelled images by the first as a bank, %; None if there are too few."""
    features, labels = features[labels >= 0], labels[labels >= 0]
    half = len(labels) // 2
    if half < NEIGHBOURS or len(labels[:half].unique()) < 2:
        return None
    knn = KNN(neighbours=(NEIGHBOURS,))
    (predicted,) = knn.classify(features[:half], labels[:half], features[half:], features.device)
    return 100 * float((predicted == labels[half:].cpu()).double().mean())


def _advice(known: Sequence[Knowledge], together: float | None) -> list[str]:
    """What to do about teachers that agree with nobody, and about those that add nothing."""
    if together is None:
        strange = [k.name for k in known if k.agreement < AGREES and len(known) > 2]
        return [f"{name} agrees with no other teacher: it looks random, or at other things." for name in strange]
    best = max(known, key=lambda k: k.knn or 0.0)
    assert best.knn is not None
    told = [
        f"Side by side {together:.1f} % kNN, {best.name} alone {best.knn:.1f} %: "
        f"{'several teachers can add' if together > best.knn else 'several teachers add'} {together - best.knn:+.1f}."
    ]
    for k in known:
        if k.agreement < AGREES and (k.knn or 0.0) < best.knn / 2:
            told.append(f"{k.name} looks random: it agrees with no other teacher and knows few labels; leave it out.")
        elif (k.without or 0.0) > together:
            told.append(f"{k.name} costs more than it gives: without it {k.without:.1f} %.")
    return told


def _conclusion(pairs: Sequence[Pair]) -> str:
    """Which two are most alike, in words."""
    most = max(pairs, key=lambda pair: pair.pooled_cka)
    alike = f"Most alike: {most.a} and {most.b}, pooled CKA {most.pooled_cka:.2f}."
    little = [pair for pair in pairs if min(pair.pooled_cka, pair.token_cka) > ADDS_LITTLE]
    if not little:
        return f"{alike} No teacher repeats another: no pair is above {ADDS_LITTLE} in both numbers."
    return " ".join([alike, *(f"{b} adds little to {a}: both are above {ADDS_LITTLE}." for a, b, _, _ in little)])


def _table(pairs: Sequence[Pair]) -> list[str]:
    """A line for each pair, numbers to the right."""
    width = max(len(name) for pair in pairs for name in (pair.a, pair.b))
    lines = [f"{'pair':{2 * width + 2}}  pooled CKA  token CKA"]
    return lines + [f"{a:{width}}  {b:{width}}  {pooled:10.3f}  {token:9.3f}" for a, b, pooled, token in pairs]


def _known_table(known: Sequence[Knowledge], together: float | None) -> list[str]:
    """A line for each teacher."""
    width = max(len("side by side"), *(len(k.name) for k in known))
    if together is None:
        return [f"{'teacher':{width}}  agreement", *(f"{k.name:{width}}  {k.agreement:9.2f}" for k in known)]
    lines = [f"{k.name:{width}}  {k.agreement:9.2f}  {k.knn:5.1f}  {k.without:17.1f}" for k in known]
    return [
        f"{'teacher':{width}}  agreement    kNN  others' without it",
        *lines,
        f"{'side by side':{width}}             {together:5.1f}",
    ]


def _write(path: Path, teachers: Sequence[Teacher], facts: dict[str, Any], pairs: Sequence[Pair], words: str) -> None:
    """Write everything as JSON."""
    seen = [t.card.as_dict() | {"image_size": view_size(t.backbone), "grid": list(t.backbone.grid)} for t in teachers]
    content = {**facts, "teachers": seen, "pairs": [pair._asdict() for pair in pairs], "conclusion": words}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose another --out.") from error
