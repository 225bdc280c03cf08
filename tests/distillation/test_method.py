"""Methods and teachers that do not fit are told so in one line; heads travel into the export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from comad.distillation.aligners import StudentProjector
from comad.distillation.distiller import Distiller
from comad.distillation.features import Blocks
from comad.distillation.masking import Independent, Shared, Superset, WholeImages
from comad.distillation.method import load_decoders
from comad.distillation.objectives import FeatureLoss, Objective
from comad.exporting.package import ModelCard, export_backbone
from comad.models.decoder import MaskedDecoder
from comad.models.mae_decoder import load_decoder, save_decoder
from comad.models.students import VitConfig
from comad.models.teachers import Teacher, load_teacher, teacher_from_module
from comad.presets import METHODS

STUDENT = VitConfig(image_size=16, patch_size=4, width=12, depth=2, heads=2)


def teacher(name: str, width: int = 24, heads: int = 4) -> Teacher:
    backbone = VitConfig(image_size=16, patch_size=4, width=width, depth=2, heads=heads).build()
    return Teacher(name, backbone.eval(), None)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.single_teacher])
def test_a_preset_of_one_teacher_refuses_two(name):
    with pytest.raises(ValueError, match=r"one teacher and got a, b; pass one with --teachers"):
        METHODS[name].check(STUDENT.build(), [teacher("a"), teacher("b")])


@pytest.mark.parametrize(
    ("name", "teachers", "words"),
    [
        ("hybrid", [("a", 24, 4)], "two or more --teachers"),
        ("dmt-like", [("a", 24, 4), ("b", 16, 4)], "widths 16, 24 have no mean"),
        ("m-tinymim", [("a", 24, 4), ("b", 24, 2)], "2, 4 heads"),
        ("tinymim", [("a", 40, 5)], "--student.width 10"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(name, teachers, words):
    with pytest.raises(ValueError, match=words):
        METHODS[name].check(STUDENT.build(), [teacher(*facts) for facts in teachers])


@pytest.mark.parametrize("name", ["tinymim", "dmae"])
def test_a_network_without_blocks_is_refused(name):
    convolution = teacher_from_module("conv", torch.nn.Conv2d(3, 8, 4, 4), 16)
    with pytest.raises(ValueError, match="conv: this preset reads the blocks"):
        METHODS[name].check(STUDENT.build(), [convolution])
    METHODS["radio"].check(STUDENT.build(), [convolution, teacher("a")])


@pytest.mark.parametrize(
    ("name", "masking", "words"),
    [
        ("hybrid", Superset(), "--masking none"),
        ("dmae", WholeImages(), "--masking shared"),
        ("dmae", Shared(hidden="token"), "--masking.hidden drop"),
        ("g2sd", Independent(teacher_hidden="zero"), "--masking.teacher-hidden drop"),
        ("dmjd", WholeImages(), "--masking shared"),
    ],
)
def test_masks_that_do_not_fit_are_refused(name, masking, words):
    with pytest.raises(ValueError, match=words):
        replace(METHODS[name], masking=masking)


def test_a_student_without_class_token_is_refused():
    student = replace(STUDENT, name="vit_base_patch16_siglip_224").build()
    with pytest.raises(ValueError, match=r"no class token.*--features\.pooled"):
        Distiller(student, [teacher("a")], METHODS["comad"])
    Distiller(student, [teacher("a")], replace(METHODS["comad"], features=Blocks(pooled=True)))


def test_heads_of_the_teacher_travel_into_the_export(tmp_path):
    student = STUDENT.build()
    Distiller(student, [teacher("a", heads=4)], METHODS["tinymim"])
    config = replace(STUDENT, heads=4)
    card = ModelCard(name="s", licence="apache-2.0", architecture=config.name, token_types=("patch",), about="",
                     preset="tinymim", seed=0, images_seen=0, data="none", data_licence="none")  # fmt: skip
    folder = export_backbone(student, tmp_path / "student", model_args=config.arguments, card=card)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert [block.attn.num_heads for block in loaded.blocks] == [4, 4]
    image = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        ours = student.eval()(image).patches
        theirs = loaded.forward_features((image - student.pixel_mean) / student.pixel_std)[:, 1:]
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize(("name", "heads"), [("comad", 0), ("hybrid", 4)])
def test_heads_are_those_of_the_teacher_whose_attention_is_compared(name, heads):
    assert METHODS[name].compared_heads([teacher("a"), teacher("b", heads=2)]) == heads


def test_identity_heads_are_for_what_compares_no_tokens():
    identity = StudentProjector(head="identity")
    assert {name for name, method in METHODS.items() if method.aligner == identity} == {"tinymim", "m-tinymim", "dmjd"}


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("comad", [{"tokens"}, {"tokens"}]),
        ("tinymim", [{"qkv"}]),
        ("dmae", [{"tokens"}]),
        ("dmjd", [set()]),
        ("hybrid", [{"qkv"}, {"tokens"}]),
    ],
)
def test_what_is_read_of_a_teacher_follows_from_the_objectives(name, needs):
    assert [METHODS[name].teacher_needs(m, len(needs)) for m in range(len(needs))] == needs


@pytest.mark.parametrize("name", METHODS)
def test_images_to_calibrate_on_follow_from_normalizer_and_aligner(name):
    method = METHODS[name]
    fitted = method.normalizer.num_calibration_images, method.aligner.num_calibration_images
    assert method.num_calibration_images == max(fitted) and set(fitted) <= {0, 512}


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda: FeatureLoss(distance="euclid"), "no distance 'euclid'; there are: kl-student-teacher"),
        (lambda: FeatureLoss(distance="smoth-l1"), "did you mean 'smooth-l1'"),
        (lambda: Objective.choose("featur"), "no objective 'featur'; did you mean 'feature'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(objective, words):
    with pytest.raises(ValueError, match=words):
        objective()


def test_a_decoder_is_found_beside_its_teacher_or_asked_for(teacher_specs):
    spec = teacher_specs[0]
    with pytest.raises(ValueError, match=r"no MAE decoder lies with this teacher.*comad pretrain mae"):
        load_decoder(spec, (4, 4))
    loaded = load_teacher(spec, 16)
    decoder = MaskedDecoder(24, (4, 4), 48, width=8, depth=1, heads=2)
    path = Path(spec.split("=")[1])
    save_decoder(decoder, path)
    try:
        load_decoders(METHODS["g2sd"], [spec], [loaded], torch.float32)
    finally:
        (path / "decoder.safetensors").unlink()
    features = METHODS["g2sd"].features
    assert features.width(loaded.backbone) == 8 and features.has_cls(loaded.backbone)
    tokens, visible = torch.rand(2, 3, 24), torch.tensor([[0, 3, 5], [1, 2, 9]])
    torch.testing.assert_close(
        loaded.backbone.decoder.decode(None, tokens, visible), decoder.decode(None, tokens, visible)
    )


def test_the_bundled_mae_has_its_decoder():
    decoder = load_decoder("mae-stamps", (6, 6))
    assert decoder.embed.in_features == load_teacher("mae-stamps", 48).backbone.width
