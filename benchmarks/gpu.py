"""What a step makes of a GPU: 3 × ViT-B/16 → ViT-Ti/16 at 224 px in bf16, random weights, in one command.

For each batch size images per second and model FLOPs utilisation, as written and with compiled blocks: matrix-product
FLOPs of the step over its time and the measured rate of a large matrix product. At the largest batch a trace counts how
often the host waits for the device, and how long the device waits for work. Then a teacher in fp8: how near its tokens
are, and how much faster. The last line printed is one JSON object; what means nothing on a CPU is null there. `--tiny`
tries the script on small networks, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from comad.models.backbone import random_visible
from comad.models.compiling import compile_blocks
from comad.models.quantized import check_quantized, quantize
from comad.models.students import VitConfig
from comad.presets import METHODS
from steps import TimedStep, load, seconds_of

TEACHER, TINY = "vit_base_patch16_224:random", "vit_tiny_patch16_224:random"
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


def build(batch_size: int, compiled: bool, tiny: bool) -> TimedStep:
    """The step of `comad`."""
    student = VitConfig(image_size=32, depth=1) if tiny else VitConfig()
    teachers = load([TINY if tiny else TEACHER] * 3, "bf16", student.image_size)
    return TimedStep(METHODS["comad"], "bf16", batch_size, teachers, students=(student,), compiled=compiled)


def measure(batch_size: int, compiled: bool, rate: float, options: argparse.Namespace) -> dict[str, float]:
    """Images per second and utilisation."""
    step = build(batch_size, False, options.tiny)
    with FlopCounterMode(display=False) as counter:
        step()
    if compiled:
        step = build(batch_size, True, options.tiny)
    seconds = repeated(step, step.device, options.steps)
    found = {"images_per_s": batch_size / seconds, "mfu": counter.get_total_flops() / seconds / rate}
    if step.device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
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


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(64, 128, 256, 512))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager-only", action="store_true", help="compile nothing")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the engine takes a GPU if it sees one
    elif not torch.cuda.is_available():
        sys.exit("no GPU is there; --device cpu --tiny tries the script without one.")
    device, largest, compiled = torch.device(options.device), max(options.batch_sizes), not options.eager_only
    rate = peak(device, 256 if options.tiny else 8192, options.steps)
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "peak_tflops": rate / 1e12,
    }
    for name, chosen in (("eager", True), ("compiled", compiled)):
        sizes = options.batch_sizes if chosen else ()
        rows = {size: measure(size, name == "compiled", rate, options) for size in sizes}
        result[name] = rows or None
        print(json.dumps({name: rows}), file=sys.stderr, flush=True)
    result["trace"] = traced(largest, compiled, options)
    result["fp8"] = None if options.eager_only else in_fp8(largest, device, options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
