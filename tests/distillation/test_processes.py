"""Results do not depend on the number of processes: weights, statistics, queues and logged numbers of every method."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comad.presets import METHODS

TRAINED = """
import json, os, sys
import torch
from torch import distributed as dist
from conftest import SmallDistillation
from comad.presets import METHODS
from comad.runtime.processes import mean_of_all, own_rows, together

def pick(part):
    if isinstance(part, torch.Tensor):
        return own_rows(part)
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*map(pick, part))
    return type(part)(map(pick, part)) if isinstance(part, (tuple, list)) else part

def train(name):
    torch.manual_seed(0)
    small = SmallDistillation(METHODS[name], num_images=32)
    module = small.distiller
    several = dist.is_initialized()
    wrapped = torch.nn.parallel.DistributedDataParallel(module) if several else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    found = {}
    for step in range(3):
        noise = torch.rand(8, 1 + len(small.teachers), 16, generator=small.generator)
        images = small.images[8 * step : 8 * step + 8]
        with together():
            images, noise = pick(images), pick(noise)
            images, masks = module.method.masking.blend(images, noise), module.method.masking(noise, step / 3)
            loss, metrics = wrapped(images, small.outputs(images, masks), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            numbers = {key: mean_of_all(torch.as_tensor(value).double()) for key, value in metrics().items()}
            found[f"step {step}"] = {"loss": mean_of_all(loss.detach()), **numbers}
    state = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return {**found, "weights": state}

folder, names, counts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
running = []
for count in counts:  # one import of torch for all
    for rank in range(count):
        running.append(os.fork())
        if running[-1]:
            continue
        if count > 1:
            dist.init_process_group("gloo", f"file://{folder}/meeting-{count}", rank=rank, world_size=count)
        found = {name: train(name) for name in names}
        if not rank:
            torch.save(found, f"{folder}/{count}.pt")
        os._exit(0)
    while running:
        assert not os.waitpid(running.pop(), 0)[1], f"one of {count} processes failed"
"""


SHARED = """
import os, sys
import torch
from torch import distributed as dist
from conftest import small_vit
from comad.data.load import load_images
from comad.evaluation.knn import KNN
from comad.evaluation.linear import LinearProbe
from comad.evaluation.scoreboard import Candidate, score_all
from comad.models.offload import shard
from comad.runtime.processes import together

folder, data = sys.argv[1:]
images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
visible = torch.tensor([[1, 5, 6], [0, 2, 15]])

def work(rank):
    splits = load_images(data)
    networks = [small_vit(seed, 16).eval().requires_grad_(False) for seed in range(2)]
    candidates = [Candidate("pixels", "pixels", None)]
    candidates += [Candidate(str(number), "teacher", network) for number, network in enumerate(networks)]
    with together():
        scores = score_all(candidates, splits, evaluations=(KNN(), LinearProbe(epochs=2)))
    whole = [networks[0](images), networks[0](images, visible, intermediates=[1])]
    found = {s.row.name: (s.row.scores, s.correct) for s in scores}
    if rank is not None:
        shard(networks[0], torch.device("cpu"))
        own = sum(p.to_local().numel() for p in networks[0].parameters())
        for _ in range(2):
            parts = [networks[0](images), networks[0](images, visible, intermediates=[1])]
            for ours, theirs in zip(whole, parts):
                assert torch.equal(ours.patches, theirs.patches) and torch.equal(ours.cls, theirs.cls)
            assert sum(p.to_local().numel() for p in networks[0].parameters()) == own
        assert own < 0.6 * sum(p.numel() for p in networks[0].parameters())
    return found

running = []
for rank in range(2):
    running.append(os.fork())
    if not running[-1]:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
        torch.save(work(rank), f"{folder}/{rank}.pt")
        os._exit(0)
for process in running:
    assert not os.waitpid(process, 0)[1], "a process failed"
torch.save(work(None), f"{folder}/alone.pt")
"""


def run(script, *arguments):
    """Run a script that finds the fixtures of the tests."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def learnt(folder, names, counts):
    """What each number of processes learns, by method."""
    run(TRAINED, str(folder), json.dumps(list(names)), json.dumps(counts))
    return [torch.load(folder / f"{count}.pt") for count in counts]


def check(folder, names, counts):
    one, *others = learnt(folder, names, counts)
    for count, other in zip(counts[1:], others, strict=True):
        for name in names:
            for part, numbers in one[name].items():
                assert other[name][part].keys() == numbers.keys()
                for key, number in numbers.items():
                    text = f"{name}, {part}, {key}: {count} processes"
                    torch.testing.assert_close(
                        other[name][part][key], number, atol=1e-5, rtol=1e-4, msg=lambda m, t=text: f"{t}: {m}"
                    )


def test_statistics_moments_queues_and_distances_are_of_the_whole_batch(tmp_path):
    check(tmp_path, ["comad", "unic", "dune", "gram"], [1, 2])


def test_two_processes_score_together_and_share_the_weights_of_a_teacher(tmp_path, labelled_folder):
    run(SHARED, str(tmp_path), str(labelled_folder))
    ours, theirs, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("0", "1", "alone"))
    for name, (scores, correct) in alone.items():
        for found in (ours, theirs):
            assert found[name][0] == pytest.approx(scores)
            assert all(torch.equal(found[name][1][key], hits) for key, hits in correct.items())


@pytest.mark.slow
def test_every_method_learns_the_same_in_one_two_and_four_processes(tmp_path):
    check(tmp_path, list(METHODS), [1, 2, 4])
