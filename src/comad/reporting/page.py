"""The verb `comad report`: one HTML page about runs and comparisons, for who has neither the code nor a network."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from comad import __version__
from comad.reporting import visuals, words
from comad.reporting.charts import MAX_POINTS, charts
from comad.reporting.folder import (
    SCORES,
    BoardRow,
    Comparison,
    Difference,
    Interval,
    RunFolder,
    is_comparison,
    is_number,
    is_run,
    read_comparison,
    read_run,
)
from comad.reporting.samples import leaves
from comad.runtime.progress import duration, track

ASSETS = Path(__file__).parent / "assets"
PAGE = "report.html"
MAX_CLASSES = 10
"""Classes that were lost and won that are shown at once."""
MAX_ROWS = 300
MANY_RUNS = 4
"""Runs on a page up to which images and curves are shown in full."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One self-contained HTML page about runs: it opens from disk, and needs no network.

    Args:
        runs: folders of runs or of comparisons.
        out: the page. Left out: report.html in the folder, if it is one.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    out: str = ""


def report(config: ReportConfig) -> str:
    """Write the page, and say where it is.

    Raises:
        ValueError: see `write_report`.
    """
    path = write_report([Path(run) for run in config.runs], Path(config.out) if config.out else None)
    return f"the report is in {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser."


def write_report(run_folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page about runs and comparisons. A run of several students counts as one run for each.

    What is missing, damaged or of another version in a folder is told on the page.

    Args:
        run_folders: folders of `comad distill` and of `comad compare`.
        out: the page; None: ``report.html`` in the folder, if it is one.

    Raises:
        ValueError: no folder, one that holds no run, several without ``out``, or ``out`` is a folder.
    """
    if not run_folders:
        raise ValueError("name a run's folder: comad report RUN.")
    if out is None and len(run_folders) > 1:
        raise ValueError("several runs: name the page with --out FILE.html.")
    out = run_folders[0] / PAGE if out is None else out
    if out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; name a file, such as --out {out / PAGE}.")
    comparisons, runs = [], []
    for folder in run_folders:
        found = _runs_in(folder)
        if is_comparison(folder):
            comparisons.append(read_comparison(folder))
        elif not found:
            raise ValueError(f"{str(folder)!r} holds no run; name the folder given to --run.out.")
        runs += [read_run(path) for path in track(found, f"reading {folder}", "runs")]
    text = render(comparisons, runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_bytes(text.encode("utf-8", errors="replace"))  # a name may hold half a surrogate pair
    os.replace(temporary, out)
    return out


def render(comparisons: Sequence[Comparison], runs: Sequence[RunFolder]) -> str:
    """The page as HTML. Everything that stands in a folder is escaped, and the page may load and run nothing else."""
    templates = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _joined("uPlot.min.css", "style.css"), _joined("uPlot.iife.min.js", "charts.js")
    views = [_run_view(number, run, len(runs)) for number, run in enumerate(runs)]
    return share_images(
        templates.get_template("page.html").render(
            title=_title(comparisons, runs),
            comparisons=[_comparison_view(part) for part in comparisons],
            runs=views,
            overview=[_overview(run) for run in runs],
            charts=[
                {key: chart[key] for key in ("id", "steps", "series")} for view in views for chart in view["charts"]
            ],
            style=style,
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
        )
    )


def share_images(page: str) -> str:
    """Keep an image that comes again once; the page's script fills in the others, which name its number."""
    numbers: dict[str, int] = {}

    def place(found: re.Match[str]) -> str:
        known, number = found[1] in numbers, numbers.setdefault(found[1], len(numbers))
        return f'data-as="{number}"' if known else f'id="image{number}" src="{found[1]}"'

    return re.sub(r'src="(data:image/webp;base64,[^"]+)"', place, page)


def _joined(*names: str) -> str:
    return "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names)


def _runs_in(folder: Path) -> list[Path]:
    """The run of a folder, or those of its students."""
    if is_run(folder) and (folder / "log.jsonl").is_file():
        return [folder]
    inner = sorted(path.parent for path in folder.glob("*/log.jsonl")) if folder.is_dir() else []
    return inner or ([folder] if is_run(folder) else [])


def _title(comparisons: Sequence[Comparison], runs: Sequence[RunFolder]) -> str:
    if len(runs) == 1 and not comparisons:
        names = words.listed(runs[0].teacher_names)
        return f"Distilled from {names}" if names else f"Run {runs[0].path.name}"
    if comparisons and not runs:
        return f"Comparison on {words.listed([part.data for part in comparisons])}"
    return f"{len(runs)} runs" + (f" and {len(comparisons)} comparisons" if comparisons else "")


def _overview(run: RunFolder) -> tuple[str, ...]:
    """A run's line in the table of several runs."""
    student, share = run.role("student"), words.share_of_best(run)
    size, knn = (student.params, student.knn) if student else (None, None)
    names = words.listed(run.teacher_names)
    return run.path.name, names, words.params(size), _number(knn, 1, 1), _number(share and share.value, 1, 0)


def _run_view(number: int, run: RunFolder, num_runs: int = 1) -> dict[str, Any]:
    """All that the template shows of a run, as plain values; of each of many runs images and curves are smaller."""
    small, points = num_runs > MANY_RUNS, MAX_POINTS if num_runs <= MANY_RUNS else MAX_POINTS // num_runs
    samples, facts = run.samples, run.facts
    classes = words.lost_classes(run)
    shown = [{**chart, "id": f"run{number}-chart{i}"} for i, chart in enumerate(charts(run, points))]
    return {
        "id": f"run{number}",
        "name": run.path.name,
        "headline": words.headline(run),
        "tiles": _tiles(run),
        "verdicts": words.verdicts(run),
        "health": words.health(run),
        "problems": run.problems,
        "board": _board(run),
        "reasons": list(dict.fromkeys(row.reason for row in run.rows if row.reason)),
        "images_scored": words.images_scored(run),
        "charts": shown,
        "originals": visuals.originals(samples, small) if samples else None,
        "masks": visuals.masks(samples, small) if samples else [],
        "gates": visuals.gates(samples) if samples else [],
        "colours": visuals.colours(samples) if samples else [],
        "neighbours": visuals.neighbours(samples, small) if samples else [],
        "lost": visuals.lost(samples, small) if samples else [],
        "classes": classes[:MAX_ROWS],
        "classes_cut": len(classes) > MAX_ROWS,
        "most_lost": [row for row in classes[:MAX_CLASSES] if row["student"] < row["teacher"]],
        "most_won": [row for row in classes[::-1][:MAX_CLASSES] if row["student"] > row["teacher"]],
        "best": run.best_teacher.name if run.best_teacher else "",
        "agreement": _agreement(run),
        "data": _data(run),
        "cost": _cost(run),
        "command": _text(facts.get("command")) or run.card.command,
        "changed": _changed(facts.get("changed")),
        "options": {key: _text(value) for key, value in leaves(run.config).items()},
        "exports": _exports(run),
        "licences": _licences(run),
        "card": run.card,
    }


def _tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """Large numbers: value, what it is, and a remark."""
    student, best, share = run.role("student"), run.best_teacher, words.share_of_best(run)
    tiles = []
    if student and student.params:
        tiles.append((words.params(student.params), "parameters", _fewer(student, best)))
    if student and student.knn is not None:
        tiles.append((f"{student.knn:.1f} %", "kNN of the student", f"best teacher {best.knn:.1f} %" if best else ""))
    if share:
        interval = f"95 % interval {share.low:.0f} to {share.high:.0f} %" if share.low < share.high else ""
        tiles.append((f"{share.value:.0f} %", "of the best teacher", interval))
    if student and student.latency_ms:
        tiles.append(
            (
                f"{student.latency_ms:.1f} ms",
                "per image on the CPU",
                f"best teacher {best.latency_ms:.1f} ms" if best and best.latency_ms else "",
            )
        )
    if run.card.hours is not None:
        tiles.append((duration(3600 * run.card.hours), "of training", run.card.hardware))
    return tiles


def _fewer(student: BoardRow, best: BoardRow | None) -> str:
    if best is None or not best.params or not student.params:
        return ""
    ratio = best.params / student.params
    return f"{ratio:.1f} times fewer than {best.name}" if ratio >= 1 else f"{1 / ratio:.1f} times more than {best.name}"


def _board(run: RunFolder) -> dict[str, Any]:
    """The scoreboard: titles, and of each row cells and the length of its bar."""
    columns = list(dict.fromkeys(key for row in run.rows for key in row.scores))
    columns.sort(key=lambda key: list(SCORES).index(key) if key in SCORES else len(SCORES))
    best = run.best_teacher
    rows = [
        {
            "name": row.name,
            "role": row.role.replace("_", " "),
            "bar": row.knn,
            "share": f"{100 * row.knn / best.knn:.0f}" if best and best.knn and row.knn is not None else "–",
            "cost": (words.params(row.params), _number(row.flops, 1e9, 2), _number(row.latency_ms, 1, 1)),
            "scores": [_number(row.scores.get(key), 1, 1) for key in columns],
        }
        for row in run.rows
    ]
    return {"scores": [SCORES.get(key, key) for key in columns], "rows": rows}


def _agreement(run: RunFolder) -> list[dict[str, str]]:
    """Per teacher: share of the target, held-out cosine at the first and last probe, what both name rightly."""
    student, rows = run.role("student"), []
    ours = run.results.get(("student", student.name)) if student else None
    for name in run.teacher_names:
        share, cosine = words.ends(run, f"share_{name}"), words.ends(run, f"held_out_cosine_{name}")
        theirs, both = run.results.get(("teacher", name)), "–"
        if ours and theirs and "knn" in ours.correct and "knn" in theirs.correct:
            a, b = ours.correct["knn"], theirs.correct["knn"]
            both = f"{100 * float(a[b].mean()):.0f} %" if len(a) == len(b) and b.any() else "–"
        cells = {
            "share": f"{100 * share[1]:.0f} %" if share else "–",
            "first": f"{cosine[0]:.2f}" if cosine and cosine[0] != cosine[1] else "–",
            "last": f"{cosine[1]:.2f}" if cosine else "–",
            "both": both,
        }
        if any(cell != "–" for cell in cells.values()):
            rows.append({"name": name, **cells})
    return rows


def _data(run: RunFolder) -> dict[str, str]:
    scored = {len(hits) for part in run.results.values() for key, hits in part.correct.items() if key == "knn"}
    concepts = {len(set(part.groups["knn"].tolist())) for part in run.results.values() if "knn" in part.groups}
    found = {
        "images": run.card.data or _text(run.config.get("data")),
        "images seen in training, repeats counted": f"{run.card.images_seen:,}" if run.card.images_seen else "",
        "images scored": f"{max(scored):,} ({run.split or 'test'})" if scored else "",
        "concepts among them": f"{max(concepts):,}" if concepts else "",
        "licence": run.card.data_licence if run.card.data else "",
    }
    return {key: value for key, value in (found | _plain(run.facts.get("data"))).items() if value}


def _cost(run: RunFolder) -> dict[str, str]:
    speeds = [line["images_per_s"] for line in run.log if "images_per_s" in line]
    memory = [line["memory_gib"] for line in run.log if "memory_gib" in line]
    found = {
        "training": duration(3600 * run.card.hours) if run.card.hours is not None else "",
        "hardware": run.card.hardware,
        "throughput": f"{sorted(speeds)[len(speeds) // 2]:.0f} images/s (median)" if speeds else "",
        "memory": f"{max(memory):.1f} GiB at most" if memory else "",
        "steps": f"{int(run.log[-1]['step']):,}" if run.log else "",
    }
    return {key: value for key, value in (found | _plain(run.facts.get("cost"))).items() if value}


def _changed(changed: Any) -> list[tuple[str, str, str]]:
    """Option, value, default."""
    pairs = changed.items() if isinstance(changed, dict) else ()
    return [
        (str(key), _text(pair[0]), _text(pair[1])) for key, pair in pairs if isinstance(pair, list) and len(pair) == 2
    ]


def _exports(run: RunFolder) -> dict[str, Any]:
    """A table whose columns are the words that the run gave."""
    rows = [_plain(row) for row in _list(run.facts.get("exports")) if isinstance(row, dict)]
    if run.exported_bytes and not any(row.get("format") == "timm" for row in rows):
        fidelity = "the same tokens as the trained network, checked when it was written"
        size = f"{run.exported_bytes / 1e6:.1f} MB"
        rows.insert(0, {"format": "timm", "file": "student/model.safetensors", "size": size, "fidelity": fidelity})
    titles = list(dict.fromkeys(key for row in rows for key in row))
    return {"titles": titles, "rows": [[row.get(title, "–") for title in titles] for row in rows]}


def _licences(run: RunFolder) -> list[tuple[str, str, str]]:
    """Of what, which licence, and where it comes from."""
    teachers = [(f"teacher {card.name}", card.licence, card.about or card.source) for card in run.card.teachers]
    if not run.card.name:
        return teachers
    return [
        ("the student", run.card.licence, "follows from its teachers and its starting weights"),
        *teachers,
        ("the images", run.card.data_licence, run.card.data),
    ]


def _comparison_view(table: Comparison) -> dict[str, Any]:
    """Rows and, per score, where the interval of the difference lies on a common axis, in percent of its width."""
    panels = []
    for name, title in SCORES.items():
        found = [(row, row.score(name)) for row in table.rows]
        scored = [(row, score) for row, score in found if score]
        if scored:
            panels.append(_panel(title, scored, table.reference))
    seeds = sorted({seed for row in table.rows for seed in row.seeds})
    return {
        "data": table.data,
        "split": table.split,
        "reference": table.reference,
        "sentences": words.compared(table),
        "panels": panels,
        "seeds": ", ".join(map(str, seeds)),
        "few_seeds": len(seeds) < 3,
        "code": words.listed(sorted({row.commit for row in table.rows if row.commit})),
        "cost": [
            (
                row.label,
                ", ".join(row.teachers),
                words.params(row.params),
                _number(row.images_seen, 1, 0),
                duration(float(row.seconds or 0)),
            )
            for row in table.rows
        ],
    }


def _panel(title: str, scored: Sequence[tuple[Difference, Interval]], reference: str) -> dict[str, Any]:
    """The scale is that of the students; what lies beyond it is cut off and said to be."""
    ends = [abs(end) for row, (_, _, *ends) in scored if row.kind != "teacher" for end in ends]
    reach = 1.1 * max([*ends, 0.5])

    def place(value: int | float) -> float:
        return 50 + 50 * min(1.0, max(-1.0, value / reach))

    rows = [
        {
            "label": row.label,
            "reference": row.label == reference,
            "mean": f"{mean:.1f}",
            "difference": f"{difference:+.1f}",
            "interval": f"{low:+.1f} to {high:+.1f}",
            "left": f"{min(place(low), 98.0):.2f}",
            "width": f"{max(place(high) - place(low), 2.0):.2f}",
            "point": f"{place(difference):.2f}",
            "beyond": max(abs(low), abs(high)) > reach,
            "level": "good" if low > 0 else "bad" if high < 0 else "even",
        }
        for row, (mean, difference, low, high) in scored
    ]
    return {"title": title, "reach": f"{reach:.1f}", "rows": rows}


def _plain(values: Any) -> dict[str, str]:
    return {str(key): _text(value) for key, value in values.items()} if isinstance(values, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: Any, unit: int | float, digits: int) -> str:
    return f"{value / unit:,.{digits}f}" if is_number(value) else "–"
