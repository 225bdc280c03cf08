"""The verb `comad export`: a student, or any backbone, as the files that other programs run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import timm
import torch
from torch import nn

from comad.data.images import Splits
from comad.data.load import load_images
from comad.exporting.card import ModelCard, model_card
from comad.exporting.encoder import ClassScorer, Encoder, Pool, Preprocessing, preprocessing_of
from comad.exporting.fidelity import (
    Accuracy,
    ClassAccuracy,
    ExportRow,
    NeighbourAccuracy,
    cosines,
    difference,
    is_sound,
    latency,
    pixels_of,
    run_all,
    some,
)
from comad.exporting.formats import FORMATS, OPSET, Format, Graph, Run, by_torch
from comad.exporting.package import both_programs, check_place, timm_facts, write_timm
from comad.exporting.source import Source, data_of, load_source, plain_card, run_folder
from comad.models.backbone import Backbone
from comad.models.files import read_json, sha256_of
from comad.models.students import takes_size
from comad.runtime.atomic import replacing
from comad.runtime.progress import say, track
from comad.runtime.spelling import hint

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a student, or any backbone, as files that other programs run; each is opened and compared with it.

    Args:
        backbone: the folder of a run, an exported folder, NAME=FILE, a bundled teacher, or a timm model name.
        to: timm, transformers, state-dict, torch-export, onnx, int8, openvino, openvino-int8, executorch.
        out: the folder to write; left out, RUN/export of a run, else exports/NAME.
        data: images to compare and to calibrate with, a folder or the name of a bundled set; left out, those that the
            run learnt from, else stamps.
        image_size: pixels on the side of the images; left out, as the student was trained.
        precision: of the weights, fp32 or fp16; 8-bit files are made of the first.
        batch: images per call that the files are fixed to; left out, any number, and 1 for executorch.
        opset: of ONNX files.
        images: validation images that every file is compared on.
        calibration: training images that set the ranges of 8 bits.
        keep_failed: keep files that are not as near to the student as they should be, and mark them.
    """

    backbone: str = ""
    to: tuple[str, ...] = ("timm", "transformers", "onnx")
    out: str | None = None
    data: str | None = None
    image_size: int | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    batch: int | None = None
    opset: int = OPSET
    images: int = 64
    calibration: int = 300
    keep_failed: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "batch", "images", "calibration"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} is too small; use 1 or more.")


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
    source = load_source(str(run / "student") if run else config.backbone, data, config.image_size, splits)
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
    known = getattr(next(backbone.children()), "pretrained_cfg", None) or {}
    name = architecture or (card.architecture if card else "") or known.get("architecture", "")
    card = card or plain_card(Path(out).name, name, backbone, "unknown", splits)
    arguments = {"img_size": backbone.image_size} if model_args is None and takes_size(name) else model_args or {}
    return write_exports(Source(backbone, replace(card, architecture=name), arguments, splits), Path(out), config)


def export_classifier(
    source: Source,
    head: nn.Linear,
    labels: Sequence[str],
    out: str | Path,
    *,
    pool: Pool,
    to: Sequence[str] = ("timm", "transformers", "onnx"),
    **options: Any,
) -> Exported:
    """Export a fine-tuned classifier: a backbone and a linear head on the class token or the mean patch token.

    Args:
        source: the backbone as it was trained, its card and timm's arguments, and images to compare and to calibrate
            with; the score is top-1 on their validation part. The card's ``labels`` are filled in.
        head: as it was trained, on any device; left as it is.
        labels: names of the classes, in the order of the head's outputs.
        out: the folder to write.
        pool: what the head sees.
        to: names of `FORMATS`.
        options: fields of `ExportConfig`.

    Raises:
        ValueError: the labels do not fit the head; or see `export`.
    """
    if len(labels) != head.out_features:
        raise ValueError(f"{len(labels)} labels for a head of {head.out_features} classes; give one name per output.")
    config = ExportConfig(to=tuple(to), out=str(out), **options)
    check(config)
    card = replace(source.card, labels=tuple(labels))
    source = source._replace(card=card, head=(head, pool), scoreboard=None)  # the run's scores are of its backbone
    return write_exports(source, Path(out), config)


def check(config: ExportConfig) -> None:
    """Say what is wrong with a request before anything is loaded.

    Raises:
        ValueError: no format, an unknown one, one whose packages are missing, or one that cannot be had in 16 bits.
    """
    if not config.to:
        raise ValueError(f"name a format: --to {' '.join(FORMATS)}.")
    for name in config.to:
        if name == "coreml":
            raise ValueError("coreml is left out: coremltools cannot convert this torch's programs; take --to onnx.")
        if name not in FORMATS:
            raise ValueError(f"no format {name!r}; {hint(name, FORMATS)}")
        if missing := FORMATS[name].missing():
            extra = FORMATS[name].extra
            raise ValueError(f"--to {name} needs {', '.join(missing)}; run: pip install 'comad[{extra}]'.")


def write_exports(source: Source, out: Path, config: ExportConfig) -> Exported:
    """Write all formats into a folder beside its place, check them, and put it there.

    Files that an earlier call wrote there for the same weights are kept.

    Raises:
        ValueError: the place is taken, timm is wanted and does not know the network, or no file came through.
    """
    check_place(out)
    names = tuple(dict.fromkeys(config.to))
    if (wants := [name for name in names if FORMATS[name].timm]) and not timm.is_model(source.card.architecture):
        raise ValueError(
            f"--to {wants[0]} needs a network of timm's, and timm's name of this one is not known; "
            "take --to onnx, openvino or torch-export, or give architecture and model_args in Python."
        )
    session = _Session(source, config)
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


class _Session:
    """A network and what its exports are compared with, made once for all formats."""

    def __init__(self, source: Source, config: ExportConfig):
        self.source, self.config = source, config
        backbone, splits = source.backbone, source.splits
        self.preprocessing: Preprocessing = preprocessing_of(backbone, source.card.eval_crop)
        self.identity = sha256_of(backbone.state_dict() | (source.head[0].state_dict() if source.head else {}))
        self.original = self._module(torch.float32)
        images = splits.val if len(splits.val) else splits.train
        self.pixels = pixels_of(images, some(images, config.images), self.preprocessing)
        self.run: Run = by_torch(self.original, 0)
        self.expected = run_all(self.run, self.pixels, None)
        if not all(np.isfinite(values).all() for values in self.expected):
            raise ValueError(f"{source.card.name}: its features are not finite, so nothing is exported; train it anew.")
        self.accuracy, self.own_score, self.unscored = self._accuracy()

    def _module(self, dtype: torch.dtype) -> Encoder | ClassScorer:
        encoder = Encoder(self.source.backbone, dtype)
        return ClassScorer(encoder, *self.source.head) if self.source.head else encoder

    def _accuracy(self) -> tuple[Accuracy | None, float | None, str]:
        """What 8-bit files are scored by, the network's own score, or why there is none."""
        if all(FORMATS[name].exact for name in self.config.to):
            return None, None, ""
        kind = ClassAccuracy if self.source.head else NeighbourAccuracy
        try:
            accuracy = kind(self.source.splits, self.preprocessing)
        except ValueError as error:
            return None, None, f"8-bit files are not scored on validation images: {error}"
        return accuracy, accuracy(self.run, None), ""

    def graph(self, name: str) -> Graph:
        """What a format is given."""
        form, config, source = FORMATS[name], self.config, self.source
        half = config.precision == "fp16" and form.half
        module = self._module(torch.float16) if half else self.original
        batch = config.batch or (1 if form.fixed else None)
        facts = timm_facts(source.backbone, self.preprocessing)
        return replace(
            facts,
            module=module,
            outputs=module.outputs,
            batch=batch,
            opset=config.opset,
            half=half,
            calibration=self._calibration,
            architecture=source.card.architecture,
            model_args=source.model_args,
            labels=source.card.labels,
            pool=source.head[1] if source.head else facts.pool,
        )

    def _calibration(self) -> Iterator[np.ndarray]:
        """Training images; a fixed batch sees each several times."""
        images = self.source.splits.train
        for row in pixels_of(images, some(images, self.config.calibration), self.preprocessing):
            yield np.repeat(row[None], self.config.batch or 1, axis=0)

    def write_base(self, folder: Path) -> ModelCard:
        """Write timm's folder where timm knows the network: what the card stands on, and two formats are."""
        source = self.source
        if not timm.is_model(source.card.architecture):
            return source.card
        dtype = DTYPES[self.config.precision]
        return write_timm(
            source.backbone, folder, model_args=source.model_args, card=source.card, dtype=dtype, head=source.head
        )

    def write(self, name: str, folder: Path) -> tuple[ExportRow | None, str]:
        """Write one format, open it, compare it. Gives its row; or none, and why, if it did not come through."""
        say(f"{name} is written and compared")
        form, graph = FORMATS[name], self.graph(name)
        file = folder / form.path(graph.half)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            if form.write is not None:
                form.write(graph, file)
            row = self._measure(name, form, graph, file, folder)
        except Exception as error:  # converters and runtimes fail in ways of their own
            self._discard(form, file, folder)
            first = str(error).strip().splitlines() or [""]
            return None, f"{name}: not written, {type(error).__name__}: {first[0][:300]}"
        if row.sound or self.config.keep_failed:
            return row, ""
        self._discard(form, file, folder)
        score = "" if row.score is None else f", {row.score:.1f} % right for {row.own_score:.1f} %"
        return None, (
            f"{name}: refused, it is not as near to the network as it should be (largest difference "
            f"{row.max_difference:.1e}, cosine {row.cosine:.4f}, mean {row.mean_cosine:.4f}{score}); "
            "--keep-failed keeps and marks it."
        )

    @staticmethod
    def _discard(form: Format, file: Path, folder: Path) -> None:
        """Take back what a format wrote; timm's folder belongs to all."""
        if form.write is None:
            return
        file.unlink(missing_ok=True)
        file.with_suffix(".bin").unlink(missing_ok=True)
        if all(left.name == "preprocessing.json" for left in file.parent.iterdir()):
            shutil.rmtree(file.parent)

    def _measure(self, name: str, form: Format, graph: Graph, file: Path, folder: Path) -> ExportRow:
        run = form.open(graph, file, 0)
        found = run_all(run, self.pixels, graph.batch)
        similar = cosines(found[0], self.expected[0])
        row = ExportRow(
            format=name,
            file=str(file.relative_to(folder)),
            note=_note(form, graph),
            bytes=sum(path.stat().st_size for path in {file, file.with_suffix(".bin")} if path.is_file()),
            images=len(self.pixels),
            max_difference=difference(found, self.expected),
            cosine=float(similar.min()),
            mean_cosine=float(similar.mean()),
        )
        if not form.exact and self.accuracy is not None:
            row = replace(
                row,
                score=self.accuracy(run, graph.batch),
                own_score=self.own_score,
                scored=getattr(self.accuracy, "name", ""),
            )
        row = replace(row, sound=is_sound(row, form.exact, graph.half))
        if not row.sound and not self.config.keep_failed:
            return row
        one = latency(form.open(graph, file, 1), self.pixels, graph.batch) if form.threads else None
        return replace(row, ms_one_thread=one, ms_all_threads=latency(run, self.pixels, graph.batch))


def _note(form: Format, graph: Graph) -> str:
    return ", ".join(filter(None, ("fp16" if graph.half else "", form.note(graph))))


def _write_facts(folder: Path, card: ModelCard, session: _Session, rows: list[dict[str, Any]], out: Path) -> None:
    """The card, and what was measured: ``README.md``, ``exports.json``, and the rows in ``config.json``."""
    facts = {"source": session.identity, "preprocessing": session.preprocessing.as_dict(), "exports": rows}
    (folder / "exports.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shown = list(both_programs(session.graph("timm"), out.name)) if card.sha256 else []
    for row in rows:
        form, graph = FORMATS[row["format"]], session.graph(row["format"])
        if form.write is not None and row["note"] == _note(form, graph):  # else it was made with other options
            shown.append((f"With {row['format']}", form.program(graph, out.name, row["file"])))
    (folder / "README.md").write_text(model_card(card, shown), encoding="utf-8")
    if (config := folder / "config.json").is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        content["comad"]["exports"] = rows
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _program(session: _Session, name: str, folder: str) -> str:
    graph = session.graph(name)
    return FORMATS[name].program(graph, folder, FORMATS[name].path(graph.half))


def _report(session: _Session, rows: Sequence[ExportRow], refused: Sequence[str], out: Path) -> str:
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
    rows = content.get("exports")
    if content.get("source") != identity or not isinstance(rows, list):
        return []
    whole = [row for row in rows if isinstance(row, dict) and row.keys() == ExportRow.__dataclass_fields__.keys()]
    return [row for row in whole if row["format"] in FORMATS and (out / str(row["file"])).is_file()]


def _add_to_scoreboard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put the exports beside the scores of the run."""
    content = read_json(path, "evaluate the run again")
    with replacing(path) as partial:
        partial.write_text(json.dumps(content | {"exports": rows}, indent=2) + "\n", encoding="utf-8")


def _file_name(name: str) -> str:
    """A name as that of a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip(".") or "backbone"
