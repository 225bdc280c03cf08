"""Presets: each differs from CoMAD in what its name says and in nothing else, builds, and learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from comad.distillation.method import Method
from comad.presets import DEMO, IMAGES, METHODS, recipe

CHANGES: dict[str, dict[str, Any]] = {
    "comad": {},
    "mean": {"fusion": {"name": "mean", "renormalize": False}},
    "comad-token-only": {"objectives.spatial.weight": 0.0},
    "comad-spatial-only": {"objectives.token.weight": 0.0},
    "comad-mse": {
        "objectives.token.distance": "mse",
        "objectives.token.temperature": 1.0,
        "objectives.spatial.distance": "mse",
        "objectives.spatial.temperature": 1.0,
    },
    "comad-uniform": {"fusion.affinity": False, "fusion.consensus": False},
    "comad-affinity-only": {"fusion.consensus": False},
    "comad-consensus-only": {"fusion.affinity": False},
    "comad-anchor": {"aligner.name": "autoencoder"},
    "comad-student-side": {
        "normalizer.name": "layer-norm",
        "aligner": {
            "name": "projector",
            "head": "linear",
            "separate_cls": False,
            "hidden_ratio": 1.0,
            "hidden_norm": True,
            "taps": 12,
            "unit_length": False,
        },
        "fusion": {"name": "loss-gate", "affinity": True, "consensus": True, "temperature": 0.1},
    },
    "comad-literal": {
        "masking.name": "independent",
        "masking.hidden": "zero",
        "masking.teacher_hidden": "zero",
        "masking.count_hidden": True,
        "features.untrained_cls": True,
        "aligner": {"name": "adapter"},
        "fusion.detached": False,
        "objectives.token.distance": "kl-student-teacher",
        "objectives.token.temperature": 1.0,
        "objectives.token.projection": True,
        "objectives.spatial.distance": "kl-student-teacher",
        "objectives.spatial.temperature": 1.0,
        "objectives.spatial.projection": True,
    },
}


def plain(method: Method) -> dict[str, Any]:
    return TypeAdapter(Method).dump_python(method, mode="json")


def differences(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Leaves of ``theirs`` that differ from ``ours``; a member with other options is one leaf."""
    if ours.get("name") != theirs.get("name") and ours.keys() != theirs.keys():
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
    assert differences(plain(METHODS["comad"]), plain(METHODS[name])) == CHANGES[name]


FIELD = [name for name in METHODS if name not in CHANGES and name != "consensus"]


def test_the_field_is_complete():
    wanted = "tinymim m-tinymim tinymim-feat dmae g2sd dmjd hybrid dmt-like unic dune radio phi-s eupe theia c-radio"
    wanted += " siglino gram"
    assert wanted.split() == FIELD


@pytest.mark.parametrize(
    ("first", "second", "changed"),
    [
        ("tinymim", "m-tinymim", {"single_teacher"}),
        ("unic", "dune", {"normalizer.over", "aligner.head", "aligner.separate_cls"}),
        ("radio", "eupe", {"normalizer"}),
    ],
)
def test_relatives_differ_in_one_slot_or_two(first, second, changed):
    assert set(differences(plain(METHODS[first]), plain(METHODS[second]))) == changed


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_all_that_is_trained_and_nothing_frozen(small_distillation, name):
    setting = small_distillation(METHODS[name], with_cls=(True,) * 3)
    setting.distiller(*setting.batch(8))[0].backward()
    trained = {name for name, p in setting.distiller.named_parameters() if p.requires_grad}
    reached = {name for name, p in setting.distiller.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == trained
    assert all(p.grad is None and not p.requires_grad for t in setting.teachers for p in t.backbone.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_from_its_state(small_distillation, name):
    def steps(setting, optimizer, batches) -> list[float]:
        losses = []
        for batch in batches:
            loss, _ = setting.distiller(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    first, other = (small_distillation(METHODS[name], seed=seed) for seed in (0, 1))
    batches = [first.batch(4) for _ in range(4)]
    one, two = (torch.optim.AdamW(setting.distiller.parameters(), lr=1e-3) for setting in (first, other))
    steps(first, one, batches[:2])
    other.distiller.load_state_dict(first.distiller.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert steps(other, two, batches[2:]) == steps(first, one, batches[2:])


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_autocast_gives_nearly_the_same_loss_and_finite_health(small_distillation, name):
    setting = small_distillation(METHODS[name])
    setting.distiller.eval()  # statistics that follow the batch stand still
    batch = setting.batch(8)
    exact = float(setting.distiller(*batch)[0].detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = setting.distiller(*batch)
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(exact, rel=0.1, abs=1e-4)
    numbers = {key: float(value) for key, value in metrics().items()}
    assert all(value == value and abs(value) < 1e6 for value in numbers.values())
    assert sum(value for key, value in numbers.items() if key.startswith("share_")) == pytest.approx(1.0, abs=1e-4)
    assert numbers["target_rank"] > 1.5 and numbers["target_std"] > 0


def test_comad_is_the_papers_setting_with_repairs():
    method = METHODS["comad"]
    assert (method.masking.mask_ratio, method.masking.teacher_mask_ratios) == (0.75, (0.5, 0.4, 0.3))
    assert method.masking.name == "superset" and method.aligner.name == "procrustes"
    assert method.fusion.temperature == 0.1 and method.fusion.detached
    assert {name: (term.where, term.cls, term.weight) for name, term in method.objectives.items()} == {
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
        assert len(config.teachers) == (0 if not demo else 1 if METHODS[name].single_teacher else 3)
        assert (config.student, config.optim, config.loader) == (setting.student, setting.optim, setting.loader)
        assert config.cache_teachers == (demo and name not in ("gram", "c-radio"))  # teachers see new images


def test_an_unknown_preset_is_answered_with_the_nearest_or_the_known_ones():
    with pytest.raises(ValueError, match=r"no preset 'comade'; did you mean 'comad'\?"):
        recipe("comade", demo=True)
    with pytest.raises(ValueError, match="no preset 'xyz'; there are: comad, comad-literal, consensus, mean"):
        recipe("xyz", demo=True)
