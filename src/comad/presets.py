"""Published methods, their ablations and the demo, as values. Add one: derive it by `replace`, list it in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from comad.data.loader import LoaderConfig
from comad.distillation.aligners import AutoencoderAdapter, StudentProjector, TrainedAdapter
from comad.distillation.config import DistillConfig
from comad.distillation.features import Blocks, MAEDecoder
from comad.distillation.fusion import Consensus, DropEasiest, Gate, LossGate, Mean, Sum
from comad.distillation.masking import Disjoint, Independent, Shared, WholeImages
from comad.distillation.method import Method
from comad.distillation.normalizers import L2, PHIS, LayerNorm, Standardize
from comad.distillation.objectives import (
    AngleLoss,
    AttentionLoss,
    DistanceLoss,
    FeatureLoss,
    HOGLoss,
    MapLoss,
    Objective,
    PixelLoss,
    QueueLoss,
    RelationLoss,
)
from comad.models.students import VitConfig, is_plain
from comad.runtime.optim import OptimConfig
from comad.runtime.run import RunConfig
from comad.runtime.spelling import hint

COMAD = Method()
"""CoMAD (arXiv:2508.04816) with targets that cannot collapse: calibrated aligners, superset masks, detached gate."""

LITERAL = Method(
    masking=Independent(hidden="zero", teacher_hidden="zero", count_hidden=True),
    features=Blocks(untrained_cls=True),
    aligner=TrainedAdapter(),
    fusion=Gate(detached=False),
    objectives={
        "token": FeatureLoss(where="visible", distance="kl-student-teacher", projection=True),
        "spatial": FeatureLoss(where="all", cls=False, distance="kl-student-teacher", projection=True),
    },
)
"""CoMAD as printed: all teachers at every position, everything trained on the target's side. It collapses.

Where the text leaves a choice: an adapter per teacher, the spatial loss is a mean over the batch too (the print has no
1/B), φ and ψ have one hidden layer, gradient passes through α.
"""

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
    features=Blocks(teacher=3 / 4, student=3 / 4, untrained_cls=True),
    normalizer=L2(),
    aligner=StudentProjector(unit_length=True),
    fusion=Sum(),
    single_teacher=True,
    objectives={"feature": FeatureLoss(where="visible", distance="l1"), "pixels": PixelLoss(normalize=False)},
)
"""DMAE (arXiv:2208.12256): MAE, and tokens of the block at 3/4 (9 of 12, 18 of 24), class token too, at length 1.

Both terms have weight 1, and pixels are those of the student's input, as by the published command; its decoder has 8
blocks of width 512, here it is 1 of width 128.
"""

G2SD = Method(
    masking=Shared(mask_ratio=0.75, decoder_output="all", decoder_depth=4),
    features=MAEDecoder(untrained_cls=True),
    normalizer=LayerNorm(),
    aligner=StudentProjector(head="mlp", hidden_norm=False),
    fusion=Sum(),
    single_teacher=True,
    objectives={"feature": FeatureLoss(where="all", distance="smooth-l1", temperature=2.0)},
)
"""G2SD (CVPR 2023), its generic stage: the student's decoder follows a MAE teacher's at every patch and class token.

The teacher's decoder is read after block 4 of 8, the student's after its 4 of width 128 (as ViT-Ti's), both before the
norm. Between the student's decoder and its MLP stands one more linear map. The specific stage needs labels and is left
out.
"""

DMJD = Method(
    masking=Disjoint(mask_ratio=0.6, block=2),
    aligner=StudentProjector(head="identity"),
    fusion=Sum(),
    single_teacher=True,
    objectives={
        "visible": HOGLoss(where="visible", distance="smooth-l1", temperature=2.0),
        "hidden": HOGLoss(where="hidden"),
    },
)
"""Disjoint masking with joint distillation (arXiv:2301.00230): two masks of 2 x 2 patches without a common one.

As published, visible and hidden patches predict the image's histograms of gradients; a teacher is read for the scores
beside the student's alone. A teacher's tokens take their place by ``--objectives.visible feature
--objectives.visible.where visible --objectives.hidden feature --objectives.hidden.where hidden`` and a projector.
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

No code of it is public: depth, weights of the terms and distance are our choice, and its masking of redundant
tokens is left out. How far that is from what was published cannot be said.
"""

DMT_LIKE = Method(
    masking=WholeImages(),
    normalizer=LayerNorm(),
    aligner=StudentProjector(),
    fusion=Mean(),
    objectives={"token": FeatureLoss(where="all"), "spatial": FeatureLoss(where="all", cls=False, distance="mse")},
)
"""A guess at DMT, whose text was not available: token KL and spatial MSE to the mean of the teachers.

It has no public code either; how far this is from what was published cannot be said.
"""


def _cosine_and_smooth_l1(share: float, cls_share: float, weight: float = 1.0) -> dict[str, Objective]:
    """``share`` times 1 - cosine, the rest smooth L1 with β 1, for patches and for the class token apart."""
    terms = {
        "cls-cosine": FeatureLoss(where="cls", distance="cosine", weight=weight * cls_share),
        "cls-smooth-l1": FeatureLoss(where="cls", distance="smooth-l1", weight=weight * (1 - cls_share)),
        "patch-cosine": FeatureLoss(where="all", cls=False, distance="cosine", weight=weight * share),
        "patch-smooth-l1": FeatureLoss(where="all", cls=False, distance="smooth-l1", weight=weight * (1 - share)),
    }
    return {name: term for name, term in terms.items() if term.weight}


UNIC = Method(
    masking=WholeImages(),
    features=Blocks(final_norm=False),
    normalizer=Standardize(over="running"),
    aligner=StudentProjector(head="multi-layer", separate_cls=True),
    fusion=DropEasiest(),
    objectives=_cosine_and_smooth_l1(0.5, 0.5, weight=0.5),
)
"""UNIC (arXiv:2408.05088): heads on every block, targets standardised by moments that come to rest over the run.

The first batch is standardised by moments of calibration images, in the published code not at all. A teacher without a
trained class token counts half, there once.
"""

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
"""EUPE (arXiv:2603.22387): the teachers into a large proxy, the proxy into the student (``--through``).

The objectives of both stages are these; the paper's third one is left out. In a comparison a row has one stage unless
it says ``--through``.
"""

THEIA = Method(
    masking=WholeImages(),
    normalizer=Standardize(over="calibration"),
    aligner=StudentProjector(head="conv"),
    fusion=Sum(average=True),
    objectives={
        "cosine": MapLoss(weight=0.9),
        "smooth-l1": FeatureLoss(where="all", cls=False, distance="smooth-l1", weight=0.1),
    },
)
"""Theia (arXiv:2407.20179): light convolutional translators, cosine of whole maps and smooth L1, mean over teachers.

Its published norms have a weight per position too, ours one per channel: the same function before the first step.
"""

C_RADIO = replace(
    PHI_S,
    masking=WholeImages(shift=0.5, scales=tuple(round(size / 432, 3) for size in (128, 192, 224, 256, 384, 432))),
    objectives={"cls": AngleLoss(), "patch": FeatureLoss(where="all", cls=False, distance="mse")},
)
"""C-RADIOv4 (arXiv:2601.17237): angles of summaries balanced over teachers, patches of images moved for each network.

What moves out on one side comes back on the other and does not count; published crops move over the larger image. Its
random resolutions are the published ones up to 432 pixels, as shares of the student's own; those from 512 on, DAMP and
the loss to its own moving average are left out.
"""

SIGLINO = replace(
    PHI_S,
    normalizer=PHIS(cls=True),
    aligner=StudentProjector(head="mlp"),
    objectives={
        "cls": FeatureLoss(where="cls", distance="mse"),
        "patch": FeatureLoss(where="all", cls=False, distance="mse"),
        "relations": DistanceLoss(),
    },
)
"""SigLino (arXiv:2512.20157, first called AMoE): PHI-S, squared error, and asymmetric relations between images.

Squared errors are means over channels, printed as sums, beside which relations would count for nothing. Each side's
distances are shares of its own mean, as in RKD, for "normalised" is not said closer. Registers, the attention that
pools for SigLIP 2, and packed batches of many sizes are left out.
"""

GRAM = Method(
    masking=WholeImages(mixup=True),
    features=Blocks(untrained_cls=True),
    normalizer=L2(),
    aligner=StudentProjector(separate_cls=True),
    fusion=Sum(),
    single_teacher=True,
    objectives={"queue": QueueLoss(size=8192), "gram": RelationLoss(with_itself=True)},
)
"""LightlyTrain's distillation, version 3: class token against a queue of the teacher's, and cosines between patches.

Its mixup blends images of a batch, each by a share of its own (published: one for the batch), so its teachers cannot be
cached. The published queue is shorter for small sets, from 16 for 50 images to 4096 for 20,000.
"""


CONSENSUS = Method(
    masking=WholeImages(),
    normalizer=Standardize(over="calibration"),
    aligner=StudentProjector(separate_cls=True),
    fusion=Consensus(),
    objectives={
        "cls-cosine": FeatureLoss(where="cls", distance="cosine"),
        "cls-smooth-l1": FeatureLoss(where="cls", distance="smooth-l1"),
        "patch-cosine": FeatureLoss(where="all", cls=False, distance="cosine", weight=0.25),
        "patch-smooth-l1": FeatureLoss(where="all", cls=False, distance="smooth-l1", weight=0.25),
        "queue": QueueLoss(size=2048),
    },
)
"""What was best on photographs (docs/results.md): whole images, linear heads, standardised targets, a queue.

Of the paper it keeps the consensus, as a weight by what teachers know about images, and two losses, for class token and
map; it has no masks, and no affinity to the student.
"""


def _objectives(method: Method, **changes: Mapping[str, Any]) -> Method:
    """Change fields of named objectives."""
    changed = {name: replace(term, **changes.get(name, {})) for name, term in method.objectives.items()}
    return replace(method, objectives=changed)


METHODS: dict[str, Method] = {
    "comad": COMAD,
    "comad-literal": LITERAL,
    "consensus": CONSENSUS,
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
    "theia": THEIA,
    "c-radio": C_RADIO,
    "siglino": SIGLINO,
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
"""The paper's recipe: ViT-Ti/16 at 224 pixels, 300 epochs, learning rate 1.5e-4 per 256 images; name your teachers.

The paper's batch is 4096 and its student starts from a checkpoint of ImageNet-21k, tuned on 1k: --recipe-of comad
--student.pretrained. Here the student starts from scratch.
"""


RENAMED = {"siglino-like": "siglino"}
"""Presets of before → their names of today."""


def default_for(student: str) -> str:
    """The preset that is taken if none is named, by the student: what was better for its kind (docs/results.md)."""
    return "comad" if is_plain(student) else "consensus"


def recipe(preset: str, demo: bool) -> DistillConfig:
    """A preset in the demo's or the paper's recipe.

    Raises:
        ValueError: no such preset.
    """
    preset = RENAMED.get(preset, preset)
    if preset not in METHODS:
        raise ValueError(f"no preset {preset!r}; {hint(preset, METHODS)}")
    method = METHODS[preset]
    config = (DEMO if demo else IMAGES).with_method(method, preset)
    if preset == "eupe":
        return replace(config, through="vit_tiny_patch16_224" if demo else "vit_base_patch16_224")
    if method.single_teacher and demo:  # a teacher as the method was published with: MAE, but for `gram`
        return replace(config, teachers=("ibot-stamps" if preset == "gram" else "mae-stamps",))
    return config
