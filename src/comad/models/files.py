"""Files of other people, read without running anything in them: tensors and JSON."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from comad.runtime.atomic import is_utf8

LARGEST_JSON = 16 * 2**20  # bytes; the names of 22,000 classes take 2 MB
SLACK = 2**20  # bytes of an archive that are no tensors
PICKLED = (
    "which could run code, so it is not read; if you trust the file, keep its tensors only: "
    "s = lambda x: getattr(x, 'state_dict', lambda: x)(); t = torch.is_tensor; "
    "k = lambda x: {n: y for n, y in x.items() if t(y)} if isinstance(x, dict) else x if t(x) else None; "
    "c = {n: k(s(x)) for n, x in s(torch.load(FILE, weights_only=False)).items()}; "
    "torch.save({n: x for n, x in c.items() if t(x) or x}, NEW_FILE)"
)
RAW_PICKLE = (
    "is a pickle that torch.save did not write, which could run code, so it is not read; if you trust the file, keep "
    "its tensors only: import pickle; c = pickle.load(open(FILE, 'rb')); c = c.get('model', c); "
    "torch.save({n: torch.as_tensor(x) for n, x in c.items() if hasattr(x, 'shape')}, NEW_FILE)"
)
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # of torch.save before its files were zip archives
SCRIPTED = (
    "is a TorchScript program, which is not run; keep its tensors only: "
    "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
)


def read_file(path: Path) -> dict[str, Any]:
    """Read a safetensors or PyTorch file onto the CPU. Nothing in the file is ever executed.

    Raises:
        ValueError: there is no such file, or it is damaged, is no checkpoint, holds pickled Python objects, or
            declares far more than it holds.
    """
    if not path.is_file():
        raise ValueError(f"{path}: not a file; check the path.")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty; download or copy it again.")
    content = _load(path, size)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict().")
    for key, tensor in _tensors(content):
        if not _is_plain(tensor):
            raise ValueError(f"{path}: {key} is no plain tensor with all its numbers; save model.state_dict() again.")
    inner = {key: value if not isinstance(value, Mapping) else _by_text(value) for key, value in content.items()}
    return _by_text(inner)


def _by_text(content: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in content.items()}


def _read_shards(path: Path) -> dict[str, Any]:
    """Read all files that an index names, which lie beside it."""
    index = read_json(path, "save the model again by save_pretrained")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{path}: holds no weight_map of file names; save the model again by save_pretrained.")
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name or name.endswith(".index.json")]:
        raise ValueError(f"{path}: names {outside[0]!r}, which is no file beside it; download the folder again.")
    if absent := [name for name in names if not (path.parent / name).is_file()]:
        raise ValueError(f"{path}: {len(absent)} of its files are missing, such as {absent[0]}; download them too.")
    content = {key: value for name in names for key, value in read_file(path.parent / name).items()}
    if lost := [key for key in places if key not in content]:
        raise ValueError(f"{path}: its files do not hold {lost[0]}; download the folder again.")
    return content


def checked_pixels(mean: Any, std: Any, what: str, remedy: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Make sure that a pixel normalisation is one: three numbers each, of pixels from 0 to 1, not to 255.

    Raises:
        ValueError: it is not.
    """
    sound = all(
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values)
        for values in (mean, std)
    )
    if not sound or max(map(abs, mean)) > 10 or not 1e-3 <= min(std) <= max(std) <= 10:
        rule = "three numbers each, of pixels from 0 to 1, of std above 0"
        raise ValueError(f"{what} are {str(mean)[:80]} and {str(std)[:80]}; {rule}; {remedy}.")
    return tuple(map(float, mean)), tuple(map(float, std))


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
    """Hash a file, or all files that an index names."""
    if path.name.endswith(".index.json"):
        shards = sorted(set(read_json(path, "download it again")["weight_map"].values()))
        return hashlib.sha256("".join(sha256(path.parent / name) for name in shards).encode()).hexdigest()
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
    """The content of a file, unless it claims to unpack to far more than its size. torch.save does not compress.

    What kind of file it is, its first bytes say, not its name.
    """
    try:
        declared = _declared_bytes(path)
        if declared <= 2 * size + SLACK:
            if _is_safetensors(path):
                return safetensors.torch.load_file(path)
            with path.open("rb") as file:  # of a path torch looks at the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way inside the unpickler
        raise ValueError(f"{path}: {_problem(path, error)}.") from error
    raise ValueError(f"{path}: its {size} bytes claim to unpack to {declared}; get the file from its authors.")


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, and the bracket of a header of JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{"


def _pickled_objects(start: bytes, error: Exception) -> str:
    """What to do about a file of pickled objects that begins so; empty if the error is another one."""
    if start[:2] in PICKLES and MAGIC not in start[:32]:
        return RAW_PICKLE
    found = re.search(r"GLOBAL (\S+) ", str(error))
    return f"holds the pickled object {found[1]}, {PICKLED}" if found else ""


def _problem(path: Path, error: Exception) -> str:
    """What is wrong with a file that does not load, and what to do."""
    if not is_utf8(path):
        return "a name that is no UTF-8, which safetensors needs; rename it"
    with path.open("rb") as file:
        start = file.read(512)
    if objects := _pickled_objects(start, error):
        return objects
    if "torchscript" in str(error).lower() or "TorchScript" in str(error):
        return SCRIPTED
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        return f"holds pickled objects, {PICKLED}"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
        return "not a readable checkpoint but a page or a pointer in its place; download the file itself"
    if start[:1] == b"{" or (start and all(31 < byte < 127 or byte in (9, 10, 13) for byte in start)):
        return "not a readable checkpoint but text; name the file with the weights"
    known = zipfile.is_zipfile(path) or start[:2] in (b"PK", b"\x80\x02", b"\x80\x04") or start[8:9] == b"{"
    if known or not start.strip(b"\0"):
        return "not a readable checkpoint, damaged or cut short; download it again"
    return "not a readable checkpoint; name a file of torch.save or of safetensors, or download it again"


def _declared_bytes(path: Path) -> int:
    """What a zip archive says it unpacks to; 0 for any other file."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _tensors(content: Mapping[Any, Any]) -> Iterable[tuple[str, Tensor]]:
    """The tensors of a file, and those of its containers."""
    for key, value in content.items():
        inner = value.items() if isinstance(value, Mapping) else [(None, value)]
        yield from ((f"{key}/{name}" if name else str(key), x) for name, x in inner if isinstance(x, Tensor))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and no larger than the bytes behind it."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
