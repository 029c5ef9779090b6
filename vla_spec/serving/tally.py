"""What a server did: counts since its start, times of its last plans."""

from __future__ import annotations

from collections import deque
from typing import Any, final

import numpy as np

from vla_spec.trace import PlanRecord, Quantiles, quantiles

#: Chunks whose times are kept, and plans that are kept with all their rounds (2 to 10 kB each); a server that runs for
#: days keeps no more.
WINDOW, KEPT_PLANS = 10_000, 1000
_NS_PER_MS = 1e6


@final
class Tally:
    """Counters and a window. Written by the server's threads, one counter by one thread."""

    def __init__(self) -> None:
        #: Clients that were let in; requests; answered from the ladder at once; replaced by a newer one.
        self.num_clients = self.num_asked = self.num_at_once = self.num_overtaken = 0
        #: Messages that were refused; clients whose key was; answers that could not be sent.
        self.num_bad = self.num_refused_keys = self.num_undelivered = 0
        #: Chunks, those from the ladder at once included; those that were sent after they were due.
        self.num_answered = self.num_late = 0
        #: The last plans, of all clients.
        self.records: deque[PlanRecord] = deque(maxlen=KEPT_PLANS)
        self._queue_ns: deque[int] = deque(maxlen=WINDOW)
        self._held_ns: deque[int] = deque(maxlen=WINDOW)
        self._told = (0, 0, 0, 0)

    def add(self, record: PlanRecord, queue_ns: int, held_ns: int, is_late: bool) -> None:
        """A chunk was sent."""
        self.num_answered += 1
        self.num_late += is_late
        self.records.append(record)
        self._queue_ns.append(queue_ns)
        self._held_ns.append(held_ns)

    def line(self, seconds: float, num_clients: int) -> str:
        """About the time since the last line; empty if nothing was asked for."""
        now = (self.num_answered, self.num_late, self.num_overtaken, self.num_at_once)
        chunks, late, overtaken, at_once = (new - old for new, old in zip(now, self._told, strict=True))
        self._told = now
        if not chunks and not overtaken:
            return ""
        of_these = quantiles(np.array(list(self._held_ns)[-chunks:] if chunks else []))
        times = "" if of_these is None else f", held p50 {_ms(of_these.p50)} p99 {_ms(of_these.p99)} ms"
        return (
            f"{num_clients} client{'s' if num_clients != 1 else ''}, {chunks / seconds:.1f} chunks/s{times}, "
            f"{late} late, {at_once} answered at once, {overtaken} overtaken"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values; quantiles over the last `WINDOW` chunks, in ms, None where there is none."""
        counters = {name: value for name, value in vars(self).items() if name.startswith("num_")}
        return {
            **counters,
            "window": WINDOW,
            "queue_ms": _as_ms(quantiles(np.array(self._queue_ns))),
            "held_ms": _as_ms(quantiles(np.array(self._held_ns))),
        }


def _as_ms(of: Quantiles | None) -> dict[str, float | int] | None:
    if of is None:
        return None
    return {**{name: round(getattr(of, name) / _NS_PER_MS, 4) for name in of._fields[:-1]}, "n": of.num_values}


def _ms(ns: float) -> str:
    return f"{ns / _NS_PER_MS:.2f}"
