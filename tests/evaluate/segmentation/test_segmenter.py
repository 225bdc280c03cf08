import itertools

import pytest
import torch
from torch import nn

from comad.data.ade20k import IGNORED
from comad.evaluate.segmentation.heads import LinearHead, UPerHead
from comad.evaluate.segmentation.segmenter import Segmenter, _starts, segment_image
from comad.models.maps import load_maps


@pytest.fixture(scope="module")
def segmenter(teacher_specs):
    torch.manual_seed(0)
    maps, _ = load_maps(teacher_specs[0], 32)
    return Segmenter(maps, 5, 16, 0.4)


def batch(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 5, (count, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    "widths, strides", [((24,) * 4, (4,) * 4), ((24,) * 4, (16,) * 4), ((8, 16, 24, 32), (4, 8, 16, 32))]
)
def test_upernet_answers_at_its_finest_level(widths, strides):
    maps = [torch.rand(1, width, 64 // stride, 64 // stride) for width, stride in zip(widths, strides, strict=True)]
    assert UPerHead(widths, strides, 16, 5)(maps).shape == (1, 5, 16, 16)


def test_every_weight_learns_at_batch_1(segmenter):
    segmenter.train().zero_grad()
    segmenter(*batch(1))[0].backward()
    assert [name for name, weight in segmenter.named_parameters() if weight.grad is None] == []


def test_the_loss_ignores_pixels_without_a_class(segmenter):
    segmenter.eval()
    images, classes = batch()
    half = classes.clone()
    half[:, 16:] = IGNORED
    scores = segmenter.scores(images.float() / 255)
    expected = nn.functional.cross_entropy(scores[:, :, :16], classes[:, :16].long())
    assert torch.allclose(segmenter(images, half)[1]()["loss_main"], expected, atol=1e-5)
    nothing = segmenter(images, torch.full_like(classes, IGNORED))
    assert nothing[0] == 0 and nothing[1]()["pixel_accuracy"] == 0


def test_it_can_learn_an_image_by_heart(teacher_specs):
    torch.manual_seed(0)
    maps, _ = load_maps(teacher_specs[0], 32)
    model = Segmenter(maps, 5, 16, 0.4)
    images, _ = batch(1)
    classes = torch.zeros(1, 32, 32, dtype=torch.uint8)
    classes[:, :16, 8:], classes[:, 20:] = 2, 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(images, classes)[0].backward()
        optimizer.step()
    answer = segment_image(model.eval(), images[0], 32, 32, 32)
    assert (answer == classes[0]).float().mean() > 0.9


def test_windows_cover_the_side_and_end_with_it():
    assert _starts(100, 32, 21) == [0, 21, 42, 63, 68] and _starts(32, 32, 21) == [0]
    for length in range(32, 120):
        starts = _starts(length, 32, 21)
        assert starts[0] == 0 and starts[-1] == length - 32
        assert all(after - before <= 21 for before, after in itertools.pairwise(starts))


@pytest.mark.parametrize("size", [(32, 32), (20, 45), (70, 33), (9, 9)])
def test_answers_have_the_size_of_the_image(segmenter, size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    answer = segment_image(segmenter.eval(), image, 32, 32, 24)
    assert answer.shape == size and answer.dtype == torch.uint8 and answer.max() < 5


def test_one_window_is_the_plain_answer(segmenter):
    image = batch(1)[0][0]
    plain = segmenter.eval().scores(image[None].float() / 255)[0].argmax(dim=0)
    assert (segment_image(segmenter, image, 32, 32, 24) == plain).float().mean() > 0.999


def test_windows_are_averaged(teacher_specs):
    """A head that says where a pixel is in its window: overlapping windows give the mean of both."""
    maps, _ = load_maps(teacher_specs[0], 32, frozen=True)
    model = Segmenter(maps, 2, 0, 0.0).eval()
    ramp = torch.linspace(0, 1, 32).expand(32, 32)
    model.scores = lambda images: torch.stack([ramp, torch.full_like(ramp, 0.5)]).expand(len(images), -1, -1, -1)
    answer = segment_image(model, torch.zeros(3, 32, 48, dtype=torch.uint8), 32, 32, 16)
    x = torch.arange(48)
    mean = torch.where(x < 16, x / 31, torch.where(x < 32, (x / 31 + (x - 16) / 31) / 2, (x - 16) / 31))
    assert torch.equal(answer[0] == 0, mean > 0.5)


def test_a_linear_head_trains_nothing_else(teacher_specs):
    maps, _ = load_maps(teacher_specs[0], 32, frozen=True)
    model = Segmenter(maps, 5, 0, 0.4)
    assert isinstance(model.head, LinearHead) and model.auxiliary is None
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trainable == ["head.classify.weight", "head.classify.bias"]
    model(*batch())[0].backward()
