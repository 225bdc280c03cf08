"""The verb `comad export`: a student, or any backbone, as the files that other programs run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from comad.data.images import Splits
from comad.data.load import load_images
from comad.exporting.card import ModelCard, model_card
from comad.exporting.config import ExportConfig, check
from comad.exporting.fidelity import ExportRow, latency
from comad.exporting.formats import FORMATS, by_torch
from comad.exporting.package import both_programs, check_place
from comad.exporting.session import Session, note
from comad.exporting.source import Source, at_hand, data_of, load_source, run_folder
from comad.models.backbone import Backbone
from comad.models.files import read_json
from comad.models.sources import left_by_run
from comad.runtime.atomic import replacing
from comad.runtime.progress import track, warn
from comad.runtime.seal import is_intact, sealed


class Exported(NamedTuple):
    """What was written: the folder, its files as measured, and the whole in words."""

    folder: Path
    rows: tuple[ExportRow, ...]
    text: str


def export(config: ExportConfig) -> str:
    """Write the files, check each by its own runtime, and say what came of it and how to use them.

    Raises:
        ValueError: no such format, a package is missing, the backbone or the data cannot be loaded, the place is taken
            by something else, or no file is as near to the student as it should be.
    """
    return _export_named(config).text


def _export_named(config: ExportConfig) -> Exported:
    """Find what ``config.backbone`` names and write it; see `export`."""
    if not config.backbone:
        raise ValueError("name what to export: comad export RUN|BACKBONE --to onnx.")
    check(config)
    run = run_folder(config.backbone)
    data = config.data or (data_of(run) if run else "stamps")
    splits = load_images(data)
    source = load_source(str(left_by_run(run)) if run else config.backbone, data, config.image_size, splits)
    if run is None:
        out = Path("exports") / _file_name(source.card.name)
        return write_exports(source, Path(config.out) if config.out else out, config)
    if config.data is None:
        source = source._replace(card=_with_counts(source.card, splits))
    source = source._replace(scoreboard=run / "scoreboard.json")
    return write_exports(source, Path(config.out) if config.out else run / "export", config)


def _with_counts(card: ModelCard, splits: Splits) -> ModelCard:
    """The card with the numbers of images that were learnt from, chosen on and scored, where it has none."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    labels = splits.test.labels.get("fine")
    return replace(
        card,
        data_images=card.data_images or {name: len(images) for name, images in parts.items()},
        scored_images=card.scored_images or (0 if labels is None else int((labels >= 0).sum())),
    )


def export_model(
    backbone: Backbone | str | Path,
    out: str | Path | None = None,
    *,
    to: Sequence[str] = ("timm", "transformers", "onnx"),
    data: str | Splits | None = None,
    architecture: str = "",
    model_args: dict[str, Any] | None = None,
    card: ModelCard | None = None,
    **options: Any,
) -> Exported:
    """Export a network that is at hand, or that is named as on the command line; see `export`.

    Args:
        backbone: on any device; left as it is.
        out: the folder to write; may be left out if the network is named.
        to: names of `FORMATS`.
        data: images to compare and to calibrate with; of a network at hand stamps, if left out.
        architecture: timm's name of the network; left out, the one that it keeps, if it does.
        model_args: timm's arguments of the network, where they are not those of the name.
        card: about the model.
        options: fields of `ExportConfig`.

    Raises:
        ValueError: see `export`.
    """
    config = ExportConfig(to=tuple(to), out=None if out is None else str(out), **options)
    if not isinstance(backbone, Backbone):
        if isinstance(data, Splits):
            raise ValueError("the images of a network that is named are named too; pass data=FOLDER.")
        return _export_named(replace(config, backbone=str(backbone), data=data))
    if out is None:
        raise ValueError("name the folder to write: out=FOLDER.")
    check(config)
    splits = data if isinstance(data, Splits) else load_images(data or "stamps")
    source = at_hand(backbone, Path(out).name, splits, architecture, model_args, card)
    return write_exports(source, Path(out), config)


def write_exports(source: Source, out: Path, config: ExportConfig) -> Exported:
    """Write all formats into a folder beside its place, check them, and put it there.

    Files that an earlier call wrote there for the same weights are kept.

    Raises:
        ValueError: see `check_source`, or no file came through.
    """
    check_source(source, out, config)
    names = tuple(dict.fromkeys(config.to))
    session = Session(source, config)
    earlier = _earlier_rows(out, session.identity)
    with replacing(out) as partial:
        if earlier:
            shutil.copytree(out, partial)
        partial.mkdir(parents=True, exist_ok=True)
        card = session.write_base(partial)
        formats = track(names, "exporting", "formats")
        written = [(name, *session.write(name, partial)) for name in formats]
        rows = tuple(row for _, row, _ in written if row is not None)
        refused = [text for *_, text in written if text]
        if not rows:
            raise ValueError(" ".join(refused))
        merged = [*_kept(earlier, rows, config.precision), *(row.as_dict() for row in rows)]
        card = replace(card, exports=tuple(merged))
        _write_facts(partial, card, session, merged, out)
    if source.scoreboard and source.scoreboard.is_file():
        _add_to_scoreboard(source.scoreboard, merged)
    return Exported(out, rows, _report(session, rows, refused, out))


def check_source(source: Source, out: Path, config: ExportConfig) -> None:
    """Say what is wrong before anything is written.

    Raises:
        ValueError: the place is taken, or timm is wanted and does not know the network, or has no place for its head.
    """
    check_place(out)
    wants = [name for name in config.to if FORMATS[name].timm]
    if wants and (reason := source.not_timm()):
        raise ValueError(
            f"--to {wants[0]} needs a network of timm's: {reason}; take --to onnx, openvino or torch-export."
        )


def _kept(earlier: Sequence[dict[str, Any]], rows: Sequence[ExportRow], precision: str) -> list[dict[str, Any]]:
    """Rows of files that are still as they were measured; timm's folder is written each time."""
    new = {(row.format, row.file) for row in rows}
    half = precision == "fp16"
    return [
        row
        for row in earlier
        if (row["format"], row["file"]) not in new
        and not (FORMATS[row["format"]].write is None and row["note"].startswith("fp16") != half)
    ]


def _write_facts(folder: Path, card: ModelCard, session: Session, rows: list[dict[str, Any]], out: Path) -> None:
    """The card, and what was measured: ``README.md``, ``exports.json``, and the rows in ``config.json``."""
    facts = {"source": session.identity, "preprocessing": session.preprocessing.as_dict(), "exports": rows}
    (folder / "exports.json").write_text(json.dumps(sealed(facts), indent=2) + "\n", encoding="utf-8")
    shown = list(both_programs(session.graph("timm"), out.name)) if card.sha256 else []
    for row in rows:
        form, graph = FORMATS[row["format"]], session.graph(row["format"])
        if form.write is not None and row["note"] == note(form, graph):  # else it was made with other options
            shown.append((f"With {row['format']}", form.program(graph, out.name, row["file"])))
    (folder / "README.md").write_text(
        model_card(card, shown),
        encoding="utf-8",
        errors="backslashreplace",  # a name may hold bytes that are no UTF-8
    )
    if (config := folder / "config.json").is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        content["comad"]["exports"] = rows
        config.write_text(json.dumps(sealed(content), indent=2) + "\n", encoding="utf-8")


def _program(session: Session, name: str, folder: str) -> str:
    graph = session.graph(name)
    return FORMATS[name].program(graph, folder, FORMATS[name].path(graph.half))


def _report(session: Session, rows: Sequence[ExportRow], refused: Sequence[str], out: Path) -> str:
    """The table, what was refused, and the programs."""
    own = latency(session.run, session.pixels, None), latency(by_torch(session.original, 1), session.pixels, None)
    titles = ("format", "file", "MB", "difference", "cosine, least (mean)", "score", "ms 1 thread", "ms all", "")
    cells = [
        titles,
        ("the network", "", "", "", "", "", f"{own[1]:.2f}", f"{own[0]:.2f}", "PyTorch"),
        *map(_cells, rows),
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    programs = [f"{row.format}:\n\n{_program(session, row.format, str(out))}" for row in rows]
    notes = [*refused, *([session.unscored] if session.unscored else [])]
    compared = f"compared on {len(session.pixels)} validation images; {out}/README.md is the card."
    return "\n".join([*lines, *notes, compared, "", *programs])


def _cells(row: ExportRow) -> tuple[str, ...]:
    score = "" if row.score is None else f"{row.score:.1f} for {row.own_score:.1f} % ({row.scored})"
    times = ("–" if ms is None else f"{ms:.2f}" for ms in (row.ms_one_thread, row.ms_all_threads))
    mark = "" if row.sound else "; NOT as near as it should be"
    return (
        row.format,
        row.file,
        f"{row.bytes / 1e6:.2f}",
        f"{row.max_difference:.1e}",
        f"{row.cosine:.5f} ({row.mean_cosine:.5f})",
        score,
        *times,
        row.note + mark,
    )


def _earlier_rows(out: Path, identity: str) -> list[dict[str, Any]]:
    """What an earlier call wrote there for the same weights; nothing if it was for others."""
    path = out / "exports.json"
    if not path.is_file():
        return []
    content = read_json(path, "remove the folder or name another one")
    if not is_intact(content):
        raise ValueError(f"{path} was edited or damaged; remove the folder or name another one.")
    rows = content.get("exports")
    if content.get("source") != identity or not isinstance(rows, list):
        return []
    whole = [row for row in rows if isinstance(row, dict) and row.keys() == ExportRow.__dataclass_fields__.keys()]
    return [row for row in whole if row["format"] in FORMATS and (out / str(row["file"])).is_file()]


def _add_to_scoreboard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put the exports beside the scores of the run."""
    content = read_json(path, "evaluate the run again")
    if not is_intact(content):
        warn(f"{path} was edited or damaged since the run wrote it; it counts as it is now.")
    with replacing(path) as partial:
        partial.write_text(json.dumps(sealed(content | {"exports": rows}), indent=2) + "\n", encoding="utf-8")


def _file_name(name: str) -> str:
    """A name as that of a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip(".") or "backbone"
