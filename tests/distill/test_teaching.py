"""Teachers as a distillation loads them."""

from __future__ import annotations

import pytest
import torch
from comad.distill.teaching import load_teachers

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "rows", "amx", "fused"),
    [
        (torch.bfloat16, 4, False, False),
        (torch.bfloat16, 4, True, True),
        (torch.bfloat16, 17, False, True),
        (torch.float32, 4, False, True),
    ],
)
def test_attention_of_short_sequences_is_fused_where_that_is_faster(dtype, rows, amx, fused, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    (teacher,) = load_teachers(["vit_tiny_patch16_224:random"], rows, 16, dtype, CPU)
    (exact,) = load_teachers(["vit_tiny_patch16_224:random"], rows, 16, torch.float32, CPU)
    exact.backbone.load_state_dict(teacher.backbone.state_dict())
    assert {block.attn.fused_attn for block in teacher.backbone.vit.blocks} == {fused}
    images = torch.rand(1, 3, 16 * rows, 16 * rows)
    with torch.no_grad():
        torch.testing.assert_close(
            teacher.backbone(images).patches.float(), exact.backbone(images).patches, atol=0.1, rtol=0.05
        )
