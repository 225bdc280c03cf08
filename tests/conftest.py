"""What tests of several folders need: a whole distillation, teachers and folders of pictures, all of them tiny."""

from __future__ import annotations

import signal
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from comad.distillation.distiller import Distiller
from comad.distillation.features import MAEDecoder, TeacherOutput
from comad.distillation.health import CollapseDetector
from comad.distillation.masking import Masks
from comad.distillation.method import Method
from comad.exporting.package import ModelCard, export_backbone
from comad.models.decoder import MaskedDecoder
from comad.models.students import VitConfig
from comad.models.teachers import Teacher, TeacherCard
from comad.models.timm_backbone import TimmBackbone
from comad.runtime import progress
from comad.runtime.memory import peak_bytes, reset_peak

CARD = TeacherCard("t", "test", "test", "vit", "", 2, 48, 4, 8, 1, 1e-6, (0.5,) * 3, (0.5,) * 3, ("patch",), "none", 0)


def small_vit(seed: int, width: int, patch_size: int = 8) -> TimmBackbone:
    """A random Vision Transformer of two blocks over 4 × 4 patches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VitConfig(image_size=4 * patch_size, patch_size=patch_size, width=width, depth=2, heads=4).build()


def blurred_noise(count: int, seed: int, size: int = 32) -> Tensor:
    """Random images with structure larger than a patch, values in [0, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bilinear")


@pytest.fixture(autouse=True)
def nothing_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, too: what a test looks for stands alone on the error stream."""
    monkeypatch.setattr(progress, "SILENCE", 600.0)


def pytest_configure() -> None:
    """What runs in the background or under nohup has signals ignored; comad heeds that, and tests send them."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden anew")


class SmallDistillation:
    """Frozen random teachers, calibrated aligners, a student 32 channels wide, images of 4 × 4 patches.

    One teacher if the method is made for one, else three; with a decoder each if the method reads it.
    """

    vit = staticmethod(small_vit)

    def __init__(
        self,
        method: Method,
        teacher_widths: Sequence[int] | None = None,
        with_cls: Sequence[bool] = (False, True, True, True),
        num_images: int = 64,
        seed: int = 0,
        teacher_patch_size: int = 8,
    ):
        teacher_widths = teacher_widths or (48,) * (1 if method.single_teacher else 3)
        self.teachers = [
            Teacher(f"teacher-{m}", small_vit(100 + m, width, teacher_patch_size).eval().requires_grad_(False), CARD)
            for m, width in enumerate(teacher_widths)
        ]
        for teacher, has in zip(self.teachers, with_cls, strict=False):
            teacher.backbone.token_types = ("cls", "patch") if has else ("patch",)
        for teacher in self.teachers if isinstance(method.features, MAEDecoder) else ():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(50)
                decoder = MaskedDecoder(teacher.backbone.width, (4, 4), 192, 24, 1, 2)
                teacher.backbone.decoder = decoder.requires_grad_(False)
        self.images = blurred_noise(num_images, seed)
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.distiller = Distiller(small_vit(seed, 32), self.teachers, method)
        self.distiller.fit(self.outputs(self.images, Masks(None, (None,) * len(self.teachers))))

    def outputs(self, images: Tensor, masks: Masks) -> list[TeacherOutput]:
        """What the teachers give under these masks."""
        return [self.distiller.forward_teacher(t, m, images, masks) for m, t in enumerate(self.teachers)]

    def batch(self, size: int) -> tuple[Tensor, list[TeacherOutput], Masks]:
        """Some images, what the teachers give for them under fresh masks, and the masks."""
        masking = self.distiller.method.masking
        chosen = torch.randperm(len(self.images), generator=self.generator)[:size]
        noise = torch.rand(size, 1 + len(self.teachers), 16, generator=self.generator)
        images, masks = masking.blend(self.images[chosen], noise), masking(noise)
        return images, self.outputs(images, masks), masks

    def losses_on_one_batch(self, steps: int, learning_rate: float = 2e-3) -> list[float]:
        """The loss of every step of a training on the same images and masks."""
        optimizer = torch.optim.AdamW(self.distiller.parameters(), lr=learning_rate)
        batch = self.batch(16)
        losses = []
        for _ in range(steps):
            loss, _ = self.distiller(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def watched_training(self, steps: int, learning_rate: float) -> tuple[list[str], dict[str, float]]:
        """Train as a run does: the warnings of the collapse detector, and the last numbers of the log."""
        optimizer = torch.optim.AdamW(self.distiller.parameters(), lr=learning_rate, betas=(0.9, 0.95))
        watch, warnings, metrics = CollapseDetector(), [], {}
        for step in range(1, steps + 1):
            loss, numbers = self.distiller(*self.batch(32))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.distiller.parameters(), 3.0)
            optimizer.step()
            if step == 1 or step % 20 == 0:
                metrics = {name: float(value) for name, value in numbers().items()}
                metrics |= {"loss": float(loss.detach()), "epoch": step * 32 / len(self.images)}
                warning = watch(step, metrics)
                warnings += [warning] if warning else []
        return warnings, metrics


@pytest.fixture(scope="session")
def small_distillation() -> type[SmallDistillation]:
    return SmallDistillation


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"not done within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def within():
    """A context that fails what would wait for ever: its seconds are many, for a busy machine."""
    return _within


@pytest.fixture
def grown():
    """Bytes by which this process grew at most since the test began, whatever it took before."""
    cpu = torch.device("cpu")
    reset_peak(cpu)
    before = peak_bytes(cpu)
    return lambda: peak_bytes(cpu) - before


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """A cache that is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def write_images():
    """Write pictures: the name decides the noise, the folder the colour, the ending the format."""

    def write(root, names, size=24):
        for name in names:
            path = Path(root) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(zlib.crc32(str(name).encode())).integers(0, 96, (size, size, 3))
            colour = np.random.default_rng(zlib.crc32(path.parent.name.encode())).integers(0, 160, 3)
            Image.fromarray((noise + colour).astype(np.uint8)).save(path)
        return Path(root)

    return write


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory, write_images):
    """Three sub-folders of 24 pictures; about 58 of them are for training."""
    names = [f"{label}/{i:02}.png" for label in ("ant", "bee", "cat") for i in range(24)]
    return write_images(tmp_path_factory.mktemp("labelled"), names)


@pytest.fixture(scope="session")
def teacher_specs(tmp_path_factory):
    """Two exported teachers of different widths, the second without a class token that carries meaning."""
    root = tmp_path_factory.mktemp("teachers")
    specs = []
    for seed, (name, width, tokens) in enumerate((("first", 24, ("cls", "patch")), ("second", 16, ("patch",)))):
        vit = VitConfig(image_size=16, patch_size=4, width=width, depth=2, heads=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = vit.build()
        backbone.token_types = tokens
        card = ModelCard(
            name=name,
            licence="apache-2.0",
            architecture=vit.name,
            token_types=tokens,
            about="Random weights for tests.",
            preset="none",
            seed=seed,
            images_seen=0,
            data="none",
            data_licence="none",
        )
        specs.append(f"{name}={export_backbone(backbone, root / name, model_args=vit.arguments, card=card)}")
    return tuple(specs)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """Eight training and four validation scenes of 48 pixels, some empty, some with a heap. Not to be written to."""
    from comad.data.scene_files import ScenesConfig, write_scenes
    from comad.data.scenes import SceneConfig

    out = tmp_path_factory.mktemp("dense") / "scenes"
    scene = SceneConfig(sides=(48, 64), object_sides=(16, 40), crowds=0.4, empty=0.2, max_objects=4)
    write_scenes(ScenesConfig(out=str(out), train=8, validation=4, scene=scene, seed=1))
    return out
