"""Measure what engine and drafter calls cost on this machine at start-up: the table that deadlines are planned by.

Warm-up calls are left out. Times are quantiles over a few calls, interleaved over sizes, so that a slow moment of the
machine does not fall on one size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vla_spec.clock import NowNs
from vla_spec.errors import BadConfig
from vla_spec.interfaces import Adapter, ChunkHistory, Drafter, Engine
from vla_spec.types import EngineInputs, Int32, Observation, Plan

QUANTILES = (0.1, 0.5, 0.9, 1.0)
#: Sizes of a step that are measured, as far as the engine takes them; sizes between are interpolated.
STEP_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DRAFT_SIZES = (1, 2, 4, 8, 16, 31)
#: Sizes of a step over a branching tree; smaller trees are nearly chains.
TREE_SIZES = (4, 8, 16, 32)
WARMUP_CALLS, MEASURED_CALLS = 2, 9

#: Quantile -> ns.
Quantiles = dict[float, float]
Key = TypeVar("Key", bound=Hashable)


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


def costs_of_run(tree: Any, path: Path, mode: str) -> Costs:
    """The cost table of one mode out of what an earlier run's ``costs.json`` holds.

    Raises:
        BadConfig: the mode is not in it, or what is there is no table.
    """
    if not isinstance(tree, dict) or mode not in tree:
        have = ", ".join(tree) if isinstance(tree, dict) else "none"
        raise BadConfig(f"runtime.costs: {path} has no costs of mode {mode!r}; have {have}")
    return Costs.from_json(tree[mode], f"runtime.costs: {path}: {mode}")


@dataclass(frozen=True, slots=True)
class Call:
    """Something whose cost is measured.

    Attributes:
        run: is timed.
        before: is not; None = nothing has to be prepared.
    """

    run: Callable[[], object]
    before: Callable[[], object] | None = None


def sizes_up_to(sizes: Sequence[int], most: int) -> list[int]:
    """Those of ``sizes`` that are smaller than ``most``, and ``most`` itself."""
    return [size for size in sizes if size < most] + [most]


def chain_calls(engine: Engine, num_tokens: int) -> dict[int, Call]:
    """Steps that score a chain, by size. They need a prefill and stay uncommitted.

    Args:
        engine: has had a prefill when a call is run.
        num_tokens: T; larger steps are of no use.
    """
    sizes = sizes_up_to(STEP_SIZES, min(engine.max_step, num_tokens))
    return {k: _step_call(engine, np.arange(-1, k - 1, dtype=np.int32)) for k in sizes}


def tree_calls(engine: Engine, num_tokens: int, branching: int) -> dict[int, Call]:
    """Steps that score a complete tree of so many children per node, by size; empty for an engine without trees."""
    if not engine.info.has_tree_mask:
        return {}
    sizes = sizes_up_to(TREE_SIZES, min(engine.max_step, num_tokens))
    parents = {k: (np.arange(-1, k - 1) // branching).astype(np.int32) for k in sizes}
    return {k: _step_call(engine, of_size) for k, of_size in parents.items()}


def _step_call(engine: Engine, parents: Int32) -> Call:
    tokens = np.zeros(len(parents), np.int32)
    return Call(lambda: engine.step(tokens, parents))


def draft_calls(
    drafter: Drafter, engine: Engine, inputs: EngineInputs, shape: Plan, prefix: Int32, history: ChunkHistory | None
) -> dict[int, Call]:
    """Drafts by gamma. The drafter is told about a new chunk before each, so that it remembers nothing of the last.

    Args:
        drafter: any.
        engine: has had a prefill when a call is run.
        inputs: a valid observation's.
        shape: of the tree: ``top_k``, and the longest path ``depth`` (0 = as long as gamma); gamma is varied.
        prefix: int32 [1], the first token.
        history: the previous chunk, for drafters that start from it.
    """

    def call(gamma: int) -> Call:
        plan = shape._replace(gamma=gamma, depth=min(gamma, shape.depth) or gamma)
        return Call(
            lambda: drafter.propose(prefix, plan, engine.features), before=lambda: drafter.begin(inputs, history)
        )

    most = engine.max_step - 1
    return {gamma: call(gamma) for gamma in sizes_up_to(DRAFT_SIZES, most)} if most else {}


def measure_engine(engine: Engine, inputs: EngineInputs, num_tokens: int, now_ns: NowNs) -> Costs:
    """Prefill and steps of one engine; the draft column stays empty.

    Args:
        engine: left with an uncommitted step.
        inputs: a valid observation's.
        num_tokens: T; larger steps are of no use.
        now_ns: a clock that runs.
    """
    prefill = _measure({0: Call(lambda: engine.prefill(inputs))}, now_ns)[0]
    engine.prefill(inputs)
    return Costs(prefill, _measure(chain_calls(engine, num_tokens), now_ns), {})


def measure_drafter(
    costs: Costs, drafter: Drafter, engine: Engine, inputs: EngineInputs, shape: Plan, now_ns: NowNs
) -> Costs:
    """Add the drafting column.

    Args:
        costs: of the engine.
        drafter: told about a new chunk before each call, so that nothing is remembered from the call before.
        engine: gets a prefill.
        inputs: a valid observation's.
        shape: of the tree: top_k, and depth (0 = as deep as gamma); gamma is varied.
        now_ns: a clock that runs.
    """
    token = int(engine.prefill(inputs).logits[0].argmax())
    calls = draft_calls(drafter, engine, inputs, shape, np.array([token], np.int32), None)
    return replace(costs, draft=_measure(calls, now_ns))


def measure_adapter(costs: Costs, adapter: Adapter, observation: Observation, tokens: Int32, now_ns: NowNs) -> Costs:
    """Add what lies before and after decoding: observation to engine inputs, tokens to actions.

    Args:
        costs: of the engine.
        adapter: any.
        observation: a valid one.
        tokens: int32 [T], a whole chunk.
        now_ns: a clock that runs.
    """
    calls = {0: Call(lambda: adapter.encode(observation)), 1: Call(lambda: adapter.decode(tokens))}
    measured = _measure(calls, now_ns)
    return replace(costs, encode=measured[0], decode=measured[1])


def time_calls(
    calls: Mapping[Key, Call],
    now_ns: NowNs,
    num_calls: int,
    order: Callable[[], Iterable[Key]] | None = None,
    after_cycle: Callable[[], object] | None = None,
) -> dict[Key, list[int]]:
    """Duration of every call [ns], warm-up included: all calls in turn, ``num_calls`` times over.

    Args:
        calls: by whatever names them.
        now_ns: a clock that runs.
        num_calls: of each.
        order: says before each cycle in which order; None = as they stand.
        after_cycle: called when each of them has been run once more.
    """
    taken: dict[Key, list[int]] = {key: [] for key in calls}
    for _ in range(num_calls):
        for key in calls if order is None else order():
            call = calls[key]
            if call.before is not None:
                call.before()
            start = now_ns()
            call.run()
            taken[key].append(now_ns() - start)
        if after_cycle is not None:
            after_cycle()
    return taken


def _measure(calls: Mapping[int, Call], now_ns: NowNs) -> dict[int, Quantiles]:
    taken = time_calls(calls, now_ns, WARMUP_CALLS + MEASURED_CALLS)
    return {
        key: dict(zip(QUANTILES, np.quantile(ns[WARMUP_CALLS:], QUANTILES).tolist(), strict=True))
        for key, ns in taken.items()
    }


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
    cost = dict(sorted((float(q), float(ns)) for q, ns in tree.items()))
    values = list(cost.values())
    if 0.5 not in cost or min(cost) < 0 or max(cost) > 1:
        raise ValueError(f"quantiles {', '.join(tree) or 'none'}; valid: 0.5 and others from 0 to 1")
    if not np.isfinite(values).all() or values[0] < 0 or values != sorted(values):
        raise ValueError(f"costs {values} ns; valid: finite, 0 or more, rising with the quantile")
    return cost
