"""How many epochs fit into a given time on this machine: measured once, before a run, by its plan."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

from comad.distillation.config import DistillConfig
from comad.distillation.setup import Inputs
from comad.planning.distillation import measure_distillation
from comad.planning.forecast import budget_seconds, clock, largest_fit
from comad.planning.profile import now
from comad.recipes import read_distillation
from comad.runtime.optim import OptimConfig
from comad.runtime.processes import refuse_several
from comad.runtime.run import check_free


def within_budget(config: DistillConfig, inputs: Inputs | None = None) -> DistillConfig:
    """The config with as many epochs as its budget allows for the whole command; without a budget, as it is.

    A run that goes on keeps the epochs of its recipe: nothing is measured again.

    Raises:
        ValueError: the budget is no time, or too short; or see `measure_distillation`.
    """
    if config.budget:
        refuse_several(config.run.devices, "--budget")
        check_free(config.run)
    recipe = Path(config.run.out) / "config.yaml"
    if config.budget and config.run.resume and recipe.is_file():
        known = read_distillation(recipe).optim
        _say(f"--budget {config.budget}: the run goes on with its {known.epochs:g} epochs.")
        optim = replace(config.optim, epochs=known.epochs, warmup_epochs=known.warmup_epochs)
        return replace(config, budget="", optim=optim)
    return replace(config, budget="", optim=fit_epochs(config, inputs)) if config.budget else config


def fit_epochs(config: DistillConfig, inputs: Inputs | None = None, training_only: bool = False) -> OptimConfig:
    """Measure, and fit the schedule to the budget; what was chosen is said.

    Args:
        config: its budget counts from the call on.
        inputs: see `comad.distillation.run.distill`; nothing of it is trained.
        training_only: the budget is for the steps, with log and checkpoints, and not for what is around them.

    Raises:
        ValueError: see `within_budget`.
    """
    start, seconds = now(), budget_seconds(config.budget)
    if config.run.devices > 1 or config.through:
        several = "--through" if config.through else "several --run.devices"
        raise ValueError(f"--budget measures one process and one stage; leave out {several}, or set --optim.epochs.")
    _say(f"--budget {config.budget}: measuring a few steps ...")
    if inputs is not None and inputs.student is not None:
        inputs = replace(inputs, student=copy.deepcopy(inputs.student))
    forecast = measure_distillation(replace(config, budget=""), inputs, training_only)
    spent = 0.0 if training_only else now() - start
    optim = largest_fit(config.optim, forecast, seconds - spent)
    plan = forecast(optim)
    _say(
        f"--budget {config.budget}: {optim.epochs:g} epochs, {plan.steps:.0f} steps of {optim.images_per_step} images, "
        f"warm-up {optim.warmup_epochs:g} epochs; about {clock(plan.training_seconds)} of training and "
        f"{clock(plan.seconds - plan.training_seconds + spent)} of other work."
    )
    return optim


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
