"""Two processes train what one process trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from comad.runtime.checkpoint import checkpoints, load_checkpoint

RUN = [
    "--optim.epochs",
    "0.1",
    "--run.probe-every",
    "0",
    "--run.precision",
    "fp32",
    "--run.no-tensorboard",
    "--run.log-every",
    "1",
]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path):
    for devices in (1, 2):
        out = ["--run.devices", str(devices), "--run.out", str(tmp_path / str(devices))]
        whole = ["--method.masking.policy", "none", "--teachers", "mae-stamps"]
        subprocess.run([sys.executable, "-m", "comad.cli", "distill", *RUN, *whole, *out], check=True)
    one, two = (json_lines(tmp_path / str(devices) / "log.jsonl") for devices in (1, 2))
    assert len(one) == len(two)  # the second process writes nothing
    one, two = (load_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1])["module"] for name in "12")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 1e-4, name


def json_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
