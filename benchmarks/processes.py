"""One process with two threads against two processes with one each: the demo's networks without the cache, on the CPU.

Whole runs of `comad distill` on small pictures, in turns. The last line printed is one JSON object, in images/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pictures import write_pictures


def rate(data: Path, out: Path, processes: int) -> float:
    """Median images per second of a run's steps, all processes together, without the first two steps."""
    flags = [f"--data={data}", f"--run.out={out}", f"--run.devices={processes}", f"--run.threads={2 // processes}"]
    student = ["--student.image-size=48", "--student.patch-size=8", "--student.width=96"]
    student += ["--student.depth=6", "--student.heads=3"]
    teachers = ["--teachers", "mae-stamps", "mocov3-stamps", "ibot-stamps"]
    length = ["--optim.epochs=3", "--optim.batch-size=64", "--optim.warmup-epochs=1", "--loader.workers=0"]
    logs = ["--run.log-every=1", "--run.no-tensorboard", "--run.precision=fp32"]
    command = [sys.executable, "-m", "comad.cli", "distill", *flags, *teachers, *student, *length, *logs]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return statistics.median([line["images_per_s"] for line in lines if "images_per_s" in line][2:])


def main() -> None:
    """Run both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    with TemporaryDirectory() as name:
        data = write_pictures(Path(name) / "data" / "train", 256, (64, 64)).parent
        write_pictures(data / "val", 1, (64, 64))
        for number in range(options.rounds):
            for processes, found in rates.items():
                found.append(rate(data, Path(name) / f"{processes}-{number}", processes))
    one, two = (statistics.median(found) for found in rates.values())
    result = {"one_images_per_s": one, "two_images_per_s": two, "times_one": two / one}
    print(json.dumps({**result, "torch": torch.__version__, "device": "cpu, 2 threads in all"}))


if __name__ == "__main__":
    main()
