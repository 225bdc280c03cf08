"""What is used of torch and timm beside their promises: each is there, and the message says what to do when it goes."""

from __future__ import annotations

import inspect
from typing import Any, cast

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

USED = {
    "torch.ops.mkldnn._linear_pointwise": "onednn_linear.py: without it layers are a tenth slower; remove it",
    "torch.ops.mkldnn._reorder_linear_weight": "models/onednn_linear.py: the same",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "models/onednn_linear.py: ask torch.backends.mkldnn instead",
    "torch.cpu._is_avx512_bf16_supported": "evaluation/inspection.py: compute in float32 there",
    "torch._int_mm": "models/quantized.py: use the 8-bit layers of torchao instead",
    "torch._scaled_mm": "models/quantized.py: use the 8-bit layers of torchao instead",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "models/timm_backbone.py: needs no formula",
    "timm.models.vision_transformer.VisionTransformer._pos_embed": "write the sum of its three "
    "cases there: cls_token, reg_token and pos_embed, with no_embed_class or not",
    "timm.models.vision_transformer.checkpoint_filter_fn": "models/networks.py: read OpenCLIP's names by a Format",
}


@pytest.mark.parametrize("name", USED)
def test_private_function_is_there(name: str):
    if "mkldnn" in name and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    root, *parts = name.split(".")
    found: Any = {"torch": torch, "timm": timm}[root]
    for part in parts:
        assert hasattr(found, part), f"{name} is gone; {USED[name]}"
        found = getattr(found, part)
    assert callable(found)


def test_positions_of_timm_are_added_as_the_masked_forward_expects():
    """`TimmBackbone._embed_visible` adds positions to zeros to learn them."""
    vit = cast(VisionTransformer, timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32))
    assert list(inspect.signature(vit._pos_embed).parameters) == ["x"], USED[
        "timm.models.vision_transformer.VisionTransformer._pos_embed"
    ]
    x = torch.randn(1, 4, 192)
    zeros = vit._pos_embed(torch.zeros_like(x))
    torch.testing.assert_close(vit._pos_embed(x)[:, 1:], x + zeros[:, 1:])


def test_blocks_are_a_row_that_can_be_cut():
    """`sources.cut_blocks` slices it."""
    vit = timm.create_model("vit_tiny_patch16_224", depth=3)
    assert len(vit.blocks[:2]) == 2
