"""What a step makes of a GPU: 3 × ViT-B/16 → ViT-Ti/16 at 224 px in bf16, random weights, in one command.

First a self-check: small whole runs, export included, live and from the cache. Then for each batch size images per
second and model FLOPs utilisation, as written and with compiled blocks: matrix-product FLOPs of the step over its time
and the measured rate of a large matrix product. At the largest batch a trace counts how often the host waits for the
device, and how long the device waits for work; a second student; activation checkpointing. Whole runs with decoding,
live and from the cache of teacher outputs, and how much one core decodes. A teacher in fp8: how near its tokens are,
and how much faster; and by CUDA graphs. The last line printed is one JSON object; what means nothing on a CPU is null
there, a part that failed says why, and so does one that `--minutes` left no time for. `--tiny` tries the script on
small networks, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cache import rates, settings
from comad.data.load import load_images
from comad.data.loader import ViewDataset
from comad.data.transforms import Crop
from comad.distillation.setup import DistillViews
from comad.models.backbone import random_visible
from comad.models.compiling import compile_blocks
from comad.models.quantized import check_quantized, quantize
from comad.models.students import VitConfig
from comad.presets import METHODS
from pictures import write_pictures
from steps import TimedStep, load, seconds_of

TEACHER, TINY = "vit_base_patch16_224:random", "vit_tiny_patch16_224:random"
Part = Callable[[], object]
READS = ("aten::item", "aten::_local_scalar_dense")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


def repeated(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of one of several calls in a row, after two for warming up."""
    for _ in range(2):
        run()
    return seconds_of(lambda: [run() for _ in range(times)] and None, device) / times


def peak(device: torch.device, side: int, times: int) -> float:
    """FLOP/s of a product of two square matrices in bf16: the best of three rounds."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / min(repeated(lambda: a @ b, device, times) for _ in range(3))


def build(batch_size: int, compiled: bool, tiny: bool, students: int = 1, again: bool = False) -> TimedStep:
    """The step of `comad`; ``again`` computes the student's blocks again in the backward pass."""
    student = VitConfig(image_size=32, depth=1) if tiny else VitConfig()
    teachers = load([TINY if tiny else TEACHER] * 3, "bf16", student.image_size)
    step = TimedStep(METHODS["comad"], "bf16", batch_size, teachers, students=(student,) * students, compiled=compiled)
    for module, _ in step.students:
        module.module.student.vit.set_grad_checkpointing(again)
    return step


def measure(batch_size: int, rate: float, options: argparse.Namespace, **how: bool | int) -> dict[str, float]:
    """Images per second, utilisation and peak memory of a step."""
    how = {"compiled": False, **how}
    step = build(batch_size, **{**how, "compiled": False}, tiny=options.tiny)
    with FlopCounterMode(display=False) as counter:
        step()
    if how["compiled"]:
        step = build(batch_size, **how, tiny=options.tiny)
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = repeated(step, step.device, options.steps)
    found = {"images_per_s": batch_size / seconds, "mfu": counter.get_total_flops() / seconds / rate}
    if step.device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def traced(batch_size: int, compiled: bool, options: argparse.Namespace) -> dict[str, float | None]:
    """Reads of a scalar, waits of the host and gaps of the device, from a profile of some steps."""
    step = build(batch_size, compiled, options.tiny)
    on_gpu = step.device.type == "cuda"
    repeated(step, step.device, 1)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as trace:
        for _ in range(options.steps):
            step()
    events = trace.events() or []
    names = Counter(event.name for event in events)
    kernels = [(e.time_range.start, e.time_range.end) for e in events if on_gpu and e.device_type == DeviceType.CUDA]
    return {
        "scalar_reads_per_step": max(names[name] for name in READS) / options.steps,
        "host_waits_per_step": sum(names[name] for name in WAITS) / options.steps if on_gpu else None,
        "gaps_percent": gaps_percent(kernels) if kernels else None,
    }


def gaps_percent(spans: Sequence[tuple[float, float]]) -> float:
    """Percent of the time from the first start to the last end that lies in none of the spans, which may overlap."""
    ordered = sorted(spans)
    reached, busy = ordered[0][0], 0.0
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 100 * (1 - busy / (reached - ordered[0][0]))


@torch.no_grad()
def in_fp8(batch_size: int, device: torch.device, options: argparse.Namespace) -> dict[str, float] | None:
    """A masked teacher in fp8 against bf16, both compiled; None where the device has no fp8."""
    try:
        check_quantized("fp8", device, compiled=True)
    except ValueError:
        return None
    (plain,), (quantized,) = (load([TEACHER], "bf16") for _ in range(2))
    quantize(quantized.backbone, "fp8")
    images = torch.rand(batch_size, 3, 224, 224, device=device)
    visible = random_visible(torch.rand(batch_size, 196, device=device), 98)
    seconds, tokens = [], []
    for teacher in (plain, quantized):
        compile_blocks(teacher.backbone)
        seconds.append(repeated(lambda t=teacher: t.backbone(images, visible), device, options.steps))
        tokens.append(teacher.backbone(images, visible).patches.float())
    return {"cosine": float(F.cosine_similarity(*tokens, dim=-1).mean()), "times_bf16": seconds[0] / seconds[1]}


@torch.no_grad()
def by_graphs(batch_size: int, device: torch.device, options: argparse.Namespace) -> dict[str, float] | None:
    """A whole teacher compiled with CUDA graphs against its compiled blocks; None without a GPU."""
    if device.type != "cuda":
        return None
    (blocks,), (graphs,) = (load([TEACHER], "bf16") for _ in range(2))
    compile_blocks(blocks.backbone.vit)
    whole = torch.compile(graphs.backbone, mode="reduce-overhead")
    images, visible = torch.rand(batch_size, 3, 224, 224, device=device), None
    seconds = [repeated(lambda call=call: call(images, visible), device, options.steps) for call in (blocks[1], whole)]
    tokens = [call(images, visible).patches.float().clone() for call in (blocks[1], whole)]
    return {"cosine": float(F.cosine_similarity(*tokens, dim=-1).mean()), "times_blocks": seconds[0] / seconds[1]}


def runs(batch_size: int, folder: Path, tiny: bool) -> dict[str, float]:
    """Whole runs on photographs, live and from the cache: images per second with decoding, and what a core decodes.

    Raises:
        ValueError: a loss is not finite, or that of the first epoch is another where the cache is filled.
    """
    data = write_pictures(folder / "data" / "train", batch_size * 2)
    write_pictures(data.parent / "val", 1)
    config = replace(settings(data.parent, batch_size), split="none")
    config = replace(config, loader=replace(config.loader, workers=0 if tiny else -1))
    if tiny:
        config = replace(config, teachers=(TINY,), student=VitConfig(image_size=32, depth=1))
    found = {}
    for name, cached in (("live", False), ("cached", True)):
        found[f"{name}_images_per_s"] = rates(config, folder / name, cached=cached, epochs=3)[-1]
    logs = [(folder / name / "log.jsonl").read_text().splitlines() for name in ("live", "cached")]
    losses = torch.tensor([[line["loss"] for line in map(json.loads, log) if "loss" in line] for log in logs])
    if not torch.isfinite(losses).all() or not torch.allclose(losses[0], losses[1], rtol=0.02):
        raise ValueError(f"losses are not finite, or others from the cache: {losses.tolist()}")
    views = ViewDataset(
        load_images(str(data.parent)).train, DistillViews(Crop(size=224), (224,), None, (4, 196)), 0, 448
    )
    core = repeated(lambda: [views[0, index] for index in range(16)], torch.device("cpu"), 1) / 16
    return {**found, "views_per_s_of_a_core": 1 / core, "last_loss": float(losses[0, -1])}


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(64, 256, 512, 1024))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins after so many")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager-only", action="store_true", help="compile nothing")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the engine takes a GPU if it sees one
    elif not torch.cuda.is_available():
        sys.exit("no GPU is there; --device cpu --tiny tries the script without one.")
    device = torch.device(options.device)
    rate = peak(device, 256 if options.tiny else 8192, options.steps)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result: dict[str, object] = {"device": name, "torch": torch.__version__, "peak_tflops": rate / 1e12}
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        for name, call in parts(Path(folder), device, rate, options):
            result[name] = attempt(call, started + 60 * options.minutes)
            told = {name: result[name], "seconds": round(time.monotonic() - started)}
            print(json.dumps(told), file=sys.stderr, flush=True)
    print(json.dumps(result))


def parts(folder: Path, device: torch.device, rate: float, options: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    """Names and measurements, the most wanted first."""
    sizes, largest = options.batch_sizes, max(options.batch_sizes)
    yield "self_check", lambda: runs(8, folder / "check", tiny=True)
    for size in sizes:
        yield f"eager {size}", lambda size=size: measure(size, rate, options)
    yield "trace", lambda: traced(largest, False, options)
    yield "two students", lambda: measure(largest, rate, options, students=2)
    yield "activation checkpointing", lambda: measure(largest, rate, options, again=True)
    yield "decode and cache", lambda: runs(min(largest, 256), folder / "runs", options.tiny)
    if options.eager_only:
        return
    for size in sizes[-2:]:
        yield f"compiled {size}", lambda size=size: measure(size, rate, options, compiled=True)
    yield "compiled trace", lambda: traced(largest, True, options)
    yield "fp8", lambda: in_fp8(largest, device, options)
    yield "cuda graphs", lambda: by_graphs(largest, device, options)


def attempt(call: Part, deadline: float) -> object:
    """What was measured; what goes wrong in it is a result, too."""
    if time.monotonic() > deadline:
        return {"failed": "--minutes left no time"}
    try:
        return call()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
