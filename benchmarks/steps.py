"""Whole training steps on fixed images, as a run takes them, with a clock on their parts."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from comad.distillation.distiller import Distiller
from comad.distillation.features import TeacherOutput
from comad.distillation.masking import Masks, drop_unused_masks
from comad.distillation.method import Method
from comad.distillation.setup import SHORT
from comad.models.backbone import Backbone
from comad.models.compiling import compile_blocks
from comad.models.offload import offload
from comad.models.onednn_linear import use_onednn_linear
from comad.models.students import VitConfig
from comad.models.teachers import Teacher, load_on_grid
from comad.models.timm_backbone import math_attention_on_cpu
from comad.runtime.memory import keep_freed_memory
from comad.runtime.optim import OptimConfig, build_optimizer
from comad.runtime.run import RunConfig, start_fabric

LOG_EVERY = RunConfig().log_every
Timer = Callable[[], float]


class Clock:
    """Seconds of each part of the steps so far; a GPU's parts are waited for, so measure whole steps without it.

    Args:
        device: that computes.
        timer: gives seconds; `time.process_time` counts those that this process computed, on a CPU that others use too.
    """

    def __init__(self, device: torch.device, timer: Timer = time.perf_counter):
        self.device, self.timer = device, timer
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.timer()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def shares(self) -> dict[str, float]:
        """Percent of the time of all parts."""
        return {name: 100 * seconds / self.total for name, seconds in self.seconds.items()}


class TimedStep:
    """Masks, teachers, student, losses, backward and optimiser on the same images.

    Args:
        method: what is learnt.
        precision: ``bf16`` or ``fp32``.
        batch_size: images of a step, 224 px.
        teachers: see `load`.
        students: the networks to train, of one image size, by the same passes through the teachers.
        compiled: as by ``--compile``.
    """

    def __init__(
        self,
        method: Method,
        precision: str,
        batch_size: int,
        teachers: Sequence[Teacher],
        *,
        students: Sequence[VitConfig] = (VitConfig(),),
        compiled: bool = False,
    ):
        self.fabric = start_fabric(RunConfig(precision=precision))
        self.device = self.fabric.device
        self.method, self.teachers, size = method, teachers, students[0].image_size
        if self.device.type == "cpu":
            keep_freed_memory()
        self.images = torch.rand(batch_size, 3, size, size, device=self.device)
        self.noise = torch.rand(batch_size, 1 + len(teachers), (size // 16) ** 2, device=self.device)
        self.students = [prepare(config, method, teachers, self.images[:2], self.fabric) for config in students]
        if compiled:
            networks = [*(t.backbone for t in teachers), *(module.module.student for module, _ in self.students)]
            for network in networks:
                compile_blocks(network)
        self.calls = 0

    def __call__(self, *clocks: Clock) -> None:
        """Take one step; measure its parts with a clock for teachers and first student, and one for each further."""
        clocks = clocks or tuple(Clock(torch.device("cpu")) for _ in self.students)
        masks = drop_unused_masks(self.method.masking(self.noise), self.teachers)
        outputs = self._teach(masks, clocks[0])
        self.calls += 1
        for (module, optimizer), clock in zip(self.students, clocks, strict=True):
            self._learn(module, optimizer, outputs, masks, clock)

    def _learn(self, module: Any, optimizer: Any, outputs: list[TeacherOutput], masks: Masks, clock: Clock) -> None:
        with timed_networks(module, clock) as reached:
            with clock.part("align, gate, loss"):
                loss, metrics = module(self.images, outputs, masks)
            if self.calls % LOG_EVERY == 0:
                with clock.part("health"):
                    metrics()
            start = clock.now()
            self.fabric.backward(loss)
        clock.seconds["align, gate, loss"] += reached[0] - start
        clock.seconds["student backward"] += clock.now() - reached[0]
        with clock.part("optimizer"):
            self.fabric.clip_gradients(module, optimizer, max_norm=3.0, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()

    def _teach(self, masks: Masks, clock: Clock) -> list[TeacherOutput]:
        distiller, outputs = self.students[0][0].module, []
        for m, teacher in enumerate(self.teachers):
            with clock.part(f"teacher {m}"):
                outputs.append(distiller.forward_teacher(teacher, m, self.images, masks))
        return outputs


def load(
    specs: Sequence[str], precision: str, image_size: int = 224, offload_to: Path | None = None, packed: bool = False
) -> list[Teacher]:
    """Teachers with 16-pixel patches, as a run loads them, or packs them as well; a name may come more than once."""
    device, dtype = start_fabric(RunConfig()).device, torch.bfloat16 if precision == "bf16" else torch.float32

    def place(backbone: Backbone) -> None:
        if offload_to:
            offload(backbone, device, offload_to)
        else:
            backbone.to(device)
        if dtype == torch.bfloat16 and backbone.num_patches <= SHORT and not torch.cpu._is_amx_tile_supported():
            math_attention_on_cpu(backbone, device)

    teachers = [load_on_grid([spec], image_size // 16, 16, dtype, place)[0] for spec in specs]
    if packed:
        for teacher in teachers:
            use_onednn_linear(teacher.backbone)
    return teachers


def prepare(
    config: VitConfig, method: Method, teachers: Sequence[Teacher], images: Tensor, fabric: Fabric
) -> tuple[Any, Any]:
    """A student with calibrated aligners, and its optimiser."""
    distiller = Distiller(config.build(), teachers, method).to(fabric.device)
    math_attention_on_cpu(distiller, fabric.device)
    distiller.calibrate(teachers, [images])
    return fabric.setup(distiller, build_optimizer(distiller, OptimConfig()))


@contextmanager
def timed_networks(module: nn.Module, clock: Clock) -> Iterator[list[float]]:
    """Count the networks' forward apart from the loss; the list gets the moment when backward reaches them."""
    reached: list[float] = []
    last: dict[str, float] = {}

    def before(network: nn.Module, inputs: Any) -> None:
        last["start"] = clock.now()

    def after(network: nn.Module, inputs: Any, output: Any) -> None:
        seconds = clock.now() - last["start"]
        clock.seconds["student forward"] += seconds
        clock.seconds["align, gate, loss"] -= seconds
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, Tensor):
                part.register_hook(note)

    def note(gradient: Tensor) -> None:
        if not reached:
            reached.append(clock.now())

    networks = [n for n in (module.module.student, module.module.decoder) if n is not None]  # as the engine wrapped it
    handles = [h for n in networks for h in (n.register_forward_pre_hook(before), n.register_forward_hook(after))]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def seconds_of(run: Callable[[], object], device: torch.device, timer: Timer = time.perf_counter) -> float:
    """Seconds of one call."""
    clock = Clock(device, timer)
    start = clock.now()
    run()
    return clock.now() - start


def gemm_rates(
    dtype: torch.dtype, device: torch.device, seconds: float = 1.0, timer: Timer = time.perf_counter
) -> tuple[float, float]:
    """FLOP/s of the largest matrix product of a ViT-B block, (tokens, 768) × (768, 3072).

    Returns:
        Those of the quickest of many, and of the median one: a step cannot choose its moments on a shared machine.
    """
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((4096, 768), (768, 3072)))
    end, found = timer() + seconds, []
    while timer() < end:
        found.append(seconds_of(lambda: a @ b, device, timer))
    flops = 2 * 4096 * 768 * 3072
    return flops / min(found), flops / statistics.median(found)
