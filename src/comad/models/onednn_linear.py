"""Linear layers of frozen bf16 networks on the CPU, their weights laid out as oneDNN's matrix product reads them.

A plain layer brings its weights into that order in every pass, which with a few thousand tokens takes a tenth of the
product's time. The product's results are the same bits. GELU joins the product in front of it and sees its sums before
they are rounded, so tokens are a little nearer to those of fp32.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from comad.models.backbone import Backbone
from comad.models.timm_backbone import replace_linears

ONEDNN: Any = torch.ops.mkldnn
"""The operators that torch's own compiler puts in place of a frozen linear layer."""

HAS_ONEDNN_LINEAR = (
    torch.backends.mkldnn.is_available() and hasattr(ONEDNN, "_linear_pointwise") and ONEDNN._is_mkldnn_bf16_supported()
)

if HAS_ONEDNN_LINEAR and ONEDNN._linear_pointwise not in flop_registry:

    @register_flop_formula(ONEDNN._linear_pointwise)
    def _count(x_shape: Any, weight_shape: Any, *arguments: Any, **named: Any) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]


class OnednnLinear(nn.Module):
    """A linear layer for inference, which can be neither copied nor moved.

    Args:
        linear: the layer in its place, in bf16 on the CPU.

    Attributes:
        kind: of its products.
        gelu: whether the exact GELU is applied to what comes out.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.kind, self.gelu = "packed bf16", False
        self.weight = nn.Parameter(ONEDNN._reorder_linear_weight(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., E) to (..., K)."""
        then = ("gelu", [], "none") if self.gelu else ("none", [], "")
        return ONEDNN._linear_pointwise(x, self.weight, self.bias, *then)


def use_onednn_linear(backbone: Backbone) -> None:
    """Pack the linear layers of a Vision Transformer's blocks, in place, where that is faster: in bf16 on the CPU."""
    weight = next(backbone.parameters(), torch.empty(0))
    if HAS_ONEDNN_LINEAR and weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        replace_linears(backbone, OnednnLinear)
        for part in backbone.modules():
            if isinstance(part, Mlp) and isinstance(part.act, nn.GELU) and part.act.approximate == "none":
                cast(OnednnLinear, part.fc1).gelu, part.act = True, nn.Identity()
