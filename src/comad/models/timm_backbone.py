"""Any timm Vision Transformer as a `Backbone`: students, and most teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import timm
import torch
from jaxtyping import Bool, Float, Int
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.format import Format
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from comad.models.backbone import (
    Backbone,
    Hidden,
    Tokens,
    check_blocks,
    gather_patches,
    map_tokens,
    take_visible,
    visible_map,
)
from comad.models.decoder import MaskedDecoder
from comad.models.embedding import PatchProjection, project_patches
from comad.models.networks import norm_after_pooling

if (fused_attention := torch.ops.aten._scaled_dot_product_flash_attention_for_cpu) not in flop_registry:  # torch 2.11

    @register_flop_formula(fused_attention)
    def _count(query: Any, key: Any, value: Any, *arguments: Any, **named: Any) -> int:
        return sdpa_flop_count(query, key, value)


class TimmBackbone(Backbone):
    """A timm ``VisionTransformer`` whose hidden patches are really left out of the computation.

    Where its norm follows the pooling, what stands for the class token is what its classifier sees, and every patch
    goes through that norm.

    Args:
        vit: the network; its head is ignored.
        mean, std: pixel normalisation, in units of [0, 1] pixels.
        token_types: the tokens that carry meaning; ``cls`` needs a class token in ``vit``.

    Attributes:
        decoder: the decoder it was trained with, where a method learns from one.
    """

    decoder: MaskedDecoder | None

    def __init__(
        self,
        vit: VisionTransformer,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        token_types: tuple[str, ...] = ("cls", "patch"),
    ):
        super().__init__()
        self.pools = norm_after_pooling(vit) != ""
        if "cls" in token_types and vit.cls_token is None and not self.pools:
            token_types = tuple(name for name in token_types if name != "cls")
        project_patches(vit)
        self.vit = vit
        self.decoder = None
        self.width = vit.embed_dim
        self.grid = self.own_grid = vit.patch_embed.grid_size
        hybrid = hasattr(vit.patch_embed, "backbone")  # then patches are of its CNN's map
        self.patch_size = vit.patch_embed.img_size[0] // self.grid[0] if hybrid else vit.patch_embed.patch_size[0]
        self.token_types = token_types
        self.has_cls = vit.cls_token is not None or self.pools
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def blocks(self) -> nn.Sequential:
        """See `Backbone`."""
        return cast(nn.Sequential, self.vit.blocks)

    def set_heads(self, heads: int) -> None:
        """Let all blocks attend with so many heads."""
        for block in cast(Any, self.blocks):
            attention = block.attn
            attention.num_heads, attention.head_dim = heads, self.width // heads
            attention.scale = attention.head_dim**-0.5

    def freeze_after(self, read: int, qkv: int) -> None:
        """Freeze what follows block ``read``, and the queries, keys and values of block ``qkv``.

        The last layers of frozen blocks are set to 0: the tokens at the end are those of the last trained block, and
        fine-tuning can train the blocks from there.
        """
        for number, block in enumerate(cast(Any, self.blocks), start=1):
            if number > read and number >= qkv:
                rest = [block.attn.proj, block.norm2, block.mlp] if number == qkv else [block]
                for part in rest:
                    part.requires_grad_(False)
                for layer in (block.attn.proj, block.mlp.fc2):
                    nn.init.zeros_(layer.weight)
                    nn.init.zeros_(layer.bias)
        cast(nn.Module, self.vit.norm).requires_grad_(False)

    def take_pixels_of(self, other: Backbone) -> None:
        """Normalise pixels as another network does."""
        self.pixel_mean.copy_(other.pixel_mean)
        self.pixel_std.copy_(other.pixel_std)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        visible: Int[Tensor, "B V"] | Bool[Tensor, "B N"] | None = None,
        hidden: Hidden = "drop",
        mask_token: Float[Tensor, " E"] | None = None,
        *,
        intermediates: Sequence[int] = (),
        qkv: int = 0,
        stop_early: bool = False,
    ) -> Tokens:
        """Patch embedding, positions, masking, blocks, norm. See `Backbone.forward`."""
        check_blocks(intermediates, qkv, len(self.vit.blocks), type(self.vit).__name__)
        if self.grid != self.own_grid:
            whole = self._forward(images, None, "drop", None, intermediates, qkv, stop_early)
            return take_visible(self._on_grid(whole), visible, hidden)
        return self._forward(images, visible, hidden, mask_token, intermediates, qkv, stop_early)

    def _forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        visible: Int[Tensor, "B V"] | Bool[Tensor, "B N"] | None,
        hidden: Hidden,
        mask_token: Float[Tensor, " E"] | None,
        intermediates: Sequence[int],
        qkv: int,
        stop_early: bool,
    ) -> Tokens:
        """On the network's own grid."""
        if qkv and not hasattr(self.vit.blocks[0], "attn"):
            raise ValueError(f"{type(self.vit.blocks[0]).__name__} has no attention to read; name a plain ViT.")
        vit = self.vit
        if visible is not None and hidden == "drop" and isinstance(vit.patch_embed.proj, PatchProjection):
            x = self._embed_visible(images, visible)
        else:
            x = self._embed(images, visible, hidden, mask_token)
        x = vit.norm_pre(x)
        recompute = vit.grad_checkpointing and torch.is_grad_enabled()
        kept, relations, last = [], None, max([*intermediates, qkv]) if stop_early else len(vit.blocks)
        for number, block in enumerate(cast(Any, vit.blocks)[:last], start=1):
            if number == qkv:
                relations = self._split(block.attn.qkv(block.norm1(x)))
                if stop_early and number == last and number not in intermediates:
                    break
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if number in intermediates:
                kept.append(self._split(x))
        tokens = self._split(x) if stop_early else self._normed(vit.norm(x))
        return tokens._replace(intermediates=tuple(kept), qkv=relations)

    def _split(self, x: Float[Tensor, "B n K"]) -> Tokens:
        """Class token, or what is pooled to stand for it, and patches of a sequence."""
        patches = x[:, self.vit.num_prefix_tokens :]
        if self.pools:
            return Tokens(self.vit.pool(x), patches)
        return Tokens(x[:, 0] if self.vit.cls_token is not None else None, patches)

    def _normed(self, x: Float[Tensor, "B n E"]) -> Tokens:
        """The last tokens, by the norm that follows the pooling where there is one."""
        tokens, norm = self._split(x), self.vit.fc_norm
        return map_tokens(norm, tokens) if self.pools else tokens

    def _embed(
        self,
        images: Float[Tensor, "B 3 H W"],
        visible: Int[Tensor, "B V"] | Bool[Tensor, "B N"] | None,
        hidden: Hidden,
        mask_token: Float[Tensor, " E"] | None,
    ) -> Float[Tensor, "B n E"]:
        """Prefix tokens and patches at their positions, from whole images."""
        vit = self.vit
        x = vit.patch_embed(self._normalised(images))
        if visible is not None and hidden == "token":
            assert mask_token is not None, "hidden='token' needs a mask token"
            keep = visible_map(visible, len(x), x[0, ..., 0].numel(), x.device).view(*x.shape[:-1], 1)
            x = torch.where(keep, x, mask_token.to(x.dtype))
        x = vit._pos_embed(x)
        prefix, patches = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
        if visible is not None and hidden == "drop":
            patches = gather_patches(patches, visible)
        elif visible is not None and hidden == "zero":
            patches = patches * visible_map(visible, len(x), patches.shape[1], x.device).unsqueeze(-1)  # M ⊙ z
        return torch.cat([prefix, patches], dim=1)

    def _embed_visible(self, images: Float[Tensor, "B 3 H W"], visible: Int[Tensor, "B V"]) -> Float[Tensor, "B n E"]:
        """The same numbers as by `_embed`, from the visible patches alone."""
        vit, projection = self.vit, self.vit.patch_embed.proj
        x = vit.patch_embed.norm(projection.project(self._normalised(projection.pick(images, visible))))
        h, w = (side // self.patch_size for side in images.shape[2:])
        empty = x.new_zeros(1, *((h, w) if vit.dynamic_img_size else (h * w,)), self.width)
        prefix, positions = vit._pos_embed(empty).tensor_split([vit.num_prefix_tokens], dim=1)
        return torch.cat([prefix.expand(len(x), -1, -1), x + F.embedding(visible, positions[0])], dim=1)

    def _normalised(self, pixels: Float[Tensor, "*n 3 h w"]) -> Float[Tensor, "*n 3 h w"]:
        """Pixels as the network wants them."""
        return (pixels - self.pixel_mean).div_(self.pixel_std).to(self.vit.patch_embed.proj.weight.dtype)


def math_attention_on_cpu(module: nn.Module, device: torch.device) -> None:
    """Let a network on the CPU compute attention by matrix products.

    The fused kernel's backward is slow there for short sequences: the demo's step takes 1.4 times as long with it. In
    bf16 its forward is slower too without AMX: a ViT-B/16 that sees 98 patches takes 3 % longer. It is as near to fp32.
    """
    for part in module.modules():
        if device.type == "cpu" and hasattr(part, "fused_attn"):
            cast(Any, part).fused_attn = False


@contextmanager
def any_size(vit: VisionTransformer) -> Iterator[None]:
    """Let a network take images of other sizes within the context, its positions resampled: timm's dynamic_img_size."""
    embed = cast(Any, vit.patch_embed)
    before = embed.strict_img_size, embed.flatten, embed.output_fmt, vit.dynamic_img_size
    embed.strict_img_size, embed.flatten, embed.output_fmt, vit.dynamic_img_size = False, False, Format("NHWC"), True
    try:
        yield
    finally:
        embed.strict_img_size, embed.flatten, embed.output_fmt, vit.dynamic_img_size = before


def replace_linears(backbone: Backbone, make: Callable[[nn.Linear], nn.Module]) -> bool:
    """Put what ``make`` returns in the place of each linear layer of a Vision Transformer's blocks.

    Returns:
        Whether the network has such blocks.
    """
    blocks = backbone.blocks
    parents = [(module, name) for module in blocks.modules() for name, _ in module.named_children()]
    for module, name in parents:
        if isinstance(linear := getattr(module, name), nn.Linear):
            setattr(module, name, make(linear))
    return len(blocks) > 0


class NotPlainError(ValueError):
    """The name is that of another kind of network."""


def refuse_unknown(name: str) -> NoReturn:
    """Raise ValueError for a name that timm does not know, and name near ones."""
    near = timm.list_models(f"*{name.split('_patch')[0]}*")[:3]
    raise ValueError(f"timm knows no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "."))


def create_vit(name: str, image_size: int | None, pretrained: bool = False, **arguments: Any) -> VisionTransformer:
    """Build a timm Vision Transformer by name, without a head, for square images of ``image_size`` pixels.

    None keeps the size that the name has.

    Raises:
        ValueError: the name is unknown to timm.
        NotPlainError: it names a network that is not a plain Vision Transformer.
    """
    if not timm.is_model(name):
        refuse_unknown(name)
    not_plain = NotPlainError(f"{name!r} is not a plain Vision Transformer; name one such as vit_tiny_patch16_224.")
    if image_size is not None:
        arguments["img_size"] = image_size
    try:
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except TypeError as error:
        raise not_plain from error
    if not isinstance(vit, VisionTransformer):
        raise not_plain
    return vit


def takes_size(name: str) -> bool:
    """Whether timm's network of that name is built for one image size."""
    known = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    return bool(known and known.fixed_input_size)


def takes_any_size(name: str) -> bool:
    """Whether it is timm's name of a network that takes images of any size."""
    return timm.is_model(name) and not takes_size(name)
