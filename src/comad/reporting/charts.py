"""Which numbers of the log stand in which chart, thinned to what an eye can tell apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from comad.reporting.folder import RunFolder

MAX_POINTS = 400
"""Steps of a chart; of a longer log evenly spaced ones are shown, the first and the last among them."""
TABLE_ROWS = 12

Picks = Callable[[str, RunFolder], bool]


class Group(NamedTuple):
    """A chart: its title, its unit, which keys of the log it shows, and what is cut off their names."""

    title: str
    unit: str
    picks: Picks
    prefix: str = ""


def _terms(key: str, run: RunFolder) -> bool:
    """The loss, its terms, and either of a teacher: ``loss``, ``token``, ``loss/dino``, ``token_dino``."""
    method = run.config.get("method")
    terms = method.get("terms") if isinstance(method, dict) else None
    names = ["loss", *terms] if isinstance(terms, dict) else ["loss"]
    if key in names or key.startswith(("loss/", "loss_")):
        return True
    return any(
        key.startswith(f"{name}/") or key in [f"{name}_{teacher}" for teacher in run.teacher_names] for name in names
    )


def _per_teacher(key: str, run: RunFolder) -> bool:
    """``loss/dino/token`` and the like."""
    return _terms(key, run) and any(f"/{name}/" in f"/{key}/" or key.endswith(f"_{name}") for name in run.teacher_names)


def _starts(prefix: str) -> Picks:
    return lambda key, run: key.startswith(prefix)


def _ends(suffix: str) -> Picks:
    return lambda key, run: key.endswith(suffix)


def _is(name: str) -> Picks:
    return lambda key, run: key == name


GROUPS = (
    Group("Loss per teacher", "", _per_teacher, "loss/"),
    Group("Loss and its terms", "", _terms, "loss/"),
    Group("Validation kNN", "%", _starts("knn")),
    Group("Share of the target", "", _starts("share_"), "share_"),
    Group("Agreement with each teacher, held-out images", "cosine", _starts("held_out_cosine_"), "held_out_cosine_"),
    Group("Learning rate", "", _is("lr")),
    Group("Waiting for data", "% of the time", _is("data_wait")),
    Group("Throughput", "images/s", _is("images_per_s")),
    Group("Information of tokens", "nats", _ends("_information")),
    Group("Cosine between images", "", _ends("_cosine")),
    Group("Effective rank", "", _ends("_rank")),
    Group("Spread of tokens", "standard deviation", _ends("_std")),
    Group("Entropy of the gate", "share of its maximum", _is("gate_entropy")),
    Group("Norm of the gradient", "", _is("grad_norm")),
    Group("Memory", "GiB", _is("memory_gib")),
    Group("Other numbers", "", lambda key, run: True),
)
"""In the order in which a key is claimed; the first that picks it shows it."""
HIDDEN = ("step", "epoch")
MAIN = 8
"""The first groups are shown at once, the others on demand."""


def charts(run: RunFolder, points: int = MAX_POINTS) -> list[dict[str, Any]]:
    """Charts as plain values: title, unit, whether it is main, steps, series (name, values), rows of a table, words.

    Args:
        run: whose log it is.
        points: steps of a chart at most.
    """
    keys = dict.fromkeys(key for line in run.log for key in line if key not in HIDDEN)
    owner = {key: next(i for i, group in enumerate(GROUPS) if group.picks(key, run)) for key in keys}
    order = [1, 0, *range(2, len(GROUPS))]
    found = [_chart(run, i, [key for key in keys if owner[key] == i], points) for i in order]
    return [chart for chart in found if chart["series"]]


def _chart(run: RunFolder, place: int, keys: Sequence[str], points: int) -> dict[str, Any]:
    group = GROUPS[place]
    lines = [line for line in run.log if any(key in line for key in keys)]
    lines = [lines[i] for i in _spaced(len(lines), points)]
    series = [
        {
            "name": key.removeprefix(group.prefix) or key,
            "values": [_short(line.get(key)) for line in lines],
        }
        for key in keys
    ]
    steps = [int(line["step"]) for line in lines]
    rows = [[f"{steps[i]:,}", *(_cell(part["values"][i]) for part in series)] for i in _spaced(len(steps), TABLE_ROWS)]
    said = [f"{part['name']} {_cell(values[0])} to {_cell(values[-1])}" for part in series if (values := _there(part))]
    return {
        "title": group.title,
        "unit": group.unit,
        "main": place < MAIN,
        "steps": steps,
        "series": series,
        "rows": rows,
        "alt": f"{group.title} over {len(steps)} logged steps: {', '.join(said)}.",
    }


def _there(part: dict[str, Any]) -> list[float]:
    return [value for value in part["values"] if value is not None]


def _spaced(count: int, limit: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(int)).tolist() if count else []


def _short(value: int | float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _cell(value: int | float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
