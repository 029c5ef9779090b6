"""How regular a timer is, in a ring of its last ticks. No ROS in here."""

from __future__ import annotations

from typing import final

import numpy as np


@final
class TickStatistics:
    """Period errors of a timer. Not thread-safe.

    Args:
        period_ns: nominal.
        window: periods that are remembered.
        pause_ns: a longer time between two ticks is a pause, counted and in no other number: an episode was over.
    """

    def __init__(self, period_ns: int, window: int = 1024, pause_ns: int = 10**18) -> None:
        self._period_ns, self._pause_ns = period_ns, pause_ns
        self.num_pauses = self._num_periods = 0
        self._errors = np.zeros(window, np.int64)
        self._last_ns: int | None = None
        self.num_ticks = 0

    def begin(self, now_ns: int) -> None:
        """A tick begins at this time, on a steady clock."""
        if self._last_ns is not None:
            passed_ns = now_ns - self._last_ns
            if passed_ns > self._pause_ns:
                self.num_pauses += 1
            else:
                self._errors[self._num_periods % len(self._errors)] = passed_ns - self._period_ns
                self._num_periods += 1
        self._last_ns = now_ns
        self.num_ticks += 1

    def summary(self) -> dict[str, float]:
        """Ticks since start, and the absolute period error of the window [ms]: p50, p99, max."""
        n = min(self._num_periods, len(self._errors))
        if n == 0:
            return {"ticks": self.num_ticks}
        errors = np.abs(self._errors[:n]) / 1e6
        p50, p99 = np.percentile(errors, (50, 99))
        return {
            "ticks": self.num_ticks, "pauses": self.num_pauses, "period_error_p50_ms": round(float(p50), 4),
            "period_error_p99_ms": round(float(p99), 4), "period_error_max_ms": round(float(errors.max()), 4),
        }  # fmt: skip
