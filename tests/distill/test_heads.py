"""Heads on the student's side: shapes, who shares what, and that every parameter is trained."""

from __future__ import annotations

import pytest
import torch
from comad.distill.heads import Student
from comad.distill.taps import Encoded
from torch import Tensor

FORMS = [
    Student(form="linear"),
    Student(form="linear", apart=True),
    Student(form="mlp", apart=True, hidden_ratio=2.0),
    Student(form="ladder", apart=True),
    Student(form="transformer"),
]


def encoded(num_rungs: int, seed: int = 0) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    last, *rungs = (torch.randn(2, 5, 32, generator=generator) for _ in range(num_rungs))
    return Encoded(last, last, tuple(rungs), None, None)


def rungs_of(config: Student) -> int:
    return config.rungs if config.form == "ladder" else 1


@pytest.mark.parametrize("config", FORMS, ids=lambda config: f"{config.form}-{config.apart}")
def test_one_head_per_teacher_and_every_parameter_is_trained(config):
    heads = config.build([24, 48], 32, [False, True], False)
    found = [heads.predict(encoded(rungs_of(config)), m) for m in range(2)]
    assert [part.shape for part in found] == [(2, 5, 24), (2, 5, 48)]
    if config.apart:
        assert not found[0][:, 0].any() and found[1][:, 0].any()  # no head for a class token that says nothing
    sum(part.square().sum() for part in found).backward()
    assert all(p.grad is not None and p.grad.any() for p in heads.parameters())


@pytest.mark.parametrize("config", FORMS, ids=lambda config: f"{config.form}-{config.apart}")
def test_fused_targets_share_one_head(config):
    heads = config.build([24, 24], 32, [False, True], True)
    student = encoded(rungs_of(config))
    assert torch.equal(heads.predict(student, 0), heads.predict(student, 1))
    alone = config.build([24], 32, [True], False)
    assert sum(p.numel() for p in heads.parameters()) == sum(p.numel() for p in alone.parameters())


def test_a_ladder_is_the_sum_of_its_rungs():
    config = Student(form="ladder", rungs=3)
    heads, student = config.build([24], 32, [True], False), encoded(3)
    sources = (*student.rungs, student.tapped)
    parts = [part(source) for part, source in zip(heads.patches[0].maps, sources, strict=True)]
    torch.testing.assert_close(heads.predict(student, 0), parts[0] + parts[1] + parts[2])


def test_targets_stay_as_they_are():
    heads = Student().build([24], 32, [True], False)
    target: Tensor = torch.randn(2, 5, 24)
    assert torch.equal(heads(target, 0), target) and heads.own_loss(target, 0) is None
    assert Student(form="identity").build([24], 32, [True], False).predict(encoded(1), 0).shape == (2, 5, 32)
