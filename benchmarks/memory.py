"""Peak memory of a step: 3 × ViT-B/16 → ViT-Ti/16 at 224 px, teachers in memory or offloaded, random weights.

Each mode runs in a fresh process, which loads the teachers as a run does and takes whole training steps. The last line
printed is one JSON object, in GiB above the interpreter with torch imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

MODES = ("memory", "offload")


def main() -> None:
    """Measure every mode, or in a child process one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--mode", choices=MODES)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options.mode, options.batch_size, options.steps)))
        return
    results = {"batch_size": options.batch_size}
    for mode in MODES:
        command = [sys.executable, __file__, "--mode", mode, "--batch-size", options.batch_size]
        child = subprocess.run([*map(str, command), "--steps", str(options.steps)], check=True, stdout=subprocess.PIPE)
        results[mode] = json.loads(child.stdout.splitlines()[-1])
        print(json.dumps({mode: results[mode]}), file=sys.stderr, flush=True)
    print(json.dumps(results))


def measure(mode: str, batch_size: int, steps: int) -> dict[str, float]:
    """Peak and present memory of this process above what it has with torch imported."""
    import torch

    floor = resident_gib()

    from comad.distillation.config import DistillConfig
    from comad.presets import METHODS
    from comad.runtime.log import memory_gib
    from steps import TimedStep, load

    with TemporaryDirectory() as folder:
        config = DistillConfig(teachers_in=mode)
        config = replace(config, run=replace(config.run, out=f"{folder}/run"))
        specs = ["vit_base_patch16_224:random"] * 3
        teachers = load(specs, "bf16", offload_to=config.offload_to, packed=config.offload_to is None)
        step = TimedStep(METHODS["comad"], "bf16", batch_size, teachers)
        loaded = memory_gib()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return {
        "peak_gib": memory_gib() - floor,
        "peak_while_loading_gib": loaded - floor,
        "at_the_end_gib": resident_gib() - floor,
        "seconds_per_step": min(seconds),
        "torch": torch.__version__,
        "device": str(step.device),
    }


def resident_gib() -> float:
    """Memory that this process holds now (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    main()
