"""Measure what engine and drafter calls cost on this machine at start-up: the table that deadlines are planned by.

Warm-up calls are left out. Times are quantiles over a few calls, interleaved over sizes, so that a slow moment of the
machine does not fall on one size alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_spec.clock import NowNs
from vla_spec.errors import BadConfig
from vla_spec.interfaces import Adapter, Drafter, Engine
from vla_spec.types import EngineInputs, Int32, Observation, Plan

QUANTILES = (0.1, 0.5, 0.9, 1.0)
#: Sizes of a step that are measured, as far as the engine takes them; sizes between are interpolated.
STEP_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DRAFT_SIZES = (1, 2, 4, 8, 16, 31)
WARMUP_CALLS, MEASURED_CALLS = 2, 9

#: Quantile -> ns.
Quantiles = dict[float, float]


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of one engine and one drafter, warm-up left out; measured at start-up, or read from a calibration.

    Sizes and quantiles between the stored ones are interpolated linearly; outside they are clamped, never extrapolated.

    Attributes:
        prefill: of one prefill.
        step: number of tokens -> of one step; one token is plain decoding.
        draft: gamma -> of asking the drafter for so many nodes; empty for a drafter that was not measured.
        encode: of turning one observation into engine inputs; empty = not measured.
        decode: of turning a whole chunk's tokens into actions; empty = not measured.
    """

    prefill: Quantiles
    step: dict[int, Quantiles]
    draft: dict[int, Quantiles]
    encode: Quantiles = field(default_factory=dict)
    decode: Quantiles = field(default_factory=dict)

    @staticmethod
    def constant(prefill: float, step: Mapping[int, float], draft: Mapping[int, float] | None = None) -> Costs:
        """Costs [ns] without spread, such as a published figure gives them."""
        return Costs(
            {0.5: float(prefill)},
            {int(k): {0.5: float(ns)} for k, ns in step.items()},
            {int(k): {0.5: float(ns)} for k, ns in (draft or {}).items()},
        )

    @property
    def prefill_ns(self) -> float:
        """Median of one prefill [ns]."""
        return self.prefill[0.5]

    def step_ns(self, num_tokens: int) -> float:
        """Median of one step [ns], interpolated between measured sizes, never extrapolated."""
        sizes = sorted(self.step)
        return float(np.interp(num_tokens, sizes, [self.step[k][0.5] for k in sizes]))

    @property
    def encode_ns(self) -> float:
        """Median of encoding one observation [ns]; 0 where it was not measured."""
        return _at_quantile(self.encode, 0.5)

    @property
    def decode_ns(self) -> float:
        """Median of turning a whole chunk's tokens into actions [ns]; 0 where it was not measured."""
        return _at_quantile(self.decode, 0.5)

    def prefill_quantile_ns(self, q: float) -> float:
        """What a prefill stays under with probability ``q`` in [0, 1] [ns]."""
        return _at_quantile(self.prefill, q)

    def step_quantile_ns(self, num_tokens: int, q: float) -> float:
        """What a step of so many tokens stays under with probability ``q`` in [0, 1] [ns]."""
        return _at_size(self.step, num_tokens, q)

    def draft_quantile_ns(self, gamma: int, q: float) -> float:
        """What drafting so many nodes stays under with probability ``q`` in [0, 1] [ns]; 0 if nothing was measured."""
        return _at_size(self.draft, gamma, q)

    def limit_ns(self, num_tokens: int) -> float:
        """The least that a chunk can take: one prefill and one forward over all of its tokens [ns]."""
        return self.prefill_ns + self.step_ns(num_tokens)

    def medians(self) -> dict[str, Any]:
        """``{"prefill": ns, "step": {n: ns}, "draft": {gamma: ns}}`` for controllers."""
        return {
            "prefill": self.prefill_ns,
            "step": {k: cost[0.5] for k, cost in self.step.items()},
            "draft": {k: cost[0.5] for k, cost in self.draft.items()},
        }

    def as_json(self) -> dict[str, Any]:
        """Plain values; sizes and quantiles become strings, as JSON wants it."""

        def plain(cost: Quantiles) -> dict[str, float]:
            return {str(q): round(ns) for q, ns in cost.items()}

        return {
            "unit": "ns",
            "prefill": plain(self.prefill),
            "step": {str(k): plain(cost) for k, cost in self.step.items()},
            "draft": {str(k): plain(cost) for k, cost in self.draft.items()},
            "encode": plain(self.encode),
            "decode": plain(self.decode),
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any], where: str) -> Costs:
        """Inverse of `as_json`.

        Raises:
            BadConfig: not a cost table.
        """
        try:
            costs = Costs(
                _quantiles(tree["prefill"]),
                {int(k): _quantiles(cost) for k, cost in tree["step"].items()},
                {int(k): _quantiles(cost) for k, cost in tree.get("draft", {}).items()},
                _quantiles(tree["encode"]) if tree.get("encode") else {},
                _quantiles(tree["decode"]) if tree.get("decode") else {},
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise BadConfig(f"{where}: not a cost table ({type(error).__name__}: {error})") from error
        if not costs.step:
            raise BadConfig(f"{where}: a cost table needs the cost of at least one step")
        return costs


def read_costs(path: Path, mode: str) -> Costs:
    """The cost table of one mode from an earlier run's ``costs.json``.

    Raises:
        BadConfig: unreadable, or the mode is not in it.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadConfig(f"runtime.costs: {path} can't be read ({type(error).__name__})") from error
    if not isinstance(tree, dict) or mode not in tree:
        have = ", ".join(tree) if isinstance(tree, dict) else "none"
        raise BadConfig(f"runtime.costs: {path} has no costs of mode {mode!r}; have {have}")
    return Costs.from_json(tree[mode], f"runtime.costs: {path}: {mode}")


def measure_engine(engine: Engine, inputs: EngineInputs, num_tokens: int, now_ns: NowNs) -> Costs:
    """Prefill and steps of one engine; the draft column stays empty.

    Args:
        engine: left with an uncommitted step.
        inputs: a valid observation's.
        num_tokens: T; larger steps are of no use.
        now_ns: a clock that runs.
    """
    sizes = [k for k in STEP_SIZES if k < min(engine.max_step, num_tokens)] + [min(engine.max_step, num_tokens)]
    calls: dict[int, Callable[[], object]] = {}
    for k in sizes:
        tokens, parents = np.zeros(k, np.int32), np.arange(-1, k - 1, dtype=np.int32)
        calls[k] = lambda tokens=tokens, parents=parents: engine.step(tokens, parents)  # type: ignore[misc]
    prefill = _measure({0: lambda: engine.prefill(inputs)}, now_ns)[0]
    engine.prefill(inputs)
    return Costs(prefill, _measure(calls, now_ns), {})


def measure_drafter(
    costs: Costs, drafter: Drafter, engine: Engine, inputs: EngineInputs, plan: Plan, now_ns: NowNs
) -> Costs:
    """Add the drafting column.

    Args:
        costs: of the engine.
        drafter: told about a new chunk before each call, so that nothing is remembered from the call before.
        engine: gets a prefill.
        inputs: a valid observation's.
        plan: shape of the tree (top_k); gamma and depth are varied.
        now_ns: a clock that runs.
    """
    token = int(engine.prefill(inputs).logits[0].argmax())
    prefix = np.array([token], np.int32)

    def propose(gamma: int) -> None:
        drafter.propose(prefix, plan._replace(gamma=gamma, depth=gamma), engine.features)

    calls = {k: (lambda k=k: propose(k)) for k in DRAFT_SIZES if k < engine.max_step}
    measured = _measure(calls, now_ns, before=lambda: drafter.begin(inputs, None))
    return replace(costs, draft=measured)


def measure_adapter(costs: Costs, adapter: Adapter, observation: Observation, tokens: Int32, now_ns: NowNs) -> Costs:
    """Add what lies before and after decoding: observation to engine inputs, tokens to actions.

    Args:
        costs: of the engine.
        adapter: any.
        observation: a valid one.
        tokens: int32 [T], a whole chunk.
        now_ns: a clock that runs.
    """
    calls = {0: lambda: adapter.encode(observation), 1: lambda: adapter.decode(tokens)}
    measured = _measure(calls, now_ns)
    return replace(costs, encode=measured[0], decode=measured[1])


def _measure(
    calls: Mapping[int, Callable[[], object]], now_ns: NowNs, before: Callable[[], object] | None = None
) -> dict[int, Quantiles]:
    taken: dict[int, list[int]] = {key: [] for key in calls}
    for i in range(WARMUP_CALLS + MEASURED_CALLS):
        for key, call in calls.items():
            if before is not None:
                before()
            start = now_ns()
            call()
            if i >= WARMUP_CALLS:
                taken[key].append(now_ns() - start)
    return {key: dict(zip(QUANTILES, np.quantile(ns, QUANTILES).tolist(), strict=True)) for key, ns in taken.items()}


def _at_quantile(cost: Quantiles, q: float) -> float:
    if not cost:
        return 0.0
    stored = sorted(cost)
    return float(np.interp(q, stored, [cost[at] for at in stored]))


def _at_size(costs: Mapping[int, Quantiles], size: int, q: float) -> float:
    if not costs:
        return 0.0
    sizes = sorted(costs)
    return float(np.interp(size, sizes, [_at_quantile(costs[k], q) for k in sizes]))


def _quantiles(tree: Mapping[str, Any]) -> Quantiles:
    cost = {float(q): float(ns) for q, ns in tree.items()}
    cost[0.5]
    return cost
