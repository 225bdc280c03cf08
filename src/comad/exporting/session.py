"""A network, the images that its exports are compared on, and the comparing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from comad.exporting.card import ModelCard
from comad.exporting.config import ExportConfig
from comad.exporting.encoder import ClassScorer, Encoder, Preprocessing, preprocessing_of
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
from comad.exporting.formats import FORMATS, Format, Graph, Run, by_torch
from comad.exporting.package import timm_arguments, timm_facts, write_timm
from comad.exporting.source import Source
from comad.models.files import sha256_of
from comad.runtime.progress import say

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Session:
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
            model_args=timm_arguments(source.backbone, source.model_args, source.pool),
            labels=source.card.labels,
            pool=source.pool,
        )

    def _calibration(self) -> Iterator[np.ndarray]:
        """Training images; a fixed batch sees each several times."""
        images = self.source.splits.train
        for row in pixels_of(images, some(images, self.config.calibration), self.preprocessing):
            yield np.repeat(row[None], self.config.batch or 1, axis=0)

    def write_base(self, folder: Path) -> ModelCard:
        """Write timm's folder where timm knows the network: what the card stands on, and two formats are."""
        source = self.source
        if source.not_timm():
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
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            first = str(cause).strip().splitlines() or [""]
            return None, f"{name}: not written, {type(cause).__name__}: {first[0][:300]}"
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
            note=note(form, graph),
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


def note(form: Format, graph: Graph) -> str:
    """What the table says of a file beside its numbers."""
    return ", ".join(filter(None, ("fp16" if graph.half else "", form.note(graph))))
