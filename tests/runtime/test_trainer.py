"""The loop's other half, on linear maps of 24 rows: log, accumulation, clipping, averages, checkpoints, signals."""

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from comad.data.loader import LoaderConfig, training_batches
from comad.runtime import checkpoint as checkpoint_module
from comad.runtime import log as log_module
from comad.runtime import trainer as trainer_module
from comad.runtime.checkpoint import RngState, checkpoints, load_checkpoint
from comad.runtime.lock import holding_runs
from comad.runtime.optim import OptimConfig
from comad.runtime.run import Interrupted, RunConfig, TrainingError, open_runs, start_fabric
from comad.runtime.trainer import STOPPING, Job, Trainer, reader_fault

OPTIM = OptimConfig(epochs=3.0, batch_size=4, base_lr=0.5, warmup_epochs=1.0, weight_decay=0.01, clip=0.0)
GENERATOR = torch.Generator().manual_seed(0)
ROWS, TRUTH = torch.randn(24, 3, generator=GENERATOR), torch.randn(3, 2, generator=GENERATOR)


class Rows(NamedTuple):
    x: Tensor
    image: Tensor
    readable: Tensor


class Unreadable(Dataset):
    def __getitem__(self, index):
        raise ValueError("3 files in a row are unreadable; check the disk.")


@dataclass
class InOrder:
    """All rows in order, again and again; ``dataset`` is read by a worker in their place."""

    batch_size: int
    unreadable: tuple[int, ...] = ()
    dataset: Any = None
    num_images: int = 24
    deadline: float = 0.0

    def load(self, first, last, rank, world_size):
        size = self.batch_size
        order = [[(number * size + i) % 24 for i in range(size)] for number in range(first, last)]
        if self.dataset is not None:
            return training_batches(self.dataset, order, LoaderConfig(workers=1, deadline=self.deadline))
        rows = [Rows(x, torch.tensor(i), torch.tensor(i not in self.unreadable)) for i, x in enumerate(ROWS)]
        return DataLoader(rows, batch_sampler=order)

    def image_name(self, index):
        return f"image-{index:02}.png"


def make_module():
    torch.manual_seed(1)
    return nn.Linear(3, 2)


def fit(out, module=None, optim=OPTIM, *, on_step=None, unreadable=(), dataset=None, job=None, deadline=0.0, **run):
    """Learn a linear map of the rows; ``on_step`` may change a loss, ``job`` holds further fields of the job."""
    run = RunConfig(**{"precision": "fp32", "log_every": 1, "tensorboard": False} | run, out=str(out))
    fabric = start_fabric(run)
    (run,) = open_runs(run, [""], fabric)
    fields = {"identity": IDENTITY, "probe": lambda module: {"knn": 50.0}, **(job or {})}
    job = Job(module=module or make_module(), run=run, **fields)
    calls = 0
    with Trainer([job], InOrder(optim.pass_size, unreadable, dataset, deadline=deadline), optim, fabric) as trainer:
        for step in trainer:
            for batch in step:
                calls += 1
                with step.microbatch(trainer.states[0]) as state:
                    loss = F.mse_loss(state.module(batch.x), batch.x @ TRUTH)
                    loss = on_step(calls, loss) if on_step else loss
                    state.backward(loss, lambda loss=loss: {"twice": 2 * loss.detach()})
    return trainer.states[0].scored


IDENTITY = {"config": {"a": 1}, "teachers": {"mae": {"sha256": "x"}}}


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps_of(out):
    return [int(path.stem.split("-")[1]) for path in checkpoints(out / "checkpoints")]


def use_sgd(monkeypatch):
    monkeypatch.setattr(
        trainer_module, "build_optimizer", lambda module, optim: torch.optim.SGD(module.parameters(), lr=1.0)
    )


def test_the_loss_falls_and_the_log_has_every_number(tmp_path):
    fit(tmp_path, optim=replace(OPTIM, epochs=20.0, base_lr=4.0))
    steps = [line for line in log_of(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 121))
    assert steps[-1]["loss"] < 0.1 * steps[0]["loss"]
    for name in ("lr", "grad_norm", "twice", "images_per_s", "data_wait", "memory_gib", "epoch"):
        assert math.isfinite(steps[-1][name])
    assert steps[-1]["epoch"] == 20 and log_of(tmp_path)[-1] == {"step": 120, "knn": 50.0}
    assert steps[0]["lr"] == pytest.approx(4.0 * 4 / 256 / 6)
    assert all(0 <= line["data_wait"] <= 100 for line in steps)


def test_accumulation_equals_a_big_batch(tmp_path):
    whole = fit(tmp_path / "a", optim=replace(OPTIM, batch_size=8, clip=1.0))
    parts = fit(tmp_path / "b", optim=replace(OPTIM, batch_size=2, accumulate=4, clip=1.0))
    micro = fit(tmp_path / "c", optim=replace(OPTIM, batch_size=8, microbatch=2, clip=1.0))
    for a, b, c in zip(whole.parameters(), parts.parameters(), micro.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5) and torch.equal(b, c)
    norms = [[line["grad_norm"] for line in log_of(tmp_path / n) if "loss" in line] for n in "ab"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and len(norms[0]) == 9


def test_gradients_are_clipped(tmp_path, monkeypatch):
    use_sgd(monkeypatch)
    module = make_module()

    def flat():
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    weights = [flat()]
    watch = {"watch": lambda step, metrics: weights.append(flat())}
    fit(tmp_path, module, replace(OPTIM, clip=0.05, weight_decay=0.0), job=watch)
    for line, before, after in zip((x for x in log_of(tmp_path) if "loss" in x), weights, weights[1:], strict=False):
        assert line["grad_norm"] > 0.05  # the log has the norm before clipping
        assert float((after - before).norm()) == pytest.approx(0.05 * line["lr"], rel=1e-2)


def test_without_clipping_the_gradient_is_left_alone(tmp_path, monkeypatch):
    use_sgd(monkeypatch)
    module = make_module()
    weight = module.weight.detach().clone()
    gradients = []
    module.weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    fit(tmp_path, module, replace(OPTIM, epochs=1 / 6, warmup_epochs=0.0))
    assert torch.allclose(module.weight, weight - gradients[0] * OPTIM.peak_lr)


def test_the_moving_average_is_what_is_scored(tmp_path):
    weights, probed, module = [], [], make_module()
    job = {
        "watch": lambda step, metrics: weights.append(module.weight.detach().clone()),
        "probe": lambda module: probed.append(module) or {},
    }
    scored = fit(tmp_path, module, replace(OPTIM, ema=0.8), job=job)
    average = weights[0]
    for weight in weights[1:]:
        average = 0.8 * average + 0.2 * weight
    assert torch.allclose(scored.weight, average, atol=1e-6)
    assert probed == [scored] and not torch.equal(scored.weight, module.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, value):
    with pytest.raises(TrainingError, match="not finite at step 8: ") as error:
        fit(tmp_path, on_step=lambda call, loss: loss * value if call >= 8 else loss, checkpoint_every=3)
    for part in ("'loss'", "'twice'", "'grad_norm'", "checkpoints", "--optim.base-lr"):
        assert part in str(error.value)
    assert steps_of(tmp_path) == [3, 6]
    state = load_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    assert all(bool(tensor.isfinite().all()) for tensor in state["module"].values())


def test_a_non_finite_loss_between_two_log_lines_never_reaches_a_checkpoint(tmp_path):
    def on_step(call, loss):
        return loss * math.nan if call == 4 else loss

    with pytest.raises(TrainingError):
        fit(tmp_path, on_step=on_step, log_every=1000, checkpoint_every=3)
    assert steps_of(tmp_path) == [3]


def test_a_non_finite_part_of_an_accumulated_batch_is_found(tmp_path):
    def on_step(call, loss):
        return loss * math.nan if call == 6 else loss

    with pytest.raises(TrainingError, match="step 2"):
        fit(tmp_path, optim=replace(OPTIM, batch_size=2, accumulate=4), on_step=on_step)


def test_a_warning_is_recorded_told_once_and_may_end_the_run(tmp_path, capfd):
    def watch(step, metrics):
        return "all tokens are alike" if step > 5 else None

    fit(tmp_path / "a", job={"watch": watch})
    assert sum("warning" in line for line in log_of(tmp_path / "a")) == 13
    assert capfd.readouterr().err.count("WARNING at step 6: all tokens are alike") == 1
    with pytest.raises(TrainingError, match="stopped at step 6: all tokens are alike"):
        fit(tmp_path / "b", job={"watch": watch}, stop_on_collapse=True)


def test_progress_is_one_line_with_everything(tmp_path, capfd):
    fit(tmp_path, job={"probe": lambda module: {"knn": 12.345}}, probe_every=9)
    line = capfd.readouterr().err.splitlines()[-1]
    for part in ("step 18/18", "ETA 0:00", "img/s", "GiB", "loss", "data_wait", "%", "knn 12.3"):
        assert part in line


def test_checkpoints_come_as_often_as_asked_and_at_the_end(tmp_path):
    fit(tmp_path, checkpoint_every=5, keep=10)
    assert steps_of(tmp_path) == [5, 10, 15, 18]


def test_tensorboard_gets_the_numbers(tmp_path):
    fit(tmp_path, tensorboard=True)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_run_folder_is_never_overwritten(tmp_path):
    fit(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"holds a run already; pass --run\.resume to go on or --run\.out"):
        fit(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"--run\.out"):
        fit(tmp_path / "other")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_run_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--run\.out"):
        fit(tmp_path / "file")


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint to resume in .*--run\.resume"):
        fit(tmp_path / "none", resume=True)


def stop_at(call):
    def on_step(number, loss):
        if number == call:
            raise RuntimeError("pulled the plug")
        return loss

    return on_step


@pytest.mark.parametrize("optim", [OPTIM, replace(OPTIM, ema=0.9), replace(OPTIM, batch_size=2, accumulate=2)])
def test_a_resumed_run_ends_bitwise_like_the_uninterrupted_one(tmp_path, optim):
    whole = fit(tmp_path / "a", optim=optim)
    with pytest.raises(RuntimeError):
        fit(tmp_path / "b", optim=optim, on_step=stop_at(11 * optim.accumulate), checkpoint_every=4)
    assert steps_of(tmp_path / "b") == [4, 8]
    resumed = fit(tmp_path / "b", optim=optim, checkpoint_every=4, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_resumes_to_itself(tmp_path):
    first = fit(tmp_path)
    again = fit(tmp_path, resume=True)
    assert torch.equal(first.weight, again.weight)


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        ({"config": {"a": 2}, "teachers": {"mae": {"sha256": "x"}}}, "config.a: 1 → 2"),
        ({"config": {"a": 1}, "teachers": {"mae": {"sha256": "y"}}}, "teachers.mae.sha256: x → y"),
        ({"config": {"a": 1}, "teachers": {}}, "teachers.mae"),
    ],
)
def test_resume_refuses_another_setup_and_names_the_difference(tmp_path, identity, words):
    fit(tmp_path)
    with pytest.raises(ValueError, match="started with another setup") as error:
        fit(tmp_path, job={"identity": identity}, resume=True)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_resume_from_a_damaged_checkpoint_takes_the_one_before(tmp_path, capfd):
    whole = fit(tmp_path, checkpoint_every=10)
    last = checkpoints(tmp_path / "checkpoints")[-1]
    last.write_bytes(last.read_bytes()[:100])
    assert torch.equal(fit(tmp_path, resume=True).weight, whole.weight)
    told = capfd.readouterr().err
    assert "step-00000018.pt is not a readable checkpoint" in told and "goes on from step-00000010.pt" in told
    assert steps_of(tmp_path) == [10, 18] and (tmp_path / "checkpoints" / "step-00000018.damaged").exists()


def test_resume_when_no_checkpoint_is_whole(tmp_path, capfd):
    whole = fit(tmp_path, checkpoint_every=10)
    for path in checkpoints(tmp_path / "checkpoints"):
        path.write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"no checkpoint of .* can be read") as error:
        fit(tmp_path, resume=True)
    assert "step-00000010.pt" in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(fit(tmp_path, resume="auto").weight, whole.weight)
    assert "begins again" in capfd.readouterr().err


CRAFTED = {
    "a step below 0": {"step": -5},
    "a step that is not its own": {"step": 17},
    "a step that is a word": {"step": "18"},
    "weights of other shapes": {"module": {"weight": torch.zeros(5, 3), "bias": torch.zeros(2)}},
    "no weights": {"module": {}},
    "moments of other shapes": {"optimizer": 7},
    "a part that is missing": {"random": None},
}


@pytest.mark.parametrize("changed", CRAFTED)
def test_a_checkpoint_that_is_whole_and_wrong_is_not_taken(tmp_path, capfd, changed):
    whole = fit(tmp_path, checkpoint_every=10)
    last = checkpoints(tmp_path / "checkpoints")[-1]
    state = load_checkpoint(last)
    if changed == "moments of other shapes":
        for moments in state["optimizer"]["state"].values():
            moments["exp_avg"] = torch.zeros(7)
    else:
        state |= CRAFTED[changed]
    torch.save({key: value for key, value in state.items() if value is not None}, last)
    assert torch.equal(fit(tmp_path, resume=True).weight, whole.weight)
    assert "step-00000018.pt" in capfd.readouterr().err


@pytest.mark.parametrize("before", ["nothing", "a kill before the first checkpoint", "a stop", "an end"])
def test_one_command_for_every_state(tmp_path, before):
    whole, out = fit(tmp_path / "whole"), tmp_path / "run"
    if before != "nothing":
        stop = {"a kill before the first checkpoint": 3, "a stop": 11}.get(before)
        with pytest.raises(RuntimeError) if stop else nullcontext():
            fit(out, on_step=stop_at(stop) if stop else None, checkpoint_every=4, resume="auto")
    assert torch.equal(fit(out, checkpoint_every=4, resume="auto").weight, whole.weight)
    assert [x["loss"] for x in log_of(out) if "loss" in x] == [
        x["loss"] for x in log_of(tmp_path / "whole") if "loss" in x
    ]


def test_auto_does_not_write_into_the_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else than a run; pass --run\.out"):
        fit(tmp_path, resume="auto")


@pytest.mark.parametrize("damage", [b"", None, b'{"step": 4, "lo', b"\x00" * 50, b'{"step": "four"}\n[1]\n7\n'])
def test_a_damaged_log_is_repaired_and_told(tmp_path, capfd, damage):
    whole = fit(tmp_path, checkpoint_every=10)
    checkpoints(tmp_path / "checkpoints")[-1].unlink()
    path = tmp_path / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink() if damage is None else path.write_bytes(b"".join(lines[:5]) + damage * 2 if damage else b"")
    capfd.readouterr()
    assert torch.equal(fit(tmp_path, resume=True).weight, whole.weight)
    assert "log.jsonl" in capfd.readouterr().err
    steps = [line["step"] for line in log_of(tmp_path) if "loss" in line]
    assert steps == [*([1, 2, 3, 4, 5] if damage else []), *range(11, 19)]


def test_a_folder_is_of_one_process(tmp_path):
    code = (
        f"from comad.runtime.lock import lock_folder\nfrom pathlib import Path\n"
        f"lock_folder(Path({str(tmp_path)!r})); print('mine', flush=True); input()"
    )
    held = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert held.stdout and held.stdout.readline() == "mine\n"
    with pytest.raises(ValueError, match=rf"in use by process {held.pid} on .* since 20.*--run\.out"):
        fit(tmp_path)
    held.kill()
    held.wait()
    fit(tmp_path)  # what the dead one left is no obstacle


def test_a_lock_ends_with_what_took_it(tmp_path):
    with holding_runs():
        fit(tmp_path)
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_writes_a_checkpoint(tmp_path, capfd, number):
    def on_step(call, loss):
        if call == 7:
            os.kill(os.getpid(), number)
        return loss

    before = [signal.getsignal(n) for n in STOPPING]
    with pytest.raises(Interrupted):
        fit(tmp_path / "b", on_step=on_step)
    assert [signal.getsignal(n) for n in STOPPING] == before
    assert steps_of(tmp_path / "b") == [7]
    assert "stopped at step 7, checkpoint written" in capfd.readouterr().err
    assert torch.equal(fit(tmp_path / "b", resume=True).weight, fit(tmp_path / "a").weight)


def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    def on_step(call, loss):
        if call == 7:
            os.kill(os.getpid(), signal.SIGHUP)
        return loss

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(tmp_path, on_step=on_step)
    finally:
        assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
    assert steps_of(tmp_path) == [18]


def test_a_second_signal_acts_at_once(tmp_path):
    def on_step(call, loss):
        if call == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, on_step=on_step)


def test_unreadable_images_are_listed(tmp_path, capfd):
    fit(tmp_path, unreadable=(5, 17, 3))
    assert (tmp_path / "unreadable.txt").read_text().split() == ["image-03.png", "image-05.png", "image-17.png"]
    assert "3 unreadable images skipped so far, listed in" in capfd.readouterr().err


def test_the_list_of_unreadable_images_is_added_to(tmp_path):
    fit(tmp_path, unreadable=(5,))
    with (tmp_path / "unreadable.txt").open("a") as file:
        file.write("image-of-another-process.png\n")
    fit(tmp_path, optim=replace(OPTIM, epochs=4.0), unreadable=(5, 17), resume=True)
    assert (tmp_path / "unreadable.txt").read_text().split() == [
        "image-05.png",
        "image-of-another-process.png",
        "image-17.png",
    ]


def test_unreadable_images_that_another_process_found_are_counted_by_the_first(tmp_path, capfd):
    def found(number, loss):
        if number == 7:
            (tmp_path / "unreadable.txt").write_text("image-of-another-process.png\n")
        return loss

    fit(tmp_path, on_step=found)
    assert capfd.readouterr().err.count("1 unreadable images skipped so far") == 1


def test_workers_end_with_the_run_however_it_ends(tmp_path):
    rows = [Rows(x, torch.tensor(i), torch.tensor(True)) for i, x in enumerate(ROWS)]
    with pytest.raises(ZeroDivisionError) as caught:
        fit(tmp_path, dataset=rows, on_step=lambda number, loss: 1 / 0)
    assert caught.value.__traceback__ is not None  # it holds the frames, and with them the loader
    assert not multiprocessing.active_children()


def wait_for_steps(out, count):
    """Until so many steps are in the log of a run that goes on beside this."""
    while not (out / "log.jsonl").exists() or sum('"loss"' in line for line in (out / "log.jsonl").open()) < count:
        time.sleep(0.01)


@dataclass
class Failing(Dataset):
    """Its third batch never comes: once the two before it are learnt, its worker is killed, or does not answer."""

    out: Any
    killed: bool

    def __getitem__(self, index):
        if index >= 8:
            wait_for_steps(self.out, 2)
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return Rows(ROWS[index], torch.tensor(index), torch.tensor(True))


@pytest.mark.parametrize(("killed", "words"), [(True, "was killed"), (False, "is stuck")])
def test_workers_that_are_killed_or_stuck_end_the_run_with_a_checkpoint(tmp_path, killed, words, within):
    out = tmp_path / "run"
    with within(120), pytest.raises(TrainingError, match=rf"{words}.*--loader\.workers 0") as error:
        fit(out, dataset=Failing(out, killed), deadline=100.0 if killed else 5.0)
    assert "\n" not in str(error.value)
    assert steps_of(out) == [2] and not multiprocessing.active_children()
    assert torch.equal(fit(out, resume=True).weight, fit(tmp_path / "whole").weight)


def test_a_second_signal_ends_a_run_whose_worker_is_stuck(tmp_path, monkeypatch, within):
    heeded, real = threading.Event(), os.write

    def write(file, text):  # the handler's word
        heeded.set()
        return real(file, text)

    def interrupt():
        wait_for_steps(tmp_path, 2)
        os.kill(os.getpid(), signal.SIGTERM)
        if heeded.wait(60):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer_module.os, "write", write)
    threading.Thread(target=interrupt, daemon=True).start()
    with within(120), pytest.raises(KeyboardInterrupt) as caught:
        fit(tmp_path, dataset=Failing(tmp_path, False), deadline=1000.0)
    assert caught.type is KeyboardInterrupt and not multiprocessing.active_children()


@pytest.mark.parametrize(
    "text",
    [
        "unable to write to file </torch_2_3_4>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory.",
        "DataLoader worker: SIGBUS",
    ],
)
def test_too_little_shared_memory_is_told(text):
    assert "--shm-size" in (reader_fault(RuntimeError(text)) or "")
    assert reader_fault(RuntimeError("shapes do not match")) is None


@pytest.fixture
def free(monkeypatch):
    """Bytes that every file system has free."""

    def leave(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=count))

    return leave


def test_too_little_shared_memory_is_told_before_the_first_step(tmp_path, free):
    rows = [Rows(x, torch.tensor(i), torch.tensor(True)) for i, x in enumerate(ROWS)]
    free(300)  # bytes; a row has 21, and 16 are read ahead
    with pytest.raises(ValueError, match=r"need 0 MB of shared memory.*--shm-size 8g\), or pass --loader\.workers 0"):
        fit(tmp_path, dataset=rows, keep=1)


def test_a_disk_without_room_for_checkpoints_and_export_is_told_before_the_first_step(tmp_path, free):
    free(223)  # two checkpoints of 8 numbers and their moments, and an export
    with pytest.raises(
        ValueError, match=r"'.*run' has 0\.0 MB free, and checkpoints and export need 0\.0 MB; make room"
    ):
        fit(tmp_path / "run", keep=1)
    free(224)
    fit(tmp_path / "run", keep=1)


def test_a_log_that_was_changed_is_told(tmp_path, capfd):
    fit(tmp_path)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text().replace('"step": 2', '"step": 1'))
    fit(tmp_path, resume=True)
    assert f"{path} was changed or damaged since the last checkpoint" in capfd.readouterr().err
    fit(tmp_path, optim=replace(OPTIM, epochs=4.0), resume=True)
    fit(tmp_path, optim=replace(OPTIM, epochs=4.0), resume=True)
    assert "was changed" not in capfd.readouterr().err.rpartition("step 24/24")[2]


def test_a_full_disk_names_the_file_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    fail = OSError(errno.ENOSPC, "No space left on device")

    class Full:
        def write(self, data):
            raise fail

    real = checkpoint_module.torch.save

    def save(state, file):
        real(state, Full() if state["step"] > 8 else file)

    monkeypatch.setattr(checkpoint_module.torch, "save", save)
    with pytest.raises(OSError, match="No space left") as error:
        fit(tmp_path, checkpoint_every=4)
    assert error.value.filename.endswith("step-00000012.pt")
    assert steps_of(tmp_path) == [4, 8] and not list((tmp_path / "checkpoints").glob(".*"))


def test_a_log_that_cannot_be_written_leaves_a_checkpoint(tmp_path, monkeypatch):
    def write(self, step, metrics, real=log_module.RunLog.write):
        if step == 7:
            raise OSError(errno.ENOSPC, "No space left on device", "log.jsonl")
        real(self, step, metrics)

    monkeypatch.setattr(log_module.RunLog, "write", write)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path)
    assert steps_of(tmp_path) == [7]


def test_a_folder_that_vanishes_and_a_terminal_that_closes_do_not_end_a_run(tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def isatty(self):
            return False

    def on_step(call, loss):
        if call == 7:
            shutil.rmtree(tmp_path / "run")
        return loss

    monkeypatch.setattr(trainer_module.sys, "stderr", Closed())
    fit(tmp_path / "run", on_step=on_step)
    assert [line["step"] for line in log_of(tmp_path / "run") if "loss" in line] == list(range(7, 19))
    assert steps_of(tmp_path / "run") == [18]


def test_the_last_checkpoint_is_written_before_the_last_scores(tmp_path):
    def probe(module):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, job={"probe": probe})
    assert steps_of(tmp_path) == [18]


def test_figures_that_need_finite_numbers_do_not_hide_that_they_are_not(tmp_path):
    def metrics():
        raise RuntimeError("the algorithm failed to converge")

    real = trainer_module.TrainState.backward
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError, match="not finite at step 3"):
        patch.setattr(
            trainer_module.TrainState,
            "backward",
            lambda self, loss, own: real(self, loss, own if loss.isfinite() else metrics),
        )
        fit(tmp_path, on_step=lambda call, loss: loss * math.nan if call == 3 else loss)


def test_the_message_of_a_worker_is_one_line(tmp_path):
    with pytest.raises(ValueError) as caught:
        fit(tmp_path, dataset=Unreadable())
    assert str(caught.value) == "3 files in a row are unreadable; check the disk."


def test_a_run_that_only_warms_up_is_told(tmp_path, capfd):
    fit(tmp_path / "a", optim=replace(OPTIM, warmup_epochs=3.0))
    assert "only warms up, for 3 epochs in a run of 3" in capfd.readouterr().err
    fit(tmp_path / "b")
    assert "warms up" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["log_every", "checkpoint_every", "keep", "devices"])
def test_values_that_are_too_small_are_refused(name):
    with pytest.raises(ValueError, match=f"--run.{name.replace('_', '-')} 0 is too small"):
        RunConfig(**{name: 0})


def test_bf16_keeps_weights_in_float32(tmp_path):
    dtypes, module = [], make_module()
    module.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    fit(tmp_path, module, precision="bf16")
    assert module.weight.dtype == torch.float32 and set(dtypes) == {torch.bfloat16}


def test_fp16_scales_the_loss_and_leaves_out_steps_that_overflow(tmp_path):
    def overflow(call, loss):
        return loss * 1e35 if call == 3 else loss

    whole = fit(tmp_path / "whole", on_step=overflow, precision="fp16")
    norms = [line["grad_norm"] for line in log_of(tmp_path / "whole") if "grad_norm" in line]
    assert [math.isfinite(norm) for norm in norms] == [False] * 3 + [True] * 15  # the first scale is too large
    stored = load_checkpoint(checkpoints(tmp_path / "whole" / "checkpoints")[-1])
    assert stored["precision"]["scale"] == 2.0**13

    def stop(call, loss):
        if call == 11:
            raise RuntimeError("pulled the plug")
        return overflow(call, loss)

    with pytest.raises(RuntimeError):
        fit(tmp_path / "part", on_step=stop, precision="fp16", checkpoint_every=5)
    resumed = fit(tmp_path / "part", precision="fp16", resume=True)
    assert torch.equal(whole.weight, resumed.weight)


def test_tf32_is_on_for_its_run_alone(tmp_path):
    fit(tmp_path / "a", precision="tf32")
    assert torch.get_float32_matmul_precision() == "high"
    fit(tmp_path / "b")
    assert torch.get_float32_matmul_precision() == "highest"


TOGETHER = OptimConfig(epochs=3.0, batch_size=2, accumulate=2, base_lr=0.5, warmup_epochs=1.0, clip=0.1, ema=0.5)


def fit_together(out, numbers, *, on_batch=None, now=None, fields=None, **run):
    """Learn to a truth of each number, under noise that a job draws in its steps. Returns what is scored."""
    run = RunConfig(**{"precision": "fp32", "log_every": 1, "tensorboard": False} | run, out=str(out))
    fabric = start_fabric(run)
    jobs = []
    for number, own in zip(numbers, open_runs(run, ["ab"[n] for n in numbers], fabric), strict=True):
        torch.manual_seed(number)
        job = Job(module=nn.Linear(3, 2), run=own, identity={}, rng=RngState())
        jobs.append(replace(job, **(fields or {}).get(number, {})))
    clock = {"now": now} if now else {}
    with Trainer(jobs, InOrder(2), TOGETHER, fabric, **clock) as trainer:
        for step in trainer:
            for batch in step:
                if on_batch:
                    on_batch(step)
                for state in step.states:
                    number = numbers[trainer.states.index(state)]
                    with step.microbatch(state):
                        x = batch.x + torch.rand_like(batch.x)
                        state.backward(F.mse_loss(state.module(x), batch.x[:, :2] + number))
    return [state.scored for state in trainer.states]


def test_jobs_that_are_trained_together_are_what_they_are_alone(tmp_path):
    batches = []
    both = fit_together(tmp_path / "both", [0, 1], on_batch=batches.append)
    assert len(batches) == 2 * 18  # each is read once
    for number, module in enumerate(both):
        (alone,) = fit_together(tmp_path / str(number), [number])
        assert torch.equal(module.weight, alone.weight)
        ours, theirs = (log_of(tmp_path / name / "ab"[number]) for name in ("both", str(number)))
        assert [line.get("loss") for line in ours] == [line.get("loss") for line in theirs]


def test_the_job_that_is_ahead_after_a_kill_waits_for_the_others(tmp_path):
    whole = fit_together(tmp_path / "whole", [0, 1])
    run = {"checkpoint_every": 4, "keep": 5}

    def stop(step):
        if step.number == 10:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        fit_together(tmp_path / "part", [0, 1], on_batch=stop, **run)
    checkpoints(tmp_path / "part" / "b" / "checkpoints")[-1].unlink()  # killed before it was written
    learning = []
    resumed = fit_together(
        tmp_path / "part", [0, 1], on_batch=lambda step: learning.append(len(step.states)), resume=True, **run
    )
    assert learning == [1] * 2 * 4 + [2] * 2 * 10
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a.weight, b.weight)
    for name in "ab":
        losses = [[x["loss"] for x in log_of(tmp_path / out / name) if "loss" in x] for out in ("whole", "part")]
        assert losses[0] == losses[1]


def test_scores_of_one_job_are_not_in_the_steps_of_another(tmp_path):
    clock = [0.0]

    def now():
        clock[0] += 0.001
        return clock[0]

    def probe(module):
        clock[0] += 1000
        return {}

    fit_together(tmp_path, [0, 1], now=now, fields={n: {"probe": probe} for n in (0, 1)}, probe_every=9)
    assert clock[0] > 4000
    for name in "ab":
        lines = [line for line in log_of(tmp_path / name) if "images_per_s" in line]
        assert len(lines) == 18 and all(4 / line["images_per_s"] < 500 for line in lines)


def test_the_job_that_fails_is_named(tmp_path):
    def watch(step, metrics):
        return "all tokens are alike" if step == 3 else None

    with pytest.raises(TrainingError, match="b: stopped at step 3: all tokens are alike"):
        fit_together(tmp_path, [0, 1], fields={1: {"watch": watch}}, stop_on_collapse=True)
    assert [len(log_of(tmp_path / name)) for name in "ab"] == [3, 4]
