import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_gpu_script_runs_on_a_cpu():
    options = "--device cpu --tiny --eager-only --steps 1 --batch-sizes 8"
    command = [sys.executable, BENCHMARKS / "gpu.py", *options.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    failed = {name: part for name, part in found.items() if isinstance(part, dict) and "failed" in part}
    assert not failed
    assert min(found["self_check"].values()) > 0
    for name in ("eager 8", "two students", "activation checkpointing"):
        assert found[name]["mfu"] > 0 and found[name]["images_per_s"] > 0
    assert not {"compiled 8", "fp8", "cuda graphs"} & set(found)
    assert found["trace"]["host_waits_per_step"] is None and found["trace"]["gaps_percent"] is None
    assert found["trace"]["scalar_reads_per_step"] < 100
    assert min(found["decode and cache"].values()) > 0


def test_gaps_lie_between_spans_that_may_overlap(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from gpu import gaps_percent

    assert gaps_percent([(0, 4), (6, 10), (1, 3), (8, 9)]) == pytest.approx(20)
    assert gaps_percent([(5, 7)]) == 0
