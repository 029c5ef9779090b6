"""How many actions are consumed between an observation and the first use of its chunk: measured, decaying."""

from __future__ import annotations

from collections import deque
from typing import final

import numpy as np

from vla_spec.errors import BadConfig


@final
class DelayEstimator:
    """A quantile of the last measured delays, in actions that were really consumed.

    Actions and not seconds, so that it is right when simulated time runs fast or slow, and so that a stall in which the
    arm stood still counts for what the arm did: nothing. A window, so that one slow plan is forgotten; the first plans
    are left out, because they pay for warming up.

    Knobs: ``quantile`` high: more steps are frozen than needed, the plan reacts late; low: hand-over jumps more often.
    ``window`` in plans. ``initial`` is the answer until something was measured.
    """

    def __init__(self, quantile: float = 0.9, window: int = 32, warmup: int = 1, initial: int = 0) -> None:
        if not 0 <= quantile <= 1 or window < 1 or warmup < 0 or initial < 0:
            raise BadConfig(f"delay: {quantile=} in [0, 1], {window=} >= 1, {warmup=} >= 0, {initial=} >= 0 required")
        self._quantile, self._warmup, self._initial = quantile, warmup, initial
        self._delays: deque[int] = deque(maxlen=window)
        self.num_measured = 0

    def record(self, num_steps: int) -> None:
        """So many actions were consumed between an observation and its chunk; the first ``warmup`` calls only count."""
        self.num_measured += 1
        if self.num_measured > self._warmup:
            self._delays.append(num_steps)

    def steps(self, most: int) -> int:
        """Expected delay, at most ``most``. Window: the last ``window`` plans; ``initial`` if nothing was measured."""
        if not self._delays:
            return min(self._initial, most)
        return min(int(np.quantile(self._delays, self._quantile, method="higher")), most)
