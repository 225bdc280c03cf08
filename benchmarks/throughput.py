"""How close a step comes to the machine's limit: 3 × ViT-B/16 → ViT-Ti/16 at 224 px, random weights.

Compares, in one process and interleaved: the step of `comad` (teachers and student drop hidden patches), the step of
`comad-literal` (every network runs on all tokens), and the limit: matrix-product FLOPs of the `comad` step over the
rate of a plain matrix product. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from comad.distill.distiller import Distiller
from comad.distill.teaching import load_teachers, teacher_step
from comad.models.timm_backbone import VitConfig, plain_attention_on_cpu
from comad.presets import METHODS
from comad.runtime.memory import keep_freed_memory
from comad.runtime.optim import OptimConfig, build_optimizer
from comad.runtime.train import RunConfig, start_fabric

TEACHERS = ["vit_base_patch16_224:random"] * 3


def gemm_rate(dtype: torch.dtype, device: torch.device, seconds: float = 3.0) -> float:
    """FLOP/s of the largest matrix product of a ViT-B block, (tokens, 768) × (768, 3072): the best of several."""
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((4096, 768), (768, 3072)))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed(lambda: a @ b, device))
    return 2 * 4096 * 768 * 3072 / best


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_step(
    preset: str, precision: str, batch_size: int, specs: list[str], offload_to: Path | None = None
) -> tuple[Callable[[], None], torch.device]:
    """A whole training step of a preset, on fixed images: masks, teachers, student, losses, backward, optimiser."""
    fabric = start_fabric(RunConfig(precision=precision))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    teachers = [load_teachers([spec], 14, 16, dtype, fabric.device, offload_to)[0] for spec in specs]
    if fabric.device.type == "cpu":
        keep_freed_memory()
    method = METHODS[preset]
    distiller = Distiller(VitConfig().build(), method, [t.backbone.width for t in teachers], [True] * len(teachers))
    distiller.to(fabric.device)
    plain_attention_on_cpu(distiller, fabric.device)
    images = torch.rand(batch_size, 3, 224, 224, device=fabric.device)
    noise = torch.rand(batch_size, 1 + len(teachers), distiller.student.num_patches, device=fabric.device)
    whole = method.masking.__class__(policy="none")(noise)
    tokens = teacher_step(teachers, images[:2], whole).tokens
    distiller.aligners.calibrate([t.patches.flatten(0, 1).float() for t in tokens])
    module, optimizer = fabric.setup(distiller, build_optimizer(distiller, OptimConfig()))

    def step() -> None:
        masks = method.masking(noise)
        result = module(images, teacher_step(teachers, images, masks, method.masking.teachers_hidden))
        fabric.backward(result.loss)
        optimizer.step()
        optimizer.zero_grad()

    return step, fabric.device


def measure(precision: str, batch_size: int, rounds: int) -> dict[str, float | str]:
    """Images per second of both steps and of the limit, medians over interleaved rounds."""
    ours, device = make_step("comad", precision, batch_size, TEACHERS)
    literal, _ = make_step("comad-literal", precision, batch_size, TEACHERS)
    with FlopCounterMode(display=False) as counter:
        ours()
    literal()
    seconds: dict[str, list[float]] = {"ours": [], "literal": []}
    for _ in range(rounds):
        seconds["ours"].append(timed(ours, device))
        seconds["literal"].append(timed(literal, device))
    rate = gemm_rate(torch.bfloat16 if precision == "bf16" else torch.float32, device)
    own, other = (batch_size / statistics.median(values) for values in seconds.values())
    limit = batch_size * rate / counter.get_total_flops()
    return {
        "images_per_s": own,
        "literal_images_per_s": other,
        "limit_images_per_s": limit,
        "times_literal": own / other,
        "share_of_limit": own / limit,
        "gemm_gflops": rate / 1e9,
        "precision": precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }


def main() -> None:
    """Measure both precisions; bf16's numbers are the top level of the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for precision in ("bf16", "fp32"):
        results[precision] = measure(precision, options.batch_size, options.rounds)
        print(json.dumps(results[precision]), file=sys.stderr, flush=True)
    print(json.dumps({**results["bf16"], "fp32": results["fp32"], "torch": torch.__version__}))


if __name__ == "__main__":
    main()
