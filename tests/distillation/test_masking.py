"""Masks: how many patches are seen, which, and from what randomness alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed import resample_abs_pos_embed
from torch.nn import functional as F

from comad.distillation.masking import Disjoint, Independent, Masking, Shared, Superset, WholeImages, num_visible
from comad.models.backbone import resample_patches
from comad.models.students import VitConfig
from comad.presets import METHODS

CPU = torch.device("cpu")
RATIOS = st.floats(0.0, 0.95)
ASYMMETRIC = [Superset, Independent]


def noise(batch_size: int, num_teachers: int, num_patches: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, 1 + num_teachers, num_patches, generator=generator)


def as_sets(visible: torch.Tensor) -> list[set[int]]:
    return [set(row) for row in visible.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    ratios=st.lists(RATIOS, min_size=2, max_size=5),
    batch_size=st.integers(1, 4),
    num_patches=st.integers(1, 50),
    seed=st.integers(0, 10_000),
)
def test_superset_shows_every_teacher_what_the_student_sees(ratios, batch_size, num_patches, seed):
    *teachers, student = sorted(ratios)
    masks = Superset(mask_ratio=student, teacher_mask_ratios=tuple(teachers))(
        noise(batch_size, len(teachers), num_patches, seed)
    )
    for visible in masks.teachers:
        assert all(own <= more for own, more in zip(as_sets(masks.student), as_sets(visible), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(ASYMMETRIC),
    teachers=st.lists(st.floats(0.0, 0.6), min_size=1, max_size=4),
    student=st.floats(0.6, 0.95),
    num_patches=st.integers(1, 60),
    seed=st.integers(0, 10_000),
)
def test_counts_are_exact_and_positions_ascend(policy, teachers, student, num_patches, seed):
    masking = policy(mask_ratio=student, teacher_mask_ratios=tuple(teachers))
    masks = masking(noise(3, len(teachers), num_patches, seed))
    for visible, ratio in zip((masks.student, *masks.teachers), (student, *teachers), strict=True):
        assert visible.shape == (3, max(1, round(num_patches * (1 - ratio))))
        assert (visible.diff(dim=1) > 0).all() and visible.min() >= 0 and visible.max() < num_patches


@pytest.mark.parametrize(
    ("num_patches", "counts"), [(16, (4, 8, 10, 11)), (36, (9, 18, 22, 25)), (196, (49, 98, 118, 137))]
)
def test_counts_of_the_papers_ratios(num_patches, counts):
    masking = Superset()
    ratios = (masking.mask_ratio, *masking.teacher_mask_ratios)
    assert tuple(num_visible(num_patches, ratio) for ratio in ratios) == counts


def test_the_last_ratio_repeats_for_further_teachers():
    masks = Superset(teacher_mask_ratios=(0.5, 0.25))(noise(1, 4, 16))
    assert [visible.shape[1] for visible in (masks.student, *masks.teachers)] == [4, 8, 12, 12, 12]


def test_none_hides_nothing():
    masks = WholeImages()(noise(2, 3, 16))
    assert masks[:2] == (None, (None, None, None))
    assert masks.student_sees(2, 16, CPU).all() and masks.teachers_see(2, 16, CPU).all()


def test_shared_gives_teachers_the_students_patches():
    masks = Shared()(noise(5, 3, 16))
    assert all(torch.equal(visible, masks.student) for visible in masks.teachers)


@pytest.mark.parametrize("policy", Masking.members.values())
def test_masks_are_functions_of_the_noise(policy):
    rows, masking = noise(4, 3, 16), policy()
    torch.manual_seed(1)
    first = masking(rows)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = masking(rows)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.student is again.student is None or torch.equal(first.student, again.student)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first.teachers, again.teachers, strict=True))
    alone = masking(rows[2:3])  # the masks of an image do not depend on its neighbours in the batch
    assert alone.student is None or torch.equal(alone.student, first.student[2::4])
    assert torch.equal(alone.noise, first.noise[2:3])


@pytest.mark.parametrize("policy", ASYMMETRIC)
def test_each_teacher_draws_from_its_own_row(policy):
    rows, masking = noise(8, 3, 36), policy()
    changed = rows.clone()
    changed[:, 2] = noise(8, 3, 36, seed=1)[:, 2]
    before, after = masking(rows), masking(changed)
    assert torch.equal(before.student, after.student)
    same = [torch.equal(a, b) for a, b in zip(before.teachers, after.teachers, strict=True)]
    assert same == [True, False, True]


def test_independent_hides_the_students_patches_as_often_as_any_other():
    masks = Independent()(noise(2000, 3, 16))
    student, teachers = masks.student_sees(2000, 16, CPU), masks.teachers_see(2000, 16, CPU)
    shares = [float(teacher[student].float().mean()) for teacher in teachers]
    assert shares == pytest.approx([8 / 16, 10 / 16, 11 / 16], abs=0.02)


@pytest.mark.parametrize("policy", ASYMMETRIC)
def test_every_position_is_seen_equally_often(policy):
    masks = policy()(noise(4000, 3, 16))
    for visible in (masks.student, *masks.teachers):
        counted = torch.bincount(visible.flatten(), minlength=16) / 4000
        assert counted.tolist() == pytest.approx([visible.shape[1] / 16] * 16, abs=0.04)


def test_maps_mark_the_visible_positions():
    masks = Superset()(noise(3, 2, 16))
    student, teachers = masks.student_sees(3, 16, CPU), masks.teachers_see(3, 16, CPU)
    assert teachers.shape == (2, 3, 16)
    for image in range(3):
        assert student[image].nonzero().flatten().tolist() == masks.student[image].tolist()
        for m in range(2):
            assert teachers[m, image].nonzero().flatten().tolist() == masks.teachers[m][image].tolist()


@pytest.mark.parametrize("wrong", [{"mask_ratio": 1.0}, {"mask_ratio": -0.1}, {"teacher_mask_ratios": (0.2, 1.5)}])
def test_refuses_a_ratio_outside_its_range(wrong):
    with pytest.raises(ValueError, match="hidden share"):
        Superset(**wrong)


def test_superset_refuses_a_student_that_sees_more_than_a_teacher():
    with pytest.raises(ValueError, match="superset"):
        Superset(mask_ratio=0.4, teacher_mask_ratios=(0.3, 0.5))
    Independent(mask_ratio=0.4, teacher_mask_ratios=(0.3, 0.5))


def test_disjoint_masks_have_no_patch_in_common_and_teachers_see_all():
    masks = Disjoint(mask_ratio=0.6)(noise(3, 2, 16))
    assert masks.student.shape == (6, 6) and masks.teachers == (None, None)
    for first, second in zip(as_sets(masks.student[:3]), as_sets(masks.student[3:]), strict=True):
        assert not first & second
    with pytest.raises(ValueError, match=r"at least 0\.5"):
        Disjoint(mask_ratio=0.4)


def test_a_share_of_the_steps_shows_the_student_everything_and_keeps_the_teachers_masks():
    plain, some = Superset(), Superset(unmasked_share=0.3)
    unmasked = 0
    for seed in range(300):
        rows = noise(2, 3, 16, seed)
        masks = some(rows)
        assert all(torch.equal(a, b) for a, b in zip(masks.teachers, plain(rows).teachers, strict=True))
        whole = masks.student.shape[1] == 16
        assert whole or torch.equal(masks.student, plain(rows).student)
        unmasked += whole
    assert unmasked / 300 == pytest.approx(0.3, abs=0.08)


def test_the_hidden_share_moves_linearly_over_the_run():
    masking, rows = Superset(mask_ratio=0.75, mask_ratio_end=0.5), noise(2, 3, 16)
    assert [masking(rows, progress).student.shape[1] for progress in (0.0, 0.5, 1.0)] == [4, 6, 8]
    assert torch.equal(masking(rows).student, Superset()(rows).student)
    rising = Superset(mask_ratio=0.5, teacher_mask_ratios=(0.5,), mask_ratio_end=0.9)
    assert rising(rows, 1.0).student.shape[1] == 2
    with pytest.raises(ValueError, match="superset"):
        Superset(mask_ratio_end=0.2)


def test_mixup_blends_neighbours_by_a_share_that_belongs_to_the_sample():
    images, rows = torch.rand(200, 3, 4, 4), noise(200, 2, 16)
    assert Superset().blend(images, rows) is images and Superset().repeats
    masking = Superset(mixup=True)
    mixed, shares = masking.blend(images, rows), []
    for index in range(200):
        shares.append(float(rows[index].double().sum() % 1))
        naive = shares[-1] * images[index].double() + (1 - shares[-1]) * images[index - 1].double()
        torch.testing.assert_close(mixed[index].double(), naive, atol=1e-4, rtol=0)
    assert 0 <= min(shares) < 0.05 and 0.95 < max(shares) < 1 and abs(sum(shares) / 200 - 0.5) < 0.06
    assert not masking.repeats and not Superset(mask_ratio_end=0.9).repeats
    assert WholeImages(mixup=True, mixup_outputs=True).repeats and not WholeImages(mixup=True).repeats
    with pytest.raises(ValueError, match=r"--masking\.mixup"):
        WholeImages(mixup_outputs=True)


def test_noise_of_the_masks_is_uniform_and_belongs_to_the_sample():
    masks = WholeImages()(noise(4000, 2, 16))
    assert masks.noise.shape == (4000, 2) and masks.noise.min() >= 0 and masks.noise.max() < 1
    assert torch.histc(masks.noise, 4, 0, 1).tolist() == pytest.approx([2000] * 4, rel=0.1)


def test_a_step_has_one_of_the_sizes(small_distillation):
    """Drawn by the first image's noise, each as often; the student's tokens come back to its own grid."""
    masking = WholeImages(scales=(0.25, 0.5, 1.0))
    noise = torch.rand(300, 1, 2, 16, generator=torch.Generator().manual_seed(0))
    drawn = [masking(part).scale for part in noise]
    assert [round(drawn.count(scale) / 100) for scale in masking.scales] == [1, 1, 1] and masking.repeats
    setting = small_distillation(replace(METHODS["c-radio"], masking=WholeImages(scales=(0.5,))))
    images, outputs, masks = setting.batch(4)
    student = setting.distiller.student
    encoded = setting.distiller.encode(images, masks).last
    assert masks.scale == 0.5 and encoded.shape == (4, 17, 32)
    small = VitConfig(image_size=16, patch_size=8, width=32, depth=2, heads=4).build()
    weights = student.vit.state_dict()
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], (2, 2), num_prefix_tokens=1)
    small.vit.load_state_dict(weights)
    tokens = small(F.interpolate(images, (16, 16), mode="bilinear", antialias=True))
    torch.testing.assert_close(encoded[:, 0], tokens.cls)
    torch.testing.assert_close(encoded[:, 1:], resample_patches(tokens.patches, (2, 2), (4, 4)))
    setting.distiller(images, outputs, masks)[0].backward()
    assert student.vit.pos_embed.grad.abs().sum() > 0 and student(images).patches.shape == (4, 16, 32)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        WholeImages(scales=(2.0,))
