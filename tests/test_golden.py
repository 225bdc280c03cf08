"""The loss of twenty steps of every preset: a change of a preset's numbers must be meant.

`python -m pytest tests/test_golden.py --write-golden` writes the curves anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comad.presets import METHODS

CURVES = Path(__file__).parent / "golden" / "presets.json"


@pytest.mark.parametrize("name", METHODS)
def test_the_first_twenty_steps(small_distillation, name: str, request: pytest.FixtureRequest):
    losses = small_distillation(METHODS[name]).losses_on_one_batch(20)
    stored = json.loads(CURVES.read_text()) if CURVES.is_file() else {}
    if request.config.getoption("--write-golden"):
        stored[name] = [round(loss, 5) for loss in losses]
        CURVES.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    assert losses == pytest.approx(stored[name], rel=1e-2, abs=1e-5), (
        "meant? then write the curves anew: --write-golden"
    )


def test_no_curve_is_left_over():
    assert set(json.loads(CURVES.read_text())) == set(METHODS)
