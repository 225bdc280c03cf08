"""A long run takes no more memory, descriptors, threads or shared memory at its end than at its beginning."""

import os
import re
import signal
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import pytest

SECONDS = float(os.environ.get("COMAD_SOAK", "3600"))
PARTS = 60
"""Looks at the process; the first quarter is warming up."""


class Look(NamedTuple):
    """At a process and those that it started: MiB of its own, descriptors, threads, MiB shared with others."""

    memory: float
    files: float
    threads: float
    shared: float


ALLOWED = Look(memory=24.0, files=2, threads=2, shared=4.0)
"""Growth from the second to the last quarter: of medians, for workers come and go."""


def family(pid):
    """Process ids."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def look(pid):
    found = []
    for member in family(pid):
        own = Path("/proc") / str(member)
        kib = {
            name: int(re.findall(rf"{name}:\s*(\d+)", (own / "status").read_text())[0])
            for name in ("RssAnon", "RssShmem")
        }
        found.append(
            (kib["RssAnon"] / 1024, len(os.listdir(own / "fd")), len(os.listdir(own / "task")), kib["RssShmem"] / 1024)
        )
    return Look(*map(sum, zip(*found, strict=True)))


@pytest.mark.slow
def test_nothing_grows(start, command, figures, tmp_path):
    out, looks = tmp_path / "run", []
    longer = ["--optim.epochs=10000000", "--run.probe-every=100", "--run.checkpoint-every=50", "--run.log-every=10"]
    running = start([*command(out), *longer, "--loader.workers=1", "--run.tensorboard"])
    while not list((out / "checkpoints").glob("*.pt")):
        time.sleep(0.1)
        assert running.state != "Z", running.told_in.read_text()
    for _ in range(PARTS):
        time.sleep(SECONDS / PARTS)
        looks.append(look(running.pid))
    running.signal(signal.SIGTERM)
    status, told = running.wait()
    assert status == 130, told
    steps = max(int(path.stem.partition("-")[2]) for path in (out / "checkpoints").glob("*.pt"))
    figures.append(f"soak: {SECONDS:g} s, {steps:,} steps")
    quarters = [
        Look(*map(statistics.median, zip(*looks[n * PARTS // 4 : (n + 1) * PARTS // 4], strict=True))) for n in range(4)
    ]
    for name in Look._fields:
        figures.append(
            f"soak: {name}, median of each quarter: " + ", ".join(f"{getattr(q, name):,.1f}" for q in quarters)
        )
    for name, first, last, allowed in zip(Look._fields, quarters[1], quarters[3], ALLOWED, strict=True):
        assert last - first <= allowed, (name, quarters)
