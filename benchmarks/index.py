"""What it takes to open a very large folder: the tree is walked, then parts and labels are made; nothing is decoded.

    python benchmarks/index.py                      # 200,000 real (empty) files, and 1,000,000 paths
    python benchmarks/index.py --files 0 --paths 14000000

Real files are walked twice, without and with the list that the first time kept. Paths are those of a set with 1,000
classes, given as an index. Seconds are of this process's CPU time and of the clock, for others may run beside it;
memory is the peak of a process of its own. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comad.data.folders import load_folder
from comad.data.index import FolderIndex, PathTable, index_folder

CLASSES = 1000


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call returns, and its seconds."""
    clock, cpu = time.monotonic(), time.process_time()
    result = call()
    return result, {"cpu_s": round(time.process_time() - cpu, 2), "clock_s": round(time.monotonic() - clock, 2)}


def peak_mb() -> float:
    """Of this process."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def paths(count: int) -> PathTable:
    """Names like those of ImageNet, in order."""
    each = -(-count // CLASSES)
    return PathTable(f"n{i // each:08}/n{i // each:08}_{i % each}.JPEG" for i in range(count))


def walk(count: int) -> dict[str, Any]:
    """Index real files."""
    with TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        root = Path(folder, "set")
        for number, name in enumerate(paths(count)):
            if number % -(-count // CLASSES) == 0:
                (root / name).parent.mkdir(parents=True)
            os.close(os.open(root / name, os.O_CREAT))
        before = peak_mb()
        index, cold = timed(lambda: index_folder(root))
        assert len(index.files) == count
        _, kept = timed(lambda: index_folder(root))
        return {"files": count, "cold": cold, "kept": kept, "mb": round(peak_mb() - before, 1)}


def divide(count: int) -> dict[str, Any]:
    """Make parts and labels of paths."""
    index = FolderIndex(paths(count), {}, [])
    before = peak_mb()
    splits, seconds = timed(lambda: load_folder(Path("set"), index=index))
    assert sum(len(part) for part in splits[:3]) == count and len(splits.class_names["fine"]) == min(CLASSES, count)
    return {"paths": count, **seconds, "index_mb": before, "mb": peak_mb()}


def main() -> None:
    """Measure each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--paths", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("walk", "divide"))
    given = parser.parse_args()
    if given.only:
        print(json.dumps(walk(given.files) if given.only == "walk" else divide(given.paths)))
        return
    found = {}
    for name, count in (("walk", given.files), ("divide", given.paths)):
        if count:
            command = [
                sys.executable,
                __file__,
                "--files",
                str(given.files),
                "--paths",
                str(given.paths),
                "--only",
                name,
            ]
            found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
