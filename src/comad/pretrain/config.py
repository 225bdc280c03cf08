"""What a pretraining run is made of. Add a method: a file with its dataclass, an entry in `METHODS`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from comad.data.loader import LoaderConfig
from comad.models.timm_backbone import VitConfig
from comad.pretrain.ibot import Ibot
from comad.pretrain.mae import Mae
from comad.pretrain.mocov3 import MoCoV3
from comad.runtime.optim import OptimConfig
from comad.runtime.train import RunConfig

Method = Mae | MoCoV3 | Ibot


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a teacher from scratch.

    Args:
        method: the objective and its settings.
        data: a folder of images, or the name of a bundled set.
        vit: the network.
        loader: how images are read.
        optim: the optimiser and how long it runs.
        run: where the run lives.
    """

    method: Method = field(default_factory=Mae)
    data: str = "stamps"
    vit: VitConfig = field(default_factory=lambda: VitConfig(image_size=48, patch_size=8, width=192, depth=6, heads=3))
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(epochs=30, batch_size=128, base_lr=1e-3, warmup_epochs=2)
    )
    run: RunConfig = field(default_factory=lambda: RunConfig(probe_every=590, checkpoint_every=295))


METHODS: dict[str, Method] = {"mae": Mae(), "mocov3": MoCoV3(), "ibot": Ibot()}

EPOCHS = {"mae": 40, "mocov3": 24, "ibot": 20}
"""How long the bundled teachers were trained."""


def recipe(method: str) -> PretrainConfig:
    """The recipe of a bundled teacher.

    Raises:
        ValueError: no such method.
    """
    if method not in METHODS:
        raise ValueError(f"no pretraining method {method!r}; choose one of: {', '.join(METHODS)}.")
    config = PretrainConfig(method=METHODS[method])
    size = {"mae": 48}.get(method, 32)  # contrastive crops of 32 pixels show things as large as whole pictures of 48
    batch_size = {"ibot": 64}.get(method, 128)
    return replace(
        config,
        vit=replace(config.vit, image_size=size),
        optim=replace(config.optim, epochs=EPOCHS[method], batch_size=batch_size),
        run=replace(config.run, out=f"runs/{method}", probe_every=2 * (7573 // batch_size)),
    )
