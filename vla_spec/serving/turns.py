"""Whose observation is planned next: one waiting request per client, the newest; clients take turns."""

from __future__ import annotations

import threading
from typing import NamedTuple, final

from vla_spec.serving.wire import Ask


class Job(NamedTuple):
    """A request that waits, or is being planned. Times on the server's clock [ns].

    client: whose it is. received_ns: when it came. due_ns: when its chunk has to be ready, the way back taken off.
    """

    client: bytes
    ask: Ask
    received_ns: int
    due_ns: int


@final
class Turns:
    """The waiting room. Offered to by the thread that listens, taken from by the thread that plans.

    Clients are served in the order in which they came into the room. A newer request takes its client's place, so
    asking often does not help, and whoever was served goes to the end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[bytes, Job] = {}  # in the order of turns
        self._running: Job | None = None
        self._since_ns = 0

    def offer(self, job: Job, now_ns: int, plan_ns: int, least_ns: int) -> tuple[bool, Job | None]:
        """Let a request wait, unless it could not be ready in time.

        A client that is being planned for may wait in any case: what would answer it at once, its ladder, is in use.

        Args:
            job: it.
            now_ns: the time.
            plan_ns: what a plan is expected to take. The running one is cut at its deadline, so it lasts no longer.
            least_ns: what a plan takes at least.

        Returns:
            Whether it waits, and the request of the same client whose place it took; waiting or not, that one is out.
        """
        with self._lock:
            replaced, left_ns, is_running = self._waiting.get(job.client), 0, False
            if self._running is not None:
                left_ns = max(0, min(self._since_ns + plan_ns, self._running.due_ns) - now_ns)
                is_running = self._running.client == job.client
            clients = list(self._waiting)
            num_ahead = clients.index(job.client) if replaced is not None else len(clients)
            if not is_running and job.due_ns - now_ns - left_ns - num_ahead * plan_ns < least_ns:
                self._waiting.pop(job.client, None)
                return False, replaced
            self._waiting[job.client] = job  # where the replaced one stood, or at the end
            return True, replaced

    def take(self, now_ns: int) -> Job | None:
        """The next one; it is running from now until `done`. None = nobody waits."""
        with self._lock:
            if not self._waiting:
                return None
            client = next(iter(self._waiting))
            self._running, self._since_ns = self._waiting.pop(client), now_ns
            return self._running

    def done(self) -> None:
        """The running one is planned."""
        with self._lock:
            self._running = None

    def withdraw(self, client: bytes) -> bool:
        """A client leaves. False = not now, it is being planned for."""
        with self._lock:
            if self._running is not None and self._running.client == client:
                return False
            self._waiting.pop(client, None)
            return True

    def take_hopeless(self, now_ns: int, least_ns: int) -> list[Job]:
        """Take out all that would not be ready in time even if planned at once.

        A client that is being planned for keeps its next one, as in `offer`.

        Args:
            now_ns: the time.
            least_ns: what a plan takes at least.
        """
        with self._lock:
            busy = None if self._running is None else self._running.client
            hopeless = [j for c, j in self._waiting.items() if c != busy and j.due_ns - now_ns < least_ns]
            for job in hopeless:
                del self._waiting[job.client]
            return hopeless

    def next_hopeless_ns(self, least_ns: int) -> int | None:
        """When the first that `take_hopeless` may take becomes hopeless; None = there is none."""
        with self._lock:
            busy = None if self._running is None else self._running.client
            return min((j.due_ns - least_ns for c, j in self._waiting.items() if c != busy), default=None)

    def busy_ns(self, now_ns: int) -> int:
        """How long the running plan has been under way; 0 = none is."""
        with self._lock:
            return 0 if self._running is None else max(1, now_ns - self._since_ns)
