"""The one contract every network fulfils: images in, tokens out.

Alphabet of the shapes, here and everywhere: B images, N patches, V visible patches, D student width,
E teacher width, M teachers, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Pool = Literal["cls", "patch"]
"""What stands for an image: the class token, or the mean patch token."""
Hidden = Literal["drop", "token", "zero"]
"""What becomes of a hidden patch: left out of the sequence, replaced by a mask token, or multiplied by 0."""


class Tokens(NamedTuple):
    """What a network gives for a batch of images.

    Attributes:
        cls: class tokens after the last block and the final norm; None if the network has none.
        patches: the same of the patches; V rows if patches were dropped, else N.
        intermediates: after the blocks that were asked for, before any norm, in their order.
        qkv: queries, keys and values (width 3E) of the block that was asked for.
    """

    cls: Float[Tensor, "B E"] | None
    patches: Float[Tensor, "B n E"]
    intermediates: tuple[Tokens, ...] = ()
    qkv: Tokens | None = None


class Backbone(nn.Module, ABC):
    """A network that turns images into tokens. It owns its pixel normalisation.

    Attributes:
        width: channels of a token.
        patch_size: pixels on the side of a patch.
        grid: rows and columns of the patches that it gives.
        token_types: which tokens carry meaning: ``("patch",)`` or ``("cls", "patch")``.
        pixel_mean, pixel_std: (3, 1, 1), of its pixel normalisation, in units of [0, 1] pixels.
        has_cls: it gives a token for the whole image: its class token, or the mean of its map in the place of one.
        supports_masking: hidden patches can be left out; if not, it computes on whole images in any case.
        pools: what stands for a class token is what the classifier of its authors sees, behind a norm.
    """

    supports_masking: bool = True
    pools: bool = False
    own_grid: tuple[int, int]

    width: int
    patch_size: int
    grid: tuple[int, int]
    token_types: tuple[str, ...]
    has_cls: bool
    pixel_mean: Tensor
    pixel_std: Tensor

    @property
    def blocks(self) -> nn.Sequential:
        """Equal blocks that can be read, compiled and frozen one by one; none of a network that is read at its end."""
        return nn.Sequential()

    @property
    def num_patches(self) -> int:
        """N, the number of patches at the resolution the backbone was built for."""
        return self.grid[0] * self.grid[1]

    @property
    def image_size(self) -> int:
        """Pixels on the side of the square images to come."""
        return self.own_grid[0] * self.patch_size

    def resample_to(self, rows: int) -> None:
        """Give the patches of whole images on a grid of ``rows`` × ``rows``, whatever the network's own is."""
        if self.own_grid != (rows, rows):
            self.supports_masking = False
        self.grid = (rows, rows)

    def _on_grid(self, tokens: Tokens) -> Tokens:
        """Bring patches, and those of intermediates, from the network's own grid to the wanted one."""
        if self.grid == self.own_grid:
            return tokens
        return tokens._replace(
            patches=resample_patches(tokens.patches, self.own_grid, self.grid),
            intermediates=tuple(self._on_grid(part) for part in tokens.intermediates),
            qkv=None if tokens.qkv is None else self._on_grid(tokens.qkv),
        )

    def pooled(self, images: Float[Tensor, "B 3 H W"], pool: Pool) -> Float[Tensor, "B F"]:
        """What a classifier's head sees of images with pixel values in [0, 1], in float32."""
        return pooled(self(images), "cls" if self.pools else pool)

    @abstractmethod
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
        """Encode images with pixel values in [0, 1], by default whole, else only the ``visible`` patches.

        Args:
            images: float, values in [0, 1]; the backbone normalises them.
            visible: positions to see, or a map of them; dropping needs positions, as many in every image.
            hidden: what becomes of the other patches.
            mask_token: takes the place of hidden patches if ``hidden`` is "token".
            intermediates: numbers of blocks, from 1 and ascending, whose output is wanted too.
            qkv: number of the block whose queries, keys and values are wanted; 0: of none.
            stop_early: leave out the blocks behind the last one that is asked for, and the final norm; class token and
                patches are then the output of the last block that ran.

        Raises:
            ValueError: blocks are asked for, and the network has none that can be read.
        """


def map_tokens(function: Callable[[Tensor], Tensor], tokens: Tokens) -> Tokens:
    """Apply a function to class token and patches, each by itself."""
    return Tokens(None if tokens.cls is None else function(tokens.cls), function(tokens.patches))


def pooled(tokens: Tokens, pool: Pool) -> Float[Tensor, "B E"]:
    """One vector per image, in float32."""
    return tokens.patches.float().mean(dim=1) if pool == "patch" or tokens.cls is None else tokens.cls.float()


def resample_patches(
    patches: Float[Tensor, "B N E"], grid: tuple[int, int], to: tuple[int, int]
) -> Float[Tensor, "B n E"]:
    """Bring patches from a grid to another: bilinear, by area where it shrinks; computed in float32."""
    maps = patches.float().transpose(1, 2).unflatten(2, grid)
    maps = F.interpolate(maps, to, mode="bilinear", antialias=True)
    return maps.flatten(2).transpose(1, 2).to(patches.dtype)


def take_visible(tokens: Tokens, visible: Int[Tensor, "B V"] | Bool[Tensor, "B N"] | None, hidden: Hidden) -> Tokens:
    """Of tokens of whole images give the visible patches; the others are left out, or 0 if not dropped."""
    if visible is None:
        return tokens

    def take(patches: Tensor) -> Tensor:
        if hidden == "drop":
            return gather_patches(patches, visible)
        return patches * visible_map(visible, len(patches), patches.shape[1], patches.device).unsqueeze(-1)

    return tokens._replace(
        patches=take(tokens.patches),
        intermediates=tuple(part._replace(patches=take(part.patches)) for part in tokens.intermediates),
        qkv=None if tokens.qkv is None else tokens.qkv._replace(patches=take(tokens.qkv.patches)),
    )


def check_blocks(intermediates: Sequence[int], qkv: int, depth: int, name: str) -> None:
    """Make sure that a network has the blocks that are asked for.

    Raises:
        ValueError: it has fewer.
    """
    if any(not 1 <= number <= depth for number in intermediates) or not 0 <= qkv <= depth:
        raise ValueError(f"{name} has blocks 1 to {depth}, not {max([*intermediates, qkv])}; name one of these.")


def gather_patches(patches: Float[Tensor, "B N E"], index: Int[Tensor, "B V"]) -> Float[Tensor, "B V E"]:
    """Pick the patches named by ``index``, in its order."""
    return patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def scatter_patches(
    patches: Float[Tensor, "B V E"], index: Int[Tensor, "B V"], onto: Float[Tensor, "*B N E"]
) -> Float[Tensor, "B N E"]:
    """Put patches at their positions in ``onto``, which shows at every other. The inverse of `gather_patches`."""
    count, num_patches = len(patches), onto.shape[-2]
    full = onto.expand(count, -1, -1).clone(memory_format=torch.contiguous_format)
    rows = index + num_patches * torch.arange(count, device=index.device).unsqueeze(1)
    whole = full.flatten(0, 1).index_copy_(0, rows.flatten(), patches.flatten(0, 1).to(onto.dtype))  # a row at a time
    return whole.unflatten(0, (count, num_patches))


def visible_map(
    visible: Int[Tensor, "B V"] | Bool[Tensor, "B N"] | None, batch_size: int, num_patches: int, device: torch.device
) -> Bool[Tensor, "B N"]:
    """Which positions are visible, as a map; None means all of them."""
    if visible is None:
        return torch.ones(batch_size, num_patches, dtype=torch.bool, device=device)
    if visible.dtype == torch.bool:
        return visible
    return torch.zeros(batch_size, num_patches, dtype=torch.bool, device=device).scatter_(1, visible, True)


def random_visible(noise: Float[Tensor, "B N"], num_visible: int) -> Int[Tensor, "B V"]:
    """Choose the ``num_visible`` positions with the smallest noise, in ascending order: a uniform random subset."""
    return noise.argsort(dim=1, stable=True)[:, :num_visible].sort(dim=1).values


def patchify(images: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N pixels"]:
    """Cut images into patches, rows first; pixels of a patch in the order row, column, colour."""
    b, c, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(b, c, rows, patch_size, columns, patch_size).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(b, rows * columns, patch_size * patch_size * c)


def normalised_patches(images: Float[Tensor, "B 3 H W"], patch_size: int) -> Float[Tensor, "B N pixels"]:
    """Pixels of the patches, each patch normalised by its own mean and variance (arXiv:2111.06377, section 3)."""
    return normalise_patches(patchify(images, patch_size))


def normalise_patches(patches: Float[Tensor, "B N pixels"]) -> Float[Tensor, "B N pixels"]:
    """Each patch to mean 0 and variance 1."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
