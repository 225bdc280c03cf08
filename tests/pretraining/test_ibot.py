import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comad.data.loader import Batch
from comad.models.students import VitConfig
from comad.pretraining.ibot import Ibot, block_mask

VIT = VitConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2)
SMALL = {"prototypes": 12, "hidden_width": 16, "bottleneck_width": 8, "local_crops": 2}
TEMPERATURE = (0.05, 0.07)


def build(**arguments):
    torch.manual_seed(0)
    config = Ibot(**{"teacher_temperature": TEMPERATURE, **SMALL, **arguments})
    model = config.build(VIT.build_vit(**config.vit_arguments))
    with torch.no_grad():  # a teacher of its own, a mask token that is not zero
        for part in (model.teacher, model.teacher_head):
            for name, parameter in part.named_parameters():
                if not name.endswith("weight_g"):
                    parameter += 0.05 * torch.randn_like(parameter)
        model.mask_token.normal_(std=0.1)
    return model


def make_batch(size=4, local_crops=2, masked=True):
    generator = torch.Generator().manual_seed(1)
    sizes = [16, 16] + [8] * local_crops
    views = tuple(torch.randint(0, 256, (size, 3, s, s), generator=generator, dtype=torch.uint8) for s in sizes)
    noise = (torch.rand(size, 2, 4, 4, generator=generator) < 0.4).float() * masked
    noise[0, 1] = 0  # one crop without a mask
    numbers = torch.arange(size)
    return Batch(views, noise, numbers, numbers * 0, numbers >= 0)


def softmax(logits, temperature):
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [weight / sum(weights) for weight in weights]


def cross_entropy(teacher, student, centre, temperature):
    target = softmax([t - c for t, c in zip(teacher, centre, strict=True)], temperature)
    prediction = softmax(student, 0.1)
    return -sum(p * math.log(q) for p, q in zip(target, prediction, strict=True))


def outputs(model, batch):
    """Class and patch outputs of teacher and student: [view][image] and [view][image][patch], as lists."""
    images = [view.float() / 255 for view in batch.views]
    hidden = batch.noise.flatten(2) > 0.5
    teacher_cls, teacher_patches, student_cls, student_patches = [], [], [], []
    for view in range(2):
        target = model.teacher(images[view])
        student = model.backbone(images[view], ~hidden[:, view], "token", model.mask_token)
        teacher_cls.append(model.teacher_head(target.cls).double().tolist())
        teacher_patches.append(model.teacher_head(target.patches.flatten(0, 1)).double().view(-1, 16, 12).tolist())
        student_cls.append(model.head(student.cls).double().tolist())
        student_patches.append(model.head(student.patches.flatten(0, 1)).double().view(-1, 16, 12).tolist())
    student_cls += [model.head(model.backbone(small).cls).double().tolist() for small in images[2:]]
    return teacher_cls, teacher_patches, student_cls, student_patches


def naive_class_loss(teacher_cls, student_cls, centre, temperature):
    """Equation 1 of arXiv:2111.07832 over all pairs of different crops."""
    terms = [
        cross_entropy(teacher_cls[t][b], student_cls[s][b], centre, temperature)
        for t in range(2)
        for s in range(len(student_cls))
        if s != t
        for b in range(len(student_cls[0]))
    ]
    return sum(terms) / len(terms)


def naive_patch_loss(teacher, student, hidden, centre, temperature):
    """Equation 2: the mean over hidden patches of a crop, then over all crops; a crop without a mask counts as 0."""
    crops = []
    for view in range(2):
        for b in range(len(hidden)):
            terms = [
                cross_entropy(teacher[view][b][n], student[view][b][n], centre, temperature)
                for n in range(16)
                if hidden[b, view, n]
            ]
            crops.append(sum(terms) / max(1, len(terms)))
    return sum(crops) / len(crops)


def mean_rows(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def test_both_losses_and_centres_against_loops_in_float64():
    model, batch = build().eval(), make_batch()
    hidden = batch.noise.flatten(2) > 0.5
    with torch.no_grad():
        teacher_cls, teacher_patches, student_cls, student_patches = outputs(model, batch)
    class_centre, patch_centre = [0.0] * 12, [0.0] * 12
    masked = [teacher_patches[v][b][n] for v in range(2) for b in range(4) for n in range(16) if hidden[b, v, n]]
    for progress in (0.0, 0.5):  # the second step has centres that are not zero
        temperature = TEMPERATURE[0] if progress == 0.0 else TEMPERATURE[1]
        loss, compute_metrics = model(batch, progress)
        metrics = compute_metrics()
        expected = naive_class_loss(teacher_cls, student_cls, class_centre, temperature)
        assert float(metrics["class_loss"]) == pytest.approx(expected, rel=1e-3)
        expected_patch = naive_patch_loss(teacher_patches, student_patches, hidden, patch_centre, temperature)
        assert float(metrics["patch_loss"]) == pytest.approx(expected_patch, rel=1e-3)
        assert float(loss.detach()) == pytest.approx(expected + expected_patch, rel=1e-3)
        means = mean_rows(teacher_cls[0] + teacher_cls[1]), mean_rows(masked)
        class_centre = [0.9 * c + 0.1 * m for c, m in zip(class_centre, means[0], strict=True)]
        patch_centre = [0.9 * c + 0.1 * m for c, m in zip(patch_centre, means[1], strict=True)]
        assert model.class_loss.center.flatten().tolist() == pytest.approx(class_centre, rel=1e-3, abs=1e-5)
        assert model.patch_loss.center.value.flatten().tolist() == pytest.approx(patch_centre, rel=1e-3, abs=1e-5)


def test_patch_loss_weight():
    batch = make_batch()
    single, double = (build(patch_loss=weight).eval()(batch, 0.5) for weight in (1.0, 2.0))
    assert torch.allclose(double[0] - single[0], single[1]()["patch_loss"], atol=1e-5)


def test_teacher_temperature_rises_to_its_end():
    batch = make_batch()
    losses = {share: build(temperature_warmup=0.4).eval()(batch, share)[0] for share in (0.2, 0.4, 1.0)}
    assert torch.equal(losses[0.4], losses[1.0]) and not torch.equal(losses[0.2], losses[0.4])
    middle = build(teacher_temperature=(0.06, 0.06)).eval()(make_batch(), 0.9)[0]
    assert torch.allclose(losses[0.2], middle, atol=1e-6)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 8), st.floats(0, 1), st.integers(0, 2**31))
def test_block_masks_hide_at_most_what_is_asked(grid, share, seed):
    count = round(grid**2 * share)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mask = block_mask(grid, count)
    assert mask.shape == (grid, grid) and mask.dtype == torch.bool
    assert int(mask.sum()) <= count
    assert bool(mask.any()) == (count > 0)


def test_block_masks_come_close_to_what_is_asked():
    torch.manual_seed(0)
    hidden = [int(block_mask(6, 15).sum()) for _ in range(50)]
    assert sum(hidden) / len(hidden) > 13.5


def test_views_and_masks_of_an_image():
    torch.manual_seed(0)
    make = Ibot(local_crops=3, masked_share=0.5, mask_ratio=(0.2, 0.5)).views(24, 36)
    image = torch.randint(0, 256, (4, 30, 30), dtype=torch.uint8)
    samples = [make(image) for _ in range(60)]
    assert [view.shape[-1] for view in samples[0].views] == [24, 24, 12, 12, 12]
    hidden = torch.stack([sample.noise for sample in samples]).flatten(2).sum(dim=2)
    assert samples[0].noise.shape == (2, 6, 6) and set(samples[0].noise.unique().tolist()) <= {0.0, 1.0}
    assert 0.3 < float((hidden > 0).float().mean()) < 0.7
    assert hidden.max() <= 18


def test_without_the_patch_loss_it_is_dino():
    """No masks, no mask token, and the loss is DINO's: cross-entropy between different crops (arXiv:2104.14294)."""
    config = Ibot(patch_loss=0.0, masked_share=1.0)
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    assert not any(bool(config.views(16, 16)(image).noise.any()) for _ in range(10))
    model, batch = build(patch_loss=0.0).eval(), make_batch(masked=False)
    with torch.no_grad():
        teacher_cls, _, student_cls, _ = outputs(model, batch)
    expected = naive_class_loss(teacher_cls, student_cls, [0.0] * 12, TEMPERATURE[1])
    assert float(model(batch, 0.5)[0].detach()) == pytest.approx(expected, rel=1e-3)


def test_a_batch_without_a_mask_leaves_the_patch_centre_finite():
    model, batch = build(), make_batch(masked=False)
    for _ in range(2):
        loss, metrics = model(batch, 0.5)
        assert float(metrics()["patch_loss"]) == 0.0 and bool(loss.isfinite())
    assert bool(model.patch_loss.center.value.isfinite().all())
    loss.backward()


def test_without_local_crops():
    assert bool(build(local_crops=0)(make_batch(local_crops=0), 0.5)[0].isfinite())


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_teacher_moves_as_scheduled(progress):
    model = build(momentum=0.9)
    pairs = [(model.backbone, model.teacher), (model.head, model.teacher_head)]
    before = [[p.clone() for p in teacher.parameters()] for _, teacher in pairs]
    model(make_batch(), progress)
    momentum = 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
    for (own, teacher), olds in zip(pairs, before, strict=True):
        for parameter, moved, old in zip(own.parameters(), teacher.parameters(), olds, strict=True):
            assert torch.allclose(moved, momentum * old + (1 - momentum) * parameter, atol=1e-6)


def test_gradients_reach_the_student_alone():
    model = build()
    model(make_batch(), 0.5)[0].backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("teacher") or name == "head.last_layer.weight_g"
        assert (parameter.grad is None) == frozen, name


def test_the_last_layer_is_frozen_at_the_start():
    model = build(freeze_head=0.1)
    for progress, frozen in ((0.05, True), (0.2, False)):
        model.zero_grad()
        model(make_batch(), progress)[0].backward()
        assert bool((model.head.last_layer.weight_v.grad == 0).all()) == frozen


def test_the_loss_falls_on_one_batch():
    model, batch = build(momentum=1.0), make_batch(8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(25):
        loss = model(batch, 0.5)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
