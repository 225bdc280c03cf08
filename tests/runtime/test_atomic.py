import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import comad
from comad.runtime.atomic import naming, remove_leftovers, replacing, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from comad.runtime.atomic import naming, remove_leftovers, replacing, write_text
with replacing(Path(sys.argv[1])) as partial:
    partial.mkdir()
    (partial / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(path, text):
    with replacing(path) as partial:
        partial.mkdir()
        (partial / "weights").write_text(text)


def test_a_folder_takes_the_place_of_another(tmp_path):
    for text in ("first", "second"):
        write(tmp_path / "deep/out", text)
        assert (tmp_path / "deep/out/weights").read_text() == text
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_failure_keeps_what_was_there(tmp_path):
    write(tmp_path / "out", "first")
    with pytest.raises(KeyError), replacing(tmp_path / "out") as partial:
        partial.mkdir()
        raise KeyError
    assert (tmp_path / "out/weights").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(comad.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], env=environment)
    assert done.returncode == -9 and len(list(tmp_path.glob(".out.*.partial"))) == 1
    living = tmp_path / f".out.{os.getppid()}.partial"
    living.mkdir()
    write(tmp_path / "out", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "out"])


def test_a_folder_that_was_moved_out_of_the_way_comes_back(tmp_path):
    former = tmp_path / ".out.999999999.former"
    former.mkdir()
    (former / "weights").write_text("first")
    with pytest.raises(KeyError), replacing(tmp_path / "out"):
        raise KeyError
    assert (tmp_path / "out/weights").read_text() == "first" and not former.exists()


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as partial:
            partial.touch(0o600)
        write(tmp_path / "out", "x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "out", "out/weights")]
    assert modes == [0o640, 0o750, 0o640]


def test_leftovers_of_any_file_go_and_those_of_living_processes_stay(tmp_path):
    (tmp_path / ".step-3.pt.4000001.partial").write_text("half")
    (tmp_path / ".student.4000001.former").mkdir()
    (tmp_path / f".other.{os.getppid()}.partial").write_text("at work")
    (tmp_path / ".mine.partial").write_text("no leftover")
    (tmp_path / ".weights.other-host-1.partial").write_text("of a process that lost its lock")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".mine.partial", f".other.{os.getppid()}.partial", "student"]  # fmt: skip


def test_what_another_host_writes_at_the_same_place_is_left_alone_even_with_the_same_process_number(tmp_path):
    theirs = tmp_path / f".layout.json.other-host-{os.getpid()}.partial"
    with replacing(tmp_path / "layout.json") as partial:
        assert partial != theirs
        theirs.write_text("half of theirs")
        partial.write_text("ours")
    write_text(tmp_path / "layout.json", "ours again")
    assert theirs.read_text() == "half of theirs" and (tmp_path / "layout.json").read_text() == "ours again"


def test_a_text_is_whole_or_not_there(tmp_path):
    write_text(tmp_path / "deep" / "file", "first \udcff")
    assert (tmp_path / "deep" / "file").read_bytes() == b"first \xff"
    with pytest.raises(TypeError):
        write_text(tmp_path / "deep" / "file", None)  # pyright: ignore[reportArgumentType]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_errors_of_the_disk_name_their_file(tmp_path):
    for error, name in (
        (OSError(28, "full"), str(tmp_path)),
        (OSError(28, "full", "own"), "own"),
        (OSError("x"), None),
    ):
        with pytest.raises(OSError) as caught, naming(tmp_path):
            raise error
        assert caught.value.filename == name
