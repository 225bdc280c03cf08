"""The verb `comad compare`: measure every row for every seed, then set them side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from comad.comparison.config import CompareConfig
from comad.comparison.entries import ComparisonRow, list_entries
from comad.comparison.measure import RowRun, check, digest_of, measure
from comad.comparison.table import markdown, tabulate, write_table
from comad.data.images import Splits
from comad.evaluation.evaluation import title_of
from comad.evaluation.finetune import check as check_finetune
from comad.evaluation.scoreboard import rehearse, shortage
from comad.evaluation.scores import Scores
from comad.evaluation.tuning import FinetuneConfig
from comad.models.teachers import load_on_grid
from comad.reporting.page import write_report
from comad.runtime.checkpoint import differences
from comad.runtime.lock import LOCK, holding_runs, lock_folder
from comad.runtime.options import identity_of
from comad.runtime.processes import refuse_several
from comad.runtime.progress import say, warn
from comad.runtime.recipe import read_recipe, write_recipe
from comad.runtime.run import start_fabric
from comad.runtime.seal import is_text_intact

RECORD = "comparison.yaml"


@holding_runs()
def compare(config: CompareConfig) -> str:
    """Measure all rows, and write ``comparison.json`` and ``.md`` anew after each seed, then a page. Returns the table.

    The same command again goes on: what is done is skipped, a run that was stopped is resumed. Rows and seeds may be
    added. Runs lie in ``runs`` below ``--run.out``, named by all that their result depends on.

    Raises:
        ValueError: nothing to compare, an unknown name, no labels, or the folder of another comparison.
        Interrupted: a signal came; what was trained is kept.
        TrainingError: the loss of a run is not finite.
    """
    refuse_several(config.recipe.run.devices, "comad compare")
    entries, reference = list_entries(config)
    splits = config.recipe.load_images()
    _check_data(config, splits)
    rehearse(splits._replace(test=getattr(splits, config.recipe.split)))
    hashes, pictures = _hashes(entries), digest_of([images.fingerprint() for images in splits[:3]])
    fabric = start_fabric(config.recipe.run)
    for entry in entries:
        check(RowRun(entry, config.seeds[0], config, splits, hashes, pictures), fabric)
    out = _open(config)
    results: list[dict[int, Scores]] = [{} for _ in entries]
    table: dict[str, Any] = {}
    for number, seed in enumerate(config.seeds):
        for position, entry in enumerate(entries):
            done = number * len(entries) + position + 1
            say(f"[{done}/{len(entries) * len(config.seeds)}] {entry.label}, seed {seed}")
            start = time.monotonic()
            results[position][seed] = measure(RowRun(entry, seed, config, splits, hashes, pictures))
            say(f"  {_scores(results[position][seed])} ({time.monotonic() - start:.0f} s)")
        table = tabulate(config, entries, results, reference)
        write_table(table, out)
    page = write_report([out])
    return f"{markdown(table)}\n\nin {out}: comparison.json, comparison.md, {page.name}"


def _check_data(config: CompareConfig, splits: Splits) -> None:
    recipe = config.recipe
    if reason := shortage(splits, "fine"):
        raise ValueError(f"{recipe.data!r} cannot be compared on: {reason} Put images into one sub-folder per label.")
    if config.finetune:
        check_finetune(FinetuneConfig(backbone="", data=recipe.data, tuning=config.tuning), splits)
    if "supervised" in config.baselines:
        tuning = replace(config.tuning, optim=recipe.optim)
        check_finetune(FinetuneConfig(backbone="", data=recipe.data, tuning=tuning), splits)


def _hashes(entries: Sequence[ComparisonRow]) -> dict[str, str]:
    """Teacher → hash of what it computes; so that a wrong name is told at once, and not after hours."""
    wanted = {(spec, entry.config.student) for entry in entries for spec in entry.teachers}
    hashes = {}
    for spec, config in sorted(wanted, key=str):
        with torch.random.fork_rng(devices=[]):
            student = config.build()
        (teacher,) = load_on_grid((spec,), student.grid[0], student.patch_size)
        hashes[spec] = digest_of(asdict(replace(teacher.card, name="", source="")))
    return hashes


def _open(config: CompareConfig) -> Path:
    """Make the folder, or find it to be of the same comparison, which may have gained rows and seeds."""
    out = Path(config.recipe.run.out)
    record = out / RECORD
    if out.exists() and not out.is_dir():
        raise ValueError(f"{str(out)!r} is a file; pass --run.out with a folder for the comparison.")
    if record.is_file():
        recorded = _read_record(record)
        if recorded and (changed := differences(_shared(recorded), _shared(config))):
            raise ValueError(
                f"{str(out)!r} holds another comparison: {'; '.join(changed)}; pass --run.out for a new folder."
            )
    elif out.exists() and {path.name for path in out.iterdir()} - {LOCK}:
        raise ValueError(f"{str(out)!r} is not empty and holds no comparison; pass --run.out for a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)
    write_recipe(config, record)
    return out


def _read_record(path: Path) -> CompareConfig | None:
    """What the comparison is of; None, which is told, if it cannot be known: rows are found by what they are of."""
    with suppress(ValueError, OSError):
        if is_text_intact(path.read_text(encoding="utf-8")):
            return read_recipe(CompareConfig, path)
    warn(f"{path} is damaged; it is written anew, and runs of this comparison are found by their names.")
    return None


def _shared(config: CompareConfig) -> dict[str, Any]:
    """What all rows have in common, as plain values."""
    plain = identity_of(config.recipe)
    del plain["run"]["seed"]
    own = {**config.recipe.data_options, "teachers": list(config.recipe.teachers), "budget": config.recipe.budget}
    return {**plain, **own, "ablation": config.ablation or "none"}


def _scores(measured: Scores) -> str:
    scores = measured.scores[0].row.scores
    return ", ".join(f"{title_of(name)} {value:.1f}" for name, value in scores.items() if "_coarse" not in name)
