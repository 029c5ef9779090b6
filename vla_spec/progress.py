"""Progress on stderr: one bar per phase at a terminal, plain lines now and then in a pipe or a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vla_spec.clock import NS_PER_S, MonotonicClock, NowNs

#: A plain line is due after this share of a phase or after this much time, whichever comes first ...
SHARE, SILENCE_NS = 0.1, 10 * NS_PER_S
#: ... but, the last line of a phase aside, no sooner than this after the line before.
PAUSE_NS = NS_PER_S


class Reporter(Protocol):
    """What long work tells about itself."""

    def phase(self, name: str, total: int) -> None:
        """A phase of ``total`` equal parts begins; the one before is over."""

    def step(self, text: str = "") -> None:
        """One part is done; ``text`` says what, in a few words."""


@final
class Silent:
    """Tells nobody."""

    def phase(self, name: str, total: int) -> None:
        """Nothing."""

    def step(self, text: str = "") -> None:
        """Nothing."""


@final
class PlainProgress:
    """Lines of text: when a phase begins, when it is done, and in between as often as a reader of a log wants to know.

    A phase of a few seconds takes two lines; a long one a line per tenth, and at least one per ten seconds as long as
    parts get done.

    Args:
        write: takes one line, without its end.
        now_ns: a clock.
    """

    def __init__(self, write: Callable[[str], None], now_ns: NowNs) -> None:
        self._write, self._now_ns = write, now_ns
        self._name = ""
        self._total = self._done = self._told_done = self._start_ns = self._told_ns = 0

    def phase(self, name: str, total: int) -> None:
        """A phase begins: one line."""
        self._name, self._total, self._done, self._told_done = name, total, 0, 0
        self._start_ns = self._told_ns = self._now_ns()
        self._write(f"{name}: 0 of {total}")

    def step(self, text: str = "") -> None:
        """One part is done: one line, if it is time for one."""
        self._done += 1
        done, total, now_ns = self._done, self._total, self._now_ns()
        is_share_done = done - self._told_done >= SHARE * total and now_ns - self._told_ns >= PAUSE_NS
        if not (is_share_done or now_ns - self._told_ns >= SILENCE_NS or done == total):
            return
        self._told_done, self._told_ns = done, now_ns
        taken_s = (now_ns - self._start_ns) / NS_PER_S
        left = f", about {taken_s / done * (total - done):.0f} s left" if done < total else ""
        self._write(f"{self._name}: {done} of {total}, {taken_s:.0f} s{left}{': ' if text else ''}{text}")


@final
class LiveProgress:
    """Bars on stderr, redrawn twice a second so that drawing costs the measurement nothing to speak of.

    Only where a person looks: a pipe or a log file gets the lines of `PlainProgress`.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._plain = None if console.is_terminal else PlainProgress(_write_line, MonotonicClock().now_ns)
        self._progress = Progress(
            TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, total: int) -> None:
        """A phase begins."""
        if self._plain is not None:
            self._plain.phase(name, total)
            return
        self._task = self._progress.add_task(name, total=total, text="")

    def step(self, text: str = "") -> None:
        """One part is done."""
        if self._plain is not None:
            self._plain.step(text)
        elif self._task is not None:
            self._progress.update(self._task, advance=1, text=text)


def _write_line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()  # a log is read while it is written
