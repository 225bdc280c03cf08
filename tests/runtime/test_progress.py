import io
import sys
import time

import pytest

from comad.cli import main
from comad.runtime import log, progress
from comad.runtime.progress import Working, quiet, say, say_next, track, warn


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def later(monkeypatch):
    """Every look at the clock is two seconds later."""
    monkeypatch.setattr(progress, "SILENCE", 3.0)
    start = iter(range(0, 10_000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(start)))


def test_what_is_quick_is_not_told(capsys):
    assert list(track(range(5), "counting", "things")) == [0, 1, 2, 3, 4]
    with Working("thinking"):
        pass
    assert capsys.readouterr().err == ""


def test_what_takes_long_is_told_in_lines(capsys, later):
    list(track(range(40), "reading", "images"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading: 2 of 40 images, ") and lines[0].endswith(" left")
    assert 3 <= len(lines) <= 6 and lines[-1].startswith("reading: 40 images, 1:")


def test_one_long_thing_is_told_by_a_timer(monkeypatch, within):
    monkeypatch.setattr(progress, "SILENCE", 0.05)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with within(60), Working("compiling"):
        while "\n" not in sys.stderr.getvalue():
            time.sleep(0.01)
    first, last = sys.stderr.getvalue().splitlines()
    assert first == "compiling ..." and last.startswith("compiling: 0:0")


def test_an_unknown_number_is_counted(capsys, later):
    with Working("indexing", unit="files") as told:
        told.advance(1200)
        told.advance(1)
    assert "indexing: 1,201 files\n" in capsys.readouterr().err


def test_quiet_leaves_warnings(capsys, later):
    with quiet():
        say("hello")
        list(track(range(40), "reading", "images"))
        warn("the disk is nearly full.")
    assert capsys.readouterr().err == "comad: the disk is nearly full.\n"


def test_only_the_first_of_several_processes_tells(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("hello")
    warn("hello")
    monkeypatch.setenv("RANK", "0")
    say("world")
    warn("world")
    assert capsys.readouterr().err == "world\ncomad: world\n"


def test_what_waits_for_a_line_is_lost_without_one(capsys):
    with quiet(False):
        say_next("chosen")
    say("begun")
    say_next("chosen")
    say("begun")
    assert capsys.readouterr().err == "begun\nbegun\nchosen\n"


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_has_bars_that_go_away(monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setattr(progress, "DRAWN", -1.0)
    with Working("outer", 2, "runs") as outer:
        for _ in range(2):
            list(track(range(3), "scoring", "images"))
            outer.advance(note="loss 0.5")
        warn("a line above the bars")
    text = screen.getvalue()
    for words in ("outer", "2 of 2 runs", "scoring", "3 of 3 images", "loss 0.5", "comad: a line above the bars\n"):
        assert words in text
    assert ("\x1b[38" in text or "\x1b[3" in text) != no_color and progress._SCREEN.bars is None


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch):
    class Gone(Terminal):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(progress, "DRAWN", -1.0)
    assert list(track(range(3), "scoring", "images")) == [0, 1, 2]
    say("hello")
    monkeypatch.undo()
    assert progress._SCREEN.bars is None


def test_the_flag_of_the_command(capsys):
    assert main(["--quiet", "teachers", "list", "stamps"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3 and not progress.is_quiet()


class FakeWandb:
    """What comad uses of Weights & Biases."""

    def __init__(self):
        self.started, self.logged, self.id, self.finished = [], [], "abc", 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1

    Image = staticmethod(lambda image: ("image", image.shape))
    Table = staticmethod(lambda columns, data: ("table", columns, data))


def test_trackers_get_the_same_names_images_and_tables(tmp_path, monkeypatch):
    import numpy as np
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    with log.RunLog(tmp_path, 3, wandb=True) as run:
        run.write(1, {"loss": 0.5, "loss/dino/patch": 0.25, "warning": "words"})
    for tracker in log.open_trackers(tmp_path, True, True):
        tracker.image(3, "gate/dino", np.zeros((4, 6, 3), np.uint8))
        tracker.table(3, "scoreboard", ("name", "kNN %"), [("student", 50.0)])
        tracker.close()
    assert [options.get("id") for options in fake.started] == [None, "abc"] and fake.finished == 2
    table = {"scoreboard": ("table", ["name", "kNN %"], [["student", "50.0"]])}
    numbers = {"loss": 0.5, "loss/dino/patch": 0.25}
    assert fake.logged == [(1, numbers), (3, {"gate/dino": ("image", (4, 6, 3))}), (3, table)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == set(numbers) and tags["images"] == ["gate/dino"]
    text = events.Tensors("scoreboard/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "| name | kNN % |\n| --- | --- |\n| student | 50.0 |"
