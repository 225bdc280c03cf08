"""Methods and teachers that do not fit are told so in one line; heads travel into the export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from comad.distill.heads import Student
from comad.distill.matching import give_decoders, match, widths_and_cls
from comad.distill.taps import Tap

from comad.distill.distiller import Distiller
from comad.export.package import ModelCard, export_backbone
from comad.models.decoder import MaskedDecoder
from comad.models.mae_decoder import load_decoder, save_decoder
from comad.models.teachers import Teacher, load_teacher, teacher_from_module
from comad.models.timm_backbone import VitConfig
from comad.presets import METHODS

STUDENT = VitConfig(image_size=16, patch_size=4, width=12, depth=2, heads=2)


def teacher(name: str, width: int = 24, heads: int = 4) -> Teacher:
    backbone = VitConfig(image_size=16, patch_size=4, width=width, depth=2, heads=heads).build()
    return Teacher(name, backbone.eval(), None)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.single])
def test_a_preset_of_one_teacher_refuses_two(name):
    with pytest.raises(ValueError, match=r"one teacher and got a, b; pass one with --teachers"):
        match(METHODS[name], STUDENT, STUDENT.build(), [teacher("a"), teacher("b")])


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
        match(METHODS[name], STUDENT, STUDENT.build(), [teacher(*facts) for facts in teachers])


@pytest.mark.parametrize("name", ["tinymim", "dmae"])
def test_a_network_without_blocks_is_refused(name):
    convolution = teacher_from_module("conv", torch.nn.Conv2d(3, 8, 4, 4), 16)
    with pytest.raises(ValueError, match="conv: this preset reads the blocks"):
        match(METHODS[name], STUDENT, STUDENT.build(), [convolution])
    match(METHODS["radio"], STUDENT, STUDENT.build(), [convolution, teacher("a")])


@pytest.mark.parametrize(("name", "policy", "words"), [("hybrid", "superset", "none"), ("dmae", "none", "shared")])
def test_masks_that_do_not_fit_the_terms_are_refused(name, policy, words):
    with pytest.raises(ValueError, match=f"--method.masking.policy {words}"):
        replace(METHODS[name], masking=replace(METHODS[name].masking, policy=policy))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [("dmae", {"hidden": "token"}, "hidden drop"), ("g2sd", {"teachers_hidden": "zero"}, "teachers-hidden drop")],
)
def test_decoders_take_what_was_left_out(name, change, words):
    with pytest.raises(ValueError, match=f"--method.masking.{words}"):
        replace(METHODS[name], masking=replace(METHODS[name].masking, **change))


def test_a_student_without_class_token_is_refused():
    student = replace(STUDENT, name="vit_base_patch16_siglip_224").build()
    with pytest.raises(ValueError, match=r"no class token.*--method\.tap\.pooled"):
        Distiller(student, METHODS["comad"], [16], [True])
    Distiller(student, replace(METHODS["comad"], tap=Tap(pooled=True)), [16], [True])


def test_heads_of_the_teacher_travel_into_the_export(tmp_path):
    student = STUDENT.build()
    config = match(METHODS["tinymim"], STUDENT, student, [teacher("a", heads=4)])
    assert config == replace(STUDENT, heads=4)
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


def test_other_presets_leave_the_students_heads():
    assert match(METHODS["comad"], STUDENT, STUDENT.build(), [teacher("a"), teacher("b", heads=2)]) == STUDENT
    hybrid = match(METHODS["hybrid"], STUDENT, STUDENT.build(), [teacher("a"), teacher("b", heads=2)])
    assert hybrid.heads == 4  # of the first, whose attention is compared


def test_identity_heads_are_for_attention_alone():
    assert {name for name, method in METHODS.items() if method.aligner == Student(form="identity")} == {
        "tinymim",
        "m-tinymim",
    }


def test_a_decoder_is_found_beside_its_teacher_or_asked_for(teacher_specs):
    spec = teacher_specs[0]
    with pytest.raises(ValueError, match=r"no MAE decoder lies with this teacher.*comad pretrain mae"):
        load_decoder(spec, (4, 4))
    loaded = load_teacher(spec, 16)
    decoder = MaskedDecoder(24, (4, 4), 48, width=8, depth=1, heads=2)
    path = Path(spec.split("=")[1])
    save_decoder(decoder, path)
    try:
        give_decoders([spec], [loaded], torch.float32, torch.device("cpu"))
    finally:
        (path / "decoder.safetensors").unlink()
    assert widths_and_cls(METHODS["g2sd"], [loaded]) == ([8], [False])
    tokens, visible = torch.rand(2, 3, 24), torch.tensor([[0, 3, 5], [1, 2, 9]])
    torch.testing.assert_close(
        loaded.backbone.decoder.decode(None, tokens, visible), decoder.decode(None, tokens, visible)
    )


def test_the_bundled_mae_has_its_decoder():
    decoder = load_decoder("mae-stamps", (6, 6))
    assert decoder.embed.in_features == load_teacher("mae-stamps", 48).backbone.width
