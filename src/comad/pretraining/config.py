"""What a pretraining run is made of. Add a method: a file with its dataclass, an entry in `METHODS`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from comad.data.load import DataConfig
from comad.data.loader import LoaderConfig
from comad.models.students import VitConfig
from comad.pretraining.ibot import Ibot
from comad.pretraining.mae import Mae
from comad.pretraining.mocov3 import MoCoV3
from comad.runtime.optim import OptimConfig
from comad.runtime.options import COMMON, NO_EFFECT
from comad.runtime.run import RunConfig
from comad.runtime.spelling import hint

Method = Mae | MoCoV3 | Ibot


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(DataConfig):
    """Train a teacher.

    Args:
        method: the objective and its settings.
        init: weights to start from, named as a teacher is; None starts from scratch.
        vit: the network.
        loader: how images are read.
        optim: the optimiser and how long it runs.
        run: where the run lives.
    """

    method: Method = field(default_factory=Mae)
    init: str | None = field(default=None, metadata=COMMON | NO_EFFECT)
    vit: VitConfig = field(default_factory=lambda: VitConfig(image_size=48, patch_size=8, width=192, depth=6, heads=3))
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(epochs=30.0, batch_size=128, base_lr=1e-3, warmup_epochs=2.0)
    )
    run: RunConfig = field(default_factory=lambda: RunConfig(probe_every=590, checkpoint_every=295))


METHODS: dict[str, Method] = {"mae": Mae(), "mocov3": MoCoV3(), "ibot": Ibot()}

RECIPES = {
    "mae": {"image_size": 48, "epochs": 100.0, "batch_size": 128, "base_lr": 2e-3},
    "mocov3": {"image_size": 32, "epochs": 60.0, "batch_size": 128, "base_lr": 1e-3},
    "ibot": {"image_size": 32, "epochs": 60.0, "batch_size": 64, "base_lr": 1e-3},
}
"""For the bundled pictures. Crops of 32 pixels show things as large as whole pictures of 48 do."""


def recipe(method: str) -> PretrainConfig:
    """The recipe of a method, from scratch.

    Raises:
        ValueError: no such method.
    """
    if method not in METHODS:
        raise ValueError(f"no pretraining method {method!r}; {hint(method, METHODS)}")
    chosen, plain = dict(RECIPES[method]), PretrainConfig(method=METHODS[method])
    vit = replace(plain.vit, image_size=chosen.pop("image_size"))
    optim = replace(plain.optim, **chosen, warmup_epochs=min(2.0, chosen["epochs"] / 10))
    return replace(plain, vit=vit, optim=optim, run=replace(plain.run, out=f"runs/{method}"))
