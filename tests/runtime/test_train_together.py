"""Several jobs on the same batches."""

import json
import time
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from comad.runtime.checkpoint import Generators
from comad.runtime.optim import OptimConfig
from comad.runtime.train import Job, RunConfig, Step, TrainingError, open_runs, start_fabric, train_together

OPTIM = OptimConfig(epochs=3.0, batch_size=2, accumulate=2, base_lr=0.5, warmup_epochs=1.0, clip=0.1, ema=0.5)


class Rows(NamedTuple):
    x: Tensor
    image: Tensor
    readable: Tensor


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def fit(out, jobs, **run):
    run = RunConfig(**{"precision": "fp32", "log_every": 1, "tensorboard": False} | run, out=str(out))
    fabric = start_fabric(run)
    return train_together(jobs, OPTIM, open_runs(run, "ab"[: len(jobs)], fabric), fabric)


def jobs_of(count, prepared=None, probe=lambda module: {}):
    """Jobs on 24 rows, in order, that draw noise in their steps and learn to different truths."""
    rows = [
        Rows(x, torch.tensor(i), torch.tensor(True))
        for i, x in enumerate(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)))
    ]

    def batches(first, last):
        return DataLoader(rows, batch_sampler=[[n % 12 * 2, n % 12 * 2 + 1] for n in range(first, last)])

    def prepare(batch, progress):
        if prepared is not None:
            prepared.append(progress)
        return batch

    def make(number):
        torch.manual_seed(number)

        def step(module, batch, progress):
            return Step(F.mse_loss(module(batch.x + torch.rand_like(batch.x)), batch.x[:, :2] + number), dict)

        return Job(
            module=nn.Linear(3, 2),
            step=step,
            batches=batches,
            prepare=prepare,
            steps_per_epoch=6,
            identity={},
            probe=probe,
            watch=lambda step, metrics: None,
            name_image=str,
            random=Generators(),
        )

    return [make(number) for number in range(count)]


def test_jobs_that_are_trained_together_are_what_they_are_alone(tmp_path):
    prepared = []
    both = fit(tmp_path / "both", jobs_of(2, prepared))
    assert len(prepared) == 2 * 18  # once per batch
    for number, module in enumerate(both):
        (alone,) = fit(tmp_path / str(number), [jobs_of(2)[number]])
        assert torch.equal(module.weight, alone.weight)
        ours, theirs = log_of(tmp_path / "both" / "ab"[number]), log_of(tmp_path / str(number) / "a")
        assert [line.get("loss") for line in ours] == [line.get("loss") for line in theirs]


def test_scores_of_one_job_are_not_in_the_steps_of_another(tmp_path, monkeypatch):
    ahead, real = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    def probe(module):
        ahead[0] += 1000
        return {}

    fit(tmp_path, jobs_of(2, probe=probe), probe_every=9)
    assert ahead == [4000.0]
    for name in "ab":
        lines = [line for line in log_of(tmp_path / name) if "images_per_s" in line]
        assert len(lines) == 18 and all(4 / line["images_per_s"] < 500 for line in lines)


def test_the_job_that_fails_is_named(tmp_path):
    def watch(step, metrics):
        return "all tokens are alike" if step == 3 else None

    good, bad = jobs_of(2)
    with pytest.raises(TrainingError, match="b: stopped at step 3: all tokens are alike"):
        fit(tmp_path, [good, replace(bad, watch=watch)], stop_on_collapse=True)
    assert [len(log_of(tmp_path / name)) for name in "ab"] == [3, 4]
