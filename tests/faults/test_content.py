"""Teachers and images of no use: what goes on with them says so, what cannot is refused in one line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow


@pytest.fixture
def with_teacher(teacher_specs, tmp_path):
    """Options that name the first teacher with other weights."""

    def change(edit):
        folder = Path(shutil.copytree(teacher_specs[0].partition("=")[2], tmp_path / "teacher"))
        weights = {name: edit(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        del config["comad"]["sha256"]
        config.pop("checksum", None)
        (folder / "config.json").write_text(json.dumps(config))
        return ["--teachers", f"first={folder}", teacher_specs[1]]

    return change


@pytest.fixture
def with_images(command, tmp_path):
    """Options that name a folder of other images."""

    def change(edit):
        data = next(a for a in command(tmp_path) if a.startswith("--data=")).partition("=")[2]
        folder = Path(shutil.copytree(data, tmp_path / "data"))
        for path in sorted(folder.rglob("*.png")):
            edit(path)
        return [f"--data={folder}"]

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_of_weights_that_are_not_finite(start, command, judge, with_teacher, tmp_path, value):
    options = with_teacher(lambda name, x: x.fill_(value) if name == "blocks.1.mlp.fc2.bias" else x)
    status, told = start([*command(tmp_path / "run"), *options]).wait()
    assert judge(tmp_path / "run", status, told) == "refused in one line"
    assert "teacher/model.safetensors: has NaN or infinite weights in blocks.1.mlp.fc2.bias" in told


def test_a_teacher_whose_outputs_are_not_finite_is_named(start, command, judge, with_teacher, tmp_path):
    options = with_teacher(lambda name, x: x.fill_(3e38) if name in ("blocks.1.mlp.fc2.bias", "pos_embed") else x)
    status, told = start([*command(tmp_path / "run"), *options]).wait()
    assert judge(tmp_path / "run", status, told) == "refused in one line"
    assert "the outputs of the teacher 'first' are not finite" in told


def test_a_teacher_that_gives_the_same_for_every_image_is_told(start, command, judge, with_teacher, tmp_path):
    options = with_teacher(lambda name, x: x.fill_(0) if name in ("norm.weight", "fc_norm.weight") else x)
    status, told = start([*command(tmp_path / "run"), *options]).wait()
    judge(tmp_path / "run", status, told, words="the same from first for every image")
    for name in ("scoreboard.json", "student/README.md", "report.html"):
        assert "the same from first for every image" in (tmp_path / "run" / name).read_text(), name
    assert "- data, images: train 24" in (tmp_path / "run/student/README.md").read_text()


def test_a_loss_that_diverges(start, command, judge, tmp_path):
    options = ["--optim.base-lr=1e8", "--optim.warmup-epochs=0", "--optim.clip=0"]
    status, told = start([*command(tmp_path / "run"), *options]).wait()
    judge(tmp_path / "run", status, told, words="the loss rose far above its start")


@pytest.mark.parametrize("grey", [0, 255])
def test_images_of_one_colour_are_told(start, command, judge, with_images, tmp_path, grey):
    options = with_images(lambda path: Image.new("RGB", (24, 24), (grey,) * 3).save(path))
    status, told = start([*command(tmp_path / "run"), *options]).wait()
    judge(tmp_path / "run", status, told, words="the images are blank")


def test_one_image_again_and_again_is_told(start, command, judge, with_images, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    options = with_images(lambda path: Image.fromarray(pixels).save(path))
    status, told = start([*command(tmp_path / "run"), *options]).wait()
    judge(tmp_path / "run", status, told, words="(the same image)")


def test_images_of_which_none_can_be_read(start, command, judge, with_images, tmp_path):
    options = with_images(lambda path: path.write_bytes(b"broken"))
    status, told = start([*command(tmp_path / "run"), *options]).wait()
    assert judge(tmp_path / "run", status, told) == "refused in one line" and "unreadable" in told
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_pipes_and_devices_among_the_images_are_left_out(start, command, judge, with_images, tmp_path):
    options = with_images(lambda path: None)
    folder = Path(options[0].partition("=")[2]) / "train"
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    status, told = start([*command(tmp_path / "run"), *options]).wait()
    judge(tmp_path / "run", status, told, refusal=False)
    assert "3 pipes, devices and broken links" in told
