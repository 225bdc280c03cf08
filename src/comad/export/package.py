"""A folder with weights, config and model card that timm loads without comad."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_model_data_config
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from comad.models.files import sha256
from comad.models.teachers import TeacherCard, markdown
from comad.models.timm_backbone import TimmBackbone

TOLERANCE = 1e-5
"""Largest absolute difference between the tokens of a float32 export and of the backbone."""
HALF_TOLERANCE = 2e-2
"""Largest difference for a 16-bit export, relative to the largest token value."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known about an exported model: the text of ``README.md`` and the key ``comad`` of ``config.json``.

    Attributes:
        name: of the model.
        licence: of the exported weights, such as ``apache-2.0``; see `comad.models.teachers.inherited_licence`.
        architecture: the timm name.
        token_types: tokens that carry meaning.
        about: one sentence on where it comes from.
        preset, seed, images_seen: of the run.
        command: what repeats the run.
        code: version and commit of comad.
        hardware, hours: what trained it, and for how long.
        curve: lines of the log worth keeping, such as loss and kNN by epoch.
        data, data_licence: the images that were learnt from.
        eval_crop: share of the shorter side that an evaluation view shows.
        teachers: each teacher's origin.
        scores: rows of the scoreboard, as in its JSON file; percent.
        sha256: of ``model.safetensors``; `export_backbone` fills it in.
    """

    name: str
    licence: str
    architecture: str
    token_types: tuple[str, ...]
    about: str
    preset: str
    seed: int
    images_seen: int
    data: str
    data_licence: str
    eval_crop: float = 0.875
    command: str = ""
    code: str = ""
    hardware: str = ""
    hours: float = 0.0
    curve: tuple[dict[str, Any], ...] = ()
    teachers: tuple[TeacherCard, ...] = ()
    scores: tuple[dict[str, Any], ...] = ()
    sha256: str = ""


def export_backbone(
    backbone: TimmBackbone,
    folder: Path,
    *,
    model_args: dict[str, Any],
    card: ModelCard,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads offline, and verify it.

    The folder holds ``model.safetensors``, ``config.json`` (with the card under the key ``comad``) and ``README.md``.
    It is written beside its place and renamed when it is verified; an earlier export at its place is replaced.
    ``model(images)`` then gives the class token, or the mean of the patches if the class token carries no meaning.

    Args:
        backbone: the network, on any device; left as it is.
        folder: where to.
        model_args: arguments that make ``card.architecture`` this network: ``{"img_size": 48, "patch_size": 8, …}``.
        card: about the model.
        dtype: of the weights in the file.

    Raises:
        ValueError: timm knows no such architecture, or the place is taken by something else than an export.
        RuntimeError: timm does not give the same tokens as the backbone; nothing is written.
    """
    if not timm.is_model(card.architecture):
        raise ValueError(f"timm knows no model {card.architecture!r}; give the name the student was built by.")
    _check_place(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        vit = _save(backbone, partial, model_args, dtype)
        card = replace(card, sha256=sha256(partial / "model.safetensors"))
        _complete_config(partial / "config.json", _preprocessing(backbone, vit, card), card)
        (partial / "README.md").write_text(model_card(card, folder), encoding="utf-8")
        verify_export(backbone, partial, dtype)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def verify_export(backbone: TimmBackbone, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Load a folder by timm and compare the tokens of a random image, and what they are pooled to, with the backbone's.

    Raises:
        RuntimeError: they differ by more than `TOLERANCE`, or in 16 bits by more than `HALF_TOLERANCE`.
    """
    network = copy.deepcopy(backbone).cpu().float().eval()
    height, width = (side * backbone.patch_size for side in backbone.grid)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = network(image)
        prefix = [] if tokens.cls is None else [tokens.cls.unsqueeze(1)]
        pooled = tokens.cls if tokens.cls is not None and "cls" in network.token_types else tokens.patches.mean(dim=1)
        expected = torch.cat([pooled.unsqueeze(1), *prefix, tokens.patches], dim=1)
        found = _timm_tokens(folder, image, len(prefix))
    difference = (found - expected).abs().max().item()
    limit = TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE * expected.abs().max().item()
    if not difference <= limit:  # so that NaN fails too
        raise RuntimeError(f"the export at {folder} gives other tokens than the model: {difference:.2e} > {limit:.2e}.")


def model_card(card: ModelCard, folder: Path) -> str:
    """Build the text of ``README.md``, with the metadata block that the Hugging Face Hub reads."""
    teachers = [(f"`{t.name}`", t.format, f"`{t.sha256}`", markdown(t.licence)) for t in card.teachers]
    scores = [(f"`{row['name']}`", row["role"], *(_percent(row.get(key)) for key in _SCORES)) for row in card.scores]
    known = card.licence if card.licence == "apache-2.0" else "other"  # the hub has its own names
    metadata = {"library_name": "timm", "license": known, "tags": ["timm", "image-feature-extraction", "comad"]}
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in metadata.items()),
            "---",
            f"# {card.name}",
            "",
            card.about,
            "",
            f"A Vision Transformer (timm `{card.architecture}` with arguments in `config.json`) without a head, for",
            f"features of images. Tokens that carry meaning: {', '.join(card.token_types)}. "
            f"Licence: {markdown(card.licence)}.",
            "",
            "## Use",
            "",
            "```python",
            snippet(Path(folder.name)).rstrip(),
            "```",
            "",
            *(
                ["## Teachers", "", *_markdown(("teacher", "format", "sha256", "licence"), teachers), ""]
                if teachers
                else []
            ),
            "## Training",
            "",
            f"- data: {card.data} (licence: {card.data_licence})",
            f"- preset: `{card.preset}`, seed {card.seed}",
            f"- images seen: {card.images_seen:,}",
            *([f"- weights: sha256 `{card.sha256}`"] if card.sha256 else []),
            *([f"- command: `{card.command}`"] if card.command else []),
            *([f"- code: comad {card.code}"] if card.code else []),
            *([f"- hardware: {card.hardware}, {card.hours:.2f} hours"] if card.hardware else []),
            *(f"- {json.dumps(line)}" for line in card.curve),
            "",
            "## Scores",
            "",
            "Top-1 percent on the test images; k, pool and probe settings were chosen on the validation images.",
            "",
            *_markdown(("model", "role", *_SCORES.values()), scores),
            "",
        ]
    )


def snippet(folder: Path) -> str:
    """Give the Python code that loads an export by timm and encodes ``photo.jpg``."""
    return f"""import timm
import torch
from PIL import Image

model = timm.create_model({f"local-dir:{folder}"!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)
with torch.inference_mode():
    feature = model(image)  # (1, width)
    patches = model.forward_features(image)[:, model.num_prefix_tokens :]  # (1, patches, width)
"""


_SCORES = {"knn": "kNN", "knn_coarse": "kNN coarse", "linear": "linear", "linear_coarse": "linear coarse"}


def _check_place(folder: Path) -> None:
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        return
    config = folder / "config.json"
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not config.is_file() or "comad" not in json.loads(config.read_text(encoding="utf-8")):
        raise ValueError(f"{folder} exists and is not an export of comad; name another folder.")


def _save(backbone: TimmBackbone, folder: Path, model_args: dict[str, Any], dtype: torch.dtype) -> VisionTransformer:
    """Save weights and config by timm, from a copy that pools what carries meaning."""
    vit = copy.deepcopy(backbone.vit).cpu().to(dtype)
    pool = "token" if "cls" in backbone.token_types else "avg"
    model_args = {key: value for key, value in model_args.items() if key not in ("num_classes", "in_chans")}
    if vit.global_pool != pool:
        model_args |= {"global_pool": pool, "fc_norm": False}  # keep the norm before the pool, as in the backbone
    vit.reset_classifier(0, pool)
    save_for_hf(vit, str(folder), model_args=model_args, safe_serialization=True)
    return vit


def _preprocessing(backbone: TimmBackbone, vit: VisionTransformer, card: ModelCard) -> dict[str, Any]:
    """Describe our weights, and none of the origin, licence and labels that timm keeps for its own weights."""
    height, width = (side * backbone.patch_size for side in backbone.grid)
    return {
        "input_size": [3, height, width],
        "fixed_input_size": not vit.dynamic_img_size,
        "interpolation": "bicubic",
        "crop_pct": card.eval_crop,
        "crop_mode": "center",
        "mean": _shortest(backbone.pixel_mean),
        "std": _shortest(backbone.pixel_std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": card.licence,
    }


def _shortest(values: Float[Tensor, "3 1 1"]) -> list[float]:
    """Give the shortest decimals that are the same in float32: 0.485, not 0.48500001430511475."""
    return [float(str(value)) for value in values.flatten().float().cpu().numpy()]


def _complete_config(path: Path, pretrained_cfg: dict[str, Any], card: ModelCard) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("num_classes", "in_chans"):  # transformers passes these itself and fails if they come twice
        config["model_args"].pop(key, None)
    config |= {"architecture": card.architecture, "num_classes": 0, "pretrained_cfg": pretrained_cfg}
    config["comad"] = asdict(card)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _timm_tokens(folder: Path, image: Float[Tensor, "1 3 H W"], num_prefix: int) -> Float[Tensor, "1 n E"]:
    """Encode as a user of timm would, pixels normalised by the config: what is pooled, class token, patches."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert isinstance(model, VisionTransformer)
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    tokens = model.forward_features((image - mean) / std)
    pooled = model.forward_head(tokens).unsqueeze(1)
    return torch.cat([pooled, tokens[:, :num_prefix], tokens[:, model.num_prefix_tokens :]], dim=1)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _markdown(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (titles, ("---",) * len(titles), *rows)]
