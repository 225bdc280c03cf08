"""What a run's numbers say, in plain sentences, with intervals where each test image's result is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from comad.reporting.folder import BoardRow, Comparison, RunFolder

RESAMPLES = 2000
COLLAPSED_INFORMATION = 0.5
"""Share of the targets' information that must be left."""
CONSTANT_COSINE = 0.95
ONE_TEACHER, NO_TEACHER = 0.9, 0.02
"""Shares of the target from which one teacher is nearly all of it, or nearly nothing."""
BASELINES = ("untrained", "pixels")
"""Kinds of rows that nothing was distilled into."""
SLOW_DATA = 10.0
"""Percent of the time that may go into waiting for images."""


class Sentence(NamedTuple):
    """A finding: ``good``, ``warn``, ``bad`` or ``info``, and its words."""

    level: Literal["good", "warn", "bad", "info"]
    text: str


class Share(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def share_interval(
    student: Bool[np.ndarray, " n"], teacher: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> Share | None:
    """The student's accuracy in percent of the teacher's, by a bootstrap over concepts; None if that one's is 0."""
    draws = _resampled(np.stack([student, teacher]), groups)
    if not teacher.any() or not draws[:, 1].all():
        return None
    low, high = 100 * np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
    return Share(float(100 * student.sum() / teacher.sum()), float(low), float(high))


def difference_interval(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"]) -> Share:
    """Accuracy of a minus accuracy of b in points, paired by image, by a bootstrap over concepts."""
    draws = _resampled(np.stack([a, b, np.ones_like(a)]), groups)
    low, high = 100 * np.quantile((draws[:, 0] - draws[:, 1]) / draws[:, 2], (0.025, 0.975))
    return Share(float(100 * (a.mean() - b.mean())), float(low), float(high))


def _resampled(columns: Bool[np.ndarray, "k n"], groups: Int[np.ndarray, " n"]) -> Float[np.ndarray, "draws k"]:
    """Sums over images when whole concepts are drawn with replacement."""
    _, cluster = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(cluster, column) for column in columns], axis=1)
    count, generator = len(sums), np.random.default_rng(0)
    chunk = max(1, 4_000_000 // count)  # bounds memory where every image is a concept
    sizes = [min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk)]
    return np.concatenate([generator.multinomial(count, np.full(count, 1 / count), size) @ sums for size in sizes])


def share_of_best(run: RunFolder) -> Share | None:
    """The student's kNN in percent of the best teacher's; both ends of the interval are the value if it is unknown."""
    student, best = run.role("student"), run.best_teacher
    if student is None or best is None or student.knn is None or not best.knn:
        return None
    ours, theirs = _results(run, student), _results(run, best)
    found = None
    if ours is not None and theirs is not None and len(ours[0]) == len(theirs[0]) > 0:
        found = share_interval(ours[0], theirs[0], ours[1])
    value = 100 * student.knn / best.knn
    return found or Share(value, value, value)


def headline(run: RunFolder) -> str:
    """What was distilled from what, and how good it is, in one or two sentences."""
    student, best, share = run.role("student"), run.best_teacher, share_of_best(run)
    if not run.teacher_names:
        return "No file names teachers: this is no distillation, or it has only begun. What its files hold is below."
    size = f" of {params(student.params)} parameters" if student and student.params else ""
    text = f"A student{size}, distilled from {listed(run.teacher_names)}"
    if student is None or student.knn is None:
        return f"{text}. It has no scores: {(student and student.reason) or 'no scoreboard could be read'}"
    text += f", names {student.knn:.1f} % of {images_scored(run)} rightly (kNN)"
    if best is None or share is None:
        return f"{text}."
    interval = f" (95 % interval {share.low:.0f} to {share.high:.0f})" if share.low < share.high else ""
    return f"{text}: {share.value:.0f} %{interval} of its best teacher, {best.name}, with {best.knn:.1f} %."


def images_scored(run: RunFolder) -> str:
    """``1,933 test images``, as far as known."""
    counts = {len(hits) for part in run.results.values() for name, hits in part.correct.items() if name == "knn"}
    split = run.split or "test"
    return f"{counts.pop():,} {split} images" if len(counts) == 1 else f"the {split} images"


def verdicts(run: RunFolder) -> list[Sentence]:
    """Is the student better than what costs nothing: its untrained self, its starting weights, raw pixels?"""
    student = run.role("student")
    if student is None or student.knn is None:
        return []
    names = {"untrained": "its untrained self", "init_only": "its starting weights", "pixels": "raw pixels, no network"}
    rows = {role: row for role in names if (row := run.role(role)) is not None and row.knn is not None}
    if "untrained" in rows and "init_only" in rows and rows["untrained"].knn == rows["init_only"].knn:
        del rows["init_only"]  # the student started from random weights: they are the same network
    found = [_verdict(run, student, row, names[role]) for role, row in rows.items()]
    return sorted(found, key=lambda sentence: ("bad", "warn", "good").index(sentence.level))


def compared(table: Comparison) -> list[Sentence]:
    """Which methods are better or worse than the reference in kNN, of which nothing can be said, and the baselines."""
    scored = [(row, score) for row in table.rows if row.label != table.reference and (score := row.score("knn"))]

    def named(above: bool, not_below: bool, baseline: bool) -> str:
        """Rows whose interval lies above zero or not, reaches zero or not, of methods or of baselines."""
        chosen = [
            f"{row.label} ({score.difference:+.1f})"
            for row, score in scored
            if row.kind != "teacher"
            and (score.low > 0, score.high >= 0, row.kind in BASELINES) == (above, not_below, baseline)
        ]
        return listed(chosen)

    found: list[tuple[Any, str, str]] = [
        ("good", f"Better than {table.reference} in kNN", named(True, True, False)),
        ("bad", f"Worse than {table.reference} in kNN", named(False, False, False)),
        ("warn", f"Not told apart from {table.reference} in kNN", named(False, True, False)),
        ("bad", f"{table.reference} is worse than a baseline without distillation", named(True, True, True)),
        (
            "warn",
            f"{table.reference} is not clearly better than a baseline without distillation",
            named(False, True, True),
        ),
        ("good", f"{table.reference} is better than the baselines without distillation", named(False, False, True)),
    ]
    teachers = listed([f"{row.label} ({score.difference:+.1f})" for row, score in scored if row.kind == "teacher"])
    found.append(("info", "For comparison, the teachers", teachers))
    return [Sentence(level, f"{text}: {names}.") for level, text, names in found if names]


def _verdict(run: RunFolder, student: BoardRow, row: BoardRow, name: str) -> Sentence:
    assert student.knn is not None and row.knn is not None
    difference, interval = student.knn - row.knn, ""
    low = high = difference
    ours, theirs = _results(run, student), _results(run, row)
    if ours is not None and theirs is not None and len(ours[0]) == len(theirs[0]) > 0:
        _, low, high = difference_interval(ours[0], theirs[0], ours[1])
        interval = f", 95 % interval {low:+.1f} to {high:+.1f}"
    tail = f"than {name}: {student.knn:.1f} against {row.knn:.1f} % ({difference:+.1f} points{interval})."
    if high < 0 or (low == high and difference < 0):
        return Sentence("bad", f"The student is worse {tail}")
    if low <= 0:
        return Sentence("warn", f"The student is not clearly better {tail}")
    return Sentence("good", f"The student is better {tail}")


def health(run: RunFolder) -> list[Sentence]:
    """What the log says of the training: loss, collapse, the gate, gradients, data."""
    found = [Sentence("bad", text) for text in run.warnings]
    if not run.log:
        return [*found, Sentence("info", "There is no log to judge the training by.")]
    for judge in (_loss, _targets, _student, _gate, _gradients, _data):
        sentence = judge(run)
        if sentence:
            found.append(sentence)
    return found


def ends(run: RunFolder, key: str) -> tuple[int | float, int | float] | None:
    """First and last logged value."""
    values = [line[key] for line in run.log if key in line]
    return (values[0], values[-1]) if values else None


def _loss(run: RunFolder) -> Sentence | None:
    found = ends(run, "loss")
    if not found:
        return None
    first, last = found
    text = f"The loss went from {first:.3g} to {last:.3g}"
    return Sentence("good", f"{text}.") if last < first else Sentence("bad", f"{text}: it did not fall.")


def _targets(run: RunFolder) -> Sentence | None:
    found = ends(run, "target_information")
    if not found or not found[0]:
        return None
    left = found[1] / found[0]
    if left < COLLAPSED_INFORMATION:
        text = f"The targets have collapsed: they keep {percent(left)} of the information they had at the start."
        return Sentence("bad", text)
    return Sentence(
        "good", f"The targets keep their information ({percent(left)} of the start): they have not collapsed."
    )


def _student(run: RunFolder) -> Sentence | None:
    found, rank = ends(run, "student_cosine"), ends(run, "student_rank")
    if not found:
        return None
    text = f"tokens of different images have a mean cosine of {found[1]:.2f}"
    if rank:
        text += f" and fill about {rank[1]:.0f} directions"
    if found[1] > CONSTANT_COSINE:
        return Sentence("bad", f"The student answers nearly the same to every image: {text}.")
    return Sentence("good", f"The student tells images apart: {text}.")


def _gate(run: RunFolder) -> Sentence | None:
    names = run.teacher_names
    shares = {name: found[1] for name in names if (found := ends(run, f"share_{name}"))}
    if len(shares) < 2:
        return None
    text = ", ".join(f"{name} {percent(value)}" for name, value in shares.items()) + " of the target at the end."
    if max(shares.values()) > ONE_TEACHER:
        return Sentence("warn", f"One teacher gives nearly all: {text}")
    if min(shares.values()) < NO_TEACHER:
        return Sentence("warn", f"A teacher hardly counts: {text}")
    return Sentence("good", f"Every teacher counts: {text}")


def _gradients(run: RunFolder) -> Sentence | None:
    norms = [line["grad_norm"] for line in run.log if "grad_norm" in line]
    if not norms:
        return None
    median, largest = float(np.median(norms)), max(norms)
    if largest > 20 * median > 0:
        return Sentence("warn", f"Gradients jumped: the largest norm is {largest / median:.0f} times the median.")
    return Sentence("good", f"Gradients are steady: median norm {median:.2g}, largest {largest:.2g}.")


def _data(run: RunFolder) -> Sentence | None:
    waits = [line["data_wait"] for line in run.log if "data_wait" in line]
    if not waits:
        return None
    mean = float(np.mean(waits))
    if mean > SLOW_DATA:
        return Sentence("warn", f"{mean:.0f} % of the time went into waiting for images; more --loader.workers help.")
    return Sentence("good", f"Images came fast enough: {mean:.1f} % of the time went into waiting for them.")


def lost_classes(run: RunFolder) -> list[dict[str, Any]]:
    """Per class: number of test images, accuracy of the best teacher and of the student in percent, most lost first."""
    samples, student, best = run.samples, run.role("student"), run.best_teacher
    if samples is None or student is None or best is None:
        return []
    ours, theirs = _results(run, student), _results(run, best)
    if ours is None or theirs is None or not len(ours[0]) == len(theirs[0]) == len(samples.labels) > 0:
        return []
    classes = np.unique(samples.labels)
    of = [samples.labels == label for label in classes]
    rows = [
        {
            "name": samples.class_names[label],
            "count": int(where.sum()),
            "teacher": 100 * float(theirs[0][where].mean()),
            "student": 100 * float(ours[0][where].mean()),
        }
        for label, where in zip(classes, of, strict=True)
    ]
    return sorted(rows, key=lambda row: (row["student"] - row["teacher"]) * row["count"])


def percent(share: float | np.floating) -> str:
    """``25 %``."""
    return f"{100 * share:.0f} %"


def params(count: int | float | None) -> str:
    """``0.7M``."""
    if not count:
        return "–"
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,.0f}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _results(run: RunFolder, row: BoardRow) -> tuple[np.ndarray, np.ndarray] | None:
    """Results and concepts of a network's kNN."""
    part = run.results.get((row.role, row.name))
    return (part.correct["knn"], part.groups["knn"]) if part and "knn" in part.correct else None
