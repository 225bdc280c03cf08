"""The method as a whole, against the same written as loops; what is trained, what is frozen, what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comad.distill.teaching import Targets
from torch import Tensor
from torch.nn import functional as F

from comad.distill.aligners import Trained
from comad.distill.config import Method
from comad.distill.fusion import Gate, Mean
from comad.distill.masking import Masking, Masks
from comad.distill.objectives import Term
from comad.presets import METHODS

COMAD = METHODS["comad"]
HIDDEN = [
    Masking(hidden="drop"),
    Masking(hidden="token"),
    Masking(hidden="zero"),
    Masking(policy="independent", hidden="zero", teachers_hidden="zero"),
    Masking(policy="shared"),
    Masking(policy="none"),
]
NAMES = ["drop", "token", "zero", "printed", "shared", "none"]


@pytest.mark.parametrize(
    ("name", "with_cls", "trained"),
    [
        ("comad", (False, True, True), True),
        ("comad", (False, False, False), False),
        ("comad-spatial-only", (True, True, True), False),
        ("radio", (True, True, True), True),
        ("gram", (True,), False),  # it compares mean patches
        ("tinymim", (True,), False),
        ("dmae", (True,), False),
        ("dmjd", (True,), False),
    ],
)
def test_the_class_token_is_offered_where_a_term_trains_it(small_distillation, name, with_cls, trained):
    types = small_distillation(METHODS[name], with_cls=with_cls).distiller.token_types
    assert types == (("cls", "patch") if trained else ("patch",))


def naive_target(student: Tensor, teachers: list[Tensor]) -> Tensor:
    """One fused token, by the gate's equations, of the teachers that saw it."""
    scores = []
    for m, token in enumerate(teachers):
        others = [F.cosine_similarity(token, other, dim=0) for k, other in enumerate(teachers) if k != m]
        scores.append(F.cosine_similarity(student, token, dim=0) + sum(others) / max(1, len(others)))
    weights = (torch.stack(scores) / 0.1).softmax(dim=0)
    return sum(weight * token for weight, token in zip(weights, teachers, strict=True))


def naive_loss(setting, images: Tensor, masks: Masks) -> float:
    """CoMAD's loss of some images: one image, one token, one teacher at a time; position -1 is the class token."""
    distiller, losses = setting.distiller, {"visible": [], "all": []}
    for b, image in enumerate(images):
        own = Masks(masks.student[b : b + 1], tuple(visible[b : b + 1] for visible in masks.teachers))
        cls, patches = rows(distiller, image.unsqueeze(0), own)
        aligned = naive_teachers(setting, image.unsqueeze(0), own)
        for n in range(-1, 16):
            student, teachers = cls[0] if n < 0 else patches[0, n], [tokens[n] for tokens in aligned if n in tokens]
            if teachers:
                p, q = ((tokens / 10).softmax(dim=0) for tokens in (naive_target(student, teachers), student))
                losses["visible"] += [float((p * (p / q).log()).sum())] * (n in (-1, *own.student[0].tolist()))
                losses["all"] += [float((p * (p / q).log()).sum())] * (n >= 0)
    return sum(sum(part) / len(part) for part in losses.values())


def rows(distiller, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
    """Class token and patches of the student."""
    tapped = distiller.encode(images, masks).tapped
    return tapped[:, 0], tapped[:, 1:]


def naive_teachers(setting, image: Tensor, masks: Masks) -> list[dict[int, Tensor]]:
    """For each teacher: position → aligned token, of the positions that it saw."""
    maps, aligned = setting.distiller.aligners.state_dict(), []
    for m, teacher in enumerate(setting.teachers):
        tokens = teacher.backbone(image, masks.teachers[m])
        seen = dict(zip(masks.teachers[m][0].tolist(), tokens.patches[0], strict=True))
        if setting.distiller.teachers_with_cls[m]:
            seen[-1] = tokens.cls[0]
        weight, bias = maps[f"weight_{m}"], maps[f"bias_{m}"]
        aligned.append({n: F.layer_norm(weight @ token + bias, (32,)) for n, token in seen.items()})
    return aligned


def masks_of(images, masking: Masking, num_teachers: int, seed: int = 0) -> Masks:
    return masking(torch.rand(len(images), 1 + num_teachers, 16, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def comad(small_distillation):
    return small_distillation(COMAD)


@pytest.mark.parametrize("policy", ["superset", "independent"])
@torch.no_grad()
def test_loss_is_that_of_a_naive_loop(small_distillation, policy):
    setting = small_distillation(replace(COMAD, masking=Masking(policy=policy)))
    images, targets = setting.batch(3)
    loss, metrics = setting.distiller(images, targets)
    assert float(loss) == pytest.approx(naive_loss(setting, images, targets.masks), rel=1e-4)
    numbers = metrics()
    assert float(loss) == pytest.approx(float(numbers["token"] + numbers["spatial"]), rel=1e-6)


@pytest.mark.parametrize("masking", HIDDEN, ids=NAMES)
def test_gradients_reach_all_that_is_trained_and_nothing_frozen(small_distillation, masking):
    setting = small_distillation(replace(COMAD, masking=masking))
    images, targets = setting.batch(8)
    setting.distiller(images, targets).loss.backward()
    missing = {name for name, p in setting.distiller.named_parameters() if p.grad is None or not p.grad.any()}
    if masking.policy == "shared":  # nobody sees what the decoder fills in
        missing = {name for name in missing if not name.startswith("decoder.")}
    assert not missing
    for teacher in setting.teachers:
        assert all(p.grad is None and not p.requires_grad for p in teacher.backbone.parameters())
    assert not any(t.patches.requires_grad or (t.cls is not None and t.cls.requires_grad) for t in targets.tokens)
    assert not any(buffer.requires_grad for buffer in setting.distiller.aligners.buffers())
    assert not list(setting.distiller.aligners.parameters())


def test_trained_aligners_and_projections_get_gradients(small_distillation):
    setting = small_distillation(METHODS["comad-literal"])
    images, targets = setting.batch(8)
    setting.distiller(images, targets).loss.backward()
    names = [name for name, p in setting.distiller.named_parameters() if p.grad is not None and p.grad.any()]
    for part in ("aligners.linear.0", "aligners.norm.2", "projections.token", "projections.spatial"):
        assert any(name.startswith(part) for name in names)


def test_a_training_step_leaves_teachers_and_aligners_as_they_were(comad):
    frozen = [*comad.distiller.aligners.buffers(), *(p for t in comad.teachers for p in t.backbone.parameters())]
    before = [value.clone() for value in frozen]
    comad.losses_on_one_batch(2)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


def test_state_holds_no_teacher_and_restores_the_loss(small_distillation, comad):
    shapes = {name: tuple(value.shape) for name, value in comad.distiller.state_dict().items()}
    assert {name.split(".")[0] for name in shapes} == {"student", "decoder", "aligners"}
    assert {name for name, shape in shapes.items() if 48 in shape} == {f"aligners.weight_{m}" for m in range(3)}
    images, targets = comad.batch(4)
    other = small_distillation(COMAD, seed=5)
    assert float(other.distiller(images, targets).loss.detach()) != float(
        comad.distiller(images, targets).loss.detach()
    )
    other.distiller.load_state_dict(comad.distiller.state_dict())
    assert torch.equal(other.distiller(images, targets).loss, comad.distiller(images, targets).loss)


# --- the student's side


@pytest.mark.parametrize("hidden", ["drop", "token", "zero"])
@torch.no_grad()
def test_student_never_sees_hidden_pixels(small_distillation, hidden):
    setting = small_distillation(replace(COMAD, masking=Masking(hidden=hidden)))
    images = setting.images[:3]
    masks = masks_of(images, setting.distiller.method.masking, 3)
    hide = ~masks.student_sees(3, 16, images.device)
    pixels = hide.view(3, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    changed = torch.where(pixels, torch.rand(images.shape, generator=torch.Generator().manual_seed(1)), images)
    for ours, theirs in zip(
        rows(setting.distiller, images, masks), rows(setting.distiller, changed, masks), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    cls, patches = rows(setting.distiller, torch.where(pixels, images, 1 - images), masks)
    assert not torch.allclose(cls, rows(setting.distiller, images, masks)[0])
    assert patches.shape == (3, 16, 32)


@pytest.mark.parametrize("hidden", ["drop", "token", "zero"])
@torch.no_grad()
def test_hiding_nothing_is_the_plain_student(small_distillation, hidden):
    setting = small_distillation(replace(COMAD, masking=Masking(student=0.0, teachers=(0.0,), hidden=hidden)))
    images = setting.images[:3]
    masks = masks_of(images, setting.distiller.method.masking, 3)
    cls, patches = rows(setting.distiller, images, masks)
    whole = setting.distiller.student(images)
    torch.testing.assert_close(cls, whole.cls)
    torch.testing.assert_close(patches, whole.patches)


@torch.no_grad()
def test_dropped_patches_come_from_the_decoder_and_visible_ones_from_the_encoder(comad):
    images = comad.images[:3]
    masks = masks_of(images, COMAD.masking, 3)
    cls, patches = rows(comad.distiller, images, masks)
    encoded = comad.distiller.student(images, masks.student)
    filled = comad.distiller.decoder(encoded.cls, encoded.patches, masks.student)
    torch.testing.assert_close(cls, encoded.cls)
    for b in range(3):
        seen = masks.student[b].tolist()
        torch.testing.assert_close(patches[b, seen], encoded.patches[b])
        hidden = [n for n in range(16) if n not in seen]
        torch.testing.assert_close(patches[b, hidden], filled[b, hidden])


def test_parts_are_built_only_where_they_are_needed(small_distillation):
    parts = {}
    for name, masking in zip(NAMES, HIDDEN, strict=True):
        distiller = small_distillation(replace(COMAD, masking=masking)).distiller
        parts[name] = (distiller.decoder is not None, distiller.mask_token is not None)
    nothing = (False, False)
    assert parts == {
        "drop": (True, False),
        "token": (False, True),
        "zero": nothing,
        "printed": nothing,
        "shared": (True, False),
        "none": nothing,
    }


# --- the teachers' side


@pytest.mark.parametrize("num_teachers", [1, 2, 3, 4])
@pytest.mark.parametrize("fusion", [Gate(), Mean()])
def test_one_to_four_teachers(small_distillation, num_teachers, fusion):
    setting = small_distillation(replace(COMAD, fusion=fusion), teacher_widths=(48, 24, 16, 64)[:num_teachers])
    images, targets = setting.batch(8)
    loss, metrics = setting.distiller(images, targets)
    loss.backward()
    numbers = metrics()
    assert loss.isfinite() and all(number.isfinite() for number in numbers.values())
    assert sum(float(numbers[f"share_{m}"]) for m in range(num_teachers)) == pytest.approx(1.0, abs=1e-5)
    assert f"share_{num_teachers}" not in numbers


def test_a_single_teacher_gives_its_own_tokens_as_target(small_distillation):
    setting = small_distillation(COMAD, teacher_widths=(48,), with_cls=(True,))
    images, targets = setting.batch(4)
    gate = setting.distiller(images, targets).loss
    setting.distiller.method = replace(COMAD, fusion=Mean())
    mean = setting.distiller(images, targets).loss
    torch.testing.assert_close(gate, mean)


def aligned_and_valid(setting, images: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    pairs, _ = setting.distiller.align(setting.distiller.encode(images, targets.masks), targets)
    return tuple(torch.stack(parts) for parts in zip(*[(p.target, p.weight) for p in pairs.values()], strict=True))


@pytest.mark.parametrize("teachers_hidden", ["drop", "zero"])
@torch.no_grad()
def test_aligned_tokens_stand_at_their_positions(small_distillation, teachers_hidden):
    setting = small_distillation(replace(COMAD, masking=Masking(teachers_hidden=teachers_hidden)))
    images, targets = setting.batch(3)
    aligned, valid = aligned_and_valid(setting, images, targets)
    assert aligned.shape == (3, 3, 17, 32) and valid.shape == (3, 3, 17)
    assert valid[:, :, 0].tolist() == [[False] * 3, [True] * 3, [True] * 3]
    for m, (cls, patches) in enumerate(targets.tokens):
        mapped = setting.distiller.aligners(patches, m)
        for b in range(3):
            rows = targets.masks.teachers[m][b].tolist()
            assert valid[m, b, 1:].nonzero().flatten().tolist() == rows
            expected = mapped[b] if teachers_hidden == "drop" else mapped[b, rows]
            torch.testing.assert_close(aligned[m, b, 1:][rows], expected)
        if m:
            torch.testing.assert_close(aligned[m, :, 0], setting.distiller.aligners(cls.unsqueeze(1), m)[:, 0])


@torch.no_grad()
def test_positions_that_no_teacher_saw_carry_no_weight(small_distillation):
    masking = Masking(policy="independent", teachers=(0.8,))
    setting = small_distillation(replace(COMAD, masking=masking), teacher_widths=(48, 48))
    images, targets = setting.batch(6)
    _, valid = aligned_and_valid(setting, images, targets)
    assert not valid.any(dim=0)[:, 1:].all()
    loss = setting.distiller(images, targets).loss
    assert float(loss) == pytest.approx(naive_loss(setting, images, targets.masks), rel=1e-4)


def test_class_tokens_count_only_where_a_teacher_has_one(small_distillation):
    with_cls = small_distillation(COMAD, with_cls=(False,) * 3)
    without = small_distillation(
        replace(COMAD, terms={name: replace(term, cls=False) for name, term in COMAD.terms.items()}),
        with_cls=(True,) * 3,
    )
    images, targets = with_cls.batch(4)
    torch.testing.assert_close(with_cls.distiller(images, targets).loss, without.distiller(images, targets).loss)


@torch.no_grad()
def test_teacher_step_shows_each_teacher_its_own_patches_and_leaves_no_gradient(comad):
    images, targets = comad.batch(3)
    for m, (teacher, (cls, patches, *_)) in enumerate(zip(comad.teachers, targets.tokens, strict=True)):
        expected = teacher.backbone(images, targets.masks.teachers[m])
        assert torch.equal(patches, expected.patches) and torch.equal(cls, expected.cls)


@torch.no_grad()
def test_teacher_with_larger_patches_gets_larger_images(small_distillation):
    setting = small_distillation(COMAD, teacher_patch_size=16)
    images, targets = setting.batch(4)
    larger = F.interpolate(images, (64, 64), mode="bicubic", antialias=True)
    for teacher, visible, tokens in zip(setting.teachers, targets.masks.teachers, targets.tokens, strict=True):
        assert torch.equal(tokens.patches, teacher.backbone(larger, visible).patches)
    assert setting.distiller(images, targets).loss.isfinite()


# --- the objective


def test_a_term_of_weight_0_is_left_out(small_distillation):
    both = small_distillation(COMAD)
    images, targets = both.batch(4)
    parts = both.distiller(images, targets).metrics()
    for kept, dropped in (("token", "spatial"), ("spatial", "token")):
        terms = dict(COMAD.terms) | {dropped: replace(COMAD.terms[dropped], weight=0.0)}
        loss, metrics = small_distillation(replace(COMAD, terms=terms)).distiller(images, targets)
        assert float(loss.detach()) == pytest.approx(float(parts[kept]), rel=1e-5)
        assert kept in metrics() and dropped not in metrics()


def test_weights_of_terms_are_factors(small_distillation):
    terms = {"near": Term(weight=2.0), "far": Term(where="hidden", distance="cosine", weight=0.5)}
    setting = small_distillation(Method(terms=terms))
    loss, metrics = setting.distiller(*setting.batch(4))
    numbers = metrics()
    assert float(loss.detach()) == pytest.approx(float(2 * numbers["near"] + 0.5 * numbers["far"]), rel=1e-5)


def test_each_of_several_terms_is_what_it_is_alone(small_distillation):
    terms = {
        "plain": Term(),
        "elsewhere": Term(where="all", cls=False),
        "hotter": Term(temperature=4.0),
        "nearer": Term(distance="mse"),
        "first": Term(teachers="first"),
        "rest": Term(teachers="rest"),
    }
    together = small_distillation(replace(COMAD, terms=terms))
    images, targets = together.batch(4)
    parts = {name: float(part) for name, part in together.distiller(images, targets).metrics().items() if name in terms}
    for name in ("plain", "elsewhere", "hotter", "nearer"):  # other terms leave teachers out, and so fit other maps
        alone = small_distillation(replace(COMAD, terms={name: terms[name]})).distiller(images, targets)
        assert parts[name] == pytest.approx(float(alone.loss.detach()), rel=1e-5)
    assert len(set(parts.values())) == len(terms)


@pytest.mark.parametrize("method", [COMAD, METHODS["comad-literal"], replace(COMAD, aligner=Trained())])
def test_metrics_are_detached_and_finite(small_distillation, method):
    setting = small_distillation(method)
    numbers = setting.distiller(*setting.batch(8)).metrics()
    assert all(not number.requires_grad and number.isfinite() and number.ndim == 0 for number in numbers.values())


def test_bfloat16_autocast_gives_nearly_the_same_loss(comad):
    images, targets = comad.batch(8)
    exact = comad.distiller(images, targets).loss.detach()
    with torch.autocast("cpu", torch.bfloat16):
        loss = comad.distiller(images, targets).loss
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(exact), rel=0.02)
    assert all(p.grad.isfinite().all() for p in comad.distiller.parameters())
