"""How regular a timer is, in a ring of its last ticks. No ROS in here."""

from __future__ import annotations

from typing import final

import numpy as np


@final
class TickStatistics:
    """Period errors of a timer. Not thread-safe.

    Args:
        period_ns: nominal.
        window: ticks that are remembered.
    """

    def __init__(self, period_ns: int, window: int = 1024) -> None:
        self._period_ns = period_ns
        self._errors = np.zeros(window, np.int64)
        self._last_ns: int | None = None
        self.num_ticks = 0

    def begin(self, now_ns: int) -> None:
        """A tick begins at this time, on a steady clock."""
        if self._last_ns is not None:
            self._errors[(self.num_ticks - 1) % len(self._errors)] = now_ns - self._last_ns - self._period_ns
        self._last_ns = now_ns
        self.num_ticks += 1

    def summary(self) -> dict[str, float]:
        """Ticks since start, and the absolute period error of the window [ms]: p50, p99, max."""
        n = min(max(self.num_ticks - 1, 0), len(self._errors))
        if n == 0:
            return {"ticks": self.num_ticks}
        errors = np.abs(self._errors[:n]) / 1e6
        p50, p99 = np.percentile(errors, (50, 99))
        return {
            "ticks": self.num_ticks, "period_error_p50_ms": round(float(p50), 4),
            "period_error_p99_ms": round(float(p99), 4), "period_error_max_ms": round(float(errors.max()), 4),
        }  # fmt: skip
