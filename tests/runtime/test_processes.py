import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from comad.runtime import processes
from comad.runtime.optim import OptimConfig
from comad.runtime.processes import layout, lost_process, own_rows, rows_of_all, sum_of_all, together
from comad.runtime.run import RunConfig, open_runs, start_fabric

LAUNCHED = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS",
            "SLURM_NNODES", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_NAME", "SLURM_NTASKS_PER_NODE")  # fmt: skip


@pytest.fixture
def started_by(monkeypatch):
    """Set what a launcher leaves in the environment."""

    def start(**values):
        for name in LAUNCHED:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    start()
    return start


def test_hosts_and_processes_are_those_of_the_launcher(started_by):
    assert layout(3)[:2] == (3, 1) and isinstance(layout(3).environment, LightningEnvironment)
    elastic = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": 4, "GROUP_WORLD_SIZE": 2, "WORLD_SIZE": 8}
    started_by(**elastic)
    for devices in (1, 4):
        assert layout(devices)[:2] == (4, 2) and isinstance(layout(devices).environment, TorchElasticEnvironment)
    started_by(SLURM_NTASKS=6, SLURM_NNODES=2, SLURM_STEP_NUM_TASKS=6)
    assert layout(1)[:2] == (3, 2) and isinstance(layout(1).environment, SLURMEnvironment)
    started_by(SLURM_NTASKS=6, SLURM_NNODES=2, SLURM_STEP_NUM_TASKS=6, **elastic)  # torchrun in a job
    assert layout(1)[:2] == (4, 2)
    started_by(SLURM_NTASKS=1, SLURM_NNODES=1)  # a job of one task, which starts its processes itself
    assert layout(4)[:2] == (4, 1) and isinstance(layout(4).environment, LightningEnvironment)
    started_by(SLURM_NTASKS=4, SLURM_JOB_NAME="interactive")
    assert layout(2)[:2] == (2, 1)


@pytest.mark.parametrize(
    ("environment", "devices", "words"),
    [
        ({"WORLD_SIZE": 4}, 1, "one of 4 processes.*torchrun or srun.*--run.devices 4"),
        ({"WORLD_SIZE": 4}, 4, "one of 4 processes"),
        ({"SLURM_NTASKS": 4, "SLURM_NNODES": 2}, 1, "4 tasks, and this process was started alone; start it by srun"),
        ({"SLURM_NTASKS": 3, "SLURM_NNODES": 2, "SLURM_STEP_NUM_TASKS": 3}, 1, "3 tasks on 2 hosts.*ntasks-per-node"),
        ({"SLURM_NTASKS": 4, "SLURM_NNODES": 2, "SLURM_STEP_NUM_TASKS": 4}, 4, "--run.devices 4, but srun started 2"),
    ],
)
def test_a_process_that_would_train_alone_by_mistake_is_refused(started_by, environment, devices, words):
    started_by(**environment)
    with pytest.raises(ValueError, match=words):
        start_fabric(RunConfig(devices=devices))


def test_a_batch_that_processes_cannot_share_is_refused_before_they_start(started_by):
    with pytest.raises(ValueError, match=r"--optim\.batch-size 4 cannot be shared by 3 processes"):
        start_fabric(RunConfig(devices=3), OptimConfig(batch_size=4))
    assert not torch.distributed.is_initialized()


def test_a_host_that_does_not_share_the_folder_of_the_run_is_refused(started_by, tmp_path, monkeypatch):
    fabric = start_fabric(RunConfig())
    monkeypatch.setattr(fabric, "broadcast", lambda seen: ["step-00000004.pt"])
    with pytest.raises(ValueError, match=r"other checkpoints here than on the first host; hosts must share it"):
        open_runs(RunConfig(out=str(tmp_path / "run"), resume="auto"), [""], fabric)
    assert not (tmp_path / "run").exists()


def test_one_process_has_all_rows():
    x = torch.rand(3, 2)
    with together():
        assert rows_of_all(x) is x and own_rows(x) is x and sum_of_all(x) is x


def test_the_process_that_is_gone_is_named(monkeypatch):
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert lost_process(gone) is None  # there is one process
    monkeypatch.setattr(processes, "who", lambda: "process 0 of 2")
    assert lost_process(ValueError("Socket")) is None
    assert lost_process(gone) == (
        "another process of this run ended; its own words, or those of torchrun or srun, say which and why; go on with "
        "--run.resume."
    )
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(processes, "_children", [child])
    os.kill(child.pid, signal.SIGKILL)
    assert lost_process(gone) == "process 1 of this run was ended by SIGKILL; go on with --run.resume."
