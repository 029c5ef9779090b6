"""Finds out that a clock was set: rclpy tells of jumps of simulated time, not of the system's date. No ROS in here."""

from __future__ import annotations

from typing import final

#: More than any slewing of the date adds up to between two looks, less than what a chunk's alignment can bear [ns].
JUMP_NS = 100_000_000


#: How long a clock is watched before its speed is believed [ns].
RATE_WINDOW_NS = 500_000_000


@final
class ClockRate:
    """How many seconds of a simulated clock pass in a second. Not thread-safe."""

    def __init__(self) -> None:
        self._from: tuple[int, int] | None = None
        self._rate = 1.0

    def look(self, time_ns: int, steady_ns: int) -> float:
        """The speed as far as it is known, 1 until then; measured anew all the time."""
        if self._from is None or time_ns < self._from[0]:
            self._from = time_ns, steady_ns
        passed_ns = steady_ns - self._from[1]
        if passed_ns >= RATE_WINDOW_NS:
            rate = (time_ns - self._from[0]) / passed_ns
            if rate > 0:  # it may stand still for a while
                self._rate = min(max(rate, 0.001), 1000.0)
            self._from = time_ns, steady_ns
        return self._rate


@final
class ClockWatch:
    """Compares a clock that may be set with a steady one. Not thread-safe.

    Args:
        threshold_ns: a difference between the two that changes by more than this from look to look is a jump.
    """

    def __init__(self, threshold_ns: int = JUMP_NS) -> None:
        self._threshold_ns = threshold_ns
        self._offset_ns: int | None = None

    def has_jumped(self, time_ns: int, steady_ns: int) -> bool:
        """Whether the clock was set since the last call; the first call says no."""
        offset_ns, before = time_ns - steady_ns, self._offset_ns
        self._offset_ns = offset_ns
        return before is not None and abs(offset_ns - before) > self._threshold_ns

    def forget(self) -> None:
        """The clock was exchanged for another one: the next call says no."""
        self._offset_ns = None
