"""Write docs/performance.md from `benchmarks/results/*.json`; with `--run`, measure everything anew before.

One script per question; each prints one JSON object as its last line, which is kept under the script's name. They run
one after another, for they would disturb each other: an otherwise idle machine, and about half an hour on two cores.
What another machine prints stands beside it, as `SCRIPT-MACHINE.json`: `--run --machine AMX`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import RESULTS, ROOT, read, table

Report = dict[str, Any]


def throughput(report: Report) -> list[str]:
    """Ours against the literal step, LightlyTrain's and the limit, and where the time goes."""
    rows = [
        [
            part["precision"],
            f"{part['images_per_s']:.2f}",
            f"{100 * part['share_of_limit']:.0f} %",
            f"{100 * part['share_of_usual_limit']:.0f} %" if "share_of_usual_limit" in part else "",
            f"{part['times_literal']:.2f} ×",
            f"{part['times_literal_fp32']:.2f} ×" if "times_literal_fp32" in part else "",
            f"{100 * part['second_student_cost']:.0f} %" if "second_student_cost" in part else "",
            f"{100 * part['second_student_cost_large']:.0f} %" if "second_student_cost_large" in part else "",
        ]
        for part in filter(None, (report, report.get("fp32")))
    ]
    header = ["precision", "images/s", "of the limit", "of the usual limit", "against literal", "against literal fp32"]
    header += ["second student", f"at batch {report.get('large_batch_size', 64)}"]
    limits = "The limit is its matrix products at the rate of the quickest plain one, the usual limit at the median."
    lines = [f"Batch {report.get('batch_size', 16)}. {limits}", "", table(header, rows), ""]
    if "int8_images_per_s" in report:
        rate, times = report["int8_images_per_s"], report["int8_times_literal_fp32"]
        lines += [
            f"With `--teacher-precision int8 --compile`: {rate:.2f} images/s, {rate / report['images_per_s']:.2f} × "
            f"bf16 and {times:.2f} × the literal step in fp32.",
            "",
        ]
    if "shares" in report:
        shares = ", ".join(f"{name} {share:.1f} %" for name, share in report["shares"].items())
        lines += [f"Where the time of the bf16 step goes: {shares}.", ""]
    if "data_wait" in report:
        lines += [f"Share of a run that waits for batches, one worker: {report['data_wait']:.1f} %.", ""]
    return lines + beside_lightly(report) if "lightly_images_per_s" in report else lines


def beside_lightly(report: Report) -> list[str]:
    """Ours with one teacher, whole or masked, and with three, against LightlyTrain's distillation of one."""
    rows = [["LightlyTrain, one teacher on whole views", f"{report['lightly_images_per_s']:.2f}", "1.00 ×"]]
    rows += [
        [title, f"{report[f'{name}images_per_s']:.2f}", f"{report[f'{name}times_lightly']:.2f} ×"]
        for title, name in (
            ("ours, one teacher on whole views", "one_whole_teacher_"),
            ("ours, one masked teacher", "one_masked_teacher_"),
            ("ours, three masked teachers", ""),
            ("ours, three masked teachers in int8", "int8_"),
        )
        if f"{name}times_lightly" in report
    ]
    said = "Ratios are medians over interleaved rounds. Its steps are those of its own clock, without waiting for data."
    return [table([report["precision"], "images/s", "against LightlyTrain"], rows), "", said, ""]


def memory(report: Report) -> list[str]:
    """Peak memory by mode."""
    modes = {key: part for key, part in report.items() if isinstance(part, dict)}
    rows = [
        [mode, *(f"{part[key]:.2f}" for key in ("peak_while_loading_gib", "peak_gib", "seconds_per_step"))]
        for mode, part in modes.items()
    ]
    header = ["`--teachers-in`", "peak while loading, GiB", "peak, GiB", "seconds per step"]
    return ["Above the interpreter with torch imported, batch 16.", "", table(header, rows), ""]


def cache(report: Report) -> list[str]:
    """Live, filling and cached epochs."""
    row = [f"{report[key]:.2f}" for key in ("live_images_per_s", "filling_images_per_s", "cached_images_per_s")]
    header = ["live, images/s", "filling", "cached", "cached against live"]
    return [table(header, [[*row, f"{report['times_live']:.1f} ×"]]), ""]


def data(report: Report) -> list[str]:
    """Views per second of one core."""
    rows = [
        [title, *(f"{report[f'{who}{kind}_per_s']:.0f}" for who in ("ours", "torchvision")), f"{report[ratio]:.2f} ×"]
        for title, kind, ratio in (
            ("crop and flip", "", "times_torchvision"),
            ("and colours", "_colours", "times_torchvision_colours"),
        )
    ]
    alone = ", ".join(f"{name} {report[f'{name}_per_s']:.0f}" for name in ("decode", "crop", "colour", "stamp"))
    header = ["views per second of one core", "ours", "torchvision", "ratio"]
    return [table(header, rows), "", f"Alone, per second: {alone} (a whole view of a bundled picture).", ""]


def plan(report: Report) -> list[str]:
    """The forecast beside what came."""
    rows = [
        [clock, *(f"{part[key]:.0f}" for key in ("forecast_s", "measured_s")), f"{part['ratio']:.2f}"]
        for clock, part in (("on the clock", report), ("of this process on a processor", report["cpu"]))
    ]
    about = f"The demo with {report['epochs']:g} epochs; load of the machine before, between and after: "
    load = ", ".join(f"{load:.1f}" for load in report["load"])
    return [f"{about}{load}.", "", table(["seconds", "forecast", "measured", "ratio"], rows), ""]


def tokens(report: Report) -> list[str]:
    """Tokens per second by share of the patches."""
    shares = ["25", "50", "75", "100"]
    row = [f"{report[f'tokens_per_s_{share}']:.0f}" for share in shares]
    lines = [table(["patches", *(f"{share} %" for share in shares)], [["tokens/s", *row]]), ""]
    if "packed_times_plain" in report:
        lines += [f"Packed weights at 50 %: {report['packed_times_plain']:.2f} times as fast as plain ones.", ""]
    if "embedding_times_convolution" in report:
        times = report["embedding_times_convolution"]
        lines += [f"A ViT-Ti's patch embedding, forward and backward: {times:.2f} times as fast as a convolution.", ""]
    return lines


def processes(report: Report) -> list[str]:
    """One and two processes."""
    row = [f"{report['one_images_per_s']:.0f}", f"{report['two_images_per_s']:.0f}", f"{report['times_one']:.2f} ×"]
    return [table(["one process, images/s", "two", "ratio"], [row]), ""]


def startup(report: Report) -> list[str]:
    """CPU seconds of fresh processes."""
    seconds = report["seconds"]
    rows = [
        [name, f"{value:.2f}", *(f"{value / seconds[other]:.1f} ×" for other in ("python", "import torch"))]
        for name, value in seconds.items()
    ]
    return [table(["", "CPU seconds", "times `python -c pass`", "times `import torch`"], rows), ""]


SECTIONS: dict[str, tuple[str, Callable[[Report], list[str]]]] = {
    "throughput": ("The step: 3 × ViT-B/16 → ViT-Ti/16, 224 px", throughput),
    "memory": ("Teachers in memory, or one after another", memory),
    "cache": ("The teacher cache: the same setting, decoding included", cache),
    "plan": ("`comad plan` for the demo, and the demo", plan),
    "data": ("Reading 500 × 375 JPEG files as 224 px views", data),
    "tokens": ("A teacher by the number of its tokens: ViT-B/16, bf16", tokens),
    "processes": ("Two processes against one: the demo's networks", processes),
    "startup": ("Until something happens", startup),
}


def measure(name: str, machine: str = "") -> None:
    """Run one script and keep its last line, of another machine beside that of the first."""
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report = json.loads(output.splitlines()[-1])
    (RESULTS / f"{'-'.join(filter(None, (name, machine)))}.json").write_text(json.dumps(report, indent=1) + "\n")


def page() -> str:
    """The whole page; what was not measured yet is said."""
    lines = ["# Performance", "", "Written by `python benchmarks/performance.py` from `benchmarks/results/*.json`.", ""]
    for name, (title, section) in SECTIONS.items():
        report = read(name)
        lines += [f"## {title}", ""]
        if report is None:
            lines += [f"Not measured yet: `python benchmarks/{name}.py`.", ""]
            continue
        lines += [f"`python benchmarks/{name}.py`, {_device(report)}. Ratios come from one run.", "", *section(report)]
        for file in sorted(RESULTS.glob(f"{name}-*.json")):
            other = json.loads(file.read_text())
            lines += [f"The same on a CPU with {file.stem.partition('-')[2]}, {_device(other)}:", "", *section(other)]
    notes = RESULTS / "performance.md"
    return "\n".join([*lines, notes.read_text() if notes.is_file() else ""]).rstrip() + "\n"


def _device(report: Report) -> str:
    return report.get("device") or next(part["device"] for part in report.values() if isinstance(part, dict))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="*", choices=list(SECTIONS), help="measure these, or all if none is named")
    parser.add_argument("--machine", default="", help="what sets this CPU apart from the first machine's")
    options = parser.parse_args()
    if options.machine and options.run is None:
        parser.error("--machine names what --run measures; give both.")
    if options.run is not None:
        for name in options.run or SECTIONS:
            measure(name, options.machine)
    (ROOT / "docs" / "performance.md").write_text(page())


if __name__ == "__main__":
    main()
