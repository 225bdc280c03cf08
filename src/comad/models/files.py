"""Files of other people, read without running anything in them: tensors and JSON."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

LARGEST_JSON = 16 * 2**20  # bytes; the names of 22,000 classes take 2 MB
SLACK = 2**20  # bytes of an archive that are no tensors
PICKLED = (
    "which could run code, so it is not read; if you trust the file, keep its tensors only: "
    "c = torch.load(FILE, weights_only=False); "
    "torch.save({k: c[k] for k in ('model', 'state_dict', 'teacher') if k in c}, NEW_FILE)"
)


def read_file(path: Path) -> dict[str, Any]:
    """Read a safetensors or PyTorch file onto the CPU. Nothing in the file is ever executed.

    Raises:
        ValueError: there is no such file, or it is damaged, is no checkpoint, holds pickled Python objects, or
            declares far more than it holds.
    """
    if not path.is_file():
        raise ValueError(f"{path}: not a file; check the path.")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty; download or copy it again.")
    content = _load(path, size)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict().")
    for key, tensor in _tensors(content):
        if not _is_plain(tensor):
            raise ValueError(f"{path}: {key} is no plain tensor with all its numbers; save model.state_dict() again.")
    return dict(content)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object; ``remedy`` ends the message of an error.

    Raises:
        ValueError: it is no file, larger than 16 MiB, no JSON, or no object.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {path.name} in this folder; {remedy}.")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path.parent}: {path.name} is larger than {LARGEST_JSON >> 20} MiB; {remedy}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.parent}: {path.name} is not JSON, or nested too deeply; {remedy}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.parent}: {path.name} holds a {type(content).__name__}, not an object; {remedy}.")
    return content


def sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(state: Mapping[str, Tensor]) -> str:
    """Hash names and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(path: Path, size: int) -> Any:
    """The content of a file, unless it claims to unpack to far more than its size. torch.save does not compress."""
    try:
        declared = _declared_bytes(path)
        if declared <= 2 * size + SLACK:
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way inside the unpickler
        if found := re.search(r"GLOBAL (\S+) ", str(error)):
            raise ValueError(f"{path}: holds the pickled object {found[1]}, {PICKLED}.") from error
        raise ValueError(f"{path}: not a readable checkpoint, damaged or cut short; download it again.") from error
    raise ValueError(f"{path}: its {size} bytes claim to unpack to {declared}; get the file from its authors.")


def _declared_bytes(path: Path) -> int:
    """What a zip archive says it unpacks to; 0 for any other file."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _tensors(content: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """The tensors of a file, and those of its containers."""
    for key, value in content.items():
        inner = value.items() if isinstance(value, Mapping) else [(None, value)]
        yield from ((f"{key}/{name}" if name else str(key), x) for name, x in inner if isinstance(x, Tensor))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and no larger than the bytes behind it."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
