"""CPU seconds until something happens: `import comad`, `comad --help`, the first step of a tiny run.

Each in a fresh process, in turns, beside `python -c pass` and `import torch`. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pictures import write_pictures

STEP = ["--teachers", "mae-stamps", "--student.image-size=48", "--student.patch-size=8"]
STEP += ["--student.width=24", "--student.depth=1", "--student.heads=2", "--optim.epochs=1", "--optim.batch-size=8"]
STEP += ["--optim.warmup-epochs=0", "--loader.workers=0", "--run.log-every=1", "--run.no-tensorboard"]


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of a Python process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure all in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        data = write_pictures(Path(name) / "data" / "train", 8, (64, 64)).parent
        write_pictures(data / "val", 1, (64, 64))
        commands = {
            "python": ["-c", "pass"],
            "import torch": ["-c", "import torch"],
            "import comad": ["-c", "import comad"],
            "comad --help": ["-m", "comad.cli", "--help"],
            "a run of one step": ["-m", "comad.cli", "distill", f"--data={data}", *STEP],
        }
        seconds: dict[str, list[float]] = {command: [] for command in commands}
        for number in range(options.rounds):
            for command, arguments in commands.items():
                out = [f"--run.out={name}/{number}"] if "distill" in arguments else []
                seconds[command].append(cpu_seconds([*arguments, *out]))
    result = {command: statistics.median(found) for command, found in seconds.items()}
    print(json.dumps({"seconds": result, "torch": torch.__version__, "device": "cpu"}))


if __name__ == "__main__":
    main()
