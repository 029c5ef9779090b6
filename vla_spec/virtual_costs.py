"""Charge a virtual clock for what engine and drafter calls would have cost: episodes with latency that repeat exactly.

A cost is a distribution, given by quantiles, that is drawn from with a seeded generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, final

import numpy as np

from vla_spec.clock import VirtualClock
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory, Drafter, Engine, EngineInfo, ScoreObserver
from vla_spec.types import Draft, EngineInputs, Int32, Plan, Scores

#: Nanoseconds: one number, or ``{quantile in 0..1: ns}``.
Cost = int | float | Mapping[float, float]


@final
class CostDistribution:
    """Inverse of a piecewise linear distribution function, flat beyond the outermost quantiles.

    Raises:
        BadConfig: negative costs, quantiles outside [0, 1] or costs that fall with the quantile.
    """

    def __init__(self, cost: Cost) -> None:
        points = sorted((float(q), float(ns)) for q, ns in cost.items()) if isinstance(cost, Mapping) else [(0.5, cost)]
        self._q = np.array([q for q, _ in points])
        self._ns = np.array([ns for _, ns in points])
        if not len(points) or (self._ns < 0).any() or (np.diff(self._ns) < 0).any():
            raise BadConfig(f"cost is {cost}; valid: 0 or more, rising with the quantile")
        if self._q[0] < 0 or self._q[-1] > 1:
            raise BadConfig(f"cost has quantiles {self._q.tolist()}; valid: 0..1")

    def draw_ns(self, rng: np.random.Generator) -> int:
        """One cost [ns]."""
        return int(np.interp(rng.random(), self._q, self._ns))


class Charges(Protocol):
    """What calls cost, one draw at a time."""

    def prefill_ns(self, rng: np.random.Generator) -> int:
        """Cost of one prefill."""

    def step_ns(self, num_tokens: int, rng: np.random.Generator) -> int:
        """Cost of a step of so many tokens."""

    def draft_ns(self, num_tokens: int, rng: np.random.Generator) -> int:
        """Cost of asking for so many tokens."""


@final
class CostTable:
    """Costs of a prefill, of steps and of drafts by their size; sizes between the measured ones cost the larger's.

    Args:
        prefill: cost of one prefill.
        step: ``{tokens: cost}`` of one step; empty = free.
        draft: ``{drafted tokens: cost}`` of one draft; empty = free.
    """

    def __init__(self, prefill: Cost, step: Mapping[int, Cost], draft: Mapping[int, Cost] | None = None) -> None:
        self.prefill = CostDistribution(prefill)
        self._step = {int(k): CostDistribution(cost) for k, cost in sorted(step.items())}
        self._draft = {int(k): CostDistribution(cost) for k, cost in sorted((draft or {}).items())}

    def prefill_ns(self, rng: np.random.Generator) -> int:
        """Cost of one prefill."""
        return self.prefill.draw_ns(rng)

    def step_ns(self, num_tokens: int, rng: np.random.Generator) -> int:
        """Cost of a step of so many tokens."""
        return _at(self._step, num_tokens, rng)

    def draft_ns(self, num_tokens: int, rng: np.random.Generator) -> int:
        """Cost of asking for so many tokens."""
        return _at(self._draft, num_tokens, rng)


def _at(costs: Mapping[int, CostDistribution], size: int, rng: np.random.Generator) -> int:
    if not costs:
        return 0
    sizes: Sequence[int] = list(costs)
    fits = [k for k in sizes if k >= size]
    return costs[fits[0] if fits else sizes[-1]].draw_ns(rng)


@final
class ChargedEngine:
    """An engine whose calls let time pass on a virtual clock; everything else is the wrapped engine's."""

    def __init__(self, engine: Engine, costs: Charges, clock: VirtualClock, rng: np.random.Generator) -> None:
        self.engine, self._costs, self._clock, self._rng = engine, costs, clock, rng

    @property
    def info(self) -> EngineInfo:
        """The wrapped engine's."""
        return self.engine.info

    @property
    def length(self) -> int:
        """The wrapped engine's."""
        return self.engine.length

    @property
    def max_step(self) -> int:
        """The wrapped engine's."""
        return self.engine.max_step

    @property
    def features(self) -> object | None:
        """The wrapped engine's."""
        return self.engine.features

    def prefill(self, inputs: EngineInputs) -> Scores:
        """Prefill, and charge for it."""
        scores = self.engine.prefill(inputs)
        self._clock.advance(self._costs.prefill_ns(self._rng))
        return scores

    def step(self, tokens: Int32, parents: Int32) -> Scores:
        """Step, and charge for that many tokens."""
        scores = self.engine.step(tokens, parents)
        self._clock.advance(self._costs.step_ns(len(tokens), self._rng))
        return scores

    def commit(self, path: Int32) -> None:
        """Free of charge."""
        self.engine.commit(path)


@final
class ChargedDrafter:
    """A drafter whose drafts let time pass on a virtual clock."""

    def __init__(self, drafter: Drafter, costs: Charges, clock: VirtualClock, rng: np.random.Generator) -> None:
        self.drafter, self._costs, self._clock, self._rng = drafter, costs, clock, rng
        self._observe = drafter.observe if isinstance(drafter, ScoreObserver) else None

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """Free of charge."""
        self.drafter.begin(inputs, history)

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """Propose, and charge for the nodes that were asked for."""
        draft = self.drafter.propose(prefix, plan, features)
        self._clock.advance(self._costs.draft_ns(plan.gamma, self._rng))
        return draft

    def observe(self, draft: Draft, scores: Scores) -> None:
        """Pass on what the target said, if the wrapped drafter wants to know. Free of charge."""
        if self._observe is not None:
            self._observe(draft, scores)
