"""Clocks and a rate keeper. The core's only module that touches ``time.*``; the rest is handed a clock or a time.

Times are integers in nanoseconds on a monotonic clock; they say how long, never what date.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, final

from vla_spec.errors import BadConfig

NS_PER_S = 1_000_000_000


class Clock(Protocol):
    """Something that tells the time and waits."""

    def now_ns(self) -> int:
        """Time now [ns]; never goes backwards."""

    def sleep_until_ns(self, t_ns: int) -> None:
        """Return at ``t_ns`` or as soon after as possible; at once if it has passed."""


@final
class MonotonicClock:
    """The machine's steady clock. Sleeping releases the interpreter, so that other threads run."""

    def now_ns(self) -> int:
        """Time since an arbitrary start [ns]."""
        return time.monotonic_ns()

    def sleep_until_ns(self, t_ns: int) -> None:
        """Sleep until ``t_ns``; the operating system wakes it about 0.1 ms late."""
        while (left_ns := t_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns / NS_PER_S)


@final
class VirtualClock:
    """A clock that moves only when it is told to: the same calls give the same times. Sleeping jumps."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        """The time that was set last [ns]."""
        return self._now_ns

    def advance(self, duration_ns: int) -> None:
        """Let ``duration_ns`` >= 0 pass."""
        if duration_ns < 0:
            raise BadConfig(f"clock: can't advance by {duration_ns} ns; valid: 0 or more, time never goes backwards")
        self._now_ns += duration_ns

    def sleep_until_ns(self, t_ns: int) -> None:
        """Jump to ``t_ns``; nothing happens if it has passed."""
        self._now_ns = max(self._now_ns, t_ns)


@final
class RateKeeper:
    """Ticks on an absolute schedule ``start + k * period``: a late tick does not shift the later ones.

    What happens to ticks that were missed altogether is the one choice. With ``catch_up`` all of them are run, back
    to back (a simulator, whose physics owes them to the wall clock); without, they are dropped and the next tick
    falls on the schedule again (a motor loop, where an old command is worth nothing).

    Knobs: ``period_ns`` > 0; too small a period is seen as negative ``slack_ns`` and a growing ``skip_count``.

    Args:
        clock: where time comes from.
        period_ns: nominal period.
        catch_up: run missed ticks instead of dropping them.
        start_ns: time of tick 0; None = now.
    """

    def __init__(self, clock: Clock, period_ns: int, catch_up: bool = False, start_ns: int | None = None) -> None:
        if period_ns <= 0:
            raise BadConfig(f"rate: period is {period_ns} ns; valid: more than 0")
        self._clock, self.period_ns, self._catch_up = clock, period_ns, catch_up
        self.next_ns = clock.now_ns() if start_ns is None else start_ns
        self.slack_ns = self.lateness_ns = 0
        self.skip_count = 0
        self.num_ticks = 0
        self._first_ns = self._last_ns = 0

    def wait(self) -> int:
        """Sleep until the next tick. Returns the tick's *scheduled* time [ns], which late ticks lie behind.

        Sets ``slack_ns``, the time that was left when this was called (negative: the loop's body took too long),
        ``lateness_ns``, how much later than scheduled the tick begins, and adds to ``skip_count`` each whole period
        that was missed: dropped, or with ``catch_up`` run late.
        """
        now_ns = self._clock.now_ns()
        self.slack_ns = self.next_ns - now_ns
        if self.slack_ns > 0:
            self._clock.sleep_until_ns(self.next_ns)
            now_ns = self._clock.now_ns()
        elif self._catch_up:
            self.skip_count += -self.slack_ns >= self.period_ns
        else:
            missed = -self.slack_ns // self.period_ns
            self.skip_count += missed
            self.next_ns += missed * self.period_ns
        scheduled_ns = self.next_ns
        self.lateness_ns = now_ns - scheduled_ns
        self.next_ns += self.period_ns
        if self.num_ticks == 0:
            self._first_ns = now_ns
        self._last_ns = now_ns
        self.num_ticks += 1
        return scheduled_ns

    def shift(self, duration_ns: int) -> None:
        """Move the whole schedule by this much: the time does not count, such as that of a simulator's drawing."""
        self.next_ns += duration_ns
        self._first_ns += duration_ns

    @property
    def measured_period_ns(self) -> float | None:
        """Mean time between ticks as they really happened, shifts left out.

        Window: all since the start; None before two ticks.
        """
        if self.num_ticks < 2:
            return None
        return (self._last_ns - self._first_ns) / (self.num_ticks - 1)


#: What most parts need of a clock.
NowNs = Callable[[], int]
