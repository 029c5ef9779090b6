"""What a control loop asks of the operating system and the interpreter so that its ticks are on time, and what it got.

Nothing here raises because a privilege was refused: each request comes back as a `Grant` that says granted or why not,
and the run reports all of them. Scheduler, affinity and timer slack belong to the calling thread, locked memory and
garbage collection to the process.

Source: openpilot's `common/realtime.py` (scheduler, affinity and garbage collection in one call) and ros2_control's
`lock_memory` for what is worth asking; the man pages sched(7), mlockall(2), prctl(2) and getrusage(2) for the calls.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from vla_spec.clock import NowNs
from vla_spec.errors import BadConfig

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

Int64 = npt.NDArray[np.int64]

#: Threads hand over the interpreter this often in real time [s]; Python's own 5 ms are most of a control period.
SWITCH_INTERVAL_S = 0.0005
#: Timers of ordinary threads are late by up to 50 us so that wake-ups can be joined; this is the least there is [ns].
LEAST_TIMER_SLACK_NS = 1
#: From <sys/mman.h> and <linux/prctl.h>.
_MCL_CURRENT, _MCL_FUTURE, _PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 1, 2, 29, 30
#: What a collection is taken to last before the first was measured [ns], and how many times the longest must fit.
FIRST_GUESS_NS, SAFETY, NUM_GENERATIONS = 500_000, 3, 3
#: Columns of `UsageLog.rows`: what getrusage says of one thread, as differences per tick.
USAGE_FIELDS = ("minor_faults", "major_faults", "voluntary_switches", "involuntary_switches")


@dataclass(frozen=True, slots=True)
class RealtimeOptions:
    """What is asked for. A refusal never stops a run; it is in its results.

    Attributes:
        fifo_priority: of the actor under SCHED_FIFO, 1..99; 0 = the ordinary scheduler. Above it only what must never
            wait for the arm.
        planner_priority: of the planner, below the actor's; 0 = the ordinary scheduler. It keeps other programs from
            delaying plans; ordinary programs on its core get what it leaves.
        actor_cpus, planner_cpus: cores that each may use; empty = all.
        lock_memory: keep all pages in memory, now and later, so that no tick waits for a page.
        freeze_gc: after warm-up, take everything that exists out of garbage collection, and collect what came later
            in the actor's slack only.
        actor_process: the actor has a process, and so an interpreter, of its own; False = the planner is a thread
            beside it and both share one interpreter lock.
    """

    fifo_priority: int = 50
    planner_priority: int = 40
    actor_cpus: tuple[int, ...] = ()
    planner_cpus: tuple[int, ...] = ()
    lock_memory: bool = True
    freeze_gc: bool = True
    actor_process: bool = True

    def __post_init__(self) -> None:
        for name in ("fifo_priority", "planner_priority"):
            if not 0 <= getattr(self, name) <= 99:
                raise BadConfig(f"runtime.realtime.{name} is {getattr(self, name)}; valid: 1..99, or 0 for none")
        if self.fifo_priority and self.planner_priority >= self.fifo_priority:
            raise BadConfig(
                f"runtime.realtime.planner_priority is {self.planner_priority}; valid: less than fifo_priority "
                f"{self.fifo_priority}, so that a plan never delays a command"
            )
        for name in ("actor_cpus", "planner_cpus"):
            if any(cpu < 0 for cpu in getattr(self, name)):
                raise BadConfig(
                    f"runtime.realtime.{name} is {list(getattr(self, name))}; valid: numbers of cores, from 0 on"
                )


class Grant(NamedTuple):
    """One request to the operating system or the interpreter, and what came of it."""

    role: str  # who asked: actor, planner, or the process
    what: str
    asked: str
    is_granted: bool
    reason: str = ""  # why not; empty = granted

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"role": self.role, "what": self.what, "asked": self.asked, "granted": self.is_granted,
                "reason": self.reason}  # fmt: skip


def ask(role: str, what: str, asked: str, call: Callable[[], object]) -> Grant:
    """Make one request. An `OSError`, or a system that has no such call, is a refusal with its reason."""
    try:
        call()
    except (OSError, AttributeError, ValueError) as error:
        return Grant(role, what, asked, False, _reason(error))
    return Grant(role, what, asked, True)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{errno.errorcode.get(error.errno, error.errno)}: {os.strerror(error.errno)}"
    if isinstance(error, AttributeError):
        return f"{sys.platform} has no such call"
    return str(error)


@contextmanager
def thread_privileges(role: str, priority: int, cpus: Sequence[int]) -> Iterator[tuple[Grant, ...]]:
    """Scheduler, cores and timer slack of the calling thread while the block lasts; as they were afterwards.

    Args:
        role: for the report.
        priority: under SCHED_FIFO; 0 = not asked for.
        cpus: cores; empty = not asked for.

    Yields:
        What was asked for, and what came of it.
    """
    grants: list[Grant] = []
    undo: list[Callable[[], None]] = []
    if cpus:
        before = _affinity()
        grants.append(ask(role, "cores", ",".join(map(str, cpus)), lambda: os.sched_setaffinity(0, cpus)))
        if grants[-1].is_granted and before:
            undo.append(lambda: os.sched_setaffinity(0, before))
    if priority:
        policy, old = _scheduler()
        grants.append(ask(role, "SCHED_FIFO", f"priority {priority}", lambda: _set_fifo(priority)))
        if grants[-1].is_granted:
            undo.append(lambda: os.sched_setscheduler(0, policy, os.sched_param(old)))
    slack_ns = _timer_slack_ns()
    grants.append(
        ask(role, "timer slack", f"{LEAST_TIMER_SLACK_NS} ns", lambda: _set_timer_slack(LEAST_TIMER_SLACK_NS))
    )
    if grants[-1].is_granted and slack_ns > 0:
        undo.append(lambda: _set_timer_slack(slack_ns))
    try:
        yield tuple(grants)
    finally:
        for call in reversed(undo):
            call()


@contextmanager
def locked_memory(role: str, is_wanted: bool) -> Iterator[tuple[Grant, ...]]:
    """All pages of this process stay in memory while the block lasts, those to come included."""
    if not is_wanted:
        yield ()
        return
    grant = ask(
        role, "locked memory", "all pages, now and later", lambda: _libc_call("mlockall", _MCL_CURRENT | _MCL_FUTURE)
    )
    try:
        yield (grant,)
    finally:
        if grant.is_granted:
            _libc_call("munlockall")


def _libc_call(name: str, *arguments: int) -> int:
    """A C library function that returns -1 and sets errno on failure.

    Raises:
        OSError: it failed. AttributeError: there is no such function.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result: int = function(*(ctypes.c_ulong(argument) for argument in arguments))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _set_fifo(priority: int) -> None:
    # Reset on fork: a child of the loop must not inherit the right to starve the machine.
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))


def _scheduler() -> tuple[int, int]:
    try:
        return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    except AttributeError:
        return 0, 0


def _affinity() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:
        return set()


def _set_timer_slack(slack_ns: int) -> None:
    _libc_call("prctl", _PR_SET_TIMERSLACK, slack_ns, 0, 0, 0)


def _timer_slack_ns() -> int:
    try:
        return _libc_call("prctl", _PR_GET_TIMERSLACK, 0, 0, 0, 0)
    except (OSError, AttributeError):
        return 0


@final
class QuietInterpreter:
    """While active: no garbage collection but where `collect_in` says so, and threads hand over within half a ms."""

    def __init__(self, now_ns: NowNs) -> None:
        self._now_ns = now_ns
        self._longest_ns = [FIRST_GUESS_NS] * NUM_GENERATIONS
        self._calls = 0
        self._is_frozen = False
        #: Collections in slack since the block began, and the longest of them [ns].
        self.num_collections = 0
        self.longest_ns = 0

    def __enter__(self) -> QuietInterpreter:
        self._was_collecting, self._interval_s = gc.isenabled(), sys.getswitchinterval()
        gc.collect()
        gc.disable()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        return self

    def freeze(self, role: str) -> Grant:
        """After warm-up: what exists now is never looked at again while the block lasts."""
        gc.collect()
        gc.freeze()
        self._is_frozen = True
        return Grant(role, "frozen garbage collection", f"{gc.get_freeze_count()} objects", True)

    def collect_in(self, slack_ns: int) -> None:
        """Collect if the time until the next tick is several times what collecting took at most so far.

        The youngest generation each time, older ones every 16th and every 256th time.
        """
        self._calls += 1
        generation = 0 if self._calls % 16 else 1 if self._calls % 256 else 2
        if slack_ns < SAFETY * self._longest_ns[generation]:
            return
        start_ns = self._now_ns()
        gc.collect(generation)
        took_ns = self._now_ns() - start_ns
        self.num_collections += 1
        self._longest_ns[generation] = max(self._longest_ns[generation], took_ns)
        self.longest_ns = max(self.longest_ns, took_ns)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.setswitchinterval(self._interval_s)
        if self._is_frozen:
            gc.unfreeze()
        if self._was_collecting:
            gc.enable()


@final
class UsageLog:
    """Page faults and context switches of one thread, tick by tick. Owned by that thread; about 2 us a tick.

    A minor fault is a page that was in memory but not mapped, a major one a page that had to be read; a switch is
    voluntary where the thread waited, and involuntary where it was pushed aside.

    Args:
        num_ticks: that are kept at most; later ones are added to the last row.
    """

    def __init__(self, num_ticks: int) -> None:
        self._rows = np.zeros((max(1, num_ticks), len(USAGE_FIELDS)), np.int64)
        self._num_ticks = 0
        self._last: tuple[int, ...] | None = None

    def begin(self) -> None:
        """The thread's first tick begins now."""
        self._last = _usage()

    def tick(self) -> None:
        """A tick ended."""
        now, last = _usage(), self._last
        if now is None or last is None:
            return
        row = self._rows[min(self._num_ticks, len(self._rows) - 1)]
        for column, (before, after) in enumerate(zip(last, now, strict=True)):
            row[column] += after - before
        self._last = now
        self._num_ticks += 1

    @property
    def rows(self) -> Int64:
        """int64 [ticks, 4], see `USAGE_FIELDS`; no rows where the system doesn't say."""
        return self._rows[: min(self._num_ticks, len(self._rows))].copy()


def _usage() -> tuple[int, ...] | None:
    if resource is None or not hasattr(resource, "RUSAGE_THREAD"):
        return None
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt, usage.ru_majflt, usage.ru_nvcsw, usage.ru_nivcsw


@dataclass(frozen=True, slots=True)
class RealtimeRecord:
    """One episode in real time. Window of everything: the episode behind its first plan.

    Attributes:
        period_ns: nominal control period.
        lateness_ns: int64 [num_steps], how much later than scheduled each control step began.
        actor_usage: int64 [num_steps, 4], see `USAGE_FIELDS`; no rows = not measured.
        planner_usage: int64 [plans, 4], the same of the planner's thread, per plan.
        grants: what was asked for; empty = nothing.
        num_collections, longest_collection_ns: garbage collections in the actor's slack.
        is_own_process: the actor had an interpreter of its own.
    """

    period_ns: int
    lateness_ns: Int64
    actor_usage: Int64
    planner_usage: Int64
    grants: tuple[Grant, ...] = ()
    num_collections: int = 0
    longest_collection_ns: int = 0
    is_own_process: bool = False


@dataclass(frozen=True, slots=True)
class Cadence:
    """How regular ticks were, in microseconds: p50, p99, p99.9 and the largest.

    Attributes:
        num_ticks: steps that began on a schedule.
        lateness_us: begun so much later than scheduled.
        jitter_us: absolute difference between a period and the nominal one.
    """

    num_ticks: int
    lateness_us: dict[str, float] = field(default_factory=dict)
    jitter_us: dict[str, float] = field(default_factory=dict)


def cadence(lateness_ns: Iterable[Int64]) -> Cadence:
    """Of several episodes: periods are taken within each of them.

    Args:
        lateness_ns: int64 [num_steps], one array per episode.
    """
    parts = [part for part in lateness_ns if len(part)]
    if not parts:
        return Cadence(0)
    # The schedule is absolute, so a period's error is how much later one step was than the one before it.
    jitter = np.concatenate([np.abs(np.diff(part)) for part in parts])
    late = np.concatenate(parts)
    return Cadence(len(late), _percentiles_us(late), _percentiles_us(jitter))


def report(records: Sequence[RealtimeRecord]) -> dict[str, Any]:
    """What the real-time block of results.json says about one mode. Window: all of its episodes.

    Returns:
        ``grants`` (of the last episode; refusals of any), ``cadence``, ``actor`` and ``planner`` (page faults and
        context switches per tick and per plan), ``garbage_collection``, ``is_own_process``.
    """
    if not records:
        return {}
    together = cadence(record.lateness_ns for record in records)
    grants: dict[tuple[str, str], Grant] = {}
    for record in records:
        for grant in record.grants:
            key = (grant.role, grant.what)
            if key not in grants or grants[key].is_granted:
                grants[key] = grant
    return {
        "is_own_process": records[-1].is_own_process,
        "period_us": round(records[-1].period_ns / 1e3, 3),
        "grants": [grant.as_json() for grant in grants.values()],
        "cadence": {
            "num_ticks": together.num_ticks,
            "lateness_us": together.lateness_us,
            "jitter_us": together.jitter_us,
        },
        "actor": usage_summary([record.actor_usage for record in records]),
        "planner": usage_summary([record.planner_usage for record in records]),
        "garbage_collection": {
            "num_collections": sum(record.num_collections for record in records),
            "longest_us": round(max(record.longest_collection_ns for record in records) / 1e3, 1),
        },
    }


def usage_summary(rows: Sequence[Int64]) -> dict[str, Any]:
    """Page faults and context switches: in all, ticks that had any, and the most in one tick. Empty = not measured."""
    parts = [part for part in rows if len(part)]
    if not parts:
        return {}
    table = np.concatenate(parts)
    summary: dict[str, Any] = {"num_ticks": len(table)}
    for column, name in enumerate(USAGE_FIELDS):
        values = table[:, column]
        summary[name] = {
            "total": int(values.sum()),
            "ticks_with_any": int((values > 0).sum()),
            "p99": round(float(np.percentile(values, 99)), 2),
            "max": int(values.max()),
        }
    return summary


def _percentiles_us(values_ns: Int64) -> dict[str, float]:
    if not len(values_ns):
        return {}
    values = np.percentile(values_ns, (50, 99, 99.9, 100)) / 1e3
    return dict(zip(("p50", "p99", "p99_9", "max"), (round(float(v), 1) for v in values), strict=True))
