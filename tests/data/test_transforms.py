import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from comad.data.colours import change_colours
from comad.data.transforms import BICUBIC, ColourChange, Crop, evaluation_view, paste, random_backdrop, random_views


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_paste_against_floats(seed):
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.randint(0, 256, (1, 9, 7), generator=generator)
    colours = (torch.rand(3, 9, 7, generator=generator) * (alpha + 1)).long().clamp(max=alpha)
    backdrop = torch.randint(0, 256, (3, 9, 7), generator=generator)
    found = paste(torch.cat([colours, alpha]).to(torch.uint8), backdrop.to(torch.uint8))
    expected = colours.double() + (1 - alpha.double() / 255) * backdrop
    assert found.dtype == torch.uint8
    assert (found.double() - expected).abs().max() <= 0.5


def test_paste_of_opaque_and_of_nothing():
    backdrop = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    assert torch.equal(paste(torch.zeros(4, 4, 4, dtype=torch.uint8), backdrop), backdrop)
    opaque = torch.full((4, 4, 4), 255, dtype=torch.uint8)
    opaque[:3] = backdrop
    assert torch.equal(paste(opaque, 255 - backdrop), backdrop)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [8, 24])
def test_a_crop_has_the_size_and_leaves_its_source_alone(channels, size):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (channels, 30, 20), dtype=torch.uint8)
    if channels == 4:
        image[:3] = torch.minimum(image[:3], image[3:])
    before = image.clone()
    for _ in range(10):
        view = Crop(size=size)(image)
        assert view.shape == (3, size, size) and view.dtype == torch.uint8
    assert torch.equal(image, before)


def test_the_flip_comes_as_often_as_it_should():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, :, :4] = 200
    for share in (0.0, 1.0):
        crop = Crop(size=8, scale=(1.0, 1.0), flip=share)
        flipped = [bool(crop(image)[0, 4, 0] < 100) for _ in range(8)]
        assert all(flipped) if share else not any(flipped)


def test_crops_keep_to_their_share_of_the_area():
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 64).expand(3, 64, 64).contiguous()
    spans = []
    for _ in range(50):
        view = Crop(size=64, scale=(0.1, 0.2), flip=0.0)(image)[0]
        spans.append(int(view.max()) - int(view.min()) + 1)
    assert min(spans) >= 64 * (0.1 * 3 / 4) ** 0.5 - 2 and max(spans) <= 64 * (0.2 * 4 / 3) ** 0.5 + 2


def test_every_draw_comes_from_the_generator_of_torch():
    image = torch.randint(0, 256, (4, 30, 30), dtype=torch.uint8)
    pairs = [(Crop(size=12), ColourChange(grey=0.5, blur=0.5)), (Crop(size=8), None)]
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(random_views(image, pairs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.manual_seed(8)
    assert not torch.equal(random_views(image, pairs)[0], results[0][0])


def test_colour_change_of_strength_zero_is_no_change():
    view = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    assert torch.equal(ColourChange(strength=0.0, hue=0.0, jitter=1.0)(view), view)


@pytest.mark.parametrize("kind", ["any", "few levels", "corners of the cube"])
def test_colours_change_as_in_torchvision(kind):
    levels = {"any": (256, 1), "few levels": (5, 60), "corners of the cube": (2, 255)}[kind]
    view = (torch.randint(0, levels[0], (3, 40, 30)) * levels[1]).to(torch.uint8)
    nothing = [None, None, None]
    for hue in torch.linspace(-0.5, 0.5, 25).tolist():
        difference = change_colours(view, [3], [*nothing, hue]).int() - F.adjust_hue(view, hue).int()
        assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.002
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    for seed in range(24):
        torch.manual_seed(seed)
        torch.rand(())  # whether to change at all
        expected = jitter(view)
        torch.manual_seed(seed)
        difference = ColourChange(jitter=1.0)(view).int() - expected.int()
        assert (difference != 0).float().mean() < 0.002


def test_colour_change_goes_grey_and_blurs():
    torch.manual_seed(0)
    view = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    grey = ColourChange(jitter=0.0, grey=1.0)(view)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    blurred = ColourChange(jitter=0.0, blur=1.0)(view)
    assert blurred.shape == view.shape and blurred.float().std() < view.float().std()


def test_backdrops_are_of_several_kinds():
    torch.manual_seed(0)
    backdrops = [random_backdrop(12) for _ in range(60)]
    assert all(b.shape == (3, 12, 12) and b.dtype == torch.uint8 for b in backdrops)
    white = sum(bool((b == 255).all()) for b in backdrops)
    one_colour = sum(bool((b == b[:, :1, :1]).all()) for b in backdrops) - white
    assert 5 < white < 35 and 5 < one_colour < 35 and white + one_colour < 55


def test_evaluation_view_resizes_the_shorter_side_and_cuts_the_centre():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :, 30:50] = 255
    view = evaluation_view(image, 10, 0.5)
    assert view.shape == (3, 10, 10) and bool((view > 200).all())
    assert torch.equal(evaluation_view(image, 10, 0.5), view)


@pytest.mark.parametrize("shape", [(3, 40, 320), (4, 320, 40), (3, 2, 200), (3, 1, 500), (3, 500, 3)])
@pytest.mark.parametrize("size, crop", [(32, 0.875), (10, 0.5), (48, 1.0)])
def test_a_thin_image_is_cut_before_it_is_resized_and_looks_the_same(shape, size, crop):
    torch.manual_seed(0)
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    if shape[0] == 4:
        image[:3] = torch.minimum(image[:3], image[3:])
    whole = F.center_crop(F.resize(image, [round(size / crop)], BICUBIC, antialias=True), [size, size])
    whole = whole if len(whole) == 3 else paste(whole, torch.full((3, size, size), 255, dtype=torch.uint8))
    assert (evaluation_view(image, size, crop).int() - whole.int()).abs().max() <= 1


def test_a_very_thin_image_takes_little_memory(grown):
    """20,000 × 2 pixels would be 2.5 million × 256."""
    image = torch.zeros(3, 2, 20_000, dtype=torch.uint8)
    assert evaluation_view(image, 224, 0.875).shape == (3, 224, 224)
    assert Crop(size=224)(image).shape == (3, 224, 224)
    assert grown() < 200_000_000


def test_a_crop_is_that_of_torchvision():
    image = torch.randint(0, 256, (3, 30, 20), dtype=torch.uint8)
    reference = v2.RandomResizedCrop(12, (0.25, 1.0), interpolation=BICUBIC)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = reference(image)
        torch.manual_seed(seed)
        assert torch.equal(Crop(size=12, flip=0.0)(image), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (1, 20_000), (20_000, 1), (5000, 7)])
@pytest.mark.parametrize("channels", [3, 4])
def test_images_of_every_shape_have_views(shape, channels):
    image = torch.full((channels, *shape), 100, dtype=torch.uint8)
    for seed in range(3):
        torch.manual_seed(seed)
        (view,) = random_views(image, [(Crop(size=16), ColourChange(grey=0.5, blur=0.5))])
        assert view.shape == (3, 16, 16)
    assert evaluation_view(image, 16, 0.875).shape == (3, 16, 16)
