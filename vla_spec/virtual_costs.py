"""Charge a virtual clock for what engine and drafter calls would have cost: episodes with latency that repeat exactly.

A cost is a distribution, given by quantiles, that is drawn from with a seeded generator.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Protocol, final

import numpy as np

from vla_spec.clock import VirtualClock
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ActionTokenizer, Adapter, ChunkHistory, Drafter, Engine, ScoreObserver
from vla_spec.types import Draft, EngineInputs, Float32, Int32, Observation, Plan, Scores, TokenDomain
from vla_spec.wrapped_engine import WrappedEngine

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

    def at(self, level: float) -> float:
        """The cost at one level in [0, 1] [ns]."""
        return float(np.interp(level, self._q, self._ns))

    def draw_ns(self, rng: np.random.Generator) -> int:
        """One cost [ns]."""
        return int(self.at(rng.random()))


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
    """Costs of a prefill, of steps and of drafts by their size.

    Sizes between the measured ones are interpolated at one level, as `vla_spec.costs.Costs` predicts them; sizes
    outside cost as much as the nearest.

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
        return _draw_at(self._step, num_tokens, rng)

    def draft_ns(self, num_tokens: int, rng: np.random.Generator) -> int:
        """Cost of asking for so many tokens."""
        return _draw_at(self._draft, num_tokens, rng)


def _draw_at(costs: Mapping[int, CostDistribution], size: int, rng: np.random.Generator) -> int:
    if not costs:
        return 0
    level = rng.random()
    sizes: Sequence[int] = list(costs)
    above = bisect_left(sizes, size)
    if above == len(sizes) or sizes[above] == size or above == 0:
        return int(costs[sizes[min(above, len(sizes) - 1)]].at(level))
    low, high = sizes[above - 1], sizes[above]
    share = (size - low) / (high - low)
    return int((1 - share) * costs[low].at(level) + share * costs[high].at(level))


@final
class ChargedEngine(WrappedEngine):
    """An engine whose calls let time pass on a virtual clock; a commit is free of charge."""

    def __init__(self, engine: Engine, costs: Charges, clock: VirtualClock, rng: np.random.Generator) -> None:
        super().__init__(engine)
        self._costs, self._clock, self._rng = costs, clock, rng

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


@final
class ChargedAdapter:
    """An adapter whose work lets time pass on a virtual clock.

    Args:
        adapter: does the work.
        encode, decode: what one call costs; `vla_spec.costs.Costs` has them as quantiles, empty = free.
        clock: is moved.
        rng: draws the costs.
    """

    def __init__(
        self, adapter: Adapter, encode: Cost, decode: Cost, clock: VirtualClock, rng: np.random.Generator
    ) -> None:
        self.adapter, self._clock, self._rng = adapter, clock, rng
        self._encode, self._decode = CostDistribution(encode or 0), CostDistribution(decode or 0)

    @property
    def domain(self) -> TokenDomain:
        """The wrapped adapter's."""
        return self.adapter.domain

    @property
    def tokenizer(self) -> ActionTokenizer:
        """The wrapped adapter's."""
        return self.adapter.tokenizer

    def encode(self, observation: Observation) -> EngineInputs:
        """Encode, and charge for it."""
        inputs = self.adapter.encode(observation)
        self._clock.advance(self._encode.draw_ns(self._rng))
        return inputs

    def decode(self, tokens: Int32) -> Float32:
        """Decode, and charge for a whole chunk, however few tokens there are."""
        actions = self.adapter.decode(tokens)
        self._clock.advance(self._decode.draw_ns(self._rng))
        return actions

    def example(self) -> Observation:
        """The wrapped adapter's; free."""
        return self.adapter.example()
