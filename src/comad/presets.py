"""Published methods, their ablations and the demo, as values. Add one: derive it by `replace`, list it in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from comad.data.loader import LoaderConfig
from comad.distill.aligners import Anchor, Trained
from comad.distill.config import DistillConfig, Method
from comad.distill.fusion import DropEasiest, Gate, LossGate, Mean, Sum
from comad.distill.heads import Student
from comad.distill.masking import Masking
from comad.distill.normalize import PhiS, Plain, Standardise
from comad.distill.objectives import Term
from comad.distill.taps import Tap
from comad.models.timm_backbone import VitConfig
from comad.runtime.optim import OptimConfig
from comad.runtime.spelling import hint
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


WHOLE = Masking(policy="none")

TINYMIM = Method(
    masking=WHOLE,
    aligner=Student(form="identity"),
    fusion=Sum(),
    single=True,
    terms={
        "queries-keys": Term(over="queries-keys", where="all"),
        "values-values": Term(over="values-values", where="all"),
    },
)
"""TinyMIM (arXiv:2301.01296): attention of the last block, KL(teacher ‖ student), both relations with weight 1.

All blocks take the teacher's number of heads, for timm's config has one number; the paper asks it of the last.
"""

TINYMIM_FEAT = Method(
    masking=WHOLE,
    normalize=Plain(function="layer-norm"),
    aligner=Student(),
    fusion=Sum(),
    single=True,
    terms={"feature": Term(where="all", distance="smooth-l1", temperature=2.0)},
)
"""TinyMIM's baseline on features: smooth L1 with β 2 to the normalised tokens of the last block."""

DMAE = Method(
    masking=Masking(policy="shared", student=0.75),
    tap=Tap(teacher=2 / 3, student=2 / 3),
    normalize=Plain(function="l2"),
    aligner=Student(),
    fusion=Sum(),
    single=True,
    terms={
        "feature": Term(where="visible", cls=False, distance="l1"),
        "pixels": Term(over="pixels", where="hidden", cls=False, distance="mse"),
    },
)
"""DMAE (arXiv:2208.12256): MAE, and a middle block's tokens of the same visible patches. Both terms have weight 1."""

G2SD = Method(
    masking=Masking(policy="shared", student=0.75),
    tap=Tap(decoder=True),
    normalize=Plain(function="layer-norm"),
    aligner=Student(form="mlp"),
    fusion=Sum(),
    single=True,
    terms={"feature": Term(where="all", cls=False, distance="smooth-l1", temperature=2.0)},
    decoder_fills="all",
)
"""G2SD (CVPR 2023), its generic stage: the student's decoder follows the decoder of a MAE teacher at every patch.

Its teacher's decoder is read after its last block and norm; the student's MLP is ours. The specific stage is left out.
"""

DMJD = Method(
    masking=Masking(policy="disjoint", student=0.6),
    normalize=Plain(function="layer-norm"),
    aligner=Student(form="mlp"),
    fusion=Sum(),
    single=True,
    terms={
        "visible": Term(where="visible", cls=False, distance="smooth-l1"),
        "hidden": Term(where="hidden", cls=False, distance="mse"),
    },
)
"""Disjoint masking with joint distillation: two masks per image without a common patch; the teacher sees all.

Thinner than published: its decoder and its visible branch share one MLP, and all terms have weight 1.
"""

HYBRID = Method(
    masking=WHOLE,
    tap=Tap(qkv=2 / 3),
    normalize=Plain(function="layer-norm"),
    aligner=Student(),
    fusion=Sum(),
    terms={
        "queries-keys": Term(over="queries-keys", teachers="first", where="all"),
        "values-values": Term(over="values-values", teachers="first", where="all"),
        "feature": Term(teachers="rest", where="all", distance="smooth-l1", temperature=2.0),
    },
)
"""After Hybrid Distillation: attention of a middle block of the first teacher (masked images), tokens of the others.

Published detail is thin here: the depth, the weights of the terms and the distance are our choice.
"""

DMT_LIKE = Method(
    masking=WHOLE,
    normalize=Plain(function="layer-norm"),
    aligner=Student(),
    fusion=Mean(),
    terms={"token": Term(where="all"), "spatial": Term(where="all", cls=False, distance="mse")},
)
"""A guess at DMT, whose text was not available: token KL and spatial MSE to the mean of the teachers."""


def _cosine_and_smooth_l1(share: float, cls_share: float) -> dict[str, Term]:
    """``share`` times 1 - cosine, the rest smooth L1 with β 1, for patches and for the class token apart."""
    terms = {
        "cls-cosine": Term(where="cls", distance="cosine", weight=cls_share),
        "cls-smooth-l1": Term(where="cls", distance="smooth-l1", weight=1 - cls_share),
        "patch-cosine": Term(where="all", cls=False, distance="cosine", weight=share),
        "patch-smooth-l1": Term(where="all", cls=False, distance="smooth-l1", weight=1 - share),
    }
    return {name: term for name, term in terms.items() if term.weight}


UNIC = Method(
    masking=WHOLE,
    normalize=Standardise(over="running"),
    aligner=Student(form="ladder", apart=True),
    fusion=DropEasiest(),
    terms=_cosine_and_smooth_l1(0.5, 0.5),
)
"""UNIC (arXiv:2408.05088). Which teachers are dropped is decided for each term by itself; three rungs, our choice."""

DUNE = replace(UNIC, normalize=Standardise(over="batch"), aligner=Student(form="transformer"))
"""DUNE (arXiv:2503.14405): a transformer block per teacher as projector."""

RADIO = Method(
    masking=WHOLE,
    aligner=Student(form="mlp", apart=True),
    fusion=Sum(),
    terms=_cosine_and_smooth_l1(0.9, 1.0),
)
"""AM-RADIO (arXiv:2312.06709): an MLP per teacher, teachers' tokens as they are, losses added up."""

PHI_S = replace(
    RADIO,
    normalize=PhiS(),
    terms={"cls": Term(where="cls", distance="cosine"), "patch": Term(where="all", cls=False, distance="mse")},
)
"""RADIO with PHI-S standardisation and MSE on patches (arXiv:2410.01680)."""

EUPE = replace(RADIO, normalize=Standardise(over="calibration"))
"""The last stage of EUPE, straight from the teachers: its large proxy teacher is a distillation of its own."""

GRAM = Method(
    masking=replace(WHOLE, mixup=True),
    tap=Tap(pooled=True),
    normalize=Plain(function="l2"),
    aligner=Student(apart=True),
    fusion=Sum(),
    single=True,
    terms={
        "queue": Term(over="queue", where="cls", temperature=0.07),
        "gram": Term(over="tokens", where="all", cls=False, temperature=0.07),
    },
)
"""Like LightlyTrain's distillation: mean of the patches against a queue of the teacher's, and cosines between tokens.

Its mixup blends images of a batch, so its teachers cannot be cached. A token's cosine to itself is left out of its row.
"""


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
    "comad-mse": _terms(COMAD, **{name: {"distance": "mse", "temperature": 1.0} for name in COMAD.terms}),
    # Table 6: the gate
    "comad-uniform": replace(COMAD, fusion=Gate(affinity=False, consensus=False)),
    "comad-affinity-only": replace(COMAD, fusion=Gate(consensus=False)),
    "comad-consensus-only": replace(COMAD, fusion=Gate(affinity=False)),
    # other repairs of the paper's trained adapters
    "comad-anchor": replace(COMAD, aligner=Anchor()),
    "comad-student-side": replace(COMAD, normalize=Plain(function="layer-norm"), aligner=Student(), fusion=LossGate()),
    # the field
    "tinymim": TINYMIM,
    "m-tinymim": replace(TINYMIM, single=False),
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
    if method.single and demo:  # a teacher as the method was published with: MAE, but for `gram`
        return replace(config, teachers=("ibot-stamps" if preset == "gram" else "mae-stamps",))
    return config
