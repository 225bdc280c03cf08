"""Each preset's loss against a transcription of its paper and published code, in float64: value and gradients.

The student's and teachers' tokens are given; the transcriptions know nothing of slots. Heads and adapters are run in
float64 from the same weights; what stands in them is checked by name at the foot.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from comad.distillation.features import StudentOutput, TeacherOutput, block_at
from comad.distillation.masking import Independent, Masks, WholeImages
from comad.distillation.relations import Dispersion
from comad.models.backbone import Tokens, map_tokens
from comad.models.decoder import MaskedDecoder
from comad.presets import METHODS

SIZE, PATCHES = 6, 16


class Given(NamedTuple):
    """What a transcription gets, all float64: the class token is row 0 of a sequence of tokens."""

    student: StudentOutput
    teachers: list[TeacherOutput]
    visible: Tensor
    distiller: Any
    masks: Masks


def double(tokens: Tokens) -> TeacherOutput:
    part = map_tokens(lambda x: x.detach().double(), tokens)
    return part if tokens.qkv is None else part._replace(qkv=double(tokens.qkv))


def rows(tokens: Tokens) -> Tensor:
    """Class token and patches as one sequence."""
    return torch.cat([tokens.cls.unsqueeze(1), tokens.patches], dim=1)


def random_student(distiller: Any, seed: int = 3) -> StudentOutput:
    """What a student might give at every position, leaves of the graph."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    copies = SIZE * (2 if "disjoint" in distiller.method.masking.name else 1)
    tokens = draw(copies, 1 + PATCHES, 32)
    qkv = Tokens(draw(copies, 96), draw(copies, PATCHES, 96))
    pixels = draw(copies, PATCHES, 192), torch.rand(copies, PATCHES, 192, generator=generator)
    return StudentOutput(
        tokens, tokens, tuple(draw(copies, 1 + PATCHES, 32) for _ in distiller.tap_blocks), qkv, pixels
    )


def leaves(student: StudentOutput) -> list[Tensor]:
    given = [student.compared, *student.intermediates, student.qkv.cls, student.qkv.patches, student.pixels[0]]
    return [part for part in given if part.requires_grad]


def in_float64(student: StudentOutput) -> StudentOutput:
    def leaf(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad)

    tokens = leaf(student.compared)
    taps, pixels = tuple(leaf(part) for part in student.intermediates), tuple(leaf(part) for part in student.pixels)
    return StudentOutput(tokens, tokens, taps, Tokens(leaf(student.qkv.cls), leaf(student.qkv.patches)), pixels)


def gradients(loss: Tensor, student: StudentOutput, distiller: Any) -> list[Tensor]:
    trained = [p for part in (distiller.aligner, distiller.objectives) for p in part.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [*leaves(student), *trained], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, [*leaves(student), *trained], strict=True)]


def agrees(
    setting: Any, published: Callable[[Given], Tensor], monkeypatch: pytest.MonkeyPatch, progress: float = 0.0
) -> float:
    """Assert that loss and gradients are the published ones to rounding; the largest relative error of a gradient."""
    distiller, (images, outputs, masks) = setting.distiller, setting.batch(SIZE)
    masks = masks._replace(progress=progress)
    student, before = random_student(distiller), copy.deepcopy(distiller)
    monkeypatch.setattr(distiller, "encode", lambda *_: student)
    loss, _ = distiller(images, outputs, masks)
    exact = in_float64(student)
    copies = len(student.compared)
    visible = masks.student_sees(copies, PATCHES, images.device)
    twice = [map_tokens(lambda x: x.repeat(copies // SIZE, *(1,) * (x.ndim - 1)), double(o)) for o in outputs]
    twice = [part._replace(qkv=o.qkv and double(o.qkv)) for part, o in zip(twice, outputs, strict=True)]
    before = before.double()
    expected = published(Given(exact, twice, visible, before, masks))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    errors = []
    pairs = [*zip(gradients(loss, student, distiller), gradients(expected, exact, before), strict=True)]
    largest = max(float(wanted.norm()) for _, wanted in pairs)
    for found, wanted in pairs:
        errors.append(float((found - wanted).norm()) / max(float(wanted.norm()), 1e-4 * largest))
        assert errors[-1] < 1e-4, (tuple(found.shape), errors)
    return max(errors)


# --- the formulas


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def smooth_l1(x: Tensor, y: Tensor, beta: float = 1.0) -> Tensor:
    size = (x - y).abs()
    return torch.where(size < beta, size.square() / (2 * beta), size - beta / 2)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (unit(x) * unit(y)).sum(dim=-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of the softmax of logits, summed over the last axis."""
    p, q = p.softmax(dim=-1), q.softmax(dim=-1)
    return (p * (p / q).log()).sum(dim=-1)


def head(given: Given, teacher: int = 0) -> Tensor:
    """What the student's heads give for a teacher, (B, 1 + N, E)."""
    state, student = given.distiller.aligner, given.student
    sources = [*student.intermediates, student.compared]
    maps, cls_maps = state["patches"][teacher].maps, state["cls"][teacher]
    if isinstance(cls_maps, nn.Identity):
        return sum(part(x) for part, x in zip(maps, sources, strict=True))
    cls = sum(part(x[:, :1]) for part, x in zip(cls_maps.maps, sources, strict=True))
    return torch.cat([cls, sum(part(x[:, 1:]) for part, x in zip(maps, sources, strict=True))], dim=1)


def comad_literal(given: Given) -> Tensor:
    """arXiv:2508.04816, the equations in their order."""
    student, adapters, temperature = given.student.compared, given.distiller.aligner, 0.1
    teachers = []
    for m, output in enumerate(given.teachers):
        linear, norm = adapters["linear"][m], adapters["norm"][m]
        z = rows(output) @ linear.weight.T + linear.bias
        teachers.append(layer_norm(z, norm.eps) * norm.weight + norm.bias)
    scores = []
    for m, teacher in enumerate(teachers):
        agreement = sum(cosine(teacher, other) for k, other in enumerate(teachers) if k != m) / (len(teachers) - 1)
        scores.append(cosine(student, teacher) + agreement)
    powers = torch.stack([(score / temperature).exp() for score in scores])
    weights = powers / powers.sum(dim=0)
    target = sum(weight.unsqueeze(-1) * teacher for weight, teacher in zip(weights, teachers, strict=True))
    phi, psi = given.distiller.objectives["token"], given.distiller.objectives["spatial"]
    mask = torch.cat([torch.ones_like(given.visible[:, :1]), given.visible], dim=1)
    token = (kl(phi(student), phi(target)) * mask).sum() / mask.sum()
    return token + kl(psi(student[:, 1:]), psi(target[:, 1:])).mean()


def tinymim(given: Given) -> Tensor:
    """arXiv:2301.01296: Q-K and V-V relations, teacher first, mean over rows and heads."""
    heads = 4

    def relations(tokens: Tokens) -> tuple[Tensor, Tensor]:
        q, k, v = rows(tokens).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scale = math.sqrt(q.shape[-1])
        return q @ k.mT / scale, v @ v.mT / scale

    pairs = zip(relations(given.teachers[0].qkv), relations(given.student.qkv), strict=True)
    return sum(kl(teacher, student).mean() for teacher, student in pairs)


def tinymim_feat(given: Given) -> Tensor:
    return smooth_l1(head(given), layer_norm(rows(given.teachers[0])), 2.0).mean()


def dmae(given: Given) -> Tensor:
    """arXiv:2208.12256 and its published command: L1 of unit vectors, class token and visible; MSE of hidden pixels."""
    keep = torch.cat([torch.ones_like(given.visible[:, :1]), given.visible], dim=1)
    feature = (unit(head(given))[keep] - unit(rows(given.teachers[0])).flatten(0, 1)).abs().mean()
    reconstructed, pixels = given.student.pixels
    return feature + (reconstructed - pixels)[~given.visible].square().mean()


def g2sd(given: Given) -> Tensor:
    """CVPR 2023 and its code: smooth L1, β 2, to the decoder's normalised tokens, class token and all patches."""
    return smooth_l1(head(given), layer_norm(rows(given.teachers[0])), 2.0).mean()


def dmjd(given: Given) -> Tensor:
    """arXiv:2301.00230 and its code: smooth L1, β 2, of visible patches and MSE of hidden ones, to the image's HOG."""
    reconstructed, pixels = given.student.pixels
    target = histograms(pixels)
    mlp, linear = (given.distiller.objectives[name] for name in ("visible", "hidden"))
    visible = smooth_l1(mlp(given.student.last[:, 1:]), target, 2.0)[given.visible].mean()
    return visible + (linear(reconstructed) - target)[~given.visible].square().mean()


def histograms(patches: Tensor) -> Tensor:
    """HOG of 4 × 4 patches of 8 × 8 pixels, pixel by pixel: cells of 4 × 4, nine bins of 20 degrees, 0 at the edges."""
    count = len(patches)
    image = patches.view(count, 4, 4, 8, 8, 3).transpose(2, 3).reshape(count, 32, 32, 3)
    found = torch.zeros(count, 8, 8, 9, 3, dtype=torch.float64)
    for row in range(32):
        for column in range(32):
            zero = torch.zeros_like(image[:, 0, 0])
            down = image[:, row + 1, column] - image[:, row - 1, column] if 0 < row < 31 else zero
            right = image[:, row, column + 1] - image[:, row, column - 1] if 0 < column < 31 else zero
            bins = (torch.atan2(down, right) * 180 / math.pi % 180 / 20).floor().long().clamp(max=8)
            length = (down.square() + right.square()).sqrt()
            found[:, row // 4, column // 4].scatter_add_(1, bins.unsqueeze(1), length.unsqueeze(1) / 16)
    mean, variance = found.mean(dim=3, keepdim=True), found.var(dim=3, keepdim=True, correction=0)
    found = (found - mean) / (variance + 1e-5 / 58**2).sqrt()
    return found.view(count, 4, 2, 4, 2, 9, 3).transpose(2, 3).reshape(count, 16, 108)


def hybrid(given: Given) -> Tensor:
    """Attention of the first teacher, normalised tokens of the others."""
    features = [smooth_l1(head(given, m), layer_norm(rows(given.teachers[1 + m])), 2.0).mean() for m in range(2)]
    return tinymim(given) + sum(features)


def unic_teacher(given: Given, teacher: int, normal: Callable[[Tensor, str], Tensor]) -> Tensor:
    """½ cosine + ½ smooth L1, mean over patches, then mean of class token and patches: one number per image."""
    prediction, output = head(given, teacher), given.teachers[teacher]
    cls, patches = normal(output.cls, "cls"), normal(output.patches, "patches")
    first = 0.5 * (1 - cosine(prediction[:, 0], cls)) + 0.5 * smooth_l1(prediction[:, 0], cls).mean(dim=-1)
    rest = 0.5 * (1 - cosine(prediction[:, 1:], patches)) + 0.5 * smooth_l1(prediction[:, 1:], patches).mean(dim=-1)
    return (first + rest.mean(dim=1)) / 2


def dropped(given: Given, losses: list[Tensor]) -> Tensor:
    """The hardest teacher of an image stays, others with probability ½; the mean over all that stay."""
    coefficients = torch.ones(len(losses), SIZE, dtype=torch.float64)
    for image in range(SIZE):
        hardest = max(range(len(losses)), key=lambda m, image=image: float(losses[m][image].detach()))
        for m in range(len(losses)):
            if m != hardest and float(given.masks.noise[image, m]) < 0.5:
                coefficients[m, image] = 0
    return (coefficients / coefficients.sum() * torch.stack(losses)).sum()


def unic(given: Given) -> Tensor:
    """arXiv:2408.05088 and its code; the moments are those before this batch."""

    def teacher(m: int) -> Tensor:
        own = given.distiller.normalizer[m]
        return unic_teacher(
            given, m, lambda x, row: (x - getattr(own, f"mean_{row}")) / (getattr(own, f"deviation_{row}") + 1e-6)
        )

    return dropped(given, [teacher(m) for m in range(3)])


def dune(given: Given) -> Tensor:
    """arXiv:2503.14405 and its code; each batch's own moments."""

    def normal(x: Tensor, row: str) -> Tensor:
        axes = (0,) if row == "cls" else (0, 1)
        return (x - x.mean(dim=axes)) / x.std(dim=axes).clamp(min=1e-3)

    return dropped(given, [unic_teacher(given, m, normal) for m in range(3)])


def radio_teacher(given: Given, teacher: int, cls: Tensor, patches: Tensor) -> Tensor:
    """Cosine of class tokens, .9 cosine + .1 smooth L1 of patches."""
    prediction = head(given, teacher)
    summary = (1 - cosine(prediction[:, 0], cls)).mean()
    dense = 0.9 * (1 - cosine(prediction[:, 1:], patches)).mean() + 0.1 * smooth_l1(prediction[:, 1:], patches).mean()
    return summary + dense


def radio(given: Given) -> Tensor:
    """arXiv:2312.06709."""
    return sum(radio_teacher(given, m, *given.teachers[m][:2]) for m in range(3))


def eupe(given: Given) -> Tensor:
    """Every channel standardised by moments taken once."""
    losses = []
    for m, (own, output) in enumerate(zip(given.distiller.normalizer, given.teachers, strict=True)):
        cls = (output.cls - own.mean_cls) / own.deviation_cls
        losses.append(radio_teacher(given, m, cls, (output.patches - own.mean_patches) / own.deviation_patches))
    return sum(losses)


def theia(given: Given) -> Tensor:
    """arXiv:2407.20179 and its code: .9 cosine of flattened maps + .1 smooth L1, mean over teachers."""
    losses = []
    for m, (own, output) in enumerate(zip(given.distiller.normalizer, given.teachers, strict=True)):
        target = (output.patches - own.mean_patches) / own.deviation_patches
        prediction = given.distiller.aligner["patches"][m].maps[0](given.student.compared[:, 1:])
        whole = 1 - cosine(prediction.flatten(1), target.flatten(1)).mean()
        losses.append(0.9 * whole + 0.1 * smooth_l1(prediction, target).mean())
    return sum(losses) / 3


def phi_s_targets(given: Given, teacher: int) -> Tensor:
    """arXiv:2410.01680: the fitted map, whose properties `test_normalizers` checks."""
    linear = given.distiller.normalizer[teacher]
    return given.teachers[teacher].patches @ linear.weight.T + linear.bias


def phi_s(given: Given) -> Tensor:
    losses = []
    for m in range(3):
        prediction = head(given, m)
        losses.append((1 - cosine(prediction[:, 0], given.teachers[m].cls)).mean())
        losses.append((prediction[:, 1:] - phi_s_targets(given, m)).square().mean())
    return sum(losses)


def c_radio(given: Given) -> Tensor:
    """arXiv:2601.17237, equations 1 and 3 to 7; Ω are the patches that student and teacher both kept."""
    losses = []
    for m in range(3):
        prediction, cls = head(given, m), given.teachers[m].cls
        spread = torch.acos(cosine(cls, cls.mean(dim=0))).square().mean()
        losses.append((torch.acos(cosine(prediction[:, 0], cls)).square() / spread).mean())
        common = torch.ones(SIZE, 4, 4, dtype=torch.bool)
        for image in range(SIZE):
            for network in (0, 1 + m):
                down, right = given.masks.shifts[image, network].tolist()
                for row in range(4):
                    for column in range(4):
                        common[image, row, column] &= 0 <= row + down < 4 and 0 <= column + right < 4
        common = common.flatten(1)
        losses.append((prediction[:, 1:] - phi_s_targets(given, m))[common].square().mean())
    return sum(losses)


def siglino(given: Given) -> Tensor:
    """arXiv:2512.20157: squared errors of PHI-S targets, and one-sided smooth L1 of relative distances."""
    losses = []
    for m in range(3):
        prediction, linear = head(given, m), given.distiller.normalizer[3 + m]
        cls = given.teachers[m].cls @ linear.weight.T + linear.bias
        losses.append((prediction[:, 0] - cls).square().mean())
        losses.append((prediction[:, 1:] - phi_s_targets(given, m)).square().mean())
        ours, theirs = (
            torch.stack([torch.stack([(x - y).square().sum().sqrt() for y in side if y is not x]) for x in rows])
            for side, rows in ((list(part), list(part)) for part in (prediction[:, 0].unbind(), cls.unbind()))
        )
        ours, theirs = ours / ours.mean(), theirs / theirs.mean()
        median, total = theirs.flatten().median(), 0.0
        for s, t in zip(ours.flatten(), theirs.flatten(), strict=True):
            error = (s - t if t < median else t - s).clamp(min=0)
            total = total + smooth_l1(error, torch.zeros_like(error))
        losses.append(total / (SIZE * (SIZE - 1)))
    return sum(losses)


def gram(given: Given) -> Tensor:
    """LightlyTrain, version 3: the queue is zeros at first and holds this batch before the loss; both τ .07."""
    prediction, target = unit(head(given)), unit(rows(given.teachers[0]))
    queue = torch.zeros(8192, target.shape[-1], dtype=torch.float64)
    queue[:SIZE] = target[:, 0]
    overall = kl(target[:, 0] @ queue.T / 0.07, prediction[:, 0] @ queue.T / 0.07).mean()
    ours, theirs = prediction[:, 1:], target[:, 1:]
    return overall + kl(theirs @ theirs.mT / 0.07, ours @ ours.mT / 0.07).mean()


PUBLISHED: dict[str, Callable[[Given], Tensor]] = {
    "comad-literal": comad_literal,
    "tinymim": tinymim,
    "tinymim-feat": tinymim_feat,
    "dmae": dmae,
    "g2sd": g2sd,
    "dmjd": dmjd,
    "hybrid": hybrid,
    "unic": unic,
    "dune": dune,
    "radio": radio,
    "phi-s": phi_s,
    "eupe": eupe,
    "theia": theia,
    "c-radio": c_radio,
    "siglino": siglino,
    "gram": gram,
}
EVERY_CLS = {"comad-literal", "dmae", "g2sd", "gram"}
"""Presets that count class tokens whether they were trained or not."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_loss_and_gradients_are_the_published_ones(small_distillation, name: str, monkeypatch):
    with_cls = (False,) * 3 if name in EVERY_CLS else (True,) * 3
    setting = small_distillation(METHODS[name], with_cls=with_cls)
    worst = agrees(setting, PUBLISHED[name], monkeypatch)
    print(f"{name}: largest relative error of a gradient {worst:.1e}")


# --- what stands around the losses


def test_literal_masks_are_independent_and_zero_what_they_hide_in_student_and_teachers():
    masking = METHODS["comad-literal"].masking
    assert masking.name == "independent" and masking.modes == ("zero", "zero") and masking.every_position
    assert masking.mask_ratio == 0.75 and masking.teacher_mask_ratios == (0.5, 0.4, 0.3)
    assert not METHODS["comad"].masking.every_position
    with pytest.raises(ValueError, match=r"set --masking\.teacher-hidden zero"):
        Independent(count_hidden=True)


def test_dmae_reads_block_9_of_12_and_18_of_24():
    features = METHODS["dmae"].features
    assert (block_at(features.student, 12), block_at(features.teacher, 24)) == (9, 18)


@torch.no_grad()
def test_g2sd_reads_block_4_of_8_before_the_norm_with_the_class_token(small_distillation):
    teacher = small_distillation.vit(0, 48).eval()
    teacher.decoder = decoder = MaskedDecoder(48, (4, 4), 192, width=24, depth=8, heads=2)
    images, visible = torch.rand(2, 3, 32, 32), torch.tensor([[1, 5, 9], [0, 2, 15]])
    found = METHODS["g2sd"].features.read(teacher, images, visible, "drop", frozenset({"tokens"}))
    tokens = teacher(images, visible)
    x = decoder.mask_token.repeat(2, 16, 1)
    for image in range(2):
        x[image, visible[image]] = decoder.embed(tokens.patches[image])
    x = torch.cat([decoder.embed(tokens.cls).unsqueeze(1), x + decoder.positions], dim=1)
    for block in list(decoder.blocks)[:4]:
        x = block(x)
    torch.testing.assert_close(rows(found), x)


def test_dmjd_hides_blocks_of_patches_as_a_whole():
    masks = METHODS["dmjd"].masking(torch.rand(5, 2, 196, generator=torch.Generator().manual_seed(0)))
    shown = masks.student_sees(10, 196, torch.device("cpu")).view(10, 7, 2, 7, 2)
    assert torch.equal(shown.any(dim=4).any(dim=2), shown.all(dim=4).all(dim=2))
    assert shown.flatten(1).sum(dim=1).tolist() == [4 * 19] * 10  # 40 % of 49 blocks, rounded down
    assert not (shown[:5] & shown[5:]).any() and len(shown[:5].unique(dim=0)) == 5
    with pytest.raises(ValueError, match="blocks of 2 patches do not fill 9 patches"):
        METHODS["dmjd"].masking(torch.rand(1, 2, 9))


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 0.5005), (1.0, 0.001)])
def test_unic_moments_come_to_rest_by_a_cosine(small_distillation, progress, share):
    distiller = small_distillation(METHODS["unic"]).distiller
    own = distiller.normalizer[0]
    before, deviation = own.mean_patches.clone(), own.deviation_patches.clone()
    patches = torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(1))
    normalizer, state = distiller.method.normalizer, distiller.normalizer
    standard = normalizer(state, Tokens(None, patches), 0).patches
    torch.testing.assert_close(standard, (patches - before) / deviation)
    normalizer.follow(state, Tokens(None, patches), 0, progress)
    after = distiller.normalizer[0].mean_patches
    torch.testing.assert_close(after, (1 - share) * before + share * patches.mean(dim=(0, 1)))


def test_moments_follow_a_training_step_and_no_evaluation(small_distillation):
    setting = small_distillation(METHODS["unic"])
    (images, outputs, masks), own = setting.batch(4), setting.distiller.normalizer[1]
    before = own.mean_cls.clone()
    setting.distiller.eval()(images, outputs, masks)
    assert torch.equal(own.mean_cls, before)
    setting.distiller.train()(images, outputs, masks._replace(progress=0.5))
    torch.testing.assert_close(own.mean_cls, 0.4995 * before + 0.5005 * outputs[1].cls.mean(dim=0))


def test_a_run_tells_its_masks_how_far_it_is():
    noise = torch.rand(2, 2, 16)
    assert [METHODS["unic"].masking(noise, progress).progress for progress in (0.0, 0.3)] == [0.0, 0.3]


def test_unic_and_dune_read_every_block_before_the_norm_and_their_heads_have_no_norm_of_their_own(small_distillation):
    for name in ("unic", "dune"):
        distiller = small_distillation(METHODS[name]).distiller
        vit = distiller.student.vit
        assert distiller.compared_block == len(vit.blocks) == 2
        assert not any(p.requires_grad for p in vit.norm.parameters())
        kinds = [type(part) for head in distiller.aligner["patches"] for part in head.maps]
        norms = [part for part in distiller.aligner.modules() if isinstance(part, nn.LayerNorm)]
        if name == "unic":
            assert distiller.tap_blocks == [1] and len(kinds) == 2 * 3 and not norms
            assert [head.maps[1][0].out_features for head in distiller.aligner["patches"]] == [4 * 32] * 3
        else:
            assert len(norms) == 2 * 3 and all(norm.eps == 1e-6 for norm in norms)  # a block's two
            assert {float(x) for head in distiller.aligner["patches"] for x in head.maps[0][0].ls1.gamma.detach()} == {
                float(torch.tensor(1e-4))
            }


def without_positions(backbone: Any) -> Any:
    nn.init.zeros_(backbone.vit.pos_embed)
    return backbone.eval()


@torch.no_grad()
def test_patches_of_moved_images_come_back_to_where_they_came_from(small_distillation):
    setting = small_distillation(replace(METHODS["c-radio"], masking=WholeImages(shift=0.5)))
    distiller = setting.distiller
    for network in (distiller.student, *(teacher.backbone for teacher in setting.teachers)):
        without_positions(network)
    images, noise = setting.images[:6], torch.rand(6, 4, 16, generator=torch.Generator().manual_seed(4))
    outputs, masks = distiller.forward_teachers(setting.teachers, images, noise=noise)
    assert masks.shifts.shape == (6, 4, 2) and len(masks.shifts.flatten(0, 1).unique(dim=0)) > 4
    still = masks._replace(shifts=None)
    for m, teacher in enumerate(setting.teachers):
        expected = distiller.forward_teacher(teacher, m, images, still)
        torch.testing.assert_close(outputs[m].patches, expected.patches, atol=1e-4, rtol=1e-4)
    moved, unmoved = distiller.encode(images, masks), distiller.encode(images, still)
    torch.testing.assert_close(moved.compared, unmoved.compared, atol=1e-4, rtol=1e-4)


def test_shifts_are_whole_patches_normal_and_of_each_network_alone():
    noise = torch.rand(4000, 3, 9, generator=torch.Generator().manual_seed(0))
    shifts = METHODS["c-radio"].masking(noise).shifts.double()
    still = math.erf(0.5 / 0.5 / math.sqrt(2))  # |N(0, ½)| < ½
    assert float((shifts == 0).double().mean()) == pytest.approx(still, abs=0.01)
    assert float(shifts.mean()) == pytest.approx(0, abs=0.01)
    between = torch.corrcoef(shifts.flatten(1).T) - torch.eye(6, dtype=torch.float64)
    assert float(between.abs().max()) < 0.06
    assert not METHODS["c-radio"].masking.repeats and METHODS["phi-s"].masking.repeats


def test_the_dispersion_is_that_of_all_batches_so_far():
    spread, targets = Dispersion(5), torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0)) + 2
    for batch in targets:
        spread.follow(batch)
    mean = targets.mean(dim=(0, 1))
    torch.testing.assert_close(spread.mean, mean)
    exact = torch.acos(cosine(targets.flatten(0, 1), mean)).square().mean()
    assert float(spread.angle) == pytest.approx(float(exact), rel=0.05)


def test_attention_is_not_compared_where_images_move():
    with pytest.raises(ValueError, match=r"set --masking\.shift 0"):
        replace(METHODS["tinymim"], masking=WholeImages(shift=0.5))
