"""Plan recorded observations and keep everything that was measured, modes in turn: cold, idle or loaded."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, final

from vla_spec.assemble import Assembly
from vla_spec.chunks import ChunkBuffer
from vla_spec.clock import NS_PER_S, NowNs
from vla_spec.comparison import Sample
from vla_spec.errors import BadConfig
from vla_spec.progress import Reporter
from vla_spec.runtime import NO_DEADLINE_NS
from vla_spec.trace import PlanRecord

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Amount:
    """How much to measure per mode; exactly one of the two is given.

    Attributes:
        plans: of each mode. None = as many as fit.
        seconds: for all modes together; every mode gets the same number of plans. [s]
    """

    plans: int | None = 200
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.plans is None) == (self.seconds is None):
            raise BadConfig("give either --plans or --seconds, not both and not neither")
        if self.plans is not None and self.plans < 1:
            raise BadConfig(f"--plans is {self.plans}; valid: 1 or more")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise BadConfig(f"--seconds is {self.seconds}; valid: more than 0")


class Measured(NamedTuple):
    """One plan and what surrounded it.

    Attributes:
        plan: as the policy measured it.
        hand_over_ns: putting the chunk into the actor's buffer and reading the first command.
        num_switches: times that the system took the core away from this thread during the plan.
        num_faults: pages that the system had to provide during the plan.
    """

    plan: PlanRecord
    hand_over_ns: int
    num_switches: int
    num_faults: int


@final
class Bench:
    """One mode, and the buffer that its chunks go into. Each plan counts as the next look of one long episode.

    Args:
        assembly: the mode.
        budget_ns: time for a plan.
        is_cut: the policy is told about it and cuts; False = chunks are decoded whole, however long that takes, and
            the records say afterwards how much of the budget was left.
    """

    def __init__(self, assembly: Assembly, budget_ns: int, is_cut: bool) -> None:
        self.assembly, self.budget_ns, self._is_cut = assembly, budget_ns, is_cut
        self._buffer = ChunkBuffer(
            assembly.policy.space, assembly.domain.tokens_per_step, replace(assembly.runtime.chunks)
        )
        self._step = 0

    def plan(self, sample: Sample) -> Measured:
        """Plan one observation as if it were taken now."""
        assembly = self.assembly
        policy, now_ns = assembly.policy, assembly.clock.now_ns
        switches, faults = _usage()
        stamp_ns = now_ns()
        observation = replace(sample.observation, stamp_ns=stamp_ns)
        given_ns = self.budget_ns if self._is_cut else NO_DEADLINE_NS
        chunk = policy.plan(observation, stamp_ns + given_ns, sample.history)
        plan = policy.last_record
        switches_after, faults_after = _usage()
        assert plan is not None, f"{assembly.config.mode=}"
        if not self._is_cut:
            plan = plan._replace(deadline_ns=plan.start_ns + self.budget_ns)
        chunk = replace(chunk, observation_step=self._step)
        before_ns = now_ns()
        self._buffer.put(chunk)
        self._buffer.command(self._step)
        hand_over_ns = now_ns() - before_ns
        self._step += assembly.runtime.execute_horizon
        return Measured(plan, hand_over_ns, switches_after - switches, faults_after - faults)


def plan_all(
    benches: Sequence[Bench], samples: Sequence[Sample], amount: Amount, now_ns: NowNs, progress: Reporter
) -> dict[str, list[Measured]]:
    """Every mode plans every sample, over and over until there is enough, each time beginning with another mode.

    Args:
        benches: one per mode, warmed up.
        samples: at least one.
        amount: when to stop; at least one plan of each mode is made.
        now_ns: clock of ``amount.seconds``.
        progress: told about each turn.

    Returns:
        Mode -> its plans, in the order of time; as many for each mode.
    """
    found: dict[str, list[Measured]] = {bench.assembly.config.mode: [] for bench in benches}
    end_ns = None if amount.seconds is None else now_ns() + round(amount.seconds * NS_PER_S)
    with quiet():
        for turn in itertools.count():
            first = turn % len(benches)
            for bench in (*benches[first:], *benches[:first]):
                found[bench.assembly.config.mode].append(bench.plan(samples[turn % len(samples)]))
            progress.step()
            if (turn + 1 == amount.plans) if end_ns is None else now_ns() >= end_ns:
                return found
            if turn % 64 == 63:
                gc.collect(0)
    raise AssertionError("unreachable")


def warm_up(benches: Sequence[Bench], samples: Sequence[Sample], num_plans: int) -> None:
    """Plans that count nowhere."""
    for bench, i in itertools.product(benches, range(num_plans)):
        bench.plan(samples[i % len(samples)])


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection by itself meanwhile, as in the real-time loop."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _find_usage() -> Callable[[], tuple[int, int]]:
    if sys.platform == "win32":
        return lambda: (0, 0)
    import resource

    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)

    def usage() -> tuple[int, int]:
        used = resource.getrusage(who)
        return used.ru_nivcsw, used.ru_minflt + used.ru_majflt

    return usage


#: Involuntary context switches and page faults of this thread so far; zeros where the system does not tell.
_usage = _find_usage()
