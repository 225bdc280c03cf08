"""Each teacher sees the student's crop cut from the original at its own size, in training, cache, scores and plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import comad
from comad.data.images import Splits
from comad.data.load import load_images
from comad.distillation.agreement import held_out_agreement
from comad.distillation.method import Method
from comad.distillation.run import calibrate_students
from comad.distillation.samples import leave_samples
from comad.distillation.setup import Inputs, Setup, prepare
from comad.models.teachers import load_teacher
from comad.presets import recipe
from comad.runtime.run import RunConfig, start_fabric

STUDENT = comad.VitConfig(image_size=32, patch_size=8, width=12, depth=2, heads=2)
SIZES = (96, 64, 32, 96)


def photographs(count: int) -> list[Tensor]:
    """Red grows to the right, green downwards, and blue is a check of 2 × 2 pixels: uint8 (3, 160, 200)."""
    down, right = torch.meshgrid(torch.linspace(0, 1, 160), torch.linspace(0, 1, 200), indexing="ij")
    check = (torch.arange(160).view(-1, 1) // 2 + torch.arange(200) // 2) % 2
    image = (255 * torch.stack([right, down, check.float()])).byte()
    return [(image.float() * (1 - 0.03 * i)).byte() for i in range(count)]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_images({"train": photographs(8), "val": photographs(3), "test": photographs(3)})


class Recorder(nn.Module):
    """A teacher that keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels.clone())
        return F.adaptive_avg_pool2d(pixels * self.weight, 4).repeat(1, 2, 1, 1)


def teachers(sizes: Sequence[int] = SIZES) -> list[comad.Teacher]:
    facts: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "rows": 4}
    return [load_teacher(Recorder(), size, name=f"t{m}", **facts) for m, size in enumerate(sizes)]


def setup(splits: Splits, sizes: Sequence[int] = SIZES) -> Setup:
    base = recipe("comad", demo=False)
    augment = replace(base.augment, jitter=0.0, crop_scale=(0.3, 0.6))
    config = replace(base, student=STUDENT, augment=augment, run=RunConfig(precision="fp32"))
    config = replace(config, optim=replace(config.optim, batch_size=4), loader=replace(config.loader, workers=0))
    return prepare(config, start_fabric(config.run), Inputs(splits=splits, teachers=teachers(sizes)))


def seen(of: comad.Teacher) -> list[Tensor]:
    """What a teacher saw."""
    recorder: Any = of.backbone.network.module
    return recorder.seen


def test_views_are_one_crop_cut_from_the_original(splits: Splits):
    parts = setup(splits)
    assert parts.teacher_sizes == (96, 64, 32)
    for index in range(8):
        sample = parts.views[0, index]
        large, middle, small, again = parts.teacher_views(sample.views)
        student = sample.views[-1]
        assert torch.equal(small, student) and again is large
        for view, size in ((large, 96), (middle, 64)):
            assert view.shape == (3, size, size)
            shrunk = F.interpolate(view[None].float(), (32, 32), mode="area")[0]
            assert (shrunk - student).abs()[:2].mean() < 2  # the same part of the image, flipped alike
        blown_up = F.interpolate(student[None].float(), (96, 96), mode="bicubic", antialias=True)[0]
        assert large[2].float().std() > 20 > 3 * blown_up[2].std()  # the check is there, not what 32 pixels keep of it


def test_crops_are_flipped_sometimes_and_always_alike(splits: Splits):
    parts, flips = setup(splits), []
    for view in range(4):
        for index in range(8):
            sample = parts.views[view, index]
            slopes = [bool(v[0, :, -4:].float().mean() > v[0, :, :4].float().mean()) for v in sample.views]
            assert len(set(slopes)) == 1
            flips.append(slopes[0])
    assert {True, False} == set(flips)


def test_calibration_gives_each_teacher_its_view(splits: Splits):
    parts = setup(splits)
    for batch in parts.calibration_views(torch.Generator().manual_seed(0)):
        assert [view.shape[-1] for view in parts.teacher_views(batch.views)] == list(SIZES)


def test_agreement_and_report_show_teachers_their_own_views(splits: Splits, tmp_path: Path):
    parts = setup(splits)
    distiller = parts.students[0].distiller
    calibrate_students(parts, [0], None)
    for look in (
        lambda: held_out_agreement(distiller, parts.teachers, splits.val),
        lambda: leave_samples(distiller, parts.teachers, splits, (), tmp_path),
    ):
        for teacher in parts.teachers:
            seen(teacher).clear()
        look()
        for teacher, size in zip(parts.teachers, SIZES, strict=True):
            assert seen(teacher)
            wanted = splits.val.view(0, size)
            torch.testing.assert_close(seen(teacher)[0][0].contiguous(), wanted)
            assert {tuple(images.shape[-2:]) for images in seen(teacher)} == {(size, size)}


def run(splits: Splits, out: Path, method: Method | None = None, **options: Any) -> comad.DistillResult:
    torch.manual_seed(0)
    given = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "workers": 0, "fixed_views": 1, "log_every": 1}
    given |= {"tensorboard": False, "threads": 1, "split": "none", "precision": "fp32", **options}
    nets = [nn.Conv2d(3, 8, 32, 32), "vit_tiny_patch16_224:random:depth=1"]
    return comad.distill(splits, nets, STUDENT, out=out, method=method, **given)


def weights(result: comad.DistillResult) -> bytes:
    return (result.student_folder / "model.safetensors").read_bytes()


def test_cached_views_are_the_live_ones(splits: Splits, tmp_path: Path):
    live = run(splits, tmp_path / "live")
    cached = run(splits, tmp_path / "cached", cache_teachers=True, cache_folder=str(tmp_path / "cache"))
    again = run(splits, tmp_path / "again", cache_teachers=True, cache_folder=str(tmp_path / "cache"))
    assert weights(live) == weights(cached) == weights(again)
    stores = len(list((tmp_path / "cache").iterdir()))
    grid = run(
        splits, tmp_path / "grid", cache_teachers=True, cache_folder=str(tmp_path / "cache"), teacher_image_size="grid"
    )
    assert weights(grid) != weights(live)  # tokens of 64 pixels are others, and are kept apart
    assert len(list((tmp_path / "cache").iterdir())) > stores


def test_teachers_are_scored_at_their_own_size(tmp_path: Path, labelled_folder: Path):
    labelled = load_images(labelled_folder)
    boards = {
        size: run(labelled, tmp_path / size, split="val", batch_size=16, epochs=1, teacher_image_size=size).scoreboard
        for size in ("own", "grid")
    }
    flops = {size: {row.name: row.flops for row in board.rows} for size, board in boards.items()}
    name = "vit_tiny_patch16_224"
    assert flops["own"][name] > 10 * flops["grid"][name] and flops["own"]["student"] == flops["grid"]["student"]


def test_plan_counts_the_larger_views(splits: Splits, tmp_path: Path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(12):
        splits.train.pil(index % 8).save(folder / f"{index}.png")
    plans = {
        size: comad.plan(
            folder,
            ["vit_tiny_patch16_224:random:depth=1"],
            student=STUDENT,
            batch_size=4,
            workers=0,
            threads=1,
            split="none",
            out=str(tmp_path / "run"),
            teacher_image_size=size,
        )
        for size in ("grid", "own")
    }
    teacher = {size: plan.flops.teachers for size, plan in plans.items()}
    assert teacher["own"] > 10 * teacher["grid"]
    assert plans["own"].flops.student == pytest.approx(plans["grid"].flops.student, rel=0.01)
