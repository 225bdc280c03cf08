"""What to change in a run, from its plan: a few lines, and only those that apply."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from comad.distillation.config import DistillConfig
from comad.planning.forecast import Plan, budget_seconds, clock, largest_fit
from comad.runtime.optim import OptimConfig

TIMES = ("20min", "1h", "8h")
"""For which it is said how many epochs they are."""
VIEWS = 2
"""Of each image that a cache keeps, as runs on own images choose."""
WORTH = 0.1
"""Share of the time from which on a change is worth a line."""


def advise(config: DistillConfig, forecast: Callable[[OptimConfig], Plan], plan: Plan) -> tuple[str, ...]:
    """Lines of advice on a distillation.

    Args:
        config: of the run that is planned.
        forecast: its plan for other numbers of epochs.
        plan: for its own.
    """
    lines = [_lengths(config, forecast), _cache(config, plan), _reading(plan), _batch(plan), _teachers(config)]
    return tuple(filter(None, lines))


def _lengths(config: DistillConfig, forecast: Callable[[OptimConfig], Plan]) -> str:
    """Epochs for some times."""
    told = []
    for time in TIMES:
        with suppress(ValueError):  # too short for what is around the training
            told.append(
                f"--budget {time} is {largest_fit(config.optim, forecast, budget_seconds(time)).epochs:g} epochs"
            )
    return ", ".join(told)


def _cache(config: DistillConfig, plan: Plan) -> str:
    """Whether teachers could be asked less often."""
    if config.cache_teachers or plan.epochs <= 2 * VIEWS:
        return ""
    cached = replace(config, cache_teachers=True, loader=replace(config.loader, fixed_views=VIEWS), budget="")
    with suppress(ValueError):  # a method whose teachers see something new each time
        cached.check(plan.images_per_step)
        live = plan.stages["live"]
        alone = live._replace(seconds=live.seconds * live.flops.student / sum(live.flops))
        gain = plan.step_seconds(live) - plan.step_seconds(alone)
        spared = (1 - VIEWS / plan.epochs) * live.steps * gain
        if spared < WORTH * plan.seconds:
            return ""
        return (
            f"--cache-teachers --loader.fixed-views {VIEWS} asks the teachers {VIEWS} times per image, not "
            f"{plan.epochs:g}, for the same {VIEWS} views in turn; about {clock(spared)} less if the disk has room"
        )
    return ""


def _reading(plan: Plan) -> str:
    """Whether reading images is the limit."""
    slow = [stage for stage in plan.stages.values() if plan.step_seconds(stage) > stage.seconds]
    if sum(stage.steps for stage in slow) < plan.steps / 2:
        return ""
    return "reading images is the limit: smaller files, pip install 'comad[fast]', or more --loader.workers"


def _batch(plan: Plan) -> str:
    """Whether a pass is larger than the memory."""
    if plan.largest_batch is None or plan.batch <= plan.largest_batch:
        return ""
    return f"a pass of {plan.batch} images does not fit: --optim.microbatch {plan.largest_batch} or less, same batch"


def _teachers(config: DistillConfig) -> str:
    """Whether several teachers pay is a question to their tokens."""
    if len(config.teachers) < 2:
        return ""
    names = " ".join(config.teachers)
    return f"whether they know more together: comad teachers compare {names} --data {config.data}"
