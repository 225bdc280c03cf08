import math

import pytest
import torch
from torch import nn

from comad.models.decoder import MaskedDecoder
from comad.models.students import VitConfig
from comad.runtime.optim import OptimConfig, build_optimizer


def test_warm_up_is_linear_and_reaches_the_peak():
    config = OptimConfig(epochs=10.0, warmup_epochs=2.0, base_lr=1e-3, batch_size=256)
    rates = [config.lr(step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([1e-3 * (step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_cosine_values():
    config = OptimConfig(epochs=10.0, warmup_epochs=2.0, base_lr=1e-3, min_lr=0.1)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        expected = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))
        assert config.lr(20 + round(share * 80), 10) == pytest.approx(expected)
    assert config.lr(1000, 10) == pytest.approx(1e-4)


def test_no_warm_up_and_fractions_of_epochs():
    assert OptimConfig(warmup_epochs=0.0, base_lr=1.0).lr(0, 10) == 1.0
    config = OptimConfig(epochs=1.5, warmup_epochs=0.25, base_lr=1.0)
    assert config.total_steps(10) == 15
    assert [config.lr(step, 10) for step in range(3)] == pytest.approx([0.4, 0.8, 1.0])  # never above the peak
    assert OptimConfig(epochs=0.001).total_steps(10) == 1


@pytest.mark.parametrize(
    ("num_images", "batch_size", "accumulate", "epochs", "steps", "seen"),
    [(1000, 256, 1, 100.0, 300, 76_800), (2000, 256, 4, 100.0, 175, 179_200), (5000, 256, 8, 8.0, 19, 38_912)],
)
def test_an_epoch_is_every_whole_batch_however_many_make_a_step(
    num_images, batch_size, accumulate, epochs, steps, seen
):
    config = OptimConfig(epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    assert config.total_steps(config.steps_per_epoch(num_images)) == steps
    assert config.images_seen(num_images) == seen


@pytest.mark.parametrize("changes", [{"epochs": 0.0}, {"batch_size": 0}, {"accumulate": 0}])
def test_values_that_are_too_small_are_refused(changes):
    with pytest.raises(ValueError, match=f"--optim.{next(iter(changes)).replace('_', '-')} 0.* is too small"):
        OptimConfig(**changes)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(256, 1), (64, 4), (1024, 1), (32, 1)])
def test_learning_rate_scales_with_the_effective_batch(batch_size, accumulate):
    config = OptimConfig(base_lr=2e-3, batch_size=batch_size, accumulate=accumulate)
    assert config.peak_lr == pytest.approx(2e-3 * batch_size * accumulate / 256)


def test_biases_norms_tokens_and_positions_are_not_decayed():
    module = nn.ModuleDict(
        {
            "student": VitConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2).build(),
            "decoder": MaskedDecoder(16, (4, 4), 48, 16, 1, 2),
        }
    )
    module["student"].vit.patch_embed.requires_grad_(False)
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.3, base_lr=1e-3, betas=(0.8, 0.9)))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, value in decay.items():
        free = name.endswith(("bias", "token", "pos_embed")) or "norm" in name
        assert value == (0.0 if free else 0.3), name
    for name in ("student.vit.cls_token", "student.vit.pos_embed", "decoder.mask_token"):
        assert decay[name] == 0.0
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 1e-3 for group in optimizer.param_groups)


def test_decay_shrinks_matrices_alone():
    module = nn.Linear(3, 3)
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.5, base_lr=1e-2))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(module.weight, before["weight"] * (1 - 0.5 * 1e-2))
    assert torch.equal(module.bias, before["bias"])


def test_other_schedules():
    poly = OptimConfig(epochs=10.0, warmup_epochs=2.0, base_lr=1.0, schedule="poly", min_lr=0.2)
    assert [poly.lr(20 + step, 10) for step in (0, 40, 80)] == pytest.approx([1.0, 0.6, 0.2])
    step = OptimConfig(epochs=100.0, warmup_epochs=0.0, base_lr=1.0, schedule="step")
    assert [step.lr(at, 10) for at in (0, 888, 890, 962, 964, 999)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_batch_in_parts_is_the_same_step():
    whole, parts = OptimConfig(batch_size=4096), OptimConfig(batch_size=4096, microbatch=256)
    assert (parts.pass_size, parts.passes, whole.passes) == (256, 16, 1)
    assert parts.peak_lr == whole.peak_lr and parts.images_per_step == 4096
    assert parts.images_seen(10_000) == OptimConfig(batch_size=256, accumulate=16).images_seen(10_000)
    assert OptimConfig(batch_size=64, microbatch=256).pass_size == 64


def test_parts_must_be_equal():
    with pytest.raises(ValueError, match=r"no multiple of --optim\.microbatch 300; use 256"):
        OptimConfig(batch_size=4096, microbatch=300)
