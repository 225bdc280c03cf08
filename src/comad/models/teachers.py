"""Frozen teachers, each with a card that says exactly what was loaded."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, no_type_check

import torch
from torch import nn

from comad.models.backbone import Backbone
from comad.models.networks import gives_tokens
from comad.models.objects import from_object, from_python_file
from comad.models.sources import Request, Size, Source, checked, find, take_options
from comad.runtime.progress import track

PERMISSIVE = re.compile(r"(apache-2\.0|mit|bsd(-\w+)*|cc0(-1\.0)?|none( \(.*\))?)$", re.IGNORECASE)
"""Licences of weights that ask nothing of a network that learnt from them; seeded weights have none."""


@dataclass(frozen=True)
class TeacherCard:
    """What a teacher is: printed, kept with the run and with every student, and compared at resume.

    Attributes:
        name: what the run calls it.
        source: name of the file, or of the folder and its file; no absolute path.
        format: a key of `comad.models.formats.FORMATS`, ``timm``, ``export`` or ``transformers``, or ``module``.
        architecture: a timm name, the kind of network if the shapes in the file say it all, or a class.
        sha256: of the weights file; of the names and bytes of the tensors if timm fetched or drew them.
        depth, width, heads, patch_size, num_prefix_tokens: the network; patch size in pixels. Depth and heads are 0
            where the network is no Vision Transformer.
        norm_eps: epsilon of the final norm; 0 if there is none.
        pixel_mean, pixel_std: pixel normalisation, in units of [0, 1] pixels.
        token_types: tokens that were trained, and so can be trusted.
        licence: of the weights, as far as known.
        params: number of parameters.
        about: where it comes from, if an export says so.
        image_size: pixels on the side of its images; 0 in cards of runs from before there was a choice.
        positions: how they came to the grid of these images, in words.
        unwrapped: containers and prefixes that its file had around the weights.
        read_at: number of the block that its tokens are read at, if it is not the last.
    """

    name: str
    source: str
    format: str
    architecture: str
    sha256: str
    depth: int
    width: int
    heads: int
    patch_size: int
    num_prefix_tokens: int
    norm_eps: float
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    token_types: tuple[str, ...]
    licence: str
    params: int
    about: str = ""
    image_size: int = 0
    positions: str = ""
    unwrapped: tuple[str, ...] = ()
    read_at: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The card in JSON's types: it equals itself after a round trip through a file."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def summary(self) -> str:
        """The card on one line."""
        shape = f"width {self.width}, patch {self.patch_size}"
        if self.depth:
            shape = f"depth {self.depth}, {self.heads} heads, {shape}"
        tokens = "+".join(self.token_types)
        if self.read_at:
            shape = f"read at block {self.read_at}, {shape}"
        if self.unwrapped:
            shape = f"unwrapped from {', '.join(self.unwrapped)}, {shape}"
        return (
            f"{self.name}: {self.format} {self.architecture}, {shape}, tokens {tokens}, "
            f"{self.params / 1e6:.1f}M parameters, {self.licence}, {self.source}, sha256 {self.sha256[:12]}"
        )


class Teacher(NamedTuple):
    """A frozen network, its name in the run, and its card."""

    name: str
    backbone: Backbone
    card: TeacherCard


@no_type_check  # at run time: what is wrong is told in one line
def load_teacher(
    teacher: str | nn.Module | Teacher,
    image_size: Size = None,
    dtype: torch.dtype = torch.float32,
    *,
    rows: int | None = None,
    allow_changed: bool = False,
    **facts: Any,
) -> Teacher:
    """Load a teacher, frozen and in eval mode. The random state of the caller is left alone.

    Args:
        teacher: one of ``NAME=FILE_OR_FOLDER`` (a folder of comad, timm's hub or transformers), a bare path, a name of
            `bundled_teachers`, a timm model (its pretrained weights), a timm model and ``:random`` (seeded, for
            benchmarks), ``efficientnet-lite0`` to ``2`` (from the extra of that name). ``TIMM_NAME.TAG=FILE`` reads a
            flat file as that model; ``NAME=NET.py:FUNCTION`` calls a function of yours that returns a module. Options
            at the end: ``:depth=11`` gives the tokens of block 11 after the final norm, ``:size=224`` the size of its
            images in place of ``image_size`` (``own`` and ``grid`` as well), ``:heads=N`` the heads of a width without
            a rule, ``:allow_changed`` weights that are not those whose hash is recorded. Or an object: a module, a
            model of timm or of transformers, which is copied, or a `Teacher`.
        image_size: pixels on the side of the square images to come; positions are resampled to it. "grid": as many as
            give ``rows``. None: as the network was made for.
        dtype: of the weights; pixels are normalised in float32 in any case.
        rows: the grid that patches are brought to; None keeps the network's own. If they differ, it sees whole images.
        allow_changed: see above.
        facts: of an object, see `teacher_from_module`; ``name`` is needed for one.

    Raises:
        ValueError: it is no teacher, the name is unknown, the file is unreadable or does not fit, or the image size is
            no multiple of the patch size.
    """
    if isinstance(teacher, Teacher):
        return _again(teacher, dtype, rows)
    if image_size == "grid" and rows is None:
        raise ValueError(f"{teacher}: images as large as the grid needs are asked for without rows; give them.")
    options = None
    if isinstance(teacher, str):
        text, options = take_options(teacher, image_size, rows, allow_changed)
        if made := from_python_file(text):
            name, teacher = made
            facts = {"name": name, **facts}
    if isinstance(teacher, str):
        if facts:
            raise ValueError(f"{teacher}: {', '.join(facts)} are for teachers that are objects; leave them out.")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            source = find(teacher, image_size, rows, allow_changed)
    elif isinstance(teacher, nn.Module):
        name = facts.pop("name", "") or type(teacher).__name__.lower()
        options = options or checked(Request("a module", image_size, rows))
        source = from_object(teacher, options._replace(name=name), **facts)
    else:
        what = repr(teacher).partition("\n")[0][:80]
        raise ValueError(f"{what} is no teacher; give a name, a file, a module or what load_teacher returns.")
    return _frozen(source, dtype, options)


@no_type_check
def load_on_grid(
    specs: Sequence[str | nn.Module | Teacher],
    rows: int,
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    place: Callable[[Backbone], object] | None = None,
    image_size: Size = "grid",
) -> list[Teacher]:
    """Load teachers whose patches form a grid of ``rows`` × ``rows``.

    Args:
        specs, dtype: see `load_teacher`; a module needs a name, so name it there first.
        rows: rows and columns of the grid.
        patch_size: pixels on the side of a student's patch; no network here needs it.
        place: puts a network where it is to live, before the next one is loaded.
        image_size: of all teachers whose spec has no ``:size=``. "grid": each sees the image size that gives it this
            grid, so that nothing is resampled; None: each sees the size it was made for.

    Raises:
        ValueError: two have the same name, or one cannot be loaded.
    """
    teachers = []
    for spec in track(specs, "loading teachers", "teachers"):
        teacher = load_teacher(spec, image_size, dtype, rows=rows)
        if place:
            place(teacher.backbone)
        teachers.append(teacher)
    names = [teacher.name for teacher in teachers]
    if len(set(names)) < len(names):
        how = "NAME=FILE, modules by load_teacher(module, name=NAME)"
        raise ValueError(f"two teachers have the same name: {', '.join(names)}; give them names with {how}.")
    return teachers


def _frozen(source: Source, dtype: torch.dtype, options: Request | None) -> Teacher:
    """Freeze a network and write its card."""
    backbone = source.backbone
    for network in backbone.children():  # the pixel normalisation stays in float32
        network.to(dtype)
    card = dataclasses.replace(_card(source), read_at=(options.depth or 0) if options else 0)
    return Teacher(source.name, backbone.requires_grad_(False).eval(), card)


def _again(teacher: Teacher, dtype: torch.dtype, rows: int | None) -> Teacher:
    """A teacher that was loaded before, on another grid if need be; it shares its weights."""
    if next(teacher.backbone.parameters(), torch.empty(0, dtype=dtype)).dtype != dtype:
        raise ValueError(f"{teacher.name}: it was loaded in another precision; load it in {dtype}.")
    if rows is None or teacher.backbone.grid == (rows, rows):
        return teacher
    backbone = copy.copy(teacher.backbone)
    backbone.resample_to(rows)
    return teacher._replace(backbone=backbone)


def teacher_from_module(
    name: str, module: nn.Module, image_size: int | None = None, *, rows: int | None = None, **facts: Any
) -> Teacher:
    """Make a teacher of your own module: `load_teacher` with a name. See `comad.models.objects.from_object`."""
    return load_teacher(module, image_size, rows=rows, name=name, **facts)


def markdown(text: str) -> str:
    """Text of others as text in Markdown: nothing in it is a link, a tag, a heading or the end of a table's cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", one_line(text))


def one_line(text: str) -> str:
    """Text of others on one line of at most 1,000 printable characters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)[:1000])


def licence_notice(teachers: Sequence[Teacher]) -> str:
    """One line that names the teachers under non-commercial licences; empty if there are none."""
    bound = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)
    names = [f"{name} ({card.licence})" for name, _, card in teachers if bound.search(card.licence)]
    if not names:
        return ""
    return f"Non-commercial weights: {', '.join(names)}. Their licences travel with every student distilled from them."


def inherited_licence(licences: Sequence[str]) -> str:
    """The licence of what was learnt from weights: apache-2.0 if all theirs are permissive, else the others."""
    bound = sorted({licence for licence in licences if not PERMISSIVE.match(licence)})
    return ", ".join(bound) or "apache-2.0"


def _card(source: Source) -> TeacherCard:
    """Write down what was loaded."""
    backbone, network = source.backbone, cast(Any, next(source.backbone.children()))
    facts: dict[str, Any] = {"depth": 0, "heads": 0, "norm_eps": 0.0}
    if gives_tokens(network) and hasattr(network, "blocks"):
        attention = getattr(network.blocks[0], "attn", None)
        heads = getattr(attention, "num_heads", 0)
        facts = {"depth": len(network.blocks), "heads": heads, "norm_eps": getattr(network.norm, "eps", 0.0)}
    facts["num_prefix_tokens"] = getattr(network, "num_prefix_tokens", 0) or 0
    return TeacherCard(
        name=source.name,
        source=source.source,
        format=source.format,
        architecture=source.architecture,
        sha256=source.sha256,
        width=backbone.width,
        patch_size=backbone.patch_size,
        pixel_mean=source.mean,
        pixel_std=source.std,
        token_types=backbone.token_types,
        licence=one_line(source.licence),
        params=sum(parameter.numel() for parameter in backbone.parameters()),
        about=one_line(source.about),
        image_size=backbone.image_size,
        positions=source.positions,
        unwrapped=source.unwrapped,
        **facts,
    )


def start_from(spec: str, backbone: Backbone) -> TeacherCard:
    """Copy the weights of a network of the same architecture into one that is to be trained, and its normalisation.

    Args:
        spec: named as a teacher is.
        backbone: changed in place.

    Raises:
        ValueError: it cannot be loaded, or is another architecture.
    """
    teacher = load_teacher(spec, backbone.image_size)
    if _architecture(teacher.backbone) != _architecture(backbone):
        raise ValueError(
            f"{spec!r} is another architecture ({teacher.card.heads} heads, width {teacher.card.width}, depth "
            f"{teacher.card.depth}, patches of {teacher.card.patch_size}) than what is to start from it; give both the "
            "same shape, or start from scratch."
        )
    backbone.load_state_dict(teacher.backbone.state_dict())
    for name in ("pixel_mean", "pixel_std"):
        getattr(backbone, name).copy_(getattr(teacher.backbone, name))
    return teacher.card


def _architecture(backbone: Any) -> Any:
    """What two networks must share if the weights of one are to mean the same in the other."""
    shapes = {name: x.shape for name, x in backbone.state_dict().items()}
    if not hasattr(backbone, "vit"):
        return shapes
    block = backbone.vit.blocks[0]
    return shapes, block.attn.num_heads, str(block.norm1), str(block.mlp.act)
