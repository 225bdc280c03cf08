"""A run on own images without options."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comad import defaults, recipes
from comad.cli import main
from comad.data.images import ImageSet
from comad.defaults import Machine, fit_to_data, told
from comad.presets import recipe
from comad.recipes import parse_distillation

CPU, GPU = Machine(False, 2, 10**11), Machine(True, 16, 10**12)


class Images(ImageSet):
    name, labels = "", {}

    def __init__(self, count: int, side: int):
        self.count, self.side = count, side

    def path(self, index: int):
        return str(index)

    def __len__(self):
        return self.count

    def load(self, index: int, min_side: int = 0):
        if index == 0:
            raise ValueError("unreadable")
        return torch.zeros(3, self.side, self.side + 9)


@pytest.mark.parametrize(
    ("count", "side", "machine", "size", "patch", "batch", "epochs", "cached"),
    [
        (300, 500, CPU, 96, 12, 16, 100, True),
        (6000, 300, CPU, 96, 12, 64, 20, True),
        (50_000, 32, CPU, 32, 4, 64, 10, False),
        (1_000_000, 400, CPU, 96, 12, 64, 10, False),
        (300, 500, GPU, 224, None, 16, 300, False),
        (1_000_000, 400, GPU, 224, None, 256, 300, False),
        (50_000, 32, GPU, 28, 2, 256, 300, False),
    ],
)
def test_a_recipe_fits_images_and_machine(count, side, machine, size, patch, batch, epochs, cached):
    before, images = recipe("comad", demo=False), Images(count, side)
    found = fit_to_data(before, images, machine)
    assert (found.student.image_size, found.student.patch_size) == (size, patch)
    assert (found.optim.batch_size, found.optim.epochs, found.cache_teachers) == (batch, epochs, cached)
    found.check(count)
    words = told(found, before, images, machine, ())
    assert f"{count:,} training images" in words and (f"--optim.epochs {epochs:g}" in words) == (epochs != 300)


def test_the_table_of_the_page_on_choosing():
    """docs/choosing.md: images, then batch, epochs and images seen on a CPU and on a GPU."""
    page = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = [
        [int(x.replace(",", "")) for x in row] for row in re.findall(r"^\|" + r" ([\d,]+) \|" * 7 + "$", page, re.M)
    ]
    assert [row[0] for row in rows] == [1_000, 10_000, 100_000, 1_000_000]
    for count, *chosen in rows:
        for machine, (batch, epochs, seen) in ((CPU, chosen[:3]), (GPU, chosen[3:])):
            optim = fit_to_data(recipe("comad", demo=False), Images(count, 300), machine).optim
            assert (optim.batch_size, optim.epochs, optim.epochs * count) == (batch, epochs, seen)


def test_what_is_given_is_left_alone():
    before, given = recipe("comad", demo=False), ("--student.image-size", "--optim.epochs", "--no-cache-teachers")
    found = fit_to_data(before, Images(6000, 300), CPU, given)
    assert found.student == before.student and found.optim.epochs == 300 and not found.loader.fixed_views
    assert "--optim.epochs" not in told(found, before, Images(6000, 300), CPU, given)


@pytest.mark.parametrize("flag", ["--student", "--student.name"])
def test_a_convolutional_student_has_the_size_of_this_machine(labelled_folder: Path, monkeypatch, flag):
    monkeypatch.setattr(recipes, "this_machine", lambda: CPU)
    monkeypatch.setattr(defaults, "median_side", lambda images: 300)
    for name in ("mobilenetv3_small_100", "convnext_atto"):
        config = parse_distillation([f"--data={labelled_folder}", "--teachers", "a=a.pth", flag, name])
        assert (config.student.image_size, config.student.patch_size, config.optim.base_lr) == (96, None, 12e-3)


@pytest.mark.parametrize(
    ("name", "count", "machine", "given", "rate"),
    [
        ("mobilenetv3_small_100", 6000, CPU, (), 3e-3),
        ("mobilenetv3_small_100", 300, CPU, (), 0.75e-3),
        ("mobilenetv3_small_100", 6000, GPU, (), 3e-3),
        ("mobilenetv3_small_100", 6000, CPU, ("--student.pretrained",), 0.25e-3),
        ("vit_tiny_patch16_224", 6000, CPU, (), 0.25e-3),
        ("vit_tiny_patch16_224", 6000, GPU, (), 1.5e-4),
    ],
)
def test_the_rate_of_a_step_goes_by_the_kind_of_student(name, count, machine, given, rate):
    before = recipe("consensus", demo=False)
    before = replace(before, student=before.student.called(name))
    optim = fit_to_data(before, Images(count, 300), machine, given).optim
    assert optim.base_lr * optim.batch_size / 256 == pytest.approx(rate)


def test_views_that_do_not_repeat_are_not_cached():
    assert not fit_to_data(recipe("c-radio", demo=False), Images(6000, 300), CPU).cache_teachers


def test_the_command_chooses_for_a_folder_and_options_count(labelled_folder: Path, monkeypatch):
    monkeypatch.setattr(recipes, "this_machine", lambda: CPU)
    data = [f"--data={labelled_folder}", "--teachers", "a=a.pth"]
    config = parse_distillation(data)
    assert config.student.image_size == 24 and config.cache_teachers and config.optim.epochs == 100
    config = parse_distillation([*data, "--optim.epochs=3", "--student.image-size", "32"])
    assert (config.optim.epochs, config.student.image_size, config.student.patch_size) == (3, 32, None)
    config = parse_distillation([*data, "--student", "vit_small_patch14_dinov2"])
    assert config.student.image_size == 224
    assert parse_distillation(["--data", "stamps"]) == recipe("comad", demo=True)


@pytest.mark.parametrize(
    ("student", "preset"),
    [
        ("vit_tiny_patch16_224", "comad"),
        ("vit_small_patch14_dinov2.lvd142m", "comad"),
        ("mobilenetv3_small_100", "consensus"),
        ("torchvision:resnet18", "consensus"),
        ("swin_tiny_patch4_window7_224", "consensus"),
    ],
)
def test_the_method_goes_by_the_kind_of_student_unless_it_is_named(student, preset):
    assert parse_distillation(["--student", student]).preset == preset
    assert parse_distillation(["--student.name", student]).preset == preset
    assert parse_distillation(["--student", student, "--preset", "mean"]).preset == "mean"


def test_what_was_chosen_is_said_when_the_run_begins(
    labelled_folder: Path, teacher_specs, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(recipes, "this_machine", lambda: CPU)
    small = ["--student.width=12", "--student.depth=1", "--student.heads=2", "--optim.epochs=1", "--loader.workers=0"]
    command = ["distill", f"--data={labelled_folder}", f"--run.out={tmp_path / 'run'}", *small, "--split=none"]
    assert main([*command, "--teachers", "nothing"]) == 1
    assert capfd.readouterr().err.count("\n") == 1
    assert main([*command, "--teachers", teacher_specs[0]]) == 0
    lines = capfd.readouterr().err.splitlines()
    first, second = lines[0], next(line for line in lines if line.startswith("chosen for "))
    assert first.startswith("distilling first into vit_tiny_patch16_224") and "images; then a page" in first
    assert "--student.image-size 24 --student.patch-size 3" in second
    assert main([*command, "--teachers", teacher_specs[0], "--run.resume", "--quiet"]) == 0
    assert "chosen for" not in capfd.readouterr().err


def test_this_machine_has_cores():
    assert defaults.this_machine().cores >= 1
