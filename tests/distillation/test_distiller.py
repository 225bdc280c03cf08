"""The method as a whole, against the same written as loops; what is trained, what is frozen, what is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comad.distillation.aligners import TrainedAdapter
from comad.distillation.distiller import Distiller
from comad.distillation.features import TeacherOutput
from comad.distillation.fusion import Gate, Mean
from comad.distillation.masking import Independent, Masking, Masks, Shared, Superset, WholeImages
from comad.distillation.method import Method
from comad.distillation.objectives import FeatureLoss, RelationLoss
from comad.presets import METHODS
from comad.runtime.run import TrainingError

COMAD = METHODS["comad"]
MASKINGS = {
    "drop": Superset(hidden="drop"),
    "token": Superset(hidden="token"),
    "zero": Superset(hidden="zero"),
    "printed": Independent(hidden="zero", teacher_hidden="zero"),
    "shared": Shared(),
    "none": WholeImages(),
}


@pytest.mark.parametrize(
    ("name", "with_cls", "trained"),
    [
        ("comad", (False, True, True), True),
        ("comad", (False, False, False), False),
        ("comad-spatial-only", (True, True, True), False),
        ("radio", (True, True, True), True),
        ("gram", (False,), True),
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
    compared = distiller.encode(images, masks).compared
    return compared[:, 0], compared[:, 1:]


def naive_teachers(setting, image: Tensor, masks: Masks) -> list[dict[int, Tensor]]:
    """For each teacher: position → aligned token, of the positions that it saw."""
    aligned = []
    for m, teacher in enumerate(setting.teachers):
        tokens = teacher.backbone(image, masks.teachers[m])
        seen = dict(zip(masks.teachers[m][0].tolist(), tokens.patches[0], strict=True))
        if "cls" in teacher.backbone.token_types:
            seen[-1] = tokens.cls[0]
        weight, bias = setting.distiller.aligner[m].weight, setting.distiller.aligner[m].bias
        aligned.append({n: F.layer_norm(weight @ token + bias, (32,)) for n, token in seen.items()})
    return aligned


def masks_of(images, masking: Masking, num_teachers: int, seed: int = 0) -> Masks:
    return masking(torch.rand(len(images), 1 + num_teachers, 16, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def comad(small_distillation):
    return small_distillation(COMAD)


@pytest.mark.parametrize("masking", [Superset(), Independent()])
@torch.no_grad()
def test_loss_is_that_of_a_naive_loop(small_distillation, masking):
    setting = small_distillation(replace(COMAD, masking=masking))
    images, outputs, masks = setting.batch(3)
    loss, metrics = setting.distiller(images, outputs, masks)
    assert float(loss) == pytest.approx(naive_loss(setting, images, masks), rel=1e-4)
    numbers = metrics()
    assert float(loss) == pytest.approx(float(numbers["loss/token"] + numbers["loss/spatial"]), rel=1e-6)


@torch.no_grad()
def test_where_targets_are_fused_the_loss_to_each_teacher_alone_is_logged(small_distillation):
    """It is what the loss would be of a run with that teacher alone, of the same maps."""
    setting = small_distillation(COMAD)
    images, outputs, masks = setting.batch(4)
    numbers = setting.distiller(images, outputs, masks)[1]()
    pairs, _ = setting.distiller.align(setting.distiller.encode(images, masks), outputs, masks)
    visible = masks.student_sees(4, 16, images.device)
    for m, pair in pairs.items():
        p, q = ((tokens / 10).softmax(dim=-1) for tokens in (pair.target, pair.prediction))
        distances = (p * (p / q).log()).sum(dim=-1)
        for name, counts in (("spatial", torch.ones_like(visible)), ("token", visible)):
            counts = torch.cat([torch.full_like(counts[:, :1], name == "token"), counts], dim=1) & pair.valid
            assert float(numbers[f"loss/teacher-{m}/{name}"]) == pytest.approx(
                float(distances[counts].mean()), rel=1e-3
            )


@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
def test_gradients_reach_all_that_is_trained_and_nothing_frozen(small_distillation, masking):
    setting = small_distillation(replace(COMAD, masking=masking))
    images, outputs, masks = setting.batch(8)
    setting.distiller(images, outputs, masks)[0].backward()
    trained = {name: p for name, p in setting.distiller.named_parameters() if p.requires_grad}
    missing = {name for name, p in trained.items() if p.grad is None or not p.grad.any()}
    if masking.name == "shared":  # nobody sees what the decoder fills in
        missing = {name for name in missing if not name.startswith("decoder.")}
    assert not missing and not any(name.startswith("aligner") for name in trained)
    for teacher in setting.teachers:
        assert all(p.grad is None and not p.requires_grad for p in teacher.backbone.parameters())
    assert not any(o.patches.requires_grad or (o.cls is not None and o.cls.requires_grad) for o in outputs)


def test_trained_adapters_and_projections_get_gradients(small_distillation):
    setting = small_distillation(METHODS["comad-literal"])
    setting.distiller(*setting.batch(8))[0].backward()
    names = [name for name, p in setting.distiller.named_parameters() if p.grad is not None and p.grad.any()]
    for part in ("aligner.linear.0", "aligner.norm.2", "objectives.token", "objectives.spatial"):
        assert any(name.startswith(part) for name in names)


def test_a_training_step_leaves_teachers_and_aligners_as_they_were(comad):
    frozen = [*comad.distiller.aligner.parameters(), *(p for t in comad.teachers for p in t.backbone.parameters())]
    before = [value.clone() for value in frozen]
    comad.losses_on_one_batch(2)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


def test_state_holds_no_teacher_and_restores_the_loss(small_distillation, comad):
    state = {name: value for name, value in comad.distiller.state_dict().items() if torch.is_tensor(value)}
    assert {name.split(".")[0] for name in state} == {"student", "decoder", "aligner"}
    assert {name for name, value in state.items() if 48 in value.shape} == {f"aligner.{m}.weight" for m in range(3)}
    batch = comad.batch(4)
    other = small_distillation(COMAD, seed=5)
    assert float(other.distiller(*batch)[0].detach()) != float(comad.distiller(*batch)[0].detach())
    other.distiller.load_state_dict(comad.distiller.state_dict())
    assert torch.equal(other.distiller(*batch)[0], comad.distiller(*batch)[0])


@pytest.mark.parametrize("name", ["comad", "unic", "phi-s"])
def test_forgetting_to_calibrate_is_an_error_and_the_state_knows(small_distillation, name):
    setting = small_distillation(METHODS[name])
    fresh = Distiller(setting.vit(0, 32), setting.teachers, METHODS[name])
    batch = setting.batch(4)
    with pytest.raises(ValueError, match=r"calibrated before it is trained: call distiller\.calibrate"):
        fresh(*batch)
    with pytest.raises(ValueError, match="calibrated before"):
        fresh.load_state_dict(Distiller(setting.vit(0, 32), setting.teachers, METHODS[name]).state_dict())
        fresh(*batch)
    fresh.load_state_dict(setting.distiller.state_dict())
    assert fresh(*batch)[0].isfinite()
    fresh = Distiller(setting.vit(0, 32), setting.teachers, METHODS[name])
    fresh.calibrate(setting.teachers, setting.images.split(16))
    assert fresh(*batch)[0].isfinite()


def test_a_method_without_statistics_needs_no_calibration(small_distillation):
    setting = small_distillation(METHODS["radio"])
    fresh = Distiller(setting.vit(0, 32), setting.teachers, METHODS["radio"])
    images = setting.images[:4]
    outputs, masks = fresh.forward_teachers(setting.teachers, images)
    assert fresh(images, outputs, masks)[0].isfinite()


# --- the student's side


@pytest.mark.parametrize("hidden", ["drop", "token", "zero"])
@torch.no_grad()
def test_student_never_sees_hidden_pixels(small_distillation, hidden):
    setting = small_distillation(replace(COMAD, masking=Superset(hidden=hidden)))
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
    setting = small_distillation(
        replace(COMAD, masking=Superset(mask_ratio=0.0, teacher_mask_ratios=(0.0,), hidden=hidden))
    )
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
    for name, masking in MASKINGS.items():
        distiller = small_distillation(replace(COMAD, masking=masking)).distiller
        parts[name] = (distiller.decoder is not None, distiller.mask_token is not None)
    built = {"drop": (True, False), "token": (False, True), "shared": (True, False)}
    assert parts == {name: built.get(name, (False, False)) for name in MASKINGS}


# --- the teachers' side


@pytest.mark.parametrize("num_teachers", [1, 2, 3, 4])
@pytest.mark.parametrize("fusion", [Gate(), Mean()])
def test_one_to_four_teachers(small_distillation, num_teachers, fusion):
    setting = small_distillation(replace(COMAD, fusion=fusion), teacher_widths=(48, 24, 16, 64)[:num_teachers])
    loss, metrics = setting.distiller(*setting.batch(8))
    loss.backward()
    numbers = metrics()
    assert loss.isfinite() and all(number.isfinite() for number in numbers.values())
    shares = [float(value) for name, value in numbers.items() if name.startswith("share_")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5) and len(shares) == num_teachers


def test_a_single_teacher_gives_its_own_tokens_as_target(small_distillation):
    setting = small_distillation(COMAD, teacher_widths=(48,), with_cls=(True,))
    batch = setting.batch(4)
    gate = setting.distiller(*batch)[0]
    setting.distiller.method = replace(COMAD, fusion=Mean())
    mean = setting.distiller(*batch)[0]
    torch.testing.assert_close(gate, mean)


def aligned_and_valid(setting, images: Tensor, outputs: list[TeacherOutput], masks: Masks) -> tuple[Tensor, Tensor]:
    pairs, _ = setting.distiller.align(setting.distiller.encode(images, masks), outputs, masks)
    return tuple(torch.stack(parts) for parts in zip(*[(p.target, p.valid) for p in pairs.values()], strict=True))


@pytest.mark.parametrize("teacher_hidden", ["drop", "zero"])
@torch.no_grad()
def test_aligned_tokens_stand_at_their_positions(small_distillation, teacher_hidden):
    setting = small_distillation(replace(COMAD, masking=Superset(teacher_hidden=teacher_hidden)))
    images, outputs, masks = setting.batch(3)
    aligned, valid = aligned_and_valid(setting, images, outputs, masks)
    assert aligned.shape == (3, 3, 17, 32) and valid.shape == (3, 3, 17)
    assert valid[:, :, 0].tolist() == [[False] * 3, [True] * 3, [True] * 3]
    for m, (cls, patches, *_) in enumerate(outputs):
        mapped = COMAD.aligner.teacher(setting.distiller.aligner, patches, m)
        for b in range(3):
            rows = masks.teachers[m][b].tolist()
            assert valid[m, b, 1:].nonzero().flatten().tolist() == rows
            expected = mapped[b] if teacher_hidden == "drop" else mapped[b, rows]
            torch.testing.assert_close(aligned[m, b, 1:][rows], expected)
        if m:
            first = COMAD.aligner.teacher(setting.distiller.aligner, cls.unsqueeze(1), m)[:, 0]
            torch.testing.assert_close(aligned[m, :, 0], first)


@torch.no_grad()
def test_positions_that_no_teacher_saw_carry_no_weight(small_distillation):
    masking = Independent(teacher_mask_ratios=(0.8,))
    setting = small_distillation(replace(COMAD, masking=masking), teacher_widths=(48, 48))
    images, outputs, masks = setting.batch(6)
    _, valid = aligned_and_valid(setting, images, outputs, masks)
    assert not valid.any(dim=0)[:, 1:].all()
    loss = setting.distiller(images, outputs, masks)[0]
    assert float(loss) == pytest.approx(naive_loss(setting, images, masks), rel=1e-4)


def test_class_tokens_count_only_where_a_teacher_has_one(small_distillation):
    with_cls = small_distillation(COMAD, with_cls=(False,) * 3)
    objectives = {name: replace(objective, cls=False) for name, objective in COMAD.objectives.items()}
    without = small_distillation(replace(COMAD, objectives=objectives), with_cls=(True,) * 3)
    batch = with_cls.batch(4)
    torch.testing.assert_close(with_cls.distiller(*batch)[0], without.distiller(*batch)[0])


@torch.no_grad()
def test_teachers_see_their_own_patches_and_leave_no_gradient(comad):
    images, noise = comad.images[:3], torch.rand(3, 4, 16)
    outputs, masks = comad.distiller.forward_teachers(comad.teachers, images, noise=noise)
    assert torch.equal(masks.student, COMAD.masking(noise).student)
    for teacher, visible, (cls, patches, *_) in zip(comad.teachers, masks.teachers, outputs, strict=True):
        expected = teacher.backbone(images, visible)
        assert torch.equal(patches, expected.patches) and torch.equal(cls, expected.cls)


@torch.no_grad()
def test_teacher_with_larger_patches_gets_larger_images(small_distillation):
    setting = small_distillation(COMAD, teacher_patch_size=16)
    images, outputs, masks = setting.batch(4)
    larger = F.interpolate(images, (64, 64), mode="bicubic", antialias=True)
    for teacher, visible, output in zip(setting.teachers, masks.teachers, outputs, strict=True):
        assert torch.equal(output.patches, teacher.backbone(larger, visible).patches)
    assert setting.distiller(images, outputs, masks)[0].isfinite()


# --- the objectives


def test_an_objective_of_weight_0_is_left_out(small_distillation):
    both = small_distillation(COMAD)
    batch = both.batch(4)
    parts = both.distiller(*batch)[1]()
    for kept, dropped in (("token", "spatial"), ("spatial", "token")):
        objectives = {**COMAD.objectives, dropped: replace(COMAD.objectives[dropped], weight=0.0)}
        loss, metrics = small_distillation(replace(COMAD, objectives=objectives)).distiller(*batch)
        assert float(loss.detach()) == pytest.approx(float(parts[f"loss/{kept}"]), rel=1e-5)
        assert f"loss/{kept}" in metrics() and f"loss/{dropped}" not in metrics()
    with pytest.raises(ValueError, match="no objective has a weight"):
        replace(COMAD, objectives={"token": FeatureLoss(weight=0.0)})


def test_weights_of_objectives_are_factors(small_distillation):
    objectives = {"near": FeatureLoss(weight=2.0), "far": FeatureLoss(where="hidden", distance="cosine", weight=0.5)}
    setting = small_distillation(Method(objectives=objectives))
    loss, metrics = setting.distiller(*setting.batch(4))
    numbers = metrics()
    expected = 2 * numbers["loss/near"] + 0.5 * numbers["loss/far"]
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_each_of_several_objectives_is_what_it_is_alone(small_distillation):
    objectives = {
        "plain": FeatureLoss(),
        "elsewhere": FeatureLoss(where="all", cls=False),
        "hotter": FeatureLoss(temperature=4.0),
        "nearer": FeatureLoss(distance="mse"),
        "relation": RelationLoss(),
        "first": FeatureLoss(teachers="first"),
        "rest": FeatureLoss(teachers="rest"),
    }
    together = small_distillation(replace(COMAD, objectives=objectives))
    batch = together.batch(4)
    numbers = together.distiller(*batch)[1]()
    parts = {name: float(numbers[f"loss/{name}"]) for name in objectives}
    for name in ("plain", "elsewhere", "hotter", "nearer", "relation"):  # others leave teachers out: other maps
        alone = small_distillation(replace(COMAD, objectives={name: objectives[name]})).distiller(*batch)
        assert parts[name] == pytest.approx(float(alone[0].detach()), rel=1e-5)
    assert len(set(parts.values())) == len(objectives)


def test_an_objective_that_gives_no_gradient_is_refused(small_distillation):
    @dataclass(frozen=True, kw_only=True)
    class Cut(FeatureLoss):
        def distance_of(self, pair):
            return super().distance_of(pair).detach()

    setting = small_distillation(replace(COMAD, objectives={"a": FeatureLoss(), "b": Cut()}))
    batch = setting.batch(4)
    with pytest.raises(ValueError, match="objective 'b' gives no gradient, so it trains nothing; leave it out"):
        setting.distiller(*batch)
    setting.distiller.eval()(*batch)
    with torch.no_grad():
        setting.distiller.train()(*batch)


@pytest.mark.parametrize("method", [COMAD, METHODS["comad-literal"], replace(COMAD, aligner=TrainedAdapter())])
def test_metrics_are_detached_and_finite(small_distillation, method):
    setting = small_distillation(method)
    numbers = setting.distiller(*setting.batch(8))[1]()
    assert all(not number.requires_grad and number.isfinite() and number.ndim == 0 for number in numbers.values())


def test_a_teacher_that_is_not_finite_is_named(comad):
    images, teachers, masks = comad.batch(8)
    teachers[1].patches[5, 0, 0] = torch.nan
    name = comad.distiller.teacher_names[1]
    with pytest.raises(TrainingError, match=f"the teacher '{name}' are not finite"):
        comad.distiller(images, teachers, masks)[1]()


def test_a_teacher_that_is_not_finite_is_named_before_anything_is_fitted(small_distillation):
    setting = small_distillation(COMAD)
    before = {name: part.clone() for name, part in setting.distiller.state_dict().items() if torch.is_tensor(part)}
    with torch.no_grad():
        setting.teachers[1].backbone.vit.blocks[0].mlp.fc1.bias[0] = torch.nan
    with pytest.raises(TrainingError, match=r"the teacher 'teacher-1' are not finite; .*inspect"):
        setting.distiller.calibrate(setting.teachers, [setting.images[:16]])
    assert all(torch.equal(setting.distiller.state_dict()[name], part) for name, part in before.items())


def test_teachers_and_images_that_say_nothing_are_seen_in_the_numbers(comad):
    images, teachers, masks = comad.batch(8)
    names = comad.distiller.teacher_names
    numbers = comad.distiller(images, teachers, masks)[1]()
    assert float(numbers["image_std"]) > 0.01 and all(float(numbers[f"std_{name}"]) > 0.01 for name in names)
    teachers[1] = teachers[1]._replace(patches=torch.ones_like(teachers[1].patches))
    numbers = comad.distiller(torch.full_like(images, 0.5), teachers, masks)[1]()
    assert float(numbers["image_std"]) == float(numbers[f"std_{names[1]}"]) == 0 < float(numbers[f"std_{names[0]}"])


def test_bfloat16_autocast_gives_nearly_the_same_loss(comad):
    batch = comad.batch(8)
    exact = comad.distiller(*batch)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        loss = comad.distiller(*batch)[0]
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(exact), rel=0.02)
    assert all(p.grad.isfinite().all() for p in comad.distiller.parameters() if p.requires_grad)
