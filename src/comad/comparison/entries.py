"""The rows of a comparison, from what was asked for. Add a baseline: a function, an entry in `BASELINES`."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from comad import presets
from comad.comparison.ablations import ABLATIONS, OURS
from comad.comparison.config import CompareConfig
from comad.distillation.config import DistillConfig
from comad.recipes import parse_distillation
from comad.runtime.spelling import hint

Kind = Literal["student", "teacher", "untrained", "supervised", "pixels"]


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One row: what is measured for every seed.

    Attributes:
        label: what the table calls it.
        preset: a preset with its options, or the name of a baseline.
        teachers: how they are named on the command line; of a teacher's own row, itself.
        kind: how it comes to be.
        config: its distillation; of a baseline, the student, views and schedule it shares with the others.
    """

    label: str
    preset: str
    teachers: tuple[str, ...]
    kind: Kind
    config: DistillConfig

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The teachers without their files."""
        return tuple(_name(spec) for spec in self.teachers)


def list_entries(config: CompareConfig) -> tuple[list[ComparisonRow], ComparisonRow]:
    """All rows in their order, and the row of reference.

    Raises:
        ValueError: nothing to compare, or an unknown preset, ablation, teacher, baseline or reference.
    """
    _check(config)
    students = [*_ablation(config), *_students(config)]
    if not students:
        raise ValueError(
            f"nothing to compare; name methods, as in --presets comad mean, or --ablation {'|'.join(ABLATIONS)}."
        )
    entries = [*students, *(entry for name in config.baselines for entry in _baseline(name)(config, students))]
    labels = [entry.label for entry in entries]
    if double := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two rows have the name {min(double)!r}; leave one out.")
    return entries, _reference(config, entries)


def _check(config: CompareConfig) -> None:
    recipe = config.recipe
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise ValueError("give each seed once, from 0 on, as in --seeds 0 1 2.")
    if config.ablation and config.ablation not in ABLATIONS:
        raise ValueError(f"no ablation {config.ablation!r}; {hint(config.ablation, ABLATIONS)}")
    if recipe.split == "none":
        raise ValueError("a comparison needs scores; pass --split val to choose by, or --split test to report.")
    if recipe.run.seed:
        raise ValueError("--run.seed is one of many here; pass --seeds.")
    _check_budget(config)
    if recipe.run.devices > 1:
        raise ValueError("a comparison runs in one process; leave out --run.devices.")
    if recipe.extra_students:
        raise ValueError("a row has one student; leave `extra_students` out of the recipe.")
    if recipe.method != presets.METHODS["comad"]:
        raise ValueError(
            'methods come from --presets; change one there, as in --presets "comad --masking.mask-ratio 0.8".'
        )


def _check_budget(config: CompareConfig) -> None:
    if config.recipe.budget and "supervised" in config.baselines:
        raise ValueError("a supervised row is not held to a --budget; leave it out of --baselines.")
    if config.recipe.budget and config.recipe.cache_folder:
        raise ValueError("rows that share a --cache-folder do not take equal time; leave it out, or --budget.")


def _ablation(config: CompareConfig) -> list[ComparisonRow]:
    if config.ablation == "teachers":
        specs = config.recipe.teachers
        subsets = [part for size in range(1, len(specs) + 1) for part in itertools.combinations(specs, size)]
        return [_student(config, "comad", part, " + ".join(map(_name, part))) for part in subsets]
    rows = ABLATIONS.get(config.ablation, {})
    return [_student(config, text, config.recipe.teachers, label) for label, text in rows.items()]


def _students(config: CompareConfig) -> list[ComparisonRow]:
    sets = [_subset(config, names) for names in config.teacher_sets] or [config.recipe.teachers]
    entries = []
    for text, specs in itertools.product(config.presets, sets):
        label = text if len(sets) == 1 else f"{text} ({' + '.join(map(_name, specs))})"
        entries.append(_student(config, text, specs, label))
    return entries


def _student(config: CompareConfig, text: str, specs: tuple[str, ...], label: str) -> ComparisonRow:
    """A row of ``text``: a preset, and options of `comad distill` that change it.

    A method that is made for one teacher takes the first, unless the options name another.
    """
    name, *options = shlex.split(text) or [""]
    method = presets.recipe(name, demo=True).method
    specs = specs[:1] if method.single_teacher else specs
    plain = replace(config.recipe.with_method(method, text), teachers=specs)
    own = parse_distillation(options, f"--presets {name}", base=plain)
    if (own.data_options, own.run, own.split) != (plain.data_options, plain.run, plain.split):
        raise ValueError(
            f"{text!r}: rows share data, split and run; give options of images, --split and --run.* once, for all."
        )
    return ComparisonRow(label=label, preset=text, teachers=own.teachers, kind="student", config=own)


def _subset(config: CompareConfig, names: str) -> tuple[str, ...]:
    """The teachers that are named, or whose names begin so."""
    known = {_name(spec): spec for spec in config.recipe.teachers}
    chosen = []
    for name in names.split(","):
        found = [full for full in known if full == name] or [full for full in known if name and full.startswith(name)]
        if len(found) != 1:
            raise ValueError(f"no teacher {name!r} in --teachers; write names with commas: {','.join(known)}.")
        chosen.append(known[found[0]])
    return tuple(chosen)


def _reference(config: CompareConfig, entries: Sequence[ComparisonRow]) -> ComparisonRow:
    """The row of that name, else of the default preset, `comad` or the first; of several the one with most teachers."""
    names = [config.reference] if config.reference else [OURS.get(config.ablation), "consensus", "comad"]
    rows = ([entry for entry in entries if name in (entry.label, entry.preset)] for name in names)
    found = next(filter(None, rows), [])
    if not found and config.reference:
        labels = [entry.label for entry in entries]
        raise ValueError(f"reference {config.reference!r} is none of the rows; {hint(config.reference, labels)}")
    return max(found or entries[:1], key=lambda entry: len(entry.teachers))


def _baseline(name: str) -> Callable[[CompareConfig, Sequence[ComparisonRow]], list[ComparisonRow]]:
    if name not in BASELINES:
        raise ValueError(f"no baseline {name!r}; {hint(name, BASELINES)}")
    return BASELINES[name]


def _teachers(config: CompareConfig, students: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    specs = dict.fromkeys(spec for entry in students for spec in entry.teachers)
    return [
        ComparisonRow(label=_name(spec), preset="teacher", teachers=(spec,), kind="teacher", config=config.recipe)
        for spec in specs
    ]


def _untrained(config: CompareConfig, students: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    scratch = replace(config.recipe, student=config.recipe.student.from_scratch)
    return [ComparisonRow(label="untrained", preset="untrained", teachers=(), kind="untrained", config=scratch)]


def _init_only(config: CompareConfig, students: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The student at its start; from scratch it is the untrained one, measured once."""
    return [ComparisonRow(label="init-only", preset="init-only", teachers=(), kind="untrained", config=config.recipe)]


def _supervised(config: CompareConfig, students: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    return [
        ComparisonRow(label="supervised", preset="supervised", teachers=(), kind="supervised", config=config.recipe)
    ]


def _pixels(config: CompareConfig, students: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    return [ComparisonRow(label="pixels", preset="pixels", teachers=(), kind="pixels", config=config.recipe)]


BASELINES: dict[str, Callable[[CompareConfig, Sequence[ComparisonRow]], list[ComparisonRow]]] = {
    "teachers": _teachers,
    "untrained": _untrained,
    "init-only": _init_only,
    "supervised": _supervised,
    "pixels": _pixels,
}


def _name(spec: str) -> str:
    """A teacher's name, without its file."""
    return spec.partition("=")[0]
