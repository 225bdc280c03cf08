"""Frozen networks whose weights wait elsewhere, in a file, in host memory or in parts at several processes."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

ALIGNMENT = 64
"""Bytes; tensors begin at multiples of it in the file."""


def offload(network: nn.Module, device: torch.device, folder: Path) -> None:
    """Let the weights of a frozen network wait in a file, or beside a GPU in host memory; every pass brings them in.

    On the CPU they are mapped from a file that has no name and vanishes with the process. The system reads its pages
    when a pass touches them, and gets them back after it: memory then holds one teacher, and what the page cache can
    spare. Beside a GPU they wait in pinned memory and are copied for the pass. Results are the same bits.

    Args:
        network: frozen; it is changed in place, by hooks, and is used as before.
        device: where a pass computes.
        folder: an existing folder on a disk with room for the weights.
    """
    enter, leave = _map_weights(network, folder) if device.type == "cpu" else _pin_weights(network, device)

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        enter()
        moved = tuple(_to(value, device) for value in inputs)
        return moved, {name: _to(value, device) for name, value in named.items()}

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        leave()

    network.register_forward_pre_hook(before, with_kwargs=True)
    network.register_forward_hook(after, always_call=True)


def shard(network: nn.Module, device: torch.device) -> None:
    """Let each process keep a part of the weights of a frozen network, and gather a block's for its pass (FSDP2).

    All processes must then run it together. Results are the same bits.

    Args:
        network: frozen; it is changed in place, and is used as before. One without blocks is gathered as a whole.
        device: where a pass computes.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = getattr(getattr(network, "vit", None), "blocks", ())
    for part in (*blocks, network):
        fully_shard(part.to(device), mesh=mesh, reshard_after_forward=True)


def _map_weights(network: nn.Module, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Write the parameters to a file without a name and point them at it."""
    places, end = {}, 0
    with tempfile.TemporaryFile(dir=folder) as file:
        for parameter in network.parameters():
            end = -(-end // ALIGNMENT) * ALIGNMENT
            places[parameter] = end
            file.seek(end)
            end += file.write(parameter.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        mapped = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_COPY)
    for parameter, place in places.items():
        flat = torch.frombuffer(mapped, dtype=parameter.dtype, count=parameter.numel(), offset=place)
        parameter.data = flat.view(parameter.shape)

    def leave() -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # else the system takes pages back when it needs them
            mapped.madvise(mmap.MADV_DONTNEED)

    return lambda: None, leave


def _pin_weights(network: nn.Module, device: torch.device) -> tuple[Callable[[], None], Callable[[], None]]:
    """Keep the parameters in pinned host memory; buffers, which are small, stay on the device."""
    network.to(device)
    waiting = [(parameter, parameter.detach().cpu().pin_memory()) for parameter in network.parameters()]

    def enter() -> None:
        for parameter, weights in waiting:
            parameter.data = weights.to(device, non_blocking=True)

    def leave() -> None:
        for parameter, weights in waiting:
            parameter.data = weights

    leave()
    return enter, leave


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
