"""Is the forecast of `comad plan` right? It plans the demo, then runs it.

Prints {"forecast_s", "measured_s", "ratio"} as one JSON object, and under "cpu" the same in seconds of this process on
a processor, which other work on the machine disturbs less. Options go to both: `python benchmarks/plan.py
--optim.epochs 3`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from comad.distill.config import DistillConfig
from comad.distill.run import distill
from comad.plan import profile
from comad.plan.distillation import plan_distillation
from comad.presets import recipe

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Plan by both clocks, run once, compare."""
    config = tyro.cli(tyro.conf.AvoidSubcommands[DistillConfig], args=sys.argv[1:], default=recipe("comad", demo=True))
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, out=str(Path(folder) / "run")))
        plans, load = {}, [os.getloadavg()[0]]
        for name, clock in CLOCKS.items():
            profile.CLOCK = clock
            plans[name] = plan_distillation(config)
            load.append(os.getloadavg()[0])
        start = {name: clock() for name, clock in CLOCKS.items()}
        distill(config)
        measured = {name: clock() - start[name] for name, clock in CLOCKS.items()}
    load.append(os.getloadavg()[0])
    report = {
        name: {
            "forecast_s": plan.seconds,
            "measured_s": measured[name],
            "ratio": plan.seconds / measured[name],
            "parts": {"training": plan.training_seconds, **plan.other},
        }
        for name, plan in plans.items()
    }
    machine = {"device": f"cpu, {os.cpu_count()} cores", "load": load}
    print(json.dumps({**report["wall"], "cpu": report["cpu"], "epochs": config.optim.epochs, **machine}))


if __name__ == "__main__":
    main()
