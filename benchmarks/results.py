"""Write the tables of the documents from the JSON files in `benchmarks/results`: what stands between two marks.

README.md and docs/results.md have the demo, docs/experiments/stamps.md the comparisons on drawn pictures, and
docs/experiments/bundled-teachers.md the bundled teachers. What stands before and behind the marks is written by hand.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from methods import QUESTIONS, Question

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCORES = ("knn", "linear", "knn_coarse", "linear_coarse")
SCORED = {"val": "979 validation images of 249 concepts", "test": "1,933 test images of 494 concepts"}
BASELINES = ("untrained", "init-only", "pixels")
DENSE_TASKS = {
    "segment": "Segmentation, UPerNet",
    "linear": "Segmentation, linear head on frozen features",
    "detect": "Detection, Cascade Mask R-CNN",
}
METRIC_NAMES = {
    "miou": "mIoU",
    "aacc": "aAcc",
    "linear_miou": "mIoU",
    "linear_aacc": "aAcc",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
}
MARKS = ("<!-- results -->", "<!-- end of results -->")


def read(name: str) -> dict[str, Any] | None:
    """One result file, or None if that benchmark was not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(gain: dict[str, float]) -> str:
    """A difference with its interval, in points."""
    difference, low, high = (f"{gain[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{difference} [{low}, {high}]"


def run_table(report: dict[str, Any]) -> str:
    """Mean over seeds of every row of the scoreboards of one set of runs."""
    names = list(dict.fromkeys(row["name"] for row in report["rows"]))
    rows = []
    for name in names:
        found = [row for row in report["rows"] if row["name"] == name]
        mean = {
            key: statistics.mean(row[key] for row in found) for key in ("knn", "linear", "knn_coarse", "linear_coarse")
        }
        rows.append([name, f"{found[0]['params'] / 1e6:.2f}", *(f"{value:.1f}" for value in mean.values())])
    return table(["model", "M parameters", "kNN", "linear", "kNN coarse", "linear coarse"], rows)


def gains(report: dict[str, Any]) -> str:
    """Student minus baselines, over seeds and concepts."""
    found = report["intervals"]
    rows = [[name, interval(found[f"knn_over_{name}"]), interval(found[f"linear_over_{name}"])] for name in BASELINES]
    return table(["student minus", "kNN, points", "linear, points"], rows)


def demo_table(report: dict[str, Any]) -> str:
    """The demo over several seeds."""
    said = (
        f"Fine top-1 percent on {SCORED['test']}, mean over {len(report['seeds'])} seeds; 95 % t intervals of paired\n"
        "differences, over seeds and concepts."
    )
    return "\n\n".join([said, run_table(report), gains(report)])


def demo_section(report: dict[str, Any]) -> str:
    """The same with its curve."""
    seeds, curve = report["seeds"], ", ".join(f"{point['knn']:.1f}" for point in report["validation_curves"][0])
    about = f"{report['epochs']:g} epochs, seeds {seeds}."
    return f"{about}\n{demo_table(report)}\n\nValidation kNN during the run (seed {seeds[0]}): {curve}."


def question_section(name: str, question: Question, report: dict[str, Any]) -> str:
    """One comparison of methods."""
    columns = {"knn": "kNN", "linear": "linear"}
    if any(row.get("finetune") is not None for row in report["rows"]):
        columns["finetune"] = "fine-tuned"
    rows = [
        [
            f"`{brief(row['label'])}`",
            " ".join(teacher.removesuffix("-stamps") for teacher in row["teachers"]),
            *(compared(row, score) for score in columns),
        ]
        for row in report["rows"]
    ]
    images, reference = max(row["images_seen"] for row in report["rows"]), brief(report["reference"])
    seeds = max((row["seeds"] for row in report["rows"]), key=len)
    left = [f"`{brief(row)}`" for row in question.rows if row not in {found["label"] for found in report["rows"]}]
    return "\n".join(
        [
            f"## {question.title}",
            "",
            f"`python benchmarks/methods.py {name}`: {SCORED[report['split']]}, fine top-1 percent, seeds {seeds},",
            f"{images:,} images seen; differences to `{reference}`, by seed and image, 95 % intervals over seeds and",
            "concepts.",
            "",
            table(["row", "teachers", *columns.values()], rows),
            "",
            *([f"Not run yet, of the rows of that command: {', '.join(left)}.", ""] if left else []),
        ]
    )


def brief(label: str) -> str:
    """A row's name, with the temperature of both terms said once."""
    return re.sub(r"--(\S+)\.token\.temperature (\S+) --\1\.spatial\.temperature \2", r"T=\2", label)


def compared(row: dict[str, Any], score: str) -> str:
    """A mean, and its difference to the reference; nothing where there is no such score."""
    if row.get(score) is None:
        return ""
    if row[f"{score}_interval"] is None:
        return f"{row[score]:.1f}"
    (low, high), difference = row[f"{score}_interval"], row[f"{score}_minus_reference"]
    return f"{row[score]:.1f}, {interval({'difference': difference, 'low': low, 'high': high})}"


def teacher_page(report: dict[str, Any]) -> str:
    """The bundled teachers against their untrained network and pixels, how alike they are, what each sees alone."""
    rows = []
    for row in report["rows"]:
        keys = (("over_untrained", "knn"), ("over_untrained", "linear"), ("over_pixel_knn", "knn"))
        keys = (*keys, ("over_pixel_knn", "linear"))
        gains = [interval(row[key][method]) if key in row else "" for key, method in keys]
        rows.append([row["name"], f"{row['knn']:.1f}", f"{row['linear']:.1f}", *gains])
    over = [f"{method} over {name}" for name in ("untrained", "pixels' kNN") for method in ("kNN", "linear")]
    names = [row["name"] for row in report["rows"] if "over_untrained" in row]
    together = [
        [row["name"], *(interval(row["together_over"][method]) for method in ("knn", "linear"))]
        for row in report["rows"]
        if "together_over" in row
    ]
    alone = [
        [name, f"{part['pictures']} ({part['share']:.1f} %)", ", ".join(f"{k} {v}" for k, v in part["labels"].items())]
        for name, part in report["alone"].items()
    ]
    classes = [[label, *(f"{part[name]:.0f}" for name in names)] for label, part in report["classes"].items()]
    return "\n".join(
        [
            "## Scores",
            "",
            f"`python benchmarks/teachers.py --score`, {report['image_size']} px, fine top-1 percent on",
            f"{SCORED['test']}; differences in points with 95 % t intervals, paired, over concepts",
            "alone: of each network there is one seed.",
            "",
            table(["features", "kNN", "linear", *over], rows),
            "",
            "`together`: side by side the token of each that its own probe chose on validation images, of length 1.",
            "Its gain over each teacher:",
            "",
            table(["over", "kNN", "linear"], together),
            "",
            "![Features as colours](../teachers.png)",
            "",
            "The first three principal components of each teacher's patches as red, green and blue, on eight test",
            "pictures at 192 px.",
            "",
            "## How alike they are",
            "",
            "Linear CKA of their mean patches on the test pictures: "
            + ", ".join(f"{pair} {value:.2f}" for pair, value in report["cka"].items())
            + ".",
            "",
            "Test pictures that only one of them names rightly (linear probe), and the labels where that is frequent:",
            "",
            table(["teacher", "pictures", "labels"], alone),
            "",
            "## By label",
            "",
            "Linear probe, percent.",
            "",
            table(["label", *names], classes),
            "",
        ]
    )


def dense_section(report: dict[str, Any] | None) -> str:
    """Segmentation and detection on composed scenes."""
    command = "python benchmarks/dense.py"
    title = "## Segmentation and detection on composed scenes"
    if report is None:
        return f"{title}\n\nNot run yet: `{command}`.\n"
    lines = [
        title,
        "",
        f"`{command}`, `--preset scenes`, 600 scenes of test concepts; percent, mean over seeds, and each seed's.",
    ]
    lines += [
        "Differences in points, without intervals: no scene's outcome was kept. comad: the demo's student; single: the",
        "same of iBOT alone; untrained: the same network as a run of that seed begins.",
        "",
    ]
    for task, part in report["tasks"].items():
        first, *others = part["means"]
        metrics = list(part["means"][first])
        seconds = [value for name, value in report["seconds"].items() if name.startswith(f"{task}-")]
        cost = f", {statistics.median(seconds) / 60:.1f} core minutes a run" if seconds else ""
        lines += [f"{DENSE_TASKS[task]}, seeds {part['seeds']}{cost}:", ""]
        rows = []
        for name, means in part["means"].items():
            values = (means[metric] for metric in metrics)
            cells = [f"{v['mean']:.2f} ({', '.join(f'{s:.2f}' for s in v['per_seed'])})" for v in values]
            gaps = [gap(part["means"], first, name, metric) if name in others else "" for metric in metrics]
            rows.append([name, *cells, *gaps])
        heads = [METRIC_NAMES[metric] for metric in metrics]
        lines += [table(["backbone", *heads, *(f"{first} minus it, {head}" for head in heads)], rows), ""]
    return "\n".join(lines)


def gap(means: dict[str, Any], first: str, name: str, metric: str) -> str:
    """The first network minus another one, paired by seed."""
    ours, theirs = (means[who][metric]["per_seed"] for who in (first, name))
    return f"{statistics.mean(a - b for a, b in zip(ours, theirs, strict=True)):+.2f}"


def fill(page: str, body: str) -> None:
    """Put a body between the two marks of a page."""
    path = ROOT / page
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise ValueError(f"{page} has no {MARKS[0]} ... {MARKS[1]}.")
    path.write_text(f"{before}{MARKS[0]}\n\n{body.strip()}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    """Fill all pages of whose benchmarks there are results."""
    demo, teachers = read("demo"), read("teachers")
    questions = ((name, question, read(f"methods-{name}")) for name, question in QUESTIONS.items())
    sections = [question_section(name, question, report) for name, question, report in questions if report]
    fill("docs/experiments/stamps.md", "\n".join([*sections, dense_section(read("dense"))]))
    if teachers:
        fill("docs/experiments/bundled-teachers.md", teacher_page(teachers))
    if demo:
        fill("docs/results.md", demo_section(demo))
        fill("README.md", demo_table(demo))


if __name__ == "__main__":
    main()
