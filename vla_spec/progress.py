"""Progress at a terminal: one bar per phase, with what is being done now. Silent where nobody looks."""

from __future__ import annotations

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
class LiveProgress:
    """Bars on stderr, redrawn twice a second so that drawing costs the measurement nothing to speak of.

    Only where a person looks: a pipe or a log file gets errors and nothing else.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
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
        self._task = self._progress.add_task(name, total=total, text="")

    def step(self, text: str = "") -> None:
        """One part is done."""
        if self._task is not None:
            self._progress.update(self._task, advance=1, text=text)
