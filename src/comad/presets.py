"""Published methods, their ablations and the demo, as values. Add one: derive it by `replace`, list it in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from comad.data.loader import LoaderConfig
from comad.distillation.aligners import AutoencoderAdapter, StudentProjector, TrainedAdapter
from comad.distillation.config import DistillConfig
from comad.distillation.features import Blocks, MAEDecoder
from comad.distillation.fusion import DropEasiest, Gate, LossGate, Mean, Sum
from comad.distillation.masking import Disjoint, Independent, Shared, WholeImages
from comad.distillation.method import Method
from comad.distillation.normalizers import L2, PHIS, LayerNorm, Standardize
from comad.distillation.objectives import AttentionLoss, FeatureLoss, Objective, PixelLoss, QueueLoss, RelationLoss
from comad.models.timm_backbone import VitConfig
from comad.runtime.optim import OptimConfig
from comad.runtime.run import RunConfig
from comad.runtime.spelling import hint

COMAD = Method()
"""CoMAD (arXiv:2508.04816) with targets that cannot collapse: calibrated aligners, superset masks, detached gate."""

LITERAL = Method(
    masking=Independent(hidden="zero", teacher_hidden="zero"),
    aligner=TrainedAdapter(),
    fusion=Gate(detached=False),
    objectives={
        "token": FeatureLoss(where="visible", distance="kl-student-teacher", projection=True),
        "spatial": FeatureLoss(where="all", cls=False, distance="kl-student-teacher", projection=True),
    },
)
"""CoMAD as printed: everything trained on the target's side. It collapses, and its run says so."""

TINYMIM = Method(
    masking=WholeImages(),
    aligner=StudentProjector(head="identity"),
    fusion=Sum(),
    single_teacher=True,
    objectives={
        "queries-keys": AttentionLoss(relation="queries-keys"),
        "values-values": AttentionLoss(relation="values-values"),
    },
)
"""TinyMIM (arXiv:2301.01296): attention of the last block, KL(teacher ‖ student), both relations with weight 1.

All blocks take the teacher's number of heads, for timm's config has one number; the paper asks it of the last.
"""

TINYMIM_FEAT = Method(
    masking=WholeImages(),
    normalizer=LayerNorm(),
    aligner=StudentProjector(),
    fusion=Sum(),
    single_teacher=True,
    objectives={"feature": FeatureLoss(where="all", distance="smooth-l1", temperature=2.0)},
)
"""TinyMIM's baseline on features: smooth L1 with β 2 to the normalised tokens of the last block."""

DMAE = Method(
    masking=Shared(mask_ratio=0.75),
    features=Blocks(teacher=2 / 3, student=2 / 3),
    normalizer=L2(),
    aligner=StudentProjector(),
    fusion=Sum(),
    single_teacher=True,
    objectives={"feature": FeatureLoss(where="visible", cls=False, distance="l1"), "pixels": PixelLoss()},
)
"""DMAE (arXiv:2208.12256): MAE, and a middle block's tokens of the same visible patches. Both terms have weight 1."""

G2SD = Method(
    masking=Shared(mask_ratio=0.75, decoder_output="all"),
    features=MAEDecoder(),
    normalizer=LayerNorm(),
    aligner=StudentProjector(head="mlp"),
    fusion=Sum(),
    single_teacher=True,
    objectives={"feature": FeatureLoss(where="all", cls=False, distance="smooth-l1", temperature=2.0)},
)
"""G2SD (CVPR 2023), its generic stage: the student's decoder follows the decoder of a MAE teacher at every patch.

Its teacher's decoder is read after its last block and norm; the student's MLP is ours. The specific stage is left out.
"""

DMJD = Method(
    masking=Disjoint(mask_ratio=0.6),
    normalizer=LayerNorm(),
    aligner=StudentProjector(head="mlp"),
    fusion=Sum(),
    single_teacher=True,
    objectives={
        "visible": FeatureLoss(where="visible", cls=False, distance="smooth-l1"),
        "hidden": FeatureLoss(where="hidden", cls=False, distance="mse"),
    },
)
"""Disjoint masking with joint distillation: two masks per image without a common patch; the teacher sees all.

Thinner than published: its decoder and its visible branch share one MLP, and all terms have weight 1.
"""

HYBRID = Method(
    masking=WholeImages(),
    features=Blocks(qkv=2 / 3),
    normalizer=LayerNorm(),
    aligner=StudentProjector(),
    fusion=Sum(),
    objectives={
        "queries-keys": AttentionLoss(relation="queries-keys", teachers="first"),
        "values-values": AttentionLoss(relation="values-values", teachers="first"),
        "feature": FeatureLoss(teachers="rest", where="all", distance="smooth-l1", temperature=2.0),
    },
)
"""After Hybrid Distillation: attention of a middle block of the first teacher (masked images), tokens of the others.

Published detail is thin here: the depth, the weights of the terms and the distance are our choice.
"""

DMT_LIKE = Method(
    masking=WholeImages(),
    normalizer=LayerNorm(),
    aligner=StudentProjector(),
    fusion=Mean(),
    objectives={"token": FeatureLoss(where="all"), "spatial": FeatureLoss(where="all", cls=False, distance="mse")},
)
"""A guess at DMT, whose text was not available: token KL and spatial MSE to the mean of the teachers."""


def _cosine_and_smooth_l1(share: float, cls_share: float) -> dict[str, Objective]:
    """``share`` times 1 - cosine, the rest smooth L1 with β 1, for patches and for the class token apart."""
    terms = {
        "cls-cosine": FeatureLoss(where="cls", distance="cosine", weight=cls_share),
        "cls-smooth-l1": FeatureLoss(where="cls", distance="smooth-l1", weight=1 - cls_share),
        "patch-cosine": FeatureLoss(where="all", cls=False, distance="cosine", weight=share),
        "patch-smooth-l1": FeatureLoss(where="all", cls=False, distance="smooth-l1", weight=1 - share),
    }
    return {name: term for name, term in terms.items() if term.weight}


UNIC = Method(
    masking=WholeImages(),
    normalizer=Standardize(over="running"),
    aligner=StudentProjector(head="multi-layer", separate_cls=True),
    fusion=DropEasiest(),
    objectives=_cosine_and_smooth_l1(0.5, 0.5),
)
"""UNIC (arXiv:2408.05088). Its head reads three depths, our choice."""

DUNE = replace(UNIC, normalizer=Standardize(over="batch"), aligner=StudentProjector(head="transformer"))
"""DUNE (arXiv:2503.14405): a transformer block per teacher as projector."""

RADIO = Method(
    masking=WholeImages(),
    aligner=StudentProjector(head="mlp", separate_cls=True),
    fusion=Sum(),
    objectives=_cosine_and_smooth_l1(0.9, 1.0),
)
"""AM-RADIO (arXiv:2312.06709): an MLP per teacher, teachers' tokens as they are, losses added up."""

PHI_S = replace(
    RADIO,
    normalizer=PHIS(),
    objectives={
        "cls": FeatureLoss(where="cls", distance="cosine"),
        "patch": FeatureLoss(where="all", cls=False, distance="mse"),
    },
)
"""RADIO with PHI-S standardisation and MSE on patches (arXiv:2410.01680)."""

EUPE = replace(RADIO, normalizer=Standardize(over="calibration"))
"""The last stage of EUPE, straight from the teachers: its large proxy teacher is a distillation of its own."""

GRAM = Method(
    masking=WholeImages(mixup=True),
    features=Blocks(pooled=True),
    normalizer=L2(),
    aligner=StudentProjector(separate_cls=True),
    fusion=Sum(),
    single_teacher=True,
    objectives={"queue": QueueLoss(), "gram": RelationLoss()},
)
"""Like LightlyTrain's distillation: mean of the patches against a queue of the teacher's, and cosines between tokens.

Its mixup blends images of a batch, so its teachers cannot be cached. A token's cosine to itself is left out of its row.
"""


def _objectives(method: Method, **changes: Mapping[str, Any]) -> Method:
    """Change fields of named objectives."""
    changed = {name: replace(term, **changes.get(name, {})) for name, term in method.objectives.items()}
    return replace(method, objectives=changed)


METHODS: dict[str, Method] = {
    "comad": COMAD,
    "comad-literal": LITERAL,
    "mean": replace(COMAD, fusion=Mean()),
    # Table 3 of the paper: the losses
    "comad-token-only": _objectives(COMAD, spatial={"weight": 0.0}),
    "comad-spatial-only": _objectives(COMAD, token={"weight": 0.0}),
    "comad-mse": _objectives(COMAD, **{name: {"distance": "mse", "temperature": 1.0} for name in COMAD.objectives}),
    # Table 6: the gate
    "comad-uniform": replace(COMAD, fusion=Gate(affinity=False, consensus=False)),
    "comad-affinity-only": replace(COMAD, fusion=Gate(consensus=False)),
    "comad-consensus-only": replace(COMAD, fusion=Gate(affinity=False)),
    # other repairs of the paper's trained adapters
    "comad-anchor": replace(COMAD, aligner=AutoencoderAdapter()),
    "comad-student-side": replace(COMAD, normalizer=LayerNorm(), aligner=StudentProjector(), fusion=LossGate()),
    # the field
    "tinymim": TINYMIM,
    "m-tinymim": replace(TINYMIM, single_teacher=False),
    "tinymim-feat": TINYMIM_FEAT,
    "dmae": DMAE,
    "g2sd": G2SD,
    "dmjd": DMJD,
    "hybrid": HYBRID,
    "dmt-like": DMT_LIKE,
    "unic": UNIC,
    "dune": DUNE,
    "radio": RADIO,
    "phi-s": PHI_S,
    "eupe": EUPE,
    "gram": GRAM,
}

DEMO = DistillConfig(
    student=VitConfig(image_size=48, patch_size=8, width=96, depth=6, heads=3),
    optim=OptimConfig(epochs=16.0, batch_size=128, base_lr=3e-3, warmup_epochs=1.0),
    loader=LoaderConfig(workers=1, fixed_views=2),
    cache_teachers=True,
    teacher_image_size="grid",
    run=RunConfig(threads=1, probe_every=236, checkpoint_every=118),
)
"""Three bundled teachers into a student of a quarter of their size on the bundled stamps, minutes on two CPU cores."""

IMAGES = DistillConfig(
    teachers=(),
    student=VitConfig(name="vit_tiny_patch16_224", image_size=224),
    optim=OptimConfig(epochs=300.0, batch_size=256, base_lr=1.5e-4, warmup_epochs=15.0),
)
"""The paper's recipe: ViT-Ti/16 at 224 pixels, 300 epochs, learning rate 1.5e-4 per 256 images; name your teachers."""


def recipe(preset: str, demo: bool) -> DistillConfig:
    """A preset in the demo's or the paper's recipe.

    Raises:
        ValueError: no such preset.
    """
    if preset not in METHODS:
        raise ValueError(f"no preset {preset!r}; {hint(preset, METHODS)}")
    method = METHODS[preset]
    config = (DEMO if demo else IMAGES).with_method(method, preset)
    if method.single_teacher and demo:  # a teacher as the method was published with: MAE, but for `gram`
        return replace(config, teachers=("ibot-stamps" if preset == "gram" else "mae-stamps",))
    return config
