"""The student's side: taps, what nothing reads, two masks per image, painted pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comad.distill.taps import Tap, block_at
from comad.distill.teaching import one_row_per_mask
from torch.nn import functional as F

from comad.distill.masking import Masking, Masks
from comad.models.backbone import normalised_patches
from comad.models.listening import listening
from comad.presets import METHODS

WHOLE = Masks(None, (None, None, None))


@torch.no_grad()
def test_taps_are_the_outputs_of_their_blocks(small_distillation):
    method = replace(METHODS["unic"], tap=Tap(student=0.5))
    setting = small_distillation(method)
    distiller, images = setting.distiller, setting.images[:2]
    encoded, vit = distiller.encode(images, WHOLE), distiller.student.vit
    x = vit.norm_pre(
        vit._pos_embed(vit.patch_embed((images - distiller.student.pixel_mean) / distiller.student.pixel_std))
    )
    first = vit.blocks[0](x)
    torch.testing.assert_close(encoded.tapped, first)
    torch.testing.assert_close(encoded.last, vit.norm(vit.blocks[1](first)))
    assert [rung.shape for rung in encoded.rungs] == [(2, 17, 32)] * 2


def test_depths_are_shares_of_the_blocks():
    assert [block_at(depth, 12) for depth in (0.01, 0.5, 2 / 3, 1.0)] == [1, 6, 8, 12]
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Tap(student=0.0)


@pytest.mark.parametrize(("name", "qkv"), [("tinymim", 1.0), ("m-tinymim", 0.5)])
def test_what_no_term_reads_is_frozen_and_lets_pass(small_distillation, name, qkv):
    method = replace(METHODS[name], tap=Tap(qkv=qkv))
    setting = small_distillation(method)
    student = setting.distiller.student
    before = {name: p.clone() for name, p in student.named_parameters()}
    setting.losses_on_one_batch(2, learning_rate=1e-2)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in student.named_parameters() if p.requires_grad}
    last = block_at(qkv, 2) - 1
    assert any(name.startswith(f"vit.blocks.{last}.attn.qkv") for name in changed)
    assert not any(
        name.startswith((f"vit.blocks.{last}.mlp", f"vit.blocks.{last}.attn.proj", "vit.norm")) for name in changed
    )
    with torch.no_grad(), listening(student, blocks=[1]) as heard:
        tokens = student(setting.images[:2])
        if last == 1:  # the last block adds nothing to the block before
            torch.testing.assert_close(tokens.patches, student.vit.norm(heard.blocks[1].patches))


def test_other_presets_freeze_nothing(small_distillation):
    for name in ("comad", "hybrid", "dmae", "gram"):
        assert all(p.requires_grad for p in small_distillation(METHODS[name]).distiller.parameters())


def test_every_image_is_seen_under_two_masks_without_a_common_patch(small_distillation):
    setting = small_distillation(METHODS["dmjd"])
    images, targets = setting.batch(3)
    twice, repeated = one_row_per_mask(images, targets)
    assert len(twice) == 6 and torch.equal(twice[:3], twice[3:])
    assert torch.equal(repeated.tokens[0].patches[3:], targets.tokens[0].patches)
    first, second = targets.masks.student[:3], targets.masks.student[3:]
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        assert not set(a) & set(b) and len(a) == len(b) == 6
    encoded = setting.distiller.encode(twice, repeated.masks)
    alone = setting.distiller.encode(images, Masks(second, targets.masks.teachers))
    torch.testing.assert_close(encoded.tapped[3:], alone.tapped)


def test_painted_pixels_are_compared_with_the_normalised_picture(small_distillation):
    setting = small_distillation(METHODS["dmae"])
    images, targets = setting.batch(3)
    painted, true = setting.distiller.encode(images, targets.masks).pixels
    assert painted.shape == true.shape == (3, 17, 192)
    assert torch.equal(true[:, 1:], normalised_patches(images, 8))
    hidden = ~targets.masks.student_sees(3, 16, images.device)
    expected = F.mse_loss(painted[:, 1:][hidden], true[:, 1:][hidden])
    numbers = setting.distiller(images, targets).metrics()
    assert float(numbers["pixels"]) == pytest.approx(float(expected.detach()), rel=1e-5)


@torch.no_grad()
def test_the_mean_of_the_patches_takes_the_place_of_the_class_token(small_distillation):
    setting = small_distillation(METHODS["gram"])
    images, targets = setting.batch(3)
    encoded = setting.distiller.encode(images, targets.masks)
    torch.testing.assert_close(encoded.tapped[:, 0], encoded.tapped[:, 1:].mean(dim=1))
    pairs, _ = setting.distiller.align(encoded, targets)
    mean = targets.tokens[0].patches.mean(dim=1)
    torch.testing.assert_close(pairs[0].target[:, 0], F.normalize(mean, dim=-1))


@pytest.mark.parametrize("hidden", ["drop", "token"])
def test_an_unmasked_step_reaches_every_parameter(small_distillation, hidden):
    masking = Masking(hidden=hidden, unmasked_share=1.0)
    setting = small_distillation(replace(METHODS["comad"], masking=masking))
    images, targets = setting.batch(4)
    setting.distiller(images, targets).loss.backward()
    assert all(p.grad is not None for p in setting.distiller.parameters())  # processes may differ in their steps
    whole = setting.distiller.student(images)
    torch.testing.assert_close(setting.distiller.encode(images, targets.masks).tapped[:, 1:], whole.patches)
