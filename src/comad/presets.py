"""Published methods, their ablations and the demo, as values. Add one: derive it by `replace`, list it in `METHODS`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from comad.data.loader import LoaderConfig
from comad.distill.aligners import Trained
from comad.distill.config import DistillConfig, Method
from comad.distill.fusion import Gate, Mean
from comad.distill.masking import Masking
from comad.distill.objectives import Term
from comad.models.timm_backbone import VitConfig
from comad.runtime.optim import OptimConfig
from comad.runtime.train import RunConfig

COMAD = Method()
"""CoMAD (arXiv:2508.04816) with targets that cannot collapse: calibrated aligners, superset masks, detached gate."""

LITERAL = Method(
    masking=Masking(policy="independent", hidden="zero", teachers_hidden="zero"),
    aligner=Trained(),
    fusion=Gate(detached=False),
    terms={
        "token": Term(where="visible", distance="kl-student-teacher", projection=True),
        "spatial": Term(where="all", cls=False, distance="kl-student-teacher", projection=True),
    },
)
"""CoMAD as printed: everything trained on the target's side. It collapses, and its run says so."""


def _terms(method: Method, **changes: Mapping[str, object]) -> Method:
    """Change fields of named terms."""
    return replace(method, terms={name: replace(term, **changes.get(name, {})) for name, term in method.terms.items()})


METHODS: dict[str, Method] = {
    "comad": COMAD,
    "comad-literal": LITERAL,
    "mean": replace(COMAD, fusion=Mean()),
    # Table 3 of the paper: the losses
    "comad-token-only": _terms(COMAD, spatial={"weight": 0.0}),
    "comad-spatial-only": _terms(COMAD, token={"weight": 0.0}),
    "comad-mse": _terms(COMAD, token={"distance": "mse"}, spatial={"distance": "mse"}),
    # Table 6: the gate
    "comad-uniform": replace(COMAD, fusion=Gate(affinity=False, consensus=False)),
    "comad-affinity-only": replace(COMAD, fusion=Gate(consensus=False)),
    "comad-consensus-only": replace(COMAD, fusion=Gate(affinity=False)),
}

DEMO = DistillConfig(
    student=VitConfig(image_size=48, patch_size=8, width=96, depth=6, heads=3),
    optim=OptimConfig(epochs=16.0, batch_size=128, base_lr=3e-3, warmup_epochs=1.0),
    loader=LoaderConfig(workers=1, fixed_views=2),
    cache_teachers=True,
    run=RunConfig(threads=1, probe_every=236, checkpoint_every=118),
)
"""Three bundled teachers into a student of a quarter of their size on the bundled stamps, minutes on two CPU cores."""

IMAGES = DistillConfig(
    teachers=(),
    student=VitConfig(name="vit_tiny_patch16_224", image_size=224),
    optim=OptimConfig(epochs=300.0, batch_size=256, base_lr=1.5e-4, warmup_epochs=15.0),
    loader=LoaderConfig(workers=4),
)
"""The paper's recipe: ViT-Ti/16 at 224 pixels, 300 epochs, learning rate 1.5e-4 per 256 images; name your teachers."""


def recipe(preset: str, demo: bool) -> DistillConfig:
    """A preset in the demo's or the paper's recipe.

    Raises:
        ValueError: no such preset.
    """
    if preset not in METHODS:
        near = difflib.get_close_matches(preset, list(METHODS), n=1)
        hint = f"did you mean {near[0]!r}? There are" if near else "choose one of"
        raise ValueError(f"no preset {preset!r}; {hint}: {', '.join(METHODS)}.")
    return replace(DEMO if demo else IMAGES, method=METHODS[preset], preset=preset)
