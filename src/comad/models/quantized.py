"""Linear layers of frozen networks in 8 bits: one scale per row of the weights, one per token, found in each pass."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from comad.models.backbone import Backbone
from comad.models.onednn_linear import OnednnLinear
from comad.models.timm_backbone import replace_linears

Quantized = Literal["int8", "fp8"]
DTYPES: dict[Quantized, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST: dict[Quantized, float] = {"int8": 127.0, "fp8": 448.0}

if torch.ops.aten._int_mm not in flop_registry:

    @register_flop_formula(torch.ops.aten._int_mm)
    def _count(a_shape: Any, b_shape: Any, *arguments: Any, **named: Any) -> int:
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]


class QuantizedLinear(nn.Module):
    """A linear layer whose product is computed in 8 bits, and whose output has its input's type.

    It is faster than bf16 only in a compiled block, where rounding and scaling join what stands before and behind.

    Args:
        linear: the layer in its place.
        kind: of the 8 bits.
    """

    weight: nn.Parameter
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kind: Quantized):
        super().__init__()
        self.kind: Quantized = kind
        rounded, scale = _rounded(linear.weight.detach().float(), kind)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale.squeeze(1))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., E) to (..., K)."""
        tokens, scale = _rounded(x.flatten(0, -2).float(), self.kind)
        if self.kind == "int8":
            product = cast(Any, torch)._int_mm(tokens, self.weight.t()).float() * scale * self.scale
        else:
            product = (
                cast(Any, torch)
                ._scaled_mm(
                    tokens, self.weight.t(), scale_a=scale, scale_b=self.scale.unsqueeze(0), out_dtype=torch.bfloat16
                )
                .float()
            )
        if self.bias is not None:
            product = product + self.bias
        return product.to(x.dtype).unflatten(0, x.shape[:-1])


def check_quantized(kind: Quantized, device: torch.device, compiled: bool) -> None:
    """Make sure that 8 bits are faster than bf16 here.

    Raises:
        ValueError: they are not, or not known to be.
    """
    if not compiled:
        raise ValueError(f"--teacher-precision {kind} is faster than bf16 only with --compile; add it.")
    if kind == "int8" and not (device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")):
        raise ValueError("--teacher-precision int8 is for CPUs with AVX-512; leave it out for bf16.")
    if kind == "fp8" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise ValueError("--teacher-precision fp8 needs a GPU such as H100 or L4; leave it out for bf16.")


def quantize(backbone: Backbone, kind: Quantized) -> None:
    """Put the linear layers of a Vision Transformer's blocks into 8 bits, in place.

    Raises:
        ValueError: another kind of network.
    """
    if not replace_linears(backbone, lambda linear: QuantizedLinear(linear, kind)):
        raise ValueError(f"{type(backbone).__name__} has no blocks to put into {kind}; use --teacher-precision bf16.")


def precision_of(backbone: Backbone) -> str:
    """The type of the matrix products, as ``torch.bfloat16``, ``packed bf16`` or ``int8``."""
    for module in backbone.modules():
        if isinstance(module, QuantizedLinear | OnednnLinear):
            return module.kind
    return str(next(backbone.parameters(), torch.empty(0)).dtype)


def _rounded(rows: Tensor, kind: Quantized) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, and the scale (rows, 1) that brings them back."""
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST[kind]
    scaled = rows / scale
    return (scaled.round() if kind == "int8" else scaled).to(DTYPES[kind]), scale
