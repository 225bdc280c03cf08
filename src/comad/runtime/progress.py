"""What a command says while it works, the same way for every verb: what, how far, and how long it will take.

    with Working("scoring", len(networks), "networks") as told:
        for network in networks:
            score(network)
            told.advance()

What takes less than `SILENCE` is not told. On a terminal there is a bar by rich; in a file or a pipe there are plain
lines. Both go to the error stream, so that results can be piped. ``NO_COLOR`` takes the colours away, `quiet` all but
warnings and errors.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

Item = TypeVar("Item")

SILENCE = 3.0
"""Seconds after which it is told what is being done."""
AGAIN = 30.0
"""Seconds between two lines of one task in a file."""
DRAWN = 0.1
"""Seconds between two drawings of the bars."""
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""What launchers call the number of a process; the first that is set counts."""

_told = {"quiet": bool(os.environ.get("COMAD_QUIET"))}
_waiting: list[str] = []


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Say nothing but warnings and errors within the context; ``COMAD_QUIET=1`` does so everywhere."""
    before, _told["quiet"] = _told["quiet"], on or _told["quiet"]
    try:
        yield
    finally:
        _told["quiet"] = before
        _waiting.clear()


def is_quiet() -> bool:
    """Whether nothing is to be told: by `quiet`, or because another process of the run tells it."""
    return _told["quiet"] or not _is_first()


def _is_first() -> bool:
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") in ("", "0")


def say(text: str) -> None:
    """A line on what is being done; a terminal that is gone does not matter."""
    if not is_quiet():
        show(text)
        while _waiting:
            show(_waiting.pop(0))


def say_next(text: str) -> None:
    """Say it behind the next line: of what is refused before it begins, the reason is the only line."""
    _waiting.append(text)


def warn(text: str) -> None:
    """A line that is shown even if all is to be quiet, by the first of several processes that see the same."""
    if _is_first():
        show(f"comad: {text}")


def show(text: str) -> None:
    """Like `warn`, as it is: for lines that a run has told ever since."""
    with suppress(OSError, ValueError):  # nobody is left to read it; a stream that is closed
        if _SCREEN.bars is not None:
            _SCREEN.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


class _Screen:
    """The bars of a terminal. Whoever works draws them: a thread that did would be forked in the middle of it."""

    def __init__(self) -> None:
        self.bars: Any = None
        self.count = 0
        self.drawn = 0.0

    def add(self, what: str, total: int | None) -> Any:
        self.count += 1
        if self.bars is None:
            self.bars = _rich_bars()
            self.bars.start()
        return self.bars.add_task(what, total=total, count="", note="")

    def draw(self, bar: Any, now: float, **values: Any) -> None:
        self.bars.update(bar, **values)
        if now - self.drawn >= DRAWN:
            self.drawn = now
            self.bars.refresh()

    def remove(self, bar: Any) -> None:
        if self.bars is None:  # the terminal is gone
            return
        self.count -= 1
        with suppress(OSError):
            self.bars.remove_task(bar)
            if not self.count:
                self.bars.stop()
        if not self.count:
            self.bars = None


def _rich_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            """A terminal that is gone ends nothing; rich would end the program."""
            raise BrokenPipeError

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=Screen(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


_SCREEN = _Screen()


def on_terminal() -> bool:
    """Whether bars can be drawn on the error stream."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Working:
    """Tell of one task, within its context.

    Args:
        what: is being done, such as ``scoring``.
        total: steps; None if that is not known, or if it is one.
        unit: what is counted.
        lines: tell it in a file, too; without it whoever counts writes lines of his own.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "", lines: bool = True):
        self.what, self.total, self.unit, self.lines = what, total, unit, lines
        self.done, self.bar, self.timer = 0, None, None
        self.start = time.monotonic()
        self.told: float | None = None

    def __enter__(self) -> Working:
        if is_quiet():
            return self
        if on_terminal() and not (self.total or self.unit):
            self._draw(self.start, "")
        elif not on_terminal() and not (self.total or self.unit):
            self.timer = threading.Timer(SILENCE, self._tell)
            self.timer.daemon = True
            self.timer.start()
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done; ``note`` stands behind the bar."""
        self.done += count
        if is_quiet():
            return
        now = time.monotonic()
        if on_terminal():
            if self.bar is not None or now - self.start > DRAWN:
                self._draw(now, note)
        elif self.lines and now - (self.told or self.start) > (SILENCE if self.told is None else AGAIN):
            self._tell()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.bar is not None:
            _SCREEN.remove(self.bar)
        took = time.monotonic() - self.start
        if error is None and self.lines and took > SILENCE:
            say(f"{self.what}: {self._count(self.done, None)}{', ' if self.unit else ''}{clock(took)}")

    def _draw(self, now: float, note: str) -> None:
        try:
            if self.bar is None:
                self.bar = _SCREEN.add(self.what, self.total)
            count = self._count(self.done, self.total)
            _SCREEN.draw(self.bar, now, completed=self.done, count=count, note=note)
        except OSError:  # the terminal is gone
            _SCREEN.bars, _SCREEN.count, self.bar = None, 0, None

    def _tell(self) -> None:
        """A line in a file."""
        now = self.told = time.monotonic()
        left = ""
        if self.total and self.done:
            left = f", {clock((now - self.start) / self.done * (self.total - self.done))} left"
        say(f"{self.what}: {self._count(self.done, self.total)}{left}" if self.unit else f"{self.what} ...")

    def _count(self, done: int, total: int | None) -> str:
        if not self.unit:
            return ""
        return f"{done:,} of {total:,} {self.unit}" if total else f"{done:,} {self.unit}"


def track(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Go through items and tell how far it is."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Working(what, total, unit) as told:
        for item in items:
            yield item
            told.advance()


def clock(seconds: float) -> str:
    """``0:07``, ``12:30`` or ``3:05:00``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def duration(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``1.5 h``."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
