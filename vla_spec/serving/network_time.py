"""What the network takes off a deadline: the part of a round trip in which the server did not hold the request."""

from __future__ import annotations

import math
from collections import deque
from typing import final

from vla_spec.errors import BadConfig


@final
class NetworkTime:
    """A quantile of the last round trips, each less the time that the server says it held the request.

    Both parts are durations, each by one clock, so two hosts' clocks are never compared. Encoding and decoding messages
    is in it. A window, so that one slow moment is forgotten.

    Knobs: ``quantile`` high: plans are cut earlier than needed; low: more chunks arrive late. ``window`` in
    round trips.
    """

    def __init__(self, quantile: float = 0.9, window: int = 32) -> None:
        if not 0 <= quantile <= 1 or window < 1:
            raise BadConfig(f"network time: {quantile=} in [0, 1], {window=} >= 1 required")
        self._quantile, self._trips = quantile, deque[int](maxlen=window)

    def record(self, round_trip_ns: int, held_ns: int) -> int:
        """A round trip of which the server held ``held_ns``. Returns the network's part, never negative."""
        network_ns = max(0, round_trip_ns - held_ns)
        self._trips.append(network_ns)
        return network_ns

    def forget(self) -> None:
        """Another connection, maybe another way."""
        self._trips.clear()

    @property
    def expected_ns(self) -> int:
        """To be taken off a deadline. Window: the last ``window`` round trips; 0 if there was none."""
        if not self._trips:
            return 0
        return sorted(self._trips)[max(0, math.ceil(self._quantile * len(self._trips)) - 1)]
