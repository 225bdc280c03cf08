"""From ``--preset``, ``--recipe`` and the choices of slots to the values that the other options change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from comad import presets
from comad.data.load import load_images
from comad.defaults import SIZE_FLAGS, fit_to_data, this_machine, told
from comad.distillation.config import DistillConfig
from comad.distillation.method import Method
from comad.distillation.objectives import Objective
from comad.models.timm_backbone import takes_any_size
from comad.published import PUBLISHED, published
from comad.runtime.command import get_flag, parse, pop_all, pop_flag
from comad.runtime.progress import say_next, warn
from comad.runtime.recipe import read_recipe, resumed_recipe
from comad.runtime.slots import Slot, load_plugins
from comad.runtime.spelling import hint

SLOTS: dict[str, type[Slot]] = {
    field.name: slot for field in fields(Method) for slot in Slot.__subclasses__() if slot.slot == field.name
}
"""Field of a method → its slot."""

RENAMED = {
    "beside": "extra_students",
    "method.single": "method.single_teacher",
    "method.decoder_width": "method.masking.decoder_width",
    "method.decoder_depth": "method.masking.decoder_depth",
    "method.decoder_heads": "method.masking.decoder_heads",
    "method.decoder_fills": "method.masking.decoder_output",
    "method.queue": "method.objectives.queue.size",
    "method.masking.policy": "method.masking.name",
    "method.masking.student": "method.masking.mask_ratio",
    "method.masking.student_end": "method.masking.mask_ratio_end",
    "method.masking.teachers": "method.masking.teacher_mask_ratios",
    "method.masking.teachers_hidden": "method.masking.teacher_hidden",
    "method.tap": "method.features",
    "method.normalize": "method.normalizer",
    "method.normalize.kind": "method.normalizer.name",
    "method.normalize.function": "method.normalizer.name",
    "method.aligner.kind": "method.aligner.name",
    "method.aligner.form": "method.aligner.head",
    "method.aligner.apart": "method.aligner.separate_cls",
    "method.aligner.rungs": "method.aligner.taps",
    "method.fusion.kind": "method.fusion.name",
    "method.fusion.renormalise": "method.fusion.renormalize",
    "method.terms": "method.objectives",
}
"""Names of the first version → names of today, in recipes and, with dashes and without ``method.``, on the command
line."""
RENAMED_VALUES = {
    "method.aligner.name": {
        "frozen": "procrustes",
        "anchor": "autoencoder",
        "trained": "adapter",
        "student": "projector",
    },
    "method.aligner.head": {"ladder": "multi-layer"},
    "method.normalizer.name": {"standardise": "standardize", "plain": None},
}
OBJECTIVES = {
    "channels": "feature",
    "tokens": "relation",
    "queue": "queue",
    "queries-keys": "attention",
    "values-values": "attention",
    "pixels": "pixels",
}
"""What a term of the first version was ``over`` → the objective of today."""


def parse_distillation(
    arguments: Sequence[str], program: str = "comad distill", description: str = "", base: DistillConfig | None = None
) -> DistillConfig:
    """The config that the options of a distillation name.

    Args:
        arguments: of the command line.
        program, description: for ``--help``.
        base: what the options change; None: the preset, the demo's recipe or the one for folders.

    Raises:
        ValueError: an unknown preset, recipe or member of a slot.
    """
    arguments, students, default = take_defaults(arguments, base, fit=True)
    config = parse(DistillConfig, default, arguments, program, f"{description} {choices_help()}".strip())
    return with_students(config, students)


def take_defaults(
    arguments: Sequence[str], base: DistillConfig | None = None, fit: bool = False
) -> tuple[list[str], list[str], DistillConfig]:
    """Take away what chooses defaults. Returns the other arguments, names of students, and the defaults.

    With ``fit`` those for own images are fitted to the images and to this machine, see `fitted`.
    """
    rest = rename_flags(list(arguments))
    plugins = pop_all(rest, "--plugin")
    load_plugins(plugins)
    preset, recipe, students = pop_flag(rest, "--preset"), pop_flag(rest, "--recipe"), pop_all(rest, "--student")
    recipe_of = pop_flag(rest, "--recipe-of")
    preset, recipe_of = (presets.RENAMED.get(name, name) if name else name for name in (preset, recipe_of))
    student = students[0] if students else get_flag(rest, "--student.name") or presets.IMAGES.student.name
    default = base or _default(preset, recipe, rest, student)
    load_plugins(default.plugin)
    resumed = None if base or recipe else resumed_recipe(read_distillation, rest, default.run.out)
    if resumed is not None:
        default = resumed.with_method(default.method, preset) if preset else resumed
    elif recipe_of:
        default = published(recipe_of).applied(default, recipe_of)
    if resumed is not None and recipe_of not in (None, resumed.recipe_of):
        raise ValueError(f"the run was started with {resumed.settings}; leave out --recipe-of, or pass --run.out.")
    if students:
        plain = replace(default.student, width=None, depth=None, heads=None).called(students[0])
        default = replace(default, student=plain, extra_students=())
    elif name := pop_flag(list(rest), "--student.name"):
        default = replace(default, student=default.student.called(name))
    if fit and not (base or recipe or resumed or recipe_of):
        fixed = () if all("patch16_224" in name or takes_any_size(name) for name in students) else SIZE_FLAGS
        default = fitted(default, [*rest, *fixed])
    method = choose_members(default.method, rest)
    refuse_options_of_others(method, rest)
    return rest, students, replace(default, method=method, plugin=(*default.plugin, *plugins))


def _default(preset: str | None, recipe: str | None, arguments: list[str], student: str) -> DistillConfig:
    if recipe:
        config = read_distillation(Path(recipe))
        return config.with_method(presets.recipe(preset, demo=True).method, preset) if preset else config
    own_data = pop_flag(list(arguments), "--data") not in (None, "stamps")
    return presets.recipe(preset or presets.default_for(student), demo=not own_data)


def fitted(config: DistillConfig, arguments: Sequence[str], data: Any = None) -> DistillConfig:
    """The recipe for own images, fitted to them and to this machine; not for bundled ones, and not for ``--help``.

    Args:
        config: of the paper.
        arguments: options that are given; these count.
        data: the images; None: those of ``--data``.
    """
    data = get_flag(list(arguments), "--data") if data is None else data
    if data in (None, "stamps") or {"-h", "--help", "--help-all"} & set(arguments):
        return config
    subset = get_flag(list(arguments), "--subset") or config.subset or None
    given, images, machine = (
        [a.partition("=")[0] for a in arguments],
        load_images(data, subset=subset).train,
        this_machine(),
    )
    if not len(images):
        return config
    found = fit_to_data(config, images, machine, given)
    say_next(told(found, config, images, machine, given))
    return found


def choose_members(method: Method, arguments: list[str]) -> Method:
    """Take ``--fusion mean`` and the like away, and ``--objectives.NAME MEMBER``; member ``none`` removes one.

    Raises:
        ValueError: an unknown member, or an objective to be removed that is not there.
    """
    chosen: dict[str, Any] = {}
    for field, slot in SLOTS.items():
        if names := pop_all(arguments, f"--{field}"):
            chosen[field] = slot.choose(names[-1])
    objectives = dict(method.objectives)
    for flag in [argument for argument in arguments if re.fullmatch(r"--objectives\.[\w-]+(=.*)?", argument)]:
        key = flag.partition("=")[0]
        name, member = key.removeprefix("--objectives."), pop_flag(arguments, key)
        if objectives.pop(name, None) is None and member == "none":
            raise ValueError(f"no objective {name!r} to take away; {hint(name, objectives)}")
        if member and member != "none":
            objectives[name] = Objective.choose(member)
    if objectives != method.objectives:
        chosen["objectives"] = objectives
    return replace(method, **chosen) if chosen else method


def refuse_options_of_others(method: Method, arguments: Sequence[str]) -> None:
    """Say whose option it is, if the member that fills the slot has none of that name.

    Raises:
        ValueError: an option of a member that was not chosen.
    """
    for argument in arguments:
        field, _, option = argument.partition("=")[0].removeprefix("--").partition(".")
        if field not in SLOTS:
            continue
        name, member = option.removeprefix("no-").replace("-", "_"), getattr(method, field)
        having = [key for key, kind in SLOTS[field].members.items() if name in {part.name for part in fields(kind)}]
        if having and member.name not in having:
            raise ValueError(
                f"--{field}.{option} is no option of {field} {member.name!r}; choose --{field} {'|'.join(having)}, or "
                "a --preset that has it."
            )


def with_students(config: DistillConfig, students: Sequence[str]) -> DistillConfig:
    """A distillation with all students that were named, alike but for their architecture."""
    extra = tuple(config.student.called(name) for name in students[1:])
    return replace(config, extra_students=extra) if students else config


def choices_help() -> str:
    """What ``--help`` says about the options of a distillation that choose others."""
    slots = [f"--{field} {{{','.join(slot.members)}}}: a slot of the method." for field, slot in SLOTS.items()]
    return "\n".join(
        (
            "",
            f"--preset {{{','.join(presets.METHODS)}}}: a method, whose values the options change; left out: comad for "
            "a plain Vision Transformer as the student, consensus for other networks.",
            f"--recipe-of {{{','.join(PUBLISHED)}}}: the published optimiser settings of that method.",
            "--recipe FILE.yaml: a recorded run, whose values the options change.",
            "--student NAME: an architecture; several times, for several students that share the teachers' passes,",
            "    each in a folder of its own. The options of --student.* then hold for all of them.",
            *slots,
            f"--objectives.NAME {{{','.join(Objective.members)}}} adds a term, or none removes it.",
            "--plugin FILE.py adds members of your own.",
            "",
            "Defaults are the demo's; after --data FOLDER, those for own images.",
        )
    )


def read_distillation(path: Path) -> DistillConfig:
    """A recipe of a distillation; names of the first version are understood, and told.

    Raises:
        ValueError: see `comad.runtime.recipe.read_recipe`.
    """
    return read_recipe(DistillConfig, path, upgrade)


def rename_flags(arguments: list[str]) -> list[str]:
    """Options of the first version by the names of today; each is told once."""
    renamed, values = [], {}
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--method."):
            renamed.append(values.get(argument, argument))
            values = {}
            continue
        name, values = _renamed_flag(flag)
        renamed.append(f"{name}{equals}{values.get(value, value)}")
        values = {} if equals else values
    return renamed


def _renamed_flag(flag: str) -> tuple[str, dict[str, Any]]:
    """Its name of today, and its values that are called otherwise now."""
    head, _, last = flag.removeprefix("--").replace("-", "_").rpartition(".")
    negated = "no-" if last.startswith("no_") else ""
    name = _rename(f"{head}.{last.removeprefix('no_')}")
    head, _, last = name.removeprefix("method.").removesuffix(".name").replace("_", "-").rpartition(".")
    new = f"--{head}{'.' * bool(head)}{negated}{last}"
    warn(f"{flag} is called {new} now.")
    return new, {old: value or "none" for old, value in RENAMED_VALUES.get(name, {}).items()}


def _rename(dotted: str) -> str:
    """The name of today for a dotted name of the first version: the longest beginning that is renamed counts."""
    for size in range(dotted.count(".") + 1, 0, -1):
        head, tail = dotted.split(".")[:size], dotted.split(".")[size:]
        if (old := ".".join(head)) in RENAMED:
            return ".".join([RENAMED[old], *tail])
    return dotted


def upgrade(plain: Any) -> Any:
    """A recipe of the first version by the names of today; others are left alone."""
    if not isinstance(plain, Mapping):
        return plain
    load_plugins(plain.get("plugin") or [])  # its members may be named below
    if all(name == _rename(name) for name, _ in _leaves(plain, "")):
        return plain
    warn("this recipe has names of the first version; they are read by those of today.")
    renamed = {"teacher_image_size": "grid"} | {RENAMED.get(key, key): value for key, value in plain.items()}
    if isinstance(method := plain.get("method"), Mapping):
        renamed["method"] = _upgraded_method(method)
    return renamed


def _upgraded_method(method: Mapping[str, Any]) -> dict[str, Any]:
    found, queue = {}, {}
    for key, value in _leaves({k: v for k, v in method.items() if k != "terms"}, "method."):
        name = _rename(key)
        value = RENAMED_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
        slot, _, option = name.removeprefix("method.").partition(".")
        if name == "method.objectives.queue.size":
            queue = {"size": value}
        elif slot in SLOTS and value is not None:
            found.setdefault(slot, {})[option or "name"] = value
        elif value is not None:
            found[slot] = value
    found |= {field: _known_options(slot, found[field]) for field, slot in SLOTS.items() if field in found}
    if isinstance(terms := method.get("terms"), Mapping):
        found["objectives"] = {name: _objective(term, queue) for name, term in terms.items()}
    elif "terms" in method:
        found["objectives"] = terms
    return found


def _leaves(plain: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _known_options(slot: type[Slot], options: dict[str, Any]) -> dict[str, Any]:
    """The options that a member has; the first version wrote those of others, too."""
    if options.pop("decoder", False):
        options["name"] = "mae-decoder"
    name = str(options.get("name", slot.default))
    known = slot.members.get(name)
    of_others = {field.name for member in slot.members.values() for field in fields(member)}
    dropped = of_others - {field.name for field in fields(known)} if known else of_others
    return {"name": name, **{key: value for key, value in options.items() if key not in dropped}}


def _objective(term: Any, queue: Mapping[str, Any]) -> Any:
    """A term of the first version as an objective."""
    if not isinstance(term, Mapping):
        return term
    options = {key: value for key, value in term.items() if key != "over"}
    over = term.get("over", "channels")
    return _known_options(Objective, {**queue, **options, "name": OBJECTIVES.get(over, over), "relation": over})
