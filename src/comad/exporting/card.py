"""The text of ``README.md``: what the model is, how it is used, what it was measured to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from comad.models.teachers import TeacherCard

_SCORES = {"knn": "kNN", "knn_coarse": "kNN coarse", "linear": "linear", "linear_coarse": "linear coarse"}
INTENDED_USE = (
    "Features of images for retrieval, clustering, nearest neighbours, linear probes, and as the start of fine-tuning "
    "for your own task. It was not tested for decisions about people; test it on your own images before you rely on it."
)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known about an exported model: the text of ``README.md`` and the key ``comad`` of ``config.json``.

    Attributes:
        name: of the model.
        licence: of the exported weights, such as ``apache-2.0``; see `comad.models.teachers.inherited_licence`.
        architecture: the timm name.
        token_types: tokens that carry meaning.
        about: one sentence on where it comes from.
        preset, seed, images_seen: of the run.
        command: what repeats the run.
        code: version and commit of comad.
        hardware, hours: what trained it, and for how long.
        curve: lines of the log worth keeping, such as loss and kNN by epoch.
        data, data_licence: the images that were learnt from.
        data_images: part of the data → number of its images.
        data_found: what else was found in the data, in words.
        warnings: what was told in the run, a sentence each.
        eval_crop: share of the shorter side that an evaluation view shows.
        teachers: each teacher's origin.
        scores: rows of the scoreboard, as in its JSON file; percent.
        scored_images: number of images that the scores come from.
        intended_use: what it is for, and not for.
        labels: names of the classes, if it is a classifier.
        exports: the files beside the weights, as measured; rows of `comad.exporting.fidelity.ExportRow`.
        sha256: of ``model.safetensors``; `export_backbone` fills it in.
    """

    name: str
    licence: str
    architecture: str
    token_types: tuple[str, ...]
    about: str
    preset: str
    seed: int
    images_seen: int
    data: str
    data_licence: str
    data_images: dict[str, int] | None = None
    eval_crop: float = 0.875
    command: str = ""
    code: str = ""
    hardware: str = ""
    hours: float = 0.0
    curve: tuple[dict[str, Any], ...] = ()
    teachers: tuple[TeacherCard, ...] = ()
    scores: tuple[dict[str, Any], ...] = ()
    scored_images: int = 0
    intended_use: str = INTENDED_USE
    data_found: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    exports: tuple[dict[str, Any], ...] = ()
    sha256: str = ""


def model_card(card: ModelCard, programs: Sequence[tuple[str, str]]) -> str:
    """Build the text of ``README.md``, with the metadata block that the Hugging Face Hub reads.

    Names and licences come from files of other people, so they are shown as text and never as Markdown or HTML.

    Args:
        card: about the model.
        programs: title and Python code of each way to use it.
    """
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in _metadata(card).items()),
            "---",
            f"# {plain(card.name)}",
            "",
            plain(card.about),
            "",
            *(line for text in card.warnings for line in (f"**Warning:** {plain(text)}", "")),
            *_what(card),
            "",
            "## Intended use",
            "",
            plain(card.intended_use),
            "",
            "## Use",
            "",
            *(line for title, text in programs for line in (f"{title}:", "", "```python", text.rstrip(), "```", "")),
            *_exports(card),
            *_teachers(card),
            *_training(card),
            *_scores(card),
        ]
    )


def plain(text: object) -> str:
    """Text of a file on one line, in which Markdown and HTML are letters."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]{}|~$#!])", r"\\\1", line)


def code(text: object) -> str:
    """The same as code, in which only backticks, line ends and the bars of tables mean something."""
    line = " ".join(str(text).split()).replace("`", "'")
    return f"`{line}`".replace("|", "\\|") if line else ""


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table of cells that are escaped already."""
    return [f"| {' | '.join(line)} |" for line in (titles, ("---",) * len(titles), *rows)]


def _metadata(card: ModelCard) -> dict[str, Any]:
    """What the Hub reads. It has its own names of licences; others have to be named and shown."""
    task = "image-classification" if card.labels else "image-feature-extraction"
    known = card.licence == "apache-2.0"
    licence = {"license": "apache-2.0"} if known else {"license": "other", "license_name": _slug(card.licence)}
    if not known:
        licence["license_link"] = "README.md"
    return {"library_name": "timm", **licence, "pipeline_tag": task, "tags": ["timm", "transformers", task, "comad"]}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:80] or "unknown"


def _what(card: ModelCard) -> list[str]:
    kind = f"timm's {code(card.architecture)} with arguments in `config.json`" if card.architecture else "a network"
    if card.labels:
        head = f"with a linear head of {len(card.labels)} classes"
    else:
        head = f"without a head, for features of images. Tokens that carry meaning: {', '.join(card.token_types)}"
    return [f"It is {kind}, {head}. Licence: {plain(card.licence)}."]


def _exports(card: ModelCard) -> list[str]:
    if not card.exports:
        return []
    titles = (
        "format",
        "file",
        "MB",
        "largest difference",
        "cosine, least (mean)",
        "score",
        "ms, 1 thread",
        "ms, all",
        "",
    )
    images = max(row["images"] for row in card.exports)
    return [
        "## Files",
        "",
        f"Each file was opened by its own runtime and compared with the model on {images} validation images. "
        "Differences are shares of the largest value. The score is percent right on validation images, of the file and "
        "of the model. Milliseconds are medians per call, where it was exported.",
        "",
        *table(titles, (_export_cells(row) for row in card.exports)),
        "",
    ]


def _export_cells(row: dict[str, Any]) -> tuple[str, ...]:
    scores = ""
    if row.get("score") is not None:
        scores = f"{row['score']:.1f} / {row['own_score']:.1f} ({plain(row['scored'])})"
    return (
        plain(row["format"]),
        code(row["file"]),
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['max_difference']:.1e}",
        f"{row['cosine']:.5f} ({row['mean_cosine']:.5f})",
        scores,
        *("–" if row.get(key) is None else f"{row[key]:.2f}" for key in ("ms_one_thread", "ms_all_threads")),
        plain(row["note"]) + ("" if row["sound"] else " **not as near as it should be**"),
    )


def _teachers(card: ModelCard) -> list[str]:
    rows = [(code(t.name), code(t.format), code(t.sha256), plain(t.licence)) for t in card.teachers]
    if not rows:
        return []
    head = ["## Teachers", "", "Their licences travel with what was learnt from them.", ""]
    return [*head, *table(("teacher", "format", "sha256", "licence"), rows), ""]


def _training(card: ModelCard) -> list[str]:
    counts = ", ".join(f"{count:,} {plain(part)}" for part, count in (card.data_images or {}).items())
    return [
        "## Training",
        "",
        f"- data: {plain(card.data)} (licence: {plain(card.data_licence)})" + (f", images: {counts}" if counts else ""),
        *(f"- data, {plain(name.replace('_', ' '))}: {plain(text)}" for name, text in card.data_found.items()),
        f"- preset: {code(card.preset)}, seed {card.seed}",
        f"- images seen: {card.images_seen:,}",
        *([f"- weights: sha256 {code(card.sha256)}"] if card.sha256 else []),
        *([f"- command: {code(card.command)}"] if card.command else []),
        *([f"- code: comad {plain(card.code)}"] if card.code else []),
        *([f"- hardware: {plain(card.hardware)}, {card.hours:.2f} hours"] if card.hardware else []),
        *(f"- {code(json.dumps(line))}" for line in card.curve),
        "",
    ]


def _scores(card: ModelCard) -> list[str]:
    if not card.scores:
        return []
    measured = dict.fromkeys([*_SCORES, *(name for row in card.scores for name in row.get("num_images", ()))])
    measured = {key: None for key in measured if any(row.get(key) is not None for row in card.scores)}
    rows = [
        (code(row["name"]), plain(row["role"]), *(_percent(row.get(key)) for key in measured)) for row in card.scores
    ]
    images = f"the {card.scored_images:,} test images" if card.scored_images else "the test images"
    return [
        "## Scores",
        "",
        f"Top-1 percent on {images}; k, pool and probe settings were chosen on the validation images.",
        "",
        *table(("model", "role", *(_SCORES.get(key, plain(key)) for key in measured)), rows),
        "",
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
