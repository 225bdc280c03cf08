import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comad.data.loader import Batch
from comad.models.backbone import patchify, random_visible
from comad.models.students import VitConfig
from comad.pretraining.mae import Mae, mae_loss

VIT = VitConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2)


def build(**arguments):
    torch.manual_seed(0)
    return Mae(decoder_width=16, decoder_depth=1, decoder_heads=2, **arguments).build(VIT.build())


def make_batch(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 4, 4), generator=generator, dtype=torch.uint8)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3) // 2
    images += torch.randint(0, 99, images.shape, generator=generator, dtype=torch.uint8)
    numbers = torch.arange(size)
    return Batch((images,), torch.rand(size, 16, generator=generator), numbers, numbers * 0, numbers >= 0)


def naive_loss(prediction, images, patch_size, hidden):
    """Section 3 of arXiv:2111.06377, one patch after another."""
    total, count = 0.0, 0
    columns = images.shape[3] // patch_size
    for b in range(len(images)):
        for n in range(prediction.shape[1]):
            if not hidden[b, n]:
                continue
            top, left = n // columns * patch_size, n % columns * patch_size
            pixels = [
                float(images[b, c, top + y, left + x])
                for y in range(patch_size)
                for x in range(patch_size)
                for c in range(3)
            ]
            mean = sum(pixels) / len(pixels)
            variance = sum((p - mean) ** 2 for p in pixels) / (len(pixels) - 1)
            errors = [
                (float(prediction[b, n, i]) - (p - mean) / (variance + 1e-6) ** 0.5) ** 2 for i, p in enumerate(pixels)
            ]
            total, count = total + sum(errors) / len(errors), count + 1
    return total / count


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([(8, 8, 4), (4, 8, 2), (6, 3, 3)]))
def test_loss_against_a_loop_in_float64(seed, shape):
    height, width, patch_size = shape
    generator = torch.Generator().manual_seed(seed)
    num_patches = (height // patch_size) * (width // patch_size)
    images = torch.rand(3, 3, height, width, generator=generator, dtype=torch.float64)
    prediction = torch.randn(3, num_patches, 3 * patch_size**2, generator=generator, dtype=torch.float64)
    hidden = torch.rand(3, num_patches, generator=generator) < 0.6
    hidden[0, 0] = True
    found = mae_loss(prediction, images, patch_size, hidden)
    assert float(found) == pytest.approx(naive_loss(prediction, images, patch_size, hidden), rel=1e-9)


def test_patchify_goes_by_rows_and_keeps_colours_together():
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for n in range(6):
        top, left = n // 3 * 2, n % 3 * 2
        expected = images[:, :, top : top + 2, left : left + 2].permute(0, 2, 3, 1).reshape(2, -1)
        assert torch.equal(patches[:, n], expected)


def test_only_hidden_patches_count():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=generator)
    prediction = torch.randn(2, 4, 48, generator=generator, requires_grad=True)
    hidden = torch.tensor([[True, False, False, True], [False, True, True, False]])
    mae_loss(prediction, images, 4, hidden).backward()
    assert torch.equal(prediction.grad.abs().sum(dim=2) > 0, hidden)


def test_the_encoder_does_not_see_hidden_pixels():
    model, batch = build(), make_batch(2)
    images = batch.views[0].float() / 255
    visible = random_visible(batch.noise, model.num_visible)
    shown = torch.zeros(2, 16).scatter(1, visible, 1.0).view(2, 1, 4, 4)
    shown = shown.repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = images * shown + torch.rand(images.shape) * (1 - shown)
    for a, b in zip(model.backbone(images, visible)[:2], model.backbone(other, visible)[:2], strict=True):
        assert torch.equal(a, b)


def test_the_step_is_the_loss_on_a_quarter_of_visible_patches():
    model, batch = build(), make_batch()
    assert model.num_visible == 4
    images = batch.views[0].float() / 255
    visible = batch.noise.argsort(dim=1)[:, :4].sort(dim=1).values
    hidden = torch.ones(8, 16, dtype=torch.bool).scatter(1, visible, False)
    cls, patches = model.backbone(images, visible)[:2]
    expected = naive_loss(model.decoder(cls, patches, visible).detach(), images, 4, hidden)
    assert float(model(batch, 0.0)[0].detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("ratio", "visible"), [(0.0, 16), (0.5, 8), (0.75, 4), (0.99, 1)])
def test_mask_ratio(ratio, visible):
    assert build(mask_ratio=ratio).num_visible == visible


def test_views_carry_the_noise_of_the_mask():
    sample = Mae().views(16, 16)(torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8))
    assert [view.shape for view in sample.views] == [(3, 16, 16)] and sample.noise.shape == (16,)


def test_the_loss_falls_on_one_batch():
    model, batch = build(), make_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(batch, 0.5)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
