"""Disks that are full, folders that cannot be written or vanish, shared memory that is too small."""

import os
import shutil
import subprocess

import pytest


def may(*command):
    """Skip the test where this user, or this system, cannot do that."""
    if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{command[0]} is not for us here")


@pytest.mark.parametrize(
    "largest", [40_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (5_000, 12_000, 90_000))]
)
def test_a_full_disk(start, command, judge, tmp_path, largest):
    out = tmp_path / "run"
    status, told = start(command(out), largest_file=largest).wait()
    assert judge(out, status, told) == "refused in one line" and str(tmp_path) in told
    judge(out, *start(command(out)).wait(), refusal=False)


@pytest.mark.slow
@pytest.mark.parametrize("kib", [64, 160, 300, 600])
def test_a_file_system_that_is_full(start, command, judge, tmp_path, kib):
    (tmp_path / "small").mkdir()
    may("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(tmp_path / "small"))
    out = tmp_path / "small" / "run"
    try:
        status, told = start(command(out)).wait()
        assert judge(out, status, told) == "survived" or str(out) in told
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "small")], check=True)
        judge(out, *start(command(out)).wait(), refusal=False)
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_a_folder_that_cannot_be_written(start, command, judge, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run", "/dev/null"):
        assert judge(out, *start(command(out)).wait()) == "refused in one line"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["checkpoints", "."])
def test_a_folder_that_becomes_read_only(start, command, at_step, judge, tmp_path, part):
    out = tmp_path / "run"
    may("chattr", "-i", str(tmp_path))
    lock = at_step(6, f"subprocess.run(['chattr', '+i', {str(out / part)!r}], check=True)")
    try:
        status, told = start(command(out), before=lock).wait()
        assert judge(out, status, told) == "refused in one line" and str(out) in told
    finally:
        subprocess.run(["chattr", "-i", str(out / part)], check=True)
    judge(out, *start(command(out)).wait(), refusal=False)


@pytest.mark.slow
@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_folder_that_vanishes(start, command, at_step, judge, tmp_path, tensorboard):
    out = tmp_path / "run"
    more = ["--run.tensorboard"] if tensorboard else []
    status, told = start([*command(out), *more], before=at_step(6, f"shutil.rmtree({str(out)!r})")).wait()
    judge(out, status, told, refusal=False)
    assert f"{out / 'log.jsonl'} is gone" in told


def test_names_that_are_no_utf8(start, command, judge, tmp_path):
    data = next(a for a in command(tmp_path) if a.startswith("--data=")).partition("=")[2]
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")
    shutil.copytree(data, odd)
    judge(tmp_path / "run", *start([*command(tmp_path / "run"), f"--data={odd}"]).wait(), refusal=False)
    (tmp_path / "run/student/README.md").read_text(encoding="utf-8")
    first = command(tmp_path)[command(tmp_path).index("--teachers") + 1].partition("=")[2]
    shutil.copytree(first, f"{odd}-teacher")
    for more in (f"--run.out={odd}-run", f"--cache-folder={odd}-cache", f"--teachers=odd={odd}-teacher"):
        status, told = start([*command(tmp_path / "other"), more]).wait()
        assert judge(tmp_path / "other", status, told) == "refused in one line" and "UTF-8" in told
    for verb in ("export", "embed"):
        status, told = start([verb, first, f"--data={data}", f"--out={odd}.parquet"]).wait()
        assert judge(tmp_path / "other", status, told) == "refused in one line" and "no name in UTF-8" in told


SMALL = """
import ctypes
assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS: what is mounted is for this process alone
for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size={size}", "tmpfs", "/dev/shm"]):
    subprocess.run(["mount", *words], check=True)

def fill():
    def keep_full():  # what a read batch gives back, too
        with open("/dev/shm/full", "wb", 0) as file:
            while True:
                try: file.write(bytes(4096))
                except OSError: time.sleep(0)
    import threading, time
    threading.Thread(target=keep_full, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["16k", "64m"])
def test_shared_memory_that_is_too_small_or_runs_full(start, command, at_step, judge, tmp_path, size):
    may("unshare", "--mount", "true")
    out, more = tmp_path / "run", ["--loader.workers=1", "--loader.deadline=60"]
    before = at_step(2, "fill()" if size == "64m" else "None") + SMALL.format(size=size)
    status, told = start(command(out, *more), before=before).wait()
    assert judge(out, status, told) == "refused in one line" and "--shm-size" in told
    judge(out, *start(command(out)).wait(), refusal=False)
