"""How close a step comes to the machine's limit: 3 × ViT-B/16 → ViT-Ti/16 at 224 px, random weights.

Compares, in one process and interleaved: the step of `comad` (teachers and student drop hidden patches), the step of
`comad-literal` (every network runs on all tokens) in the same precision and in fp32, the step with one teacher, masked
or on whole views, on a CPU with AVX-512 the compiled step with teachers in int8, and the limit: matrix-product FLOPs of
the `comad` step over the rate of the quickest plain matrix product of a second, and of the median one. Ratios are
medians over the rounds. What a second ViT-Ti costs is its time in steps of two over that of all the rest, also at four
times the batch, for the many small products of a small student gain by it. A short run on a folder of pictures gives
the share of time that the loop waits for data. Where `lightly-train` is installed its distillation of one teacher is
measured in each bf16 round too (`lightly_step.py`). The last line printed is one JSON object; `--tiny` tries the script
in a few seconds, and its numbers mean nothing. On a machine that others use too, `--cpu-time` counts the seconds of one
thread of this process in place of those on the wall, and leaves LightlyTrain and the short run out;
`--second-student` leaves out all steps but the first and those of two students.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from cache import settings
from comad.distillation.method import Method
from comad.distillation.run import distill
from comad.models.quantized import quantize
from comad.models.students import VitConfig
from comad.presets import METHODS
from pictures import write_pictures
from steps import Clock, TimedStep, Timer, gemm_rates, load, seconds_of

TEACHERS = ("vit_base_patch16_224:random",) * 3
LARGE = 4
"""Times the batch at which a second student is measured again."""
LIMITS = ("limit", "usual limit")
"""Needed FLOPs at the rate of the quickest product of a second, and of that second's median one."""
TINY = ("vit_tiny_patch16_224:random",) * 3


def whole(method: Method) -> Method:
    """The method with teachers that see whole images; the student's mask stays."""
    return replace(method, masking=replace(method.masking, teacher_mask_ratios=(0.0,)))


def all_steps(
    precision: str, batch_size: int, tiny: bool, second_alone: bool = False
) -> tuple[dict[str, TimedStep], list[TimedStep]]:
    """The steps to compare, and those of two students at both batches; of one precision with the same teachers."""
    specs, student = (TINY, VitConfig(image_size=32, depth=1)) if tiny else (TEACHERS, VitConfig())
    ours, literal = METHODS["comad"], METHODS["comad-literal"]
    teachers = load(specs, precision, student.image_size, packed=True)

    def step(method: Method, count: int = 3) -> TimedStep:
        return TimedStep(method, precision, batch_size, teachers[:count], students=(student,))

    sizes = (batch_size, LARGE * batch_size)
    of_two = [TimedStep(ours, precision, size, teachers, students=(student, student)) for size in sizes]
    steps = {"ours": step(ours)}
    if second_alone:
        return steps, of_two
    steps |= {"literal": step(literal)}
    steps |= {"one masked teacher": step(ours, 1), "one whole teacher": step(whole(ours), 1)}
    if precision == "bf16":
        slow = load(specs, "fp32", student.image_size)
        steps["literal fp32"] = TimedStep(literal, "fp32", batch_size, slow, students=(student,))
        if torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not torch.cuda.is_available():
            small = load(specs, precision, student.image_size)
            for teacher in small:
                quantize(teacher.backbone, "int8")
            steps["int8"] = TimedStep(ours, precision, batch_size, small, students=(student,), compiled=True)
    return steps, of_two


def measure(precision: str, options: argparse.Namespace) -> dict[str, object]:
    """Images per second of all steps and of the limit, medians over interleaved rounds."""
    timer: Timer = time.process_time if options.cpu_time else time.perf_counter
    batch_size = options.batch_size
    steps, of_two = all_steps(precision, batch_size, options.tiny, options.second_student)
    device, ours = steps["ours"].device, steps["ours"]
    with FlopCounterMode(display=False) as counter:
        ours()
    for step in (*steps.values(), *of_two):
        step()
    timed = {name: partial(seconds_of, step, device, timer) for name, step in steps.items()}
    others = not (options.cpu_time or options.second_student)
    if precision == "bf16" and importlib.util.find_spec("lightly_train") and others:
        timed["lightly"] = partial(lightly_seconds, batch_size, options.tiny)
    seconds: dict[str, list[float]] = {name: [] for name in (*timed, *LIMITS)}
    costs: list[list[float]] = [[] for _ in of_two]
    clock, dtype = Clock(device, timer), torch.bfloat16 if precision == "bf16" else torch.float32
    for _ in range(options.rounds):
        rates = gemm_rates(dtype, device, 0.1 if options.tiny else 1.0, timer)
        for name, rate in zip(LIMITS, rates, strict=True):
            seconds[name].append(counter.get_total_flops() / rate)
        for name, measured in timed.items():
            seconds[name].append(measured())
        for step, found in zip(of_two, costs, strict=True):
            rest, second = Clock(device, timer), Clock(device, timer)
            step(rest, second)
            found.append(second.total / rest.total)
        ours(clock)
    cpu = f"cpu, {torch.get_num_threads()} thread(s)" + (", time of the processor" if options.cpu_time else "")
    images_per_s = {name: batch_size / statistics.median(found) for name, found in seconds.items()}
    cost, cost_large = map(statistics.median, costs)
    return {
        "batch_size": batch_size,
        "images_per_s": images_per_s.pop("ours"),
        **{f"{name.replace(' ', '_')}_images_per_s": value for name, value in images_per_s.items()},
        **ratios(seconds),
        "second_student_cost": cost,
        "second_student_cost_large": cost_large,
        "large_batch_size": LARGE * batch_size,
        "shares": clock.shares(),
        "gflops_per_image": counter.get_total_flops() / batch_size / 1e9,
        "gemm_gflops": counter.get_total_flops() / statistics.median(seconds["limit"]) / 1e9,
        "precision": precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
    }


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of one step's seconds over another's, where both were measured."""
    pairs = {
        "share_of_limit": ("limit", "ours"),
        "share_of_usual_limit": ("usual limit", "ours"),
        "times_literal": ("literal", "ours"),
        "times_literal_fp32": ("literal fp32", "ours"),
        "int8_times_literal_fp32": ("literal fp32", "int8"),
        "times_lightly": ("lightly", "ours"),
        "int8_times_lightly": ("lightly", "int8"),
        "one_whole_teacher_times_lightly": ("lightly", "one whole teacher"),
        "one_masked_teacher_times_lightly": ("lightly", "one masked teacher"),
    }
    return {
        key: statistics.median(a / b for a, b in zip(seconds[slow], seconds[quick], strict=True))
        for key, (slow, quick) in pairs.items()
        if slow in seconds and quick in seconds
    }


def data_wait(precision: Literal["bf16", "fp32"], batch_size: int, tiny: bool) -> float:
    """Percent of the time that a short run with one worker waits for data; its first two steps do not count."""
    with TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "data" / "train", batch_size * 2).parent
        write_pictures(data / "val", 1)
        config = settings(data, batch_size)
        if tiny:
            config = replace(config, teachers=TINY[:1], student=VitConfig(image_size=32, depth=1))
        out = Path(folder) / "run"
        optim, run = replace(config.optim, epochs=6.0), replace(config.run, out=str(out), precision=precision)
        distill(replace(config, optim=optim, run=run, split="none"))
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return statistics.median([line["data_wait"] for line in lines if "data_wait" in line][2:])


def lightly_seconds(batch_size: int, tiny: bool) -> float:
    """A step of LightlyTrain by its own clock, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("lightly_step.py")), "--batch-size", str(batch_size)]
    done = subprocess.run(command + ["--tiny"] * tiny, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["seconds_per_step"]


def main() -> None:
    """Measure all; the numbers of the first precision are the top level of the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--second-student", action="store_true", help="measure what it costs, and little else")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, object] = {"torch": torch.__version__}
    for number, precision in enumerate(options.precisions):
        found = measure(precision, options)
        if not (options.cpu_time or options.second_student):
            found["data_wait"] = data_wait(precision, options.batch_size, options.tiny)
        result |= {precision: found} if number else found
        print(json.dumps(found), file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
