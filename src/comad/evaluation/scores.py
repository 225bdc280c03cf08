"""Scores in a file, with every test image's result: what a paired comparison needs later on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comad.evaluation.scoreboard import Row, Score
from comad.runtime.atomic import write_text
from comad.runtime.progress import warn
from comad.runtime.seal import is_intact, sealed


class Scores(NamedTuple):
    """What a file of scores holds: the scores, and plain facts about how they came about."""

    scores: tuple[Score, ...]
    facts: dict[str, Any]


def write_scores(path: Path, scores: Sequence[Score], facts: Mapping[str, Any] | None = None) -> None:
    """Write JSON: of each score its row, ``correct`` as a text of 0 and 1 per test image, and the images' concepts.

    Per-image results that are no bool are a list of numbers.

    A reader never sees half a file: it is renamed into place.
    """
    plain = [
        {
            "row": asdict(part.row),
            "correct": {name: _text(hits) for name, hits in part.correct.items()},
            "groups": {name: groups.tolist() for name, groups in part.groups.items()},
        }
        for part in scores
    ]
    content = {"facts": dict(facts or {}), "scores": plain}
    write_text(path, json.dumps(sealed(content)) + "\n")


def read_scores(path: Path) -> Scores | None:
    """Read what `write_scores` wrote, exactly. None, and a line that says so, if there is none of this version."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not is_intact(content):
            raise ValueError("the checksum is wrong")
        return Scores(tuple(_score(part) for part in content["scores"]), content["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        warn(f"{path} is damaged or of another version; its scores are computed again.")
        return None


def _score(plain: Mapping[str, Any]) -> Score:
    correct = {name: _hits(found) for name, found in plain["correct"].items()}
    groups = {name: torch.tensor(numbers, dtype=torch.int64) for name, numbers in plain["groups"].items()}
    return Score(Row(**plain["row"]), correct, groups)


def _text(hits: Tensor) -> str | list[float]:
    return "".join("1" if hit else "0" for hit in hits.tolist()) if hits.dtype == torch.bool else hits.tolist()


def _hits(found: str | list[float]) -> Tensor:
    return torch.tensor([letter == "1" for letter in found] if isinstance(found, str) else found)
