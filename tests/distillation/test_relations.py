"""Relations of tokens against plain loops in float64, against timm's own attention, and the queue as a state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from comad.distillation.features import StudentOutput
from comad.distillation.fusion import Pair
from comad.distillation.objectives import DISTANCES, AttentionLoss, QueueLoss, RelationLoss, Shapes
from comad.distillation.relations import (
    Queue,
    attention_logits,
    mean_of_maps,
    other_cosines,
    token_logits,
    with_class_token,
)

EVERYWHERE = torch.ones(2, 5, dtype=torch.bool)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cos(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


def softmax(x: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp((value - max(x)) / temperature) for value in x]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(("relation", "left", "right"), [("queries-keys", 0, 1), ("values-values", 2, 2)])
def test_attention_logits_and_their_kl_are_the_naive_ones(relation, left, right):
    student, teacher = draw(2, 5, 3 * 6), draw(2, 5, 3 * 8, seed=1)  # two heads of 3 and of 4 channels
    found = [attention_logits(qkv, 2, relation) for qkv in (student, teacher)]
    distances = AttentionLoss(relation=relation).distance_of(Pair(*found, EVERYWHERE, EVERYWHERE))
    for b in range(2):
        for i in range(5):
            expected = 0.0
            for head in range(2):
                rows = []
                for qkv, logits in zip((student, teacher), found, strict=True):
                    d = qkv.shape[2] // 6
                    parts = qkv[b].view(5, 3, 2, d)[:, :, head].tolist()
                    row = [
                        sum(x * y for x, y in zip(parts[i][left], parts[j][right], strict=True)) / math.sqrt(d)
                        for j in range(5)
                    ]
                    assert logits[b, i, head].tolist() == pytest.approx(row, abs=1e-5)
                    rows.append(softmax(row))
                expected += kl(rows[1], rows[0]) / 2
            assert float(distances[b, i]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_attention_rows_are_those_that_timm_computes(small_distillation):
    backbone = small_distillation.vit(3, 32)
    attention, seen = backbone.vit.blocks[1].attn, []
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    tokens = backbone(torch.rand(2, 3, 32, 32), qkv=2)
    rows = attention_logits(with_class_token(tokens.qkv), 4, "queries-keys").softmax(dim=-1)
    torch.testing.assert_close(rows.transpose(1, 2), seen[0])


def test_the_mean_of_maps_has_the_gradient_of_the_mean_of_losses():
    student = draw(1, 4, 2, 4).requires_grad_()
    teachers = [draw(1, 4, 2, 4, seed=seed) for seed in (1, 2, 3)]
    mixture = mean_of_maps(teachers)
    torch.testing.assert_close(mixture.softmax(dim=-1), sum(t.softmax(dim=-1) for t in teachers) / 3)
    distance = DISTANCES["kl-teacher-student"]
    (one,) = torch.autograd.grad(distance(student, mixture, 1.0).sum(), student)
    (many,) = torch.autograd.grad(sum(distance(student, t, 1.0).sum() for t in teachers) / 3, student)
    torch.testing.assert_close(one, many)


def test_token_rows_and_their_kl_are_the_naive_ones():
    student, teacher, counts = draw(2, 6, 3), draw(2, 6, 5, seed=1), torch.ones(2, 6, dtype=torch.bool)
    counts[:, 0], counts[1, 3] = False, False
    pair = Pair(token_logits(student, counts), token_logits(teacher, counts), counts, counts)
    found = RelationLoss(temperature=0.07).distance_of(pair)
    for b in range(2):
        kept = [n for n in range(6) if counts[b, n]]
        for i in kept:
            rows = [
                softmax([cos(x[b, i].tolist(), x[b, j].tolist()) for j in kept if j != i], 0.07)
                for x in (student, teacher)
            ]
            assert float(found[b, i]) == pytest.approx(kl(rows[1], rows[0]), rel=1e-3, abs=1e-5)
    assert found.isfinite().all()


def test_cosines_to_others_have_an_empty_diagonal():
    found = other_cosines(draw(2, 4, 3))
    assert not found.diagonal(dim1=1, dim2=2).any()
    assert float(found[0, 1, 2]) == pytest.approx(cos(*draw(2, 4, 3)[0, 1:3].tolist()), rel=1e-5)


def test_queue_replaces_the_oldest_and_gives_cosines():
    queue, targets = Queue(5, 3), draw(7, 3).float()
    queue.push(targets[:3])
    queue.push(targets[3:7])  # 7 in all: the first two are forgotten
    order = [5, 6, 2, 3, 4]
    token = draw(1, 1, 3, seed=2).float()
    expected = [cos(token[0, 0].tolist(), targets[n].tolist()) for n in order]
    assert queue(token)[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    queue.push(draw(9, 3, seed=3).float())  # more than it holds: the newest stay
    newest = torch.nn.functional.normalize(draw(9, 3, seed=3).float()[-5:], dim=-1)
    assert sorted(queue.directions[:, 0].tolist()) == pytest.approx(sorted(newest[:, 0].tolist()))


def test_queue_is_in_the_state_and_may_be_written_before_the_backward():
    queue, other = Queue(4, 3), Queue(4, 3)
    token = draw(2, 1, 3).float().requires_grad_()
    cosines = queue(token)
    queue.push(draw(3, 3, seed=1).float())
    cosines.sum().backward()
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.directions, queue.directions) and int(other.next) == 3
    assert not list(queue.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_relations(dtype):
    tokens, counts = draw(2, 5, 6).float(), torch.ones(2, 5, dtype=torch.bool)
    exact = token_logits(tokens, counts), attention_logits(100 * tokens, 1, "queries-keys"), Queue(3, 6)
    with torch.autocast("cpu", dtype):
        assert torch.equal(token_logits(tokens, counts), exact[0])
        assert torch.equal(attention_logits(100 * tokens, 1, "queries-keys"), exact[1])
        assert exact[2](tokens).dtype == torch.float32
    half = attention_logits((100 * tokens).to(dtype), 1, "queries-keys")
    assert half.dtype == torch.float32 and half.log_softmax(dim=-1).isfinite().all()


def test_a_queue_holds_the_batch_before_it_compares_and_follows_only_in_training():
    objective = QueueLoss(size=4, temperature=0.5)
    state = objective.build(Shapes(3, (3,), 1, 8))
    assert not state[0].directions.any()
    state[0].push(draw(4, 3, seed=2).float())
    before = state[0].directions.clone()
    pair = Pair(draw(2, 5, 3).float(), draw(2, 5, 3, seed=1).float(), EVERYWHERE, EVERYWHERE)
    output = StudentOutput(pair.prediction, pair.prediction, (), None, None)
    for training in (False, True):
        (compared,), positions = objective.pairs(state.train(training), [pair], output, [], EVERYWHERE[:, 1:])
        assert positions.tolist() == [[True], [True]]
        found = objective.distance_of(compared)
        held = torch.cat([pair.target[:, 0], before[2:]]) if training else before
        for b in range(2):
            rows = [
                softmax([cos(x[b, 0].tolist(), row) for row in held.tolist()], 0.5)
                for x in (pair.prediction, pair.target)
            ]
            assert float(found[b, 0]) == pytest.approx(kl(rows[1], rows[0]), rel=1e-3, abs=1e-6)
        changed = (state[0].directions != before).any(dim=1).tolist()
        assert changed == [training, training, False, False]
    newest = torch.nn.functional.normalize(pair.target[:, 0], dim=-1)
    torch.testing.assert_close(state[0].directions[:2], newest)
