"""What lies in a run's folder, read so that a missing, older or damaged file is told and stops nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from comad.reporting.samples import FACTS, SAMPLES, Samples, leaves, read_samples
from comad.runtime.seal import is_intact, is_text_intact

SCORES = {
    "knn": "kNN",
    "linear": "linear probe",
    "finetune": "fine-tuned",
    "knn_coarse": "kNN, coarse",
    "linear_coarse": "linear, coarse",
    "finetune_coarse": "fine-tuned, coarse",
}
"""Score → what a reader calls it; top-1 percent. A score that is not here is shown by its own name."""

LARGEST = 10**30
"""Larger numbers in a file are damage."""

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, le=10**18)]
Real = Annotated[float, Field(ge=0, le=LARGEST)]


class _Plain(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class BoardRow(_Plain):
    """A row of ``scoreboard.json``: a network, its cost and its scores in percent, None where there are none."""

    model_config = ConfigDict(extra="allow")

    name: str
    role: str = ""
    params: Count | None = None
    flops: Real | None = None
    latency_ms: Real | None = None
    knn: Real | None = None
    linear: Real | None = None
    reason: str | None = None

    @property
    def scores(self) -> dict[str, int | float]:
        """Score → percent, those that are there; of a dict of scores in the file all are taken."""
        inner = (self.__pydantic_extra__ or {}).get("scores")
        given = self.model_dump() | (inner if isinstance(inner, dict) else {})
        names = dict.fromkeys([*SCORES, *(inner if isinstance(inner, dict) else ())])
        return {str(name): float(given[name]) for name in names if is_number(given.get(name))}


class TeacherCard(_Plain):
    """What the student's card says of a teacher."""

    name: str
    source: str = ""
    architecture: str = ""
    sha256: str = ""
    licence: str = "unknown"
    params: Count | None = None
    about: str = ""


class Card(_Plain):
    """The key ``comad`` of ``student/config.json``."""

    name: str = ""
    licence: str = "unknown"
    architecture: str = ""
    preset: str = ""
    seed: Count | None = None
    images_seen: Count | None = None
    data: str = ""
    data_licence: str = "unknown"
    command: str = ""
    code: str = ""
    hardware: str = ""
    hours: Real | None = None
    teachers: tuple[TeacherCard, ...] = ()
    sha256: str = ""


class Interval(NamedTuple):
    """Mean percent of a row, its difference to the reference in points, and the ends of the 95 % interval of that."""

    mean: float
    difference: float
    low: float
    high: float


class Difference(_Plain):
    """A row of ``comparison.json``."""

    model_config = ConfigDict(extra="allow")

    label: str
    kind: str = ""
    teachers: tuple[str, ...] = ()
    seeds: tuple[Count, ...] = ()
    params: Count | None = None
    images_seen: Count | None = None
    seconds: Real | None = None
    commit: str = ""

    def score(self, name: str) -> Interval | None:
        """The comparison of a score such as ``knn``; None if there is none."""
        extra = self.__pydantic_extra__ or {}
        ends = extra.get(f"{name}_interval")
        values = [extra.get(name), extra.get(f"{name}_minus_reference"), *(ends if isinstance(ends, list) else [])]
        if len(values) != 4 or not all(map(is_number, values)):
            return None
        return Interval(*(float(value) for value in values if is_number(value)))


class Comparison(_Plain):
    """``comparison.json``."""

    reference: str = ""
    data: str = ""
    split: str = ""
    rows: tuple[Difference, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Results:
    """Of one network, each test image's result: score → bool (n,), and the concepts of these images, int (n,)."""

    correct: Mapping[str, np.ndarray]
    groups: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Everything of one run that could be read, results by role and name; ``problems`` are sentences about the rest."""

    path: Path
    config: Mapping[str, Any]
    log: tuple[Mapping[str, int | float], ...]
    warnings: tuple[str, ...]
    rows: tuple[BoardRow, ...]
    results: Mapping[tuple[str, str], Results]
    split: str
    card: Card
    exported_bytes: int
    samples: Samples | None
    facts: Mapping[str, Any]
    problems: tuple[str, ...]

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of the teachers, from the card, else the scoreboard, else the configuration."""
        configured = self.config.get("teachers")
        options = (
            [card.name for card in self.card.teachers],
            [row.name for row in self.rows if row.role == "teacher"],
            [str(name).partition("=")[0] for name in configured] if isinstance(configured, list) else [],
        )
        return tuple(next((names for names in options if names), ()))

    def role(self, role: str) -> BoardRow | None:
        """The first row of a role."""
        return next((row for row in self.rows if row.role == role), None)

    @property
    def best_teacher(self) -> BoardRow | None:
        """The teacher with the highest kNN."""
        teachers = [row for row in self.rows if row.role == "teacher" and row.knn is not None]
        return max(teachers, key=lambda row: row.knn or 0.0, default=None)


def is_run(folder: Path) -> bool:
    """Whether a folder looks like a run's."""
    return any((folder / name).is_file() for name in ("log.jsonl", "scoreboard.json", "config.yaml"))


def is_comparison(folder: Path) -> bool:
    """Whether a folder is that of a comparison."""
    return (folder / "comparison.json").is_file()


def read_run(folder: Path) -> RunFolder:
    """Read a run's folder. It raises nothing for what is missing or damaged in it."""
    problems: list[str] = []

    def attempt(name: str, read: Callable[[Path], T], instead: T) -> T:
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is not there.")
            return instead
        try:
            found = read(path)
            if not _is_intact(path):
                problems.append(f"{name} was edited or damaged since it was written; it is shown as it is.")
            return found
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            problems.append(f"{name} is damaged or of another version: {where}: {first['msg']}.")
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            yaml.YAMLError,
        ) as error:
            problems.append(f"{name} is damaged or of another version: {' '.join(str(error).split())[:200]}.")
        return instead

    config = attempt("config.yaml", _config, {})
    log, warnings, skipped = attempt("log.jsonl", _log, ((), (), 0))
    if skipped:
        problems.append(f"log.jsonl has {skipped} lines that cannot be read; the others are shown.")
    rows = attempt("scoreboard.json", _rows, ())
    split, results = attempt("scores.json", _results, ("", {}))
    card = attempt("student/config.json", _card, Card())
    samples = attempt(SAMPLES, read_samples, None)
    facts = attempt(FACTS, _facts, {})
    weights = folder / "student" / "model.safetensors"
    return RunFolder(
        path=folder,
        config=config,
        log=log,
        warnings=warnings,
        rows=rows,
        results=results,
        split=split,
        card=card,
        exported_bytes=weights.stat().st_size if weights.is_file() else 0,
        samples=samples,
        facts=facts,
        problems=tuple(problems),
    )


def read_comparison(folder: Path) -> Comparison:
    """Read ``comparison.json``.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "comparison.json"
    try:
        if not _is_intact(path):
            raise ValueError("the checksum is wrong")
        return Comparison.model_validate_json(path.read_bytes())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged; the same comad compare command again writes it anew.") from error


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number of a size that can be calculated with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_intact(path: Path) -> bool:
    """Whether a file is what its checksum says; one without a checksum is."""
    if path.suffix == ".json":
        return is_intact(json.loads(path.read_bytes()))
    return path.suffix != ".yaml" or is_text_intact(path.read_text(encoding="utf-8"))


def _config(path: Path) -> dict[str, Any]:
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(plain, dict):
        raise ValueError("it holds no options")
    leaves(plain)  # options that hold themselves are told here
    return plain


def _facts(path: Path) -> dict[str, Any]:
    plain = json.loads(path.read_bytes())
    if not isinstance(plain, dict):
        raise ValueError("it holds no facts")
    return plain


def _log(path: Path) -> tuple[tuple[dict[str, int | float], ...], tuple[str, ...], int]:
    """Numbers by line, what the log warns of, and how many lines could not be read."""
    lines, warnings, skipped = [], {}, 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if not (is_number(line["step"]) and 0 <= line["step"] < 2**53):
                raise ValueError("no step")
        except (ValueError, KeyError, TypeError, RecursionError):
            skipped += bool(text.strip())
            continue
        lines.append({key: value for key, value in line.items() if is_number(value)})
        warning = line.get("warning")
        if any(isinstance(value, float) and not math.isfinite(value) for value in line.values()):
            warning = "a number is not finite"
        if isinstance(warning, str):  # its numbers, behind the colon, change from step to step
            warnings[warning.partition(":")[0]] = f"At step {line['step']}: {warning}"
    return tuple(lines), tuple(warnings.values()), skipped


def _rows(path: Path) -> tuple[BoardRow, ...]:
    return TypeAdapter(tuple[BoardRow, ...]).validate_python(json.loads(path.read_bytes())["rows"])


def _results(path: Path) -> tuple[str, dict[tuple[str, str], Results]]:
    content = json.loads(path.read_bytes())
    found = {}
    for part in content["scores"]:
        correct = {key: np.frombuffer(text.encode(), np.uint8) == ord("1") for key, text in part["correct"].items()}
        groups = {key: np.asarray(numbers, dtype=np.int64) for key, numbers in part["groups"].items()}
        if any(key not in groups or groups[key].shape != hits.shape for key, hits in correct.items()):
            raise ValueError("results and concepts do not fit each other")
        found[str(part["row"]["role"]), str(part["row"]["name"])] = Results(correct=correct, groups=groups)
    return str(content.get("facts", {}).get("split", "")), found


def _card(path: Path) -> Card:
    return Card.model_validate(json.loads(path.read_bytes())["comad"])
