from pathlib import Path

import torch

from comad.data.loader import Batch, LoaderConfig, TrainingBatches
from comad.models.students import VitConfig
from comad.models.timm_backbone import math_attention_on_cpu
from comad.planning import profile
from comad.planning.measure import times
from comad.planning.profile import Training, count_flops, largest_that_fits, profile_steps, seconds_per_view
from comad.runtime.optim import OptimConfig
from comad.runtime.run import RunConfig, start_fabric
from comad.runtime.trainer import Job

SIZE, PATCH, WIDTH, DEPTH = 16, 4, 16, 2
OPTIM = OptimConfig(batch_size=4, warmup_epochs=0.0)
RUN = RunConfig(precision="fp32", tensorboard=False)


class Views(torch.utils.data.Dataset):
    def __getitem__(self, key):
        view, index = key
        image = torch.full((3, SIZE, SIZE), index, dtype=torch.uint8)
        return Batch((image,), torch.rand(1), torch.tensor(index), torch.tensor(view), torch.tensor(True))


def network():
    return VitConfig(image_size=SIZE, patch_size=PATCH, width=WIDTH, depth=DEPTH, heads=2).build()


def training(module, forward):
    """``forward`` gives the loss of a batch, and a function for the log."""

    def loop(trainer):
        for step in trainer:
            for batch in step:
                with step.microbatch(trainer.states[0]) as state:
                    state.backward(*forward(state.module, batch))

    data = TrainingBatches(Views(), 40, str, 99, 0, LoaderConfig(workers=0))
    return Training(Job(module=module, run=RUN, identity={}), data, OPTIM, start_fabric(RUN), loop)


def forward_flops():
    """Of one image: the patches' embedding, and blocks of queries, keys, values, two products, projection, MLP."""
    patches = (SIZE // PATCH) ** 2
    tokens = patches + 1
    embedding = 2 * patches * 3 * PATCH**2 * WIDTH
    block = 2 * tokens * WIDTH * 3 * WIDTH + 4 * tokens**2 * WIDTH + 2 * tokens * WIDTH**2 + 16 * tokens * WIDTH**2
    return embedding, DEPTH * block


def test_operations_of_a_vit_are_those_of_the_formula():
    student, teacher = network(), network().requires_grad_(False)
    math_attention_on_cpu(student, torch.device("cpu"))

    def forward(module, batch):
        images = batch.views[0].float() / 255
        with torch.no_grad():
            target = teacher(images).patches
        loss = (module(images).patches - target).square().mean()
        return loss, lambda: {"waste": (torch.ones(99, 99) @ torch.ones(99, 99)).sum()}

    flops, operations, _ = count_flops(training(student, forward), 4, [teacher])
    embedding, blocks = forward_flops()
    assert flops.teachers == embedding + blocks
    assert operations > 100  # without views and log lines
    assert flops.student == 2 * embedding + 3 * blocks  # nobody wants the gradient of the pixels


def test_steps_log_lines_and_checkpoints_are_timed_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock, real, probed = [100.0], torch.save, []
    monkeypatch.setattr(profile, "CLOCK", lambda: clock[0])
    monkeypatch.setattr(torch, "save", lambda *given: [wait(7.0), real(*given)])

    def wait(seconds):
        clock[0] += seconds

    def forward(module, batch):
        wait(0.25)

        def metrics():
            wait(1.5)
            return {}

        return module(torch.ones(1)).sum(), metrics

    def probe(scored):
        wait(30.0)
        probed.append(scored)

    took = profile_steps(training(torch.nn.Linear(1, 1), forward), 4, 8, probe=probe)
    assert len(probed) == 1 and took.batch == 4
    assert (took.starting, took.seconds, took.logging, took.saving) == (0.0, 0.25, 1.5, 7.0)
    assert took.checkpoint > 500 and 0 < took.log < 2000
    assert not list(tmp_path.iterdir()) and not Path(RUN.out).exists()


def test_steps_are_of_the_batch_that_is_asked_for():
    sizes = []

    def forward(module, batch):
        sizes.append(len(batch.image))
        return module(torch.ones(1)).sum(), dict

    some = training(torch.nn.Linear(1, 1), forward)
    assert profile_steps(some, 8, 7).batch == 8 and sizes == [8] * 7
    assert seconds_per_view(some.data) > 0


def test_doubling_ends_where_memory_does():
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 100:
            raise torch.OutOfMemoryError

    assert largest_that_fits(attempt, 16, 1000) == 64 and tried == [16, 32, 64, 128]
    assert largest_that_fits(attempt, 128, 1000) == 0
    assert largest_that_fits(attempt, 16, 40) == 32


def test_how_often_something_is_done():
    assert [times(944, 236), times(945, 236), times(100, 0), times(5, 200)] == [4, 5, 1, 1]
