"""Two hosts with two processes each, by torchrun and as by srun: two network namespaces, or one machine twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

STUDENT = [f"--student.{key}={value}" for key, value in
           {"image-size": 16, "patch-size": 4, "width": 12, "depth": 2, "heads": 2}.items()]  # fmt: skip
SHORT = ["--optim.epochs=3", "--optim.batch-size=12", "--optim.warmup-epochs=1", "--optim.base-lr=0.01"]
QUIET = ["--run.precision=fp32", "--run.log-every=1", "--run.no-tensorboard", "--loader.workers=0"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(write_images, teacher_specs, tmp_path_factory):
    names = [f"train/{i}.png" for i in range(58)] + ["val/1.png", "test/1.png"]
    data = write_images(tmp_path_factory.mktemp("plain"), names)

    def build(out, *more):
        options = ["--preset=comad", "--data", str(data), "--teachers", *teacher_specs, *STUDENT, *SHORT, *QUIET]
        return ["-m", "comad", "distill", *options, f"--run.out={out}", *more]

    return build


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run([sys.executable, *command(out)], check=True, capture_output=True)
    return out


class Hosts:
    """Two places to start processes in, that reach each other at an address."""

    def __init__(self, namespaces):
        self.namespaces = namespaces
        self.address = "10.77.41.1" if namespaces else "127.0.0.1"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, host, command, **environment):
        own = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        if self.namespaces:
            command = ["ip", "netns", "exec", self.namespaces[host], *command]
            own["GLOO_SOCKET_IFNAME"] = f"comadv{host}"
        return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def hosts():
    names = [f"comad-test-{host}" for host in range(2)]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    made = shutil.which("ip") and os.geteuid() == 0 and all(ip("netns", "add", name) for name in names)
    made = made and ip("link", "add", "comadv0", "type", "veth", "peer", "name", "comadv1")
    for host, name in enumerate(names if made else ()):
        ip("link", "set", f"comadv{host}", "netns", name)
        for words in (
            ["addr", "add", f"10.77.41.{host + 1}/24", "dev", f"comadv{host}"],
            ["link", "set", f"comadv{host}", "up"],
        ):
            ip("-n", name, *words)
        ip("-n", name, "link", "set", "lo", "up")
    yield Hosts(names if made else [])
    for name in names:
        ip("netns", "del", name)


def as_srun(hosts, command, ntasks=4):
    """Start four tasks on two hosts with what srun tells them."""
    running = []
    for task in range(ntasks):
        host = task // 2
        told = {"SLURM_NTASKS": 4, "SLURM_STEP_NUM_TASKS": 4, "SLURM_NNODES": 2, "SLURM_JOB_ID": 4321}
        told |= {"SLURM_PROCID": task, "SLURM_LOCALID": task % 2, "SLURM_NODEID": host, "SLURM_JOB_NAME": "comad"}
        meeting = {"MASTER_ADDR": hosts.address, "MASTER_PORT": hosts.port}
        running.append(hosts.start(host, [sys.executable, *command], **told, **meeting))
    return running


def weights(out):
    return load_file(out / "student" / "model.safetensors")


def check(alone, out):
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(out)[name], tensor, atol=1e-5, rtol=0)
    ours, theirs = ([json.loads(x) for x in (o / "log.jsonl").read_text().splitlines()] for o in (out, alone))
    assert [x["step"] for x in ours] == [x["step"] for x in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in {*a} - {"images_per_s", "data_wait", "memory_gib"}:
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-3), name


def test_two_hosts_under_torchrun_train_the_student_of_one_process(hosts, command, alone, tmp_path):
    meeting = ["--nnodes=2", "--nproc-per-node=2", f"--master-addr={hosts.address}", f"--master-port={hosts.port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting]
    running = [hosts.start(host, [*torchrun, f"--node-rank={host}", *command(tmp_path / "run")]) for host in range(2)]
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said[0][0].count("the student is in") == 1 and not said[1][0]
    check(alone, tmp_path / "run")


def test_two_hosts_under_srun_train_the_student_of_one_process(hosts, command, alone, tmp_path):
    running = as_srun(hosts, command(tmp_path / "run"))
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    assert [bool(out) for out, _ in said] == [True, False, False, False]
    check(alone, tmp_path / "run")


def test_a_process_that_is_killed_ends_all_within_seconds_and_the_run_goes_on(hosts, command, alone, tmp_path):
    running = as_srun(hosts, command(tmp_path / "run", "--run.checkpoint-every=2"))
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        time.sleep(0.01)
        assert running[0].poll() is None, running[0].communicate()
    os.kill(running[3].pid, signal.SIGKILL)
    killed = time.monotonic()
    said = [process.communicate()[1] for process in running]
    assert time.monotonic() - killed < 60  # on a busy machine
    assert [process.returncode for process in running] == [3, 3, 3, -9], said
    for rank, words in enumerate(said[:3]):
        assert f"comad: process {rank} of 4 on" in words and "go on with --run.resume" in words, said
    running = as_srun(hosts, command(tmp_path / "run", "--run.resume"))
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    check(alone, tmp_path / "run")
