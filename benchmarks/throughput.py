"""How close a step comes to the machine's limit: 3 × ViT-B/16 → ViT-Ti/16 at 224 px, random weights.

Compares, in one process and interleaved: the step of `comad` (teachers and student drop hidden patches), the step of
`comad-literal` (every network runs on all tokens) in the same precision and in fp32, and the limit: matrix-product
FLOPs of the `comad` step over the rate of a plain matrix product. Ratios are medians over the rounds. Short runs on a
folder of pictures, by turns with one student and with two, give what a second ViT-Ti costs, and the share of time that
the loop waits for data. The distillation of one teacher by LightlyTrain is measured beside it where `lightly-train` is
installed. The last line printed is one JSON object; `--tiny` tries the script in a few seconds, and its numbers mean
nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from cache import settings
from comad.distill.run import distill
from comad.models.timm_backbone import VitConfig
from pictures import write_pictures
from steps import Clock, TimedStep, gemm_rate, seconds_of

TEACHERS = ("vit_base_patch16_224:random",) * 3
TINY = ("vit_tiny_patch16_224:random",) * 3


def measure(precision: str, batch_size: int, rounds: int, tiny: bool) -> dict[str, object]:
    """Images per second of all steps and of the limit, medians over interleaved rounds."""
    specs, student = (TINY, VitConfig(image_size=32, depth=1)) if tiny else (TEACHERS, VitConfig())
    steps = {"ours": TimedStep("comad", precision, batch_size, specs, student=student)}
    steps["literal"] = TimedStep("comad-literal", precision, batch_size, specs, student=student)
    if precision == "bf16":
        steps["literal fp32"] = TimedStep("comad-literal", "fp32", batch_size, specs, student=student)
    device, ours = steps["ours"].device, steps["ours"]
    with FlopCounterMode(display=False) as counter:
        ours()
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = Clock(device)
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device))
        ours(clock)
    rate = gemm_rate(torch.bfloat16 if precision == "bf16" else torch.float32, device, 0.1 if tiny else 3.0)
    limit = batch_size * rate / counter.get_total_flops()
    rates = {name: batch_size / statistics.median(values) for name, values in seconds.items()}

    def times(name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds["ours"], strict=True))

    result: dict[str, object] = {
        "images_per_s": rates["ours"],
        "literal_images_per_s": rates["literal"],
        "limit_images_per_s": limit,
        "times_literal": times("literal"),
        "share_of_limit": rates["ours"] / limit,
        "shares": clock.shares(),
        "gflops_per_image": counter.get_total_flops() / batch_size / 1e9,
        "gemm_gflops": rate / 1e9,
        "precision": precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }
    if "literal fp32" in steps:
        result |= {"literal_fp32_images_per_s": rates["literal fp32"], "times_literal_fp32": times("literal fp32")}
    return result


def whole_runs(precision: Literal["bf16", "fp32"], batch_size: int, rounds: int, tiny: bool) -> dict[str, float]:
    """What a second student costs, as a share of the time with one, and percent of the time that the loop waits.

    Medians over rounds of two runs of six steps each, one worker decoding; the first two steps do not count.
    """
    costs, waits = [], []
    with TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "data" / "train", batch_size * 2).parent
        write_pictures(data / "val", 1)
        config = settings(data, batch_size)
        config = replace(config, optim=replace(config.optim, epochs=3.0))
        if tiny:
            config = replace(config, teachers=TINY[:1], student=VitConfig(image_size=32, depth=1))
        for number in range(rounds):
            seconds = []
            for beside in ((), (config.student,)):
                out = Path(folder) / f"run-{number}-{len(beside)}"
                run = replace(config.run, out=str(out), precision=precision)
                distill(replace(config, beside=beside, run=run, split="none"))
                log = out / (config.student.name if beside else "") / "log.jsonl"
                lines = [line for line in map(json.loads, log.read_text().splitlines()) if "data_wait" in line][2:]
                seconds.append(statistics.median(1 / line["images_per_s"] for line in lines))
                waits += [] if beside else [line["data_wait"] for line in lines]
            costs.append(seconds[1] / seconds[0] - 1)
    return {"second_student_cost": statistics.median(costs), "data_wait": statistics.median(waits)}


def lightly_images_per_s(batch_size: int, steps: int = 6) -> float | None:
    """LightlyTrain's step, one teacher on whole views, from the difference of a longer and a shorter run."""
    if importlib.util.find_spec("lightly_train") is None:
        return None
    import lightly_train

    with TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "data", batch_size * 2)

        def run(count: int) -> None:
            lightly_train.pretrain(
                out=f"{folder}/out-{count}",
                data=str(data),
                model="dinov3/vitt16-notpretrained",
                method="distillation",
                method_args={"teacher": "dinov3/vitb16-notpretrained"},
                steps=count,
                batch_size=batch_size,
                precision="bf16-mixed",
                num_workers=1,
            )

        cpu = torch.device("cpu")
        short, long = (seconds_of(lambda n=n: run(n), cpu) for n in (2, 2 + steps))
    return steps * batch_size / (long - short)


def main() -> None:
    """Measure both precisions; bf16's numbers are the top level of the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for precision in ("bf16", "fp32"):
        results[precision] = measure(precision, options.batch_size, options.rounds, options.tiny)
        results[precision] |= whole_runs(precision, options.batch_size, max(1, options.rounds // 2), options.tiny)
        print(json.dumps(results[precision]), file=sys.stderr, flush=True)
    extra = {}
    lightly = lightly_images_per_s(options.batch_size)
    if lightly is not None:
        extra = {"lightly_images_per_s": lightly}
    print(json.dumps({**results["bf16"], **extra, "fp32": results["fp32"], "torch": torch.__version__}))


if __name__ == "__main__":
    main()
