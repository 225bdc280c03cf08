"""Runs as a scheduler starts them, each a process of its own, forked from one that has imported everything."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

COUNTS: Counter[str] = Counter()
KINDS = ("tried", "survived", "refused in one line", "lost", "tracebacks", "silent")

SERVER = """
import json, os, resource, sys
import comad.distillation.run, comad.pretraining.run, comad.recipes
from comad.cli import main

for line in sys.stdin:
    wanted = json.loads(line)
    if "wait" in wanted:
        print(os.waitstatus_to_exitcode(os.waitpid(wanted["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if not pid:
        told = os.open(wanted["told"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(told, 1), os.dup2(told, 2)
        if wanted["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["largest_file"],) * 2)
        exec(wanted["before"])
        status = main(wanted["arguments"])
        sys.stdout.flush()
        os._exit(status)
    print(pid, flush=True)
"""


@dataclass
class Running:
    """A process of the server."""

    server: subprocess.Popen
    pid: int
    told_in: Path

    @property
    def state(self):
        """Its letter in /proc: R and S at work, T stopped, Z ended and not waited for."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """Exit status, negative after a signal, and everything that was told."""
        status = int(ask(self.server, {"wait": self.pid}))
        return status, self.told_in.read_text(errors="replace")


def ask(server, wanted):
    server.stdin.write(json.dumps(wanted) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start a command: its arguments, the largest file that it may write, Python to run before it."""
    folder = tmp_path_factory.mktemp("told")
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(arguments, largest_file=0, before=""):
        told = folder / f"{len(list(folder.iterdir()))}.txt"
        wanted = {"arguments": arguments, "largest_file": largest_file, "before": before, "told": str(told)}
        return Running(server, int(ask(server, wanted)), told)

    assert begin(["--version"]).wait()[0] == 0  # all is imported now
    yield begin
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def command(write_images, teacher_specs, tmp_path_factory):
    """A distillation of 12 steps without scores, with a checkpoint every second step."""
    names = [f"train/{i}.png" for i in range(24)] + ["val/1.png", "test/1.png"]
    data = write_images(tmp_path_factory.mktemp("plain"), names)
    student = {"image-size": 16, "patch-size": 4, "width": 12, "depth": 2, "heads": 2}

    def build(out, *more):
        return [
            "distill", f"--data={data}", "--teachers", *teacher_specs, "--split=none", f"--run.out={out}",
            *(f"--student.{key}={value}" for key, value in student.items()),
            "--optim.epochs=6", "--optim.batch-size=11", "--optim.warmup-epochs=1", "--run.precision=fp32",
            "--run.log-every=1", "--run.no-tensorboard", "--run.checkpoint-every=2", "--loader.workers=0",
            "--loader.fixed-views=2", "--cache-teachers", "--run.resume=auto", *more,
        ]  # fmt: skip

    return build


@pytest.fixture(scope="session")
def whole(command, start, tmp_path_factory):
    """A run that nothing happened to, and its seconds."""
    out, before = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    status, told = start(command(out)).wait()
    assert status == 0, told
    return out, time.monotonic() - before


@pytest.fixture(scope="session")
def at_step():
    """Python that a process runs before its command: it does something when it has saved a step."""

    def build(step, doing):
        return (
            "from comad.runtime import trainer; import signal, shutil, subprocess\n"
            "def save(self, step, real=trainer.TrainState.save):\n"
            "    real(self, step)\n"
            f"    if step == {step}: {doing}\n"
            "trainer.TrainState.save = save\n"
        )

    return build


@pytest.fixture(scope="session")
def stopped(command, start, at_step, tmp_path_factory):
    """A run that was killed after six steps, its cache of teacher outputs still there."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert start(command(out), before=at_step(6, "os.kill(os.getpid(), signal.SIGKILL)")).wait()[0] == -9
    return out


def weights(out):
    return (out / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def judge(whole):
    """Count how a command ended: whole and with the weights that it should have, refused in one line, or badly.

    What goes on otherwise than ``whole`` must have told so, in ``words``. What is no distillation says by ``same``
    whether it ended as it should.
    """

    def judgement(out, status, told, refusal=True, words="", same=None):
        lines = [line for line in told.splitlines() if line.startswith("comad: ")]
        if "Traceback" in told or status == 70:
            kind = "tracebacks"
        elif status == 0 and words:
            kind = "survived" if words in told else "silent"
        elif status == 0:
            kind = "survived" if (same() if same else weights(out) == weights(whole[0])) else "lost"
        elif status in (1, 2, 3) and lines:
            kind = "refused in one line" if refusal else "lost"
        else:
            kind = "silent"
        COUNTS.update(["tried", kind])
        assert kind in ("survived", "refused in one line"), f"{kind}: status {status}, {told}"
        return kind

    return judgement


@pytest.fixture
def copied(stopped, tmp_path):
    """The run that was killed, in a place of its own."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


FIGURES: list[str] = []


@pytest.fixture(scope="session")
def figures():
    """Lines to be printed at the end."""
    return FIGURES


def pytest_terminal_summary(terminalreporter):
    for line in FIGURES:
        terminalreporter.write_line(line)
    if COUNTS:
        terminalreporter.write_line("faults: " + ", ".join(f"{COUNTS[kind]} {kind}" for kind in KINDS))
