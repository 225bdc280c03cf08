"""What a Vision Transformer says on its way: tokens after some blocks; queries, keys and values of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from comad.models.backbone import Backbone, Tokens
from comad.models.timm_backbone import TimmBackbone


@dataclass
class Heard:
    """What was said during the last pass.

    Attributes:
        blocks: number of the block, from 1 → its output, before any norm.
        qkv: queries, keys and values (width 3E) of the block asked for.
    """

    blocks: dict[int, Tokens] = field(default_factory=dict)
    qkv: Tokens | None = None


@contextmanager
def listening(backbone: Backbone, blocks: Sequence[int] = (), qkv: int = 0) -> Iterator[Heard]:
    """Within the context a pass through the backbone leaves what was asked for in the `Heard`.

    Args:
        backbone: a plain Vision Transformer.
        blocks: numbers of blocks whose output is wanted, from 1.
        qkv: number of the block whose queries, keys and values are wanted; 0: none.

    Raises:
        ValueError: another kind of network, whose blocks are not known.
    """
    heard, handles = Heard(), []
    if blocks or qkv:
        vit = _blocks_known(backbone).vit
        parts = {number: vit.blocks[number - 1] for number in blocks}
        if qkv:
            parts[0] = cast(Any, vit.blocks[qkv - 1]).attn.qkv
        handles = [part.register_forward_hook(_keep(heard, number, vit)) for number, part in parts.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _blocks_known(backbone: Backbone) -> TimmBackbone:
    if not (isinstance(backbone, TimmBackbone) and hasattr(backbone.vit.blocks[0], "attn")):
        name = type(backbone).__name__
        raise ValueError(f"{name} has no blocks that can be read; name a plain Vision Transformer as teacher.")
    return backbone


def _keep(heard: Heard, number: int, vit: VisionTransformer) -> Callable[[nn.Module, object, Tensor], None]:
    """A hook that puts a block's output, or for number 0 its queries, keys and values, into ``heard``."""

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        cls = output[:, 0] if vit.cls_token is not None else None
        tokens = Tokens(cls, output[:, vit.num_prefix_tokens :])
        if number:
            heard.blocks[number] = tokens
        else:
            heard.qkv = tokens

    return keep
