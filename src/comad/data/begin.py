"""What every run does before its first step: take its folder, say what was found in the data, keep both on record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lightning_fabric import Fabric

from comad.data.identity import Listed, check_manifest
from comad.data.loader import check_order
from comad.data.summary import Summary
from comad.runtime.progress import say
from comad.runtime.recipe import write_recipe
from comad.runtime.run import RunConfig, first_for_all, open_runs


@runtime_checkable
class Data(Protocol):
    """What a run learns from, and what is said of it."""

    @property
    def train(self) -> Listed:
        """The training images."""
        ...

    def summary(self) -> Summary:
        """Say what is there and what is left out."""
        ...


class Begun(NamedTuple):
    """A run whose folder is taken.

    Attributes:
        config: as it was given; its ``run.resume`` is a plain yes or no.
        runs: of each part.
        summary: of the data.
    """

    config: Any
    runs: list[RunConfig]
    summary: Summary


def begin_run(
    config: Any,
    fabric: Fabric,
    data: Data,
    parts: Sequence[str] = ("",),
    about: Callable[[bool], str] = lambda resumed: "",
) -> Begun:
    """Take the folder of a run, tell what was found in its data, and write ``config.yaml`` and ``data.npy``.

    Args:
        config: to be kept; its ``run`` says where.
        fabric: the engine.
        data: of a run that goes on, the training images must be those it began with.
        parts: folders of its parts, below its own.
        about: whether it goes on → what else to tell, before the data.

    Raises:
        ValueError: the folder is in use or another's, there is nothing to resume, the images changed, or they
            cannot be read in the order that is asked for.
    """
    check_order(config.loader, data.train)
    runs = open_runs(config.run, parts, fabric)
    config = replace(config, run=replace(config.run, resume=any(run.resume for run in runs)))
    out, resumed, summary = Path(config.run.out), bool(config.run.resume), data.summary()
    say("\n".join(filter(None, (about(resumed), summary.text))))

    def record() -> None:
        check_manifest(data.train, out / "data.npy", resumed)
        if not resumed:
            write_recipe(config, out / "config.yaml")

    first_for_all(record, fabric)
    return Begun(config, runs, summary)
