"""Presets: each differs from CoMAD in what its name says and in nothing else, builds, and learns."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from comad.presets import DEMO, IMAGES, METHODS, recipe

CHANGES: dict[str, dict[str, Any]] = {
    "comad": {},
    "mean": {"fusion": {"kind": "mean", "renormalise": False}},
    "comad-token-only": {"terms.spatial.weight": 0.0},
    "comad-spatial-only": {"terms.token.weight": 0.0},
    "comad-mse": {"terms.token.distance": "mse", "terms.spatial.distance": "mse"},
    "comad-uniform": {"fusion.affinity": False, "fusion.consensus": False},
    "comad-affinity-only": {"fusion.consensus": False},
    "comad-consensus-only": {"fusion.affinity": False},
    "comad-literal": {
        "masking.policy": "independent",
        "masking.hidden": "zero",
        "masking.teachers_hidden": "zero",
        "aligner": {"kind": "trained", "calibration_images": 0},
        "fusion.detached": False,
        "terms.token.distance": "kl-student-teacher",
        "terms.token.projection": True,
        "terms.spatial.distance": "kl-student-teacher",
        "terms.spatial.projection": True,
    },
}


def differences(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Leaves of ``theirs`` that differ from ``ours``; a choice of another kind is one leaf."""
    if ours.get("kind") != theirs.get("kind"):
        return {path.rstrip("."): theirs}
    found = {}
    for key in ours.keys() | theirs.keys():
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            found |= differences(mine, other, f"{path}{key}.")
        elif mine != other:
            found[f"{path}{key}"] = other
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_a_preset_changes_exactly_what_it_says(name):
    assert differences(asdict(METHODS["comad"]), asdict(METHODS[name])) == CHANGES[name]


def test_comad_is_the_papers_setting_with_repairs():
    method = METHODS["comad"]
    assert (method.masking.student, method.masking.teachers) == (0.75, (0.5, 0.4, 0.3))
    assert method.masking.policy == "superset" and method.aligner.kind == "frozen"
    assert method.fusion.temperature == 0.1 and method.fusion.detached
    assert {name: (term.where, term.cls, term.weight) for name, term in method.terms.items()} == {
        "token": ("visible", True, 1.0),
        "spatial": ("all", False, 1.0),
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_builds_and_its_loss_falls(small_distillation, name):
    losses = small_distillation(METHODS[name]).losses_on_one_batch(15)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("demo", [True, False])
def test_a_recipe_is_a_preset_in_its_setting(demo):
    setting = DEMO if demo else IMAGES
    for name in METHODS:
        config = recipe(name, demo)
        assert config.method == METHODS[name] and config.preset == name
        assert (config.student, config.optim, config.loader) == (setting.student, setting.optim, setting.loader)


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'comade'.*comad, comad-literal, mean"):
        recipe("comade", demo=True)
