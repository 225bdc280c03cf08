"""Where networks are read: depths, what nothing reads, two masks per image, reconstructed pixels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from comad.distillation.distiller import repeat_for_masks
from comad.distillation.features import Blocks, block_at, forward_teacher
from comad.distillation.masking import Masks, Superset
from comad.distillation.objectives import PixelLoss
from comad.models.backbone import patchify
from comad.models.students import VitConfig
from comad.presets import METHODS

WHOLE = Masks(None, (None, None, None))


@torch.no_grad()
def test_what_is_read_of_the_student_are_the_outputs_of_its_blocks(small_distillation):
    method = replace(METHODS["unic"], features=Blocks(student=0.5))
    setting = small_distillation(method)
    distiller, images = setting.distiller, setting.images[:2]
    encoded, vit = distiller.encode(images, WHOLE), distiller.student.vit
    x = vit.norm_pre(
        vit._pos_embed(vit.patch_embed((images - distiller.student.pixel_mean) / distiller.student.pixel_std))
    )
    first = vit.blocks[0](x)
    torch.testing.assert_close(encoded.compared, first)
    torch.testing.assert_close(encoded.last, vit.norm(vit.blocks[1](first)))
    assert [part.shape for part in encoded.intermediates] == [(2, 17, 32)]  # below the last of two


def test_blocks_that_are_computed_again_give_the_same_gradients(small_distillation):
    gradients = []
    for again in (False, True):
        setting = small_distillation(METHODS["mean"])
        student = setting.distiller.student
        student.vit.set_grad_checkpointing(again)
        calls = Counter()
        student.vit.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.update("x"))
        setting.distiller(*setting.batch(4))[0].backward()
        assert calls["x"] == 1 + again
        gradients.append([p.grad for p in student.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_depths_are_shares_of_the_blocks():
    assert [block_at(depth, 12) for depth in (0.01, 0.5, 2 / 3, 1.0)] == [1, 6, 8, 12]
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Blocks(student=0.0)


@pytest.mark.parametrize(
    ("features", "needs", "computed"),
    [
        (Blocks(), {"tokens"}, 6),
        (Blocks(teacher=2 / 3, student=2 / 3), {"tokens"}, 4),
        (Blocks(qkv=0.5), {"qkv"}, 2),  # and the queries, keys and values of the third
        (Blocks(qkv=0.5), {"tokens", "qkv"}, 6),
        (Blocks(teacher=2 / 3, qkv=1 / 3), {"tokens", "qkv"}, 4),
    ],
)
def test_blocks_of_a_teacher_behind_the_last_one_that_is_read_are_not_computed(features, needs, computed):
    teacher = VitConfig(image_size=32, patch_size=8, width=32, depth=6, heads=4).build().eval()
    ran, blocks = [], teacher.vit.blocks
    for number, block in enumerate(blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    images = torch.rand(2, 3, 32, 32)
    output = forward_teacher(features, teacher, images, needs=frozenset(needs))
    assert ran == list(range(1, computed + 1)) and (output.qkv is not None) == ("qkv" in needs)
    with torch.no_grad():
        whole = teacher(images, intermediates=[block_at(features.teacher, 6)])
    if "tokens" in needs:
        expected = whole if features.teacher == 1 else whole.intermediates[0]
        assert torch.equal(output.patches, expected.patches) and torch.equal(output.cls, expected.cls)


@pytest.mark.parametrize(("name", "qkv"), [("tinymim", 1.0), ("m-tinymim", 0.5)])
def test_what_no_term_reads_is_frozen_and_lets_pass(small_distillation, name, qkv):
    method = replace(METHODS[name], features=Blocks(qkv=qkv))
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
    with torch.no_grad():
        tokens = student(setting.images[:2], intermediates=[1])
        if last == 1:  # the last block adds nothing to the block before
            torch.testing.assert_close(tokens.patches, student.vit.norm(tokens.intermediates[0].patches))


def test_other_presets_freeze_nothing(small_distillation):
    for name in ("comad", "hybrid", "dmae", "gram"):
        assert all(p.requires_grad for p in small_distillation(METHODS[name]).distiller.student.parameters())


def test_every_image_is_seen_under_two_masks_without_a_common_patch(small_distillation):
    setting = small_distillation(METHODS["dmjd"])
    images, outputs, masks = setting.batch(3)
    twice, repeated, both = repeat_for_masks(images, outputs, masks)
    assert len(twice) == 6 and torch.equal(twice[:3], twice[3:])
    assert torch.equal(repeated[0].patches[3:], outputs[0].patches)
    first, second = masks.student[:3], masks.student[3:]
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        assert not set(a) & set(b) and len(a) == len(b) == 4  # one block of four, .4 of them rounded down
    encoded = setting.distiller.encode(twice, both)
    alone = setting.distiller.encode(images, Masks(second, masks.teachers))
    torch.testing.assert_close(encoded.compared[3:], alone.compared)


def test_reconstructed_pixels_are_compared_with_the_image_as_the_student_takes_it(small_distillation):
    setting = small_distillation(METHODS["dmae"])
    images, outputs, masks = setting.batch(3)
    ours, true = setting.distiller.encode(images, masks).pixels
    assert ours.shape == true.shape == (3, 16, 192)
    student = setting.distiller.student
    assert torch.equal(true, patchify((images - student.pixel_mean) / student.pixel_std, 8))
    hidden = ~masks.student_sees(3, 16, images.device)
    expected = F.mse_loss(ours[hidden], true[hidden])
    numbers = setting.distiller(images, outputs, masks)[1]()
    assert float(numbers["loss/pixels"]) == pytest.approx(float(expected.detach()), rel=1e-5)
    (pair,), _ = PixelLoss().pairs(None, [], setting.distiller.encode(images, masks), [], ~hidden)
    variance, mean = torch.var_mean(pair.target, dim=-1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    assert variance.min() > 0.5  # by default each patch is normalised


@torch.no_grad()
def test_the_mean_of_the_patches_takes_the_place_of_the_class_token(small_distillation):
    setting = small_distillation(replace(METHODS["gram"], features=Blocks(pooled=True)))
    images, outputs, masks = setting.batch(3)
    encoded = setting.distiller.encode(images, masks)
    torch.testing.assert_close(encoded.compared[:, 0], encoded.compared[:, 1:].mean(dim=1))
    pairs, _ = setting.distiller.align(encoded, outputs, masks)
    mean = outputs[0].patches.mean(dim=1)
    torch.testing.assert_close(pairs[0].target[:, 0], F.normalize(mean, dim=-1))


@pytest.mark.parametrize("hidden", ["drop", "token"])
def test_an_unmasked_step_reaches_every_parameter(small_distillation, hidden):
    masking = Superset(hidden=hidden, unmasked_share=1.0)
    setting = small_distillation(replace(METHODS["comad"], masking=masking))
    images, outputs, masks = setting.batch(4)
    setting.distiller(images, outputs, masks)[0].backward()
    trained = [p for p in setting.distiller.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)  # processes may differ in their steps
    whole = setting.distiller.student(images)
    torch.testing.assert_close(setting.distiller.encode(images, masks).compared[:, 1:], whole.patches)
