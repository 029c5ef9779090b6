"""Where faults are put in: the hooks of `vla_spec/faults/`, and the wrappers that carry them out on a virtual clock.

Whatever goes wrong in plan k, and what each of its calls takes, is a pure function of the seed and of plan, round and
size. Every decoding mode therefore meets the same weather, however many calls it makes and in whichever order; and
what a call that was never made would have taken can be asked for in hindsight.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import NormalDist
from typing import NamedTuple, final

import numpy as np

from vla_spec.clock import VirtualClock
from vla_spec.costs import Costs
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory, Drafter, Engine, ScoreObserver
from vla_spec.runtime import EpisodicRobot
from vla_spec.types import Draft, EngineInputs, Float32, Int32, Observation, Plan, Scores
from vla_spec.virtual_costs import ChargedDrafter, ChargedEngine
from vla_spec.wrapped_engine import WrappedEngine
from vla_spec.wrapped_robot import WrappedRobot

_MASK = (1 << 64) - 1
_NORMAL = NormalDist()
#: Observations of earlier plans that a fault may put in the place of the new one.
PAST_OBSERVATIONS = 8


class CallKind(IntEnum):
    """What a call is, for its price and for where a fault strikes."""

    PREFILL = 0
    STEP = 1
    DRAFT = 2
    COMMIT = 3


class Call(NamedTuple):
    """One call of an engine or a drafter.

    ``plan`` counts planning ticks of the run. ``round`` is 0 for the prefill; round r drafts, then steps, then commits.
    ``size``: tokens of a step, nodes asked of a drafter, 0 otherwise.
    """

    plan: int
    round: int
    kind: CallKind
    size: int


@final
class Draws:
    """Random numbers that are looked up, not consumed: the same seed, name and index give the same number.

    Source: the mixing function of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195.
    """

    def __init__(self, seed: int, name: str) -> None:
        state = _mix(seed & _MASK)
        for byte in name.encode():
            state = _mix(state ^ byte)
        self._state = state

    def uniform(self, *index: int) -> float:
        """A number in [0, 1)."""
        state = self._state
        for i in index:
            state = _mix(state ^ (i & _MASK))
        return (state >> 11) * 2.0**-53

    def normal(self, *index: int) -> float:
        """A number from the standard normal distribution."""
        return _NORMAL.inv_cdf(max(self.uniform(*index), 2.0**-53))

    def below(self, limit: int, *index: int) -> int:
        """A whole number in [0, limit)."""
        return int(self.uniform(*index) * limit)


@dataclass(frozen=True, slots=True)
class Chance:
    """Options of a fault that strikes by chance and has nothing else to set.

    Attributes:
        probability: of each plan.
    """

    probability: float = 0.01

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1):
            raise BadConfig(f"probability is {self.probability}; valid: 0..1")


class Fault:
    """One thing that goes wrong. Each file of `vla_spec/faults/` overrides the hooks that it needs.

    Hooks are pure functions of their arguments and of ``draws``: called twice, or in another order, they give the same
    answer. What is handed in is never changed in place. A hook that leaves things alone returns what it was given.

    Attributes:
        is_foreseeable: False for a delay that nobody could see coming, whatever was measured before; plans that it
            strikes count as infeasible (docs/stress.md).
        needs_drafter: True if it can only strike a mode that drafts.
        fired: how often it struck; counted by the wrappers below.
    """

    is_foreseeable = True
    needs_drafter = False

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.fired = 0

    def slowdown(self, plan: int) -> float:
        """Factor on the time of every call of a plan: the regime that the machine is in. Fires once per plan."""
        return 1.0

    def call_ns(self, call: Call, ns: float) -> float:
        """What one call takes that would take ``ns`` [ns]."""
        return ns

    def observe(self, plan: int, seen: Observation, past: Sequence[Observation]) -> Observation:
        """What the planner gets instead of ``seen``. past: true observations of earlier plans, newest last."""
        return seen

    def instruction(self, step: int, current: str, offered: Sequence[str]) -> str:
        """The order from this control step of the run on."""
        return current

    def before(self, call: Call) -> None:
        """Raise what the engine or the drafter is to raise instead of answering."""

    def scores(self, call: Call, scores: Scores) -> Scores:
        """What the engine says instead."""
        return scores

    def draft(self, call: Call, draft: Draft) -> Draft:
        """What the drafter proposes instead."""
        return draft


@final
class Weather:
    """What each call of each plan takes: the calibrated distribution, then what the faults make of it.

    Args:
        costs: of the undisturbed machine; drawn from by their quantiles, and what controllers are told.
        faults: all of them; those without latency hooks are skipped.
        seed: of the undisturbed machine's spread.
        longest: most tokens of one step.
    """

    def __init__(self, costs: Costs, faults: Sequence[Fault], seed: int, longest: int) -> None:
        self._draws = Draws(seed, "undisturbed")
        levels = sorted({q for cost in (costs.prefill, *costs.step.values(), *costs.draft.values()) for q in cost})
        self._levels = levels
        self._prefill = [costs.prefill_quantile_ns(q) for q in levels]
        self._step = [[costs.step_quantile_ns(n, q) for q in levels] for n in range(longest + 1)]
        self._draft = [[costs.draft_quantile_ns(n, q) for q in levels] for n in range(longest + 1)]
        self._regimes = overriding(faults, "slowdown")
        self._shocks = overriding(faults, "call_ns")
        self._asked, self._answer = -1, [1.0] * len(self._regimes)

    def slowdown(self, plan: int) -> float:
        """Product of all regimes."""
        return math.prod(self._factors(plan))

    def is_struck_unforeseeably(self, plan: int, num_rounds: int) -> bool:
        """Some fault that nobody could see coming changes one of the first calls of this plan."""
        for fault in self._shocks:
            if not fault.is_foreseeable:
                for r in range(num_rounds + 1):
                    call = Call(plan, r, CallKind.STEP if r else CallKind.PREFILL, 1)
                    if fault.call_ns(call, 1.0) != 1.0:
                        return True
        return False

    def call_ns(self, call: Call, slowdown: float) -> int:
        """What a call takes, without counting it. slowdown: of its plan, from `slowdown`."""
        ns = self._undisturbed_ns(call) * slowdown
        for fault in self._shocks:
            ns = fault.call_ns(call, ns)
        return int(ns)

    def charge_ns(self, call: Call, slowdown: float, struck: set[Fault]) -> int:
        """What a call takes; counts the faults that changed it and adds them to ``struck``."""
        ns = self._undisturbed_ns(call) * slowdown
        for fault in self._shocks:
            changed = fault.call_ns(call, ns)
            if changed != ns:
                fault.fired += 1
                struck.add(fault)
            ns = changed
        return int(ns)

    def count_regimes(self, plan: int, struck: set[Fault]) -> None:
        """Count the regimes that a plan runs under."""
        for fault, factor in zip(self._regimes, self._factors(plan), strict=True):
            if factor != 1.0:
                fault.fired += 1
                struck.add(fault)

    def _factors(self, plan: int) -> list[float]:
        """Of each regime; remembered for the plan that was asked about last."""
        if self._asked != plan:
            self._asked, self._answer = plan, [fault.slowdown(plan) for fault in self._regimes]
        return self._answer

    def _undisturbed_ns(self, call: Call) -> float:
        if call.kind is CallKind.PREFILL:
            values = self._prefill
        else:
            table = self._step if call.kind is CallKind.STEP else self._draft
            values = table[min(call.size, len(table) - 1)]
        if len(values) == 1:
            return values[0]
        # The size is no part of the index: a round that is slow is slow for every draft length.
        u = self._draws.uniform(call.plan, call.round, int(call.kind))
        levels = self._levels
        i = bisect_right(levels, u)
        if i == 0 or i == len(levels):
            return values[min(i, len(levels) - 1)]
        share = (u - levels[i - 1]) / (levels[i] - levels[i - 1])
        return values[i - 1] + share * (values[i] - values[i - 1])


@final
class Injector:
    """Wraps one mode's robot, engine and drafter, and knows in which plan and round it is. Not thread-safe.

    Args:
        faults: built anew for each mode, from the same seed.
        weather: what calls take.
        clock: moved by engine and drafter calls.
    """

    def __init__(self, faults: dict[str, Fault], weather: Weather, clock: VirtualClock) -> None:
        self.faults, self.weather, self.clock = faults, weather, clock
        everything = list(faults.values())
        self._observing = overriding(everything, "observe")
        self._ordering = overriding(everything, "instruction")
        self._raising = overriding(everything, "before")
        self._scoring = overriding(everything, "scores")
        self._drafting = overriding(everything, "draft")
        self.plan, self.round = -1, 0
        self.charged_ns = 0  # in this plan
        self.struck: set[Fault] = set()  # in this plan
        self._slowdown = 1.0

    def begin_plan(self) -> None:
        """The next plan begins, with its observation."""
        self.plan += 1
        self.round = self.charged_ns = 0
        self.struck = set()
        self._slowdown = self.weather.slowdown(self.plan)

    def observe(self, seen: Observation, past: Sequence[Observation]) -> Observation:
        """What the planner gets."""
        for fault in self._observing:
            given = fault.observe(self.plan, seen, past)
            if given is not seen:
                self._strike(fault)
            seen = given
        return seen

    def instruction(self, step: int, current: str, offered: Sequence[str]) -> str:
        """The order that holds from this control step of the run on."""
        for fault in self._ordering:
            changed = fault.instruction(step, current, offered)
            if changed != current:
                fault.fired += 1
            current = changed
        return current

    def before(self, call: Call) -> None:
        """Raise what a fault wants to be raised."""
        for fault in self._raising:
            try:
                fault.before(call)
            except Exception:
                self._strike(fault)
                raise

    def scores(self, call: Call, scores: Scores) -> Scores:
        """What the engine says."""
        for fault in self._scoring:
            said = fault.scores(call, scores)
            if said is not scores:
                self._strike(fault)
            scores = said
        return scores

    def draft(self, call: Call, draft: Draft) -> Draft:
        """What the drafter proposes."""
        for fault in self._drafting:
            proposed = fault.draft(call, draft)
            if proposed is not draft:
                self._strike(fault)
            draft = proposed
        return draft

    # The three prices, as `virtual_costs.Charges` asks for them; the generator is not used.

    def prefill_ns(self, rng: np.random.Generator) -> int:
        """Of this plan's prefill."""
        self.weather.count_regimes(self.plan, self.struck)
        return self._charge(Call(self.plan, 0, CallKind.PREFILL, 0))

    def step_ns(self, num_tokens: int, rng: np.random.Generator) -> int:
        """Of a step in this round."""
        return self._charge(Call(self.plan, self.round, CallKind.STEP, num_tokens))

    def draft_ns(self, num_tokens: int, rng: np.random.Generator) -> int:
        """Of a draft for the next round."""
        return self._charge(Call(self.plan, self.round + 1, CallKind.DRAFT, num_tokens))

    def _charge(self, call: Call) -> int:
        ns = self.weather.charge_ns(call, self._slowdown, self.struck)
        self.charged_ns += ns
        return ns

    def _strike(self, fault: Fault) -> None:
        fault.fired += 1
        self.struck.add(fault)

    def wrap_engine(self, engine: Engine) -> FaultyEngine:
        """An engine that takes time and goes wrong."""
        return FaultyEngine(ChargedEngine(engine, self, self.clock, np.random.default_rng(0)), self)

    def wrap_drafter(self, drafter: Drafter) -> FaultyDrafter:
        """A drafter that takes time and goes wrong."""
        return FaultyDrafter(ChargedDrafter(drafter, self, self.clock, np.random.default_rng(0)), self)


@final
class FaultyEngine(WrappedEngine):
    """An engine whose calls fail, or say nonsense, after their time has passed."""

    def __init__(self, engine: ChargedEngine, injector: Injector) -> None:
        super().__init__(engine)
        self._injector = injector

    def prefill(self, inputs: EngineInputs) -> Scores:
        """Round 0."""
        injector = self._injector
        injector.round = 0
        scores = self.engine.prefill(inputs)
        call = Call(injector.plan, 0, CallKind.PREFILL, 0)
        injector.before(call)
        return injector.scores(call, scores)

    def step(self, tokens: Int32, parents: Int32) -> Scores:
        """The next round."""
        injector = self._injector
        injector.round += 1
        scores = self.engine.step(tokens, parents)
        call = Call(injector.plan, injector.round, CallKind.STEP, len(tokens))
        injector.before(call)
        return injector.scores(call, scores)

    def commit(self, path: Int32) -> None:
        """Of this round."""
        injector = self._injector
        injector.before(Call(injector.plan, injector.round, CallKind.COMMIT, 0))
        self.engine.commit(path)


@final
class FaultyDrafter:
    """A drafter that fails, or makes up nonsense, after its time has passed."""

    def __init__(self, drafter: ChargedDrafter, injector: Injector) -> None:
        self._drafter, self._injector = drafter, injector
        self._observe = drafter.observe if isinstance(drafter, ScoreObserver) else None

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """The wrapped drafter's; a new chunk takes no time."""
        self._drafter.begin(inputs, history)

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """The wrapped drafter's, or what a fault makes of it."""
        injector = self._injector
        draft = self._drafter.propose(prefix, plan, features)
        call = Call(injector.plan, injector.round + 1, CallKind.DRAFT, plan.gamma)
        injector.before(call)
        return injector.draft(call, draft)

    def observe(self, draft: Draft, scores: Scores) -> None:
        """Passed on to a drafter that wants to know."""
        if self._observe is not None:
            self._observe(draft, scores)


@final
class FaultyRobot(WrappedRobot):
    """A robot whose camera, sensors and orders go wrong; what it is told to do, it does.

    Args:
        robot: the real one.
        injector: its faults.
        offered: sentences that an order may change to.
    """

    def __init__(self, robot: EpisodicRobot, injector: Injector, offered: Sequence[str]) -> None:
        super().__init__(robot)
        self._injector, self._offered = injector, offered
        self._past: deque[Observation] = deque(maxlen=PAST_OBSERVATIONS)
        self._step = 0
        self._instruction: str | None = None
        #: What was handed to the planner last.
        self.given: Observation | None = None
        #: Control step of this episode from which the current order holds.
        self.ordered_at = 0

    @property
    def instruction(self) -> str | None:
        """The order that holds; None = the robot's own, not looked at yet."""
        return self._instruction

    def reset(self, seed: int) -> None:
        """Start an episode: earlier pictures and the order are forgotten."""
        self.robot.reset(seed)
        self._past.clear()
        self._instruction, self._step, self.ordered_at, self.given = self._offered[0], 0, 0, None

    def order(self, run_step: int) -> None:
        """Let the order change. run_step: control steps of the whole run."""
        assert self._instruction is not None, "order before reset"
        changed = self._injector.instruction(run_step, self._instruction, self._offered)
        if changed != self._instruction:
            self._instruction, self.ordered_at = changed, self._step

    def observe(self, now_ns: int) -> Observation:
        """Look; what is returned may be wrong in any way. A plan begins."""
        self._injector.begin_plan()
        seen = self.robot.observe(now_ns)
        if self._instruction is not None and self._instruction != seen.instruction:
            seen = Observation(seen.images, seen.state, self._instruction, seen.stamp_ns, seen.step)
        self.given = self._injector.observe(seen, tuple(self._past))
        self._past.append(seen)
        return self.given

    def act(self, action: Float32, now_ns: int) -> Float32:
        """Do it."""
        sent = self.robot.act(action, now_ns)
        self._step += 1
        return sent


def overriding(faults: Sequence[Fault], hook: str) -> list[Fault]:
    """Those faults that do something in this hook."""
    return [fault for fault in faults if getattr(type(fault), hook) is not getattr(Fault, hook)]


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
