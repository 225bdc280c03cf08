import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comad.data.loader import Batch
from comad.models.students import VitConfig
from comad.pretraining.mocov3 import MoCoV3, info_nce

VIT = VitConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2)


def build(**arguments):
    torch.manual_seed(0)
    model = MoCoV3(hidden_width=32, out_width=16, **arguments).build(VIT.build())
    return model


def make_batch(size=16):
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 200, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    second = first + torch.randint(0, 55, first.shape, generator=generator, dtype=torch.uint8)
    numbers = torch.arange(size)
    return Batch((first, second), torch.zeros(size, 0), numbers, numbers * 0, numbers >= 0)


def naive_info_nce(queries, keys, temperature):
    """Equation 1 of arXiv:2104.02057 times 2τ, as in its algorithm 1; one query after another."""
    total = 0.0
    for i, query in enumerate(queries.tolist()):
        scores = []
        for key in keys.tolist():
            dot = sum(a * b for a, b in zip(query, key, strict=True))
            norms = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in key))
            scores.append(dot / norms / temperature)
        total -= scores[i] - math.log(sum(math.exp(score) for score in scores))
    return 2 * temperature * total / len(queries)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.2, 1.0]), st.integers(1, 6))
def test_info_nce_against_a_loop_in_float64(seed, temperature, size):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(2, size, 5, generator=generator)
    found = float(info_nce(queries, keys, temperature))
    assert found == pytest.approx(naive_info_nce(queries.double(), keys.double(), temperature), rel=1e-4, abs=1e-5)


def test_info_nce_is_computed_in_float32_under_autocast():
    queries, keys = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = info_nce(queries, keys, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(queries, keys, 0.2), expected)


def test_the_step_is_symmetrised():
    model, batch = build(), make_batch()
    images = torch.cat(batch.views).float() / 255
    loss = model(batch, 1.0)[0].detach()  # at the end of the run the momentum is 1: nothing moves
    first, second = (model.predictor(model.projector(half)) for half in model.backbone(images).cls.chunk(2))
    keys = [model.momentum_projector(half) for half in model.momentum_backbone(images).cls.chunk(2)]
    expected = naive_info_nce(first, keys[1], 0.2) + naive_info_nce(second, keys[0], 0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_momentum_networks_move_as_scheduled(progress):
    model = build(momentum=0.9)
    pairs = [(model.backbone, model.momentum_backbone), (model.projector, model.momentum_projector)]
    for own, _ in pairs:
        for parameter in own.parameters():
            parameter.data += torch.randn_like(parameter)
    before = [[p.clone() for p in copy.parameters()] for _, copy in pairs]
    model(make_batch(), progress)
    momentum = 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
    for (own, copy), olds in zip(pairs, before, strict=True):
        for parameter, moved, old in zip(own.parameters(), copy.parameters(), olds, strict=True):
            assert torch.allclose(moved, momentum * old + (1 - momentum) * parameter, atol=1e-6)


def test_parts_of_one_accumulated_batch_move_the_momentum_networks_once():
    model = build(momentum=0.5)
    model(make_batch(), 0.25)
    model.backbone.vit.norm.weight.data += 1
    before = model.momentum_backbone.vit.norm.weight.clone()
    model(make_batch(), 0.25)
    assert torch.equal(model.momentum_backbone.vit.norm.weight, before)
    model(make_batch(), 0.5)
    assert not torch.equal(model.momentum_backbone.vit.norm.weight, before)


KEYS_OF_TWO = """
import sys, torch
import torch.distributed as dist
from comad.pretraining.mocov3 import info_nce
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
queries, keys = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
loss = info_nce(queries.chunk(2)[rank], keys.chunk(2)[rank], 0.2)
dist.all_reduce(loss)
assert abs(loss.item() / 2 - float(sys.argv[3])) < 1e-6, (loss, sys.argv)
"""


def test_keys_of_all_processes_are_negatives(tmp_path):
    queries, keys = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    whole = str(float(info_nce(queries, keys, 0.2)))
    command = [sys.executable, "-c", KEYS_OF_TWO]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting"), whole]) for rank in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]


def test_the_momentum_networks_stay_in_eval_mode_of_the_model():
    model = build().eval()
    before = [p.clone() for p in model.momentum_backbone.parameters()]
    model(make_batch(), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.momentum_backbone.parameters(), strict=True))


def test_gradients_reach_the_query_side_alone():
    model = build()
    model(make_batch(), 0.5)[0].backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("momentum") or "patch_embed" in name
        assert (parameter.grad is None) == frozen, name
        assert parameter.requires_grad != frozen


def test_the_patch_projection_is_trained_on_request():
    model = build(freeze_patches=False)
    assert model.backbone.vit.patch_embed.proj.weight.requires_grad
    assert not model.momentum_backbone.vit.patch_embed.proj.weight.requires_grad


def test_two_views():
    sample = MoCoV3().views(16, 16)(torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8))
    assert [view.shape for view in sample.views] == [(3, 16, 16)] * 2
    assert not torch.equal(*sample.views)


def test_the_loss_falls_on_one_batch():
    model, batch = build(), make_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(20):
        loss = model(batch, 0.5)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
