"""Teachers as a distillation loads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comad.distill import setup as assembly
from comad.models.teachers import load_teacher
from comad.presets import recipe
from comad.runtime.run import RunConfig, start_fabric


@pytest.mark.parametrize(
    ("precision", "rows", "amx", "fused"),
    [
        ("bf16", 4, False, False),
        ("bf16", 4, True, True),
        ("bf16", 17, False, True),
        ("fp32", 4, False, True),
    ],
)
def test_attention_of_short_sequences_is_fused_where_that_is_faster(precision, rows, amx, fused, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(assembly, "use_onednn_linear", lambda backbone: None)  # packed weights cannot be read
    base, spec = recipe("radio", demo=True), "vit_tiny_patch16_224:random"
    student = replace(base.student, image_size=8 * rows, width=12, depth=1, heads=2)
    config = replace(base, teachers=(spec,), student=student, run=RunConfig(precision=precision))
    (teacher,) = assembly.prepare(config, start_fabric(config.run)).teachers
    exact = load_teacher(spec, 16 * rows)
    exact.backbone.load_state_dict({name: part.float() for name, part in teacher.backbone.state_dict().items()})
    assert {block.attn.fused_attn for block in teacher.backbone.vit.blocks} == {fused}
    images = torch.rand(1, 3, 16 * rows, 16 * rows)
    with torch.no_grad():
        ours, theirs = (part.backbone(images).patches.float() for part in (teacher, exact))
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.05)
