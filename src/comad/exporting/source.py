"""What is exported, and what is known about it: runs, exported folders, teachers' names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import timm
import yaml
from pydantic import TypeAdapter, ValidationError
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from comad.data.images import Splits
from comad.evaluation.views import load_one
from comad.exporting.card import ModelCard
from comad.exporting.encoder import pool_of
from comad.exporting.package import module_of, timm_network
from comad.models.backbone import Backbone, Pool
from comad.models.files import read_file, read_json
from comad.models.networks import load_strictly
from comad.models.sources import BUNDLED, bundled_teachers, left_by_run
from comad.models.students import VitConfig
from comad.models.timm_backbone import takes_size

LARGEST_RECIPE = 2**20
T = TypeVar("T")


class Source(NamedTuple):
    """What is exported.

    Attributes:
        backbone: the network, on any device.
        card: what is known about it; timm's name is empty where timm does not know it.
        model_args: timm's arguments.
        splits: images to compare and to calibrate with.
        head: a linear head on a pool of the tokens, for the classes ``card.labels``.
        scoreboard: a file of scores that the exports are added to.
    """

    backbone: Backbone
    card: ModelCard
    model_args: dict[str, Any]
    splits: Splits
    head: tuple[nn.Linear, Pool] | None = None
    scoreboard: Path | None = None

    @property
    def pool(self) -> Pool:
        """What stands for an image."""
        return self.head[1] if self.head else pool_of(self.backbone)

    def not_timm(self) -> str:
        """Why timm cannot hold it; empty if it can."""
        if not timm.is_model(self.card.architecture):
            return "timm's name of this one is not known (in Python give architecture and model_args)"
        try:
            timm_network(self.backbone, self.head)
        except ValueError as error:
            return str(error).rstrip(".")
        return ""


def run_folder(spec: str) -> Path | None:
    """The folder of a run, if that is what is named.

    Raises:
        ValueError: the run has no student yet.
    """
    folder = Path(spec)
    if left_by_run(folder) != folder:
        return folder
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{spec}: this run has no student yet; finish it with --run.resume, then export it.")
    return None


def data_of(run: Path) -> str:
    """The images that a run learnt from, as its recipe has it.

    Raises:
        ValueError: the recipe cannot be read.
    """
    return _recipe(run, "data", str)


def _recipe(run: Path, key: str, kind: type[T]) -> T:
    """A part of a run's recipe.

    Raises:
        ValueError: the recipe cannot be read, or the part is of another type.
    """
    path, remedy = run / "config.yaml", "pass --data FOLDER" if key == "data" else "name the student's folder"
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_RECIPE:
            raise ValueError("no file of its size")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))[key]
        return TypeAdapter(kind).validate_python(found)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: no recipe that says what the run's {key} is; {remedy}.") from error


def load_source(spec: str, data: str, image_size: int | None, splits: Splits) -> Source:
    """Load what is named, and what is known about it: its card, and timm's arguments.

    Args:
        spec: an exported folder, NAME=FILE, a bundled teacher, or a timm model name.
        data: what the images are called; a bundled set has an image size of its own.
        image_size: pixels on the side of the images; None: an export's own, else that of ``data``.
        splits: images to compare and to calibrate with.

    Raises:
        ValueError: it cannot be loaded, or its card is damaged.
    """
    folder = BUNDLED / spec if spec in bundled_teachers() else Path(spec.partition("=")[2] or spec)
    config = read_json(folder / "config.json", "name an exported folder") if _is_timm_folder(folder) else {}
    size = image_size or _own_size(config)
    if (trained := _by_recipe(folder, config, image_size)) is not None:
        card = plain_card("student", config["architecture"], trained, "unknown", splits)
        return Source(trained, _card_of(config, card, folder), {}, splits)
    teacher = load_one(spec, data, size)
    if not config:
        name = teacher.card.architecture.partition(".")[0]
        arguments = {"img_size": teacher.backbone.image_size} if takes_size(name) else {}
        known = teacher.card.format == "timm"
        card = plain_card(teacher.name, name if known else "", teacher.backbone, teacher.card.licence, splits)
        return Source(teacher.backbone, card, arguments, splits)
    arguments = dict(config.get("model_args", {}))
    if "img_size" in arguments:
        arguments["img_size"] = teacher.backbone.image_size
    card = plain_card(teacher.name, config.get("architecture", ""), teacher.backbone, teacher.card.licence, splits)
    return Source(teacher.backbone, _card_of(config, card, folder), arguments, splits)


def at_hand(
    backbone: Backbone,
    name: str,
    splits: Splits,
    architecture: str = "",
    model_args: dict[str, Any] | None = None,
    card: ModelCard | None = None,
) -> Source:
    """A network that nobody named: what it keeps of timm's name and arguments is taken.

    Args:
        backbone: on any device.
        name: what it is to be called, if there is no card.
        splits: images to compare and to calibrate with.
        architecture, model_args: timm's, in the place of what the network says.
        card: about the model.
    """
    network = next(backbone.children())
    known = getattr(network, "pretrained_cfg", None) or {}
    architecture = architecture or (card.architecture if card else "") or known.get("architecture", "")
    card = card or plain_card(name, architecture, backbone, "unknown", splits)
    arguments = model_args or {}
    if model_args is None and type(network) is VisionTransformer and not hasattr(network.patch_embed, "backbone"):
        heads = cast(Any, network.blocks)[0].attn.num_heads
        arguments = {"patch_size": backbone.patch_size, "embed_dim": backbone.width, "num_heads": heads}
        arguments |= {"img_size": backbone.image_size, "depth": len(network.blocks)}
    elif model_args is None and takes_size(architecture):
        arguments = {"img_size": backbone.image_size}
    return Source(backbone, replace(card, architecture=architecture), arguments, splits)


def _by_recipe(folder: Path, config: dict[str, Any], image_size: int | None) -> Backbone | None:
    """The student of a run, if its network is made by the file that the run's recipe names, which is executed.

    Raises:
        ValueError: the recipe cannot be read, or makes another network.
    """
    recipe = folder.parent / "config.yaml"
    if not config or timm.is_model(config["architecture"]) or not recipe.is_file():
        return None
    student = _recipe(folder.parent, "student", VitConfig)
    if "=" not in student.name:
        return None
    backbone = replace(student, image_size=image_size or student.image_size).build()
    module = module_of(backbone)
    assert module is not None
    load_strictly(module, read_file(folder / "model.safetensors"), str(folder))
    return backbone.requires_grad_(False).eval()


def _is_timm_folder(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and not {"architecture", "comad"}.isdisjoint(read_json(config, "name an exported folder"))


def _own_size(config: dict[str, Any]) -> int | None:
    """Pixels on the side of the images that an export was made for."""
    size = (
        config.get("pretrained_cfg", {}).get("input_size") if isinstance(config.get("pretrained_cfg"), dict) else None
    )
    return size[-1] if isinstance(size, list) and size and isinstance(size[-1], int) and size[-1] > 0 else None


def _card_of(config: dict[str, Any], plain: ModelCard, folder: Path) -> ModelCard:
    """The card in a folder of ours; of timm's own folders the plain one.

    Raises:
        ValueError: the card is damaged.
    """
    if not config.get("comad"):
        return plain
    try:
        card = TypeAdapter(ModelCard).validate_python(config["comad"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{folder}: config.json has no sound card, {where}: {first['msg']}; export it again."
        ) from error
    return replace(card, labels=(), exports=())


def plain_card(name: str, architecture: str, backbone: Backbone, licence: str, splits: Splits) -> ModelCard:
    """What is known about a network that nobody wrote a card for."""
    return ModelCard(
        name=name,
        licence=licence.lower() if licence.lower() == "apache-2.0" else licence,
        architecture=architecture,
        token_types=backbone.token_types,
        about=f"{name}, exported by comad.",
        preset="none",
        seed=0,
        images_seen=0,
        data="unknown",
        data_licence="unknown",
        eval_crop=splits.train.eval_crop,
    )
