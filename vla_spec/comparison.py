"""Decode the same recorded observations with every mode, interleaved, and compare with autoregression.

Each observation comes with the chunk that autoregression had planned at the observation before, so that drafters which
start from the previous chunk get exactly what they would have had on the robot, and all modes get the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vla_spec.assemble import Assembly
from vla_spec.interfaces import ChunkHistory
from vla_spec.metrics import RULES_IN_BINS
from vla_spec.progress import Reporter
from vla_spec.runtime import NO_DEADLINE_NS
from vla_spec.trace import PlanRecord
from vla_spec.types import ActionChunk, Float32, Int32, Observation

#: Plans per mode before anything counts.
WARMUP_PLANS = 3


class Recording(NamedTuple):
    """Observations that plans were made from in one episode, in order."""

    task: str
    seed: int
    observations: tuple[Observation, ...]


class Sample(NamedTuple):
    """A recorded observation, and the chunk that autoregression had planned before it."""

    observation: Observation
    history: ChunkHistory | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One mode over all samples and repeats.

    Attributes:
        plans: as measured.
        token_agreement: share of tokens equal to the baseline's.
        max_deviation: from the target's own choice, in the tokenizer's physical unit.
        max_action_difference: from the baseline's action, in action units.
        limit_ns: int64 [samples * repeats], one prefill and one forward over the whole chunk on this mode's engine,
            measured in turn with the plans.
        forward_ns: int64 [samples * repeats], one single-token forward, likewise.
    """

    plans: tuple[PlanRecord, ...]
    token_agreement: float
    max_deviation: float
    max_action_difference: float
    limit_ns: npt.NDArray[np.int64]
    forward_ns: npt.NDArray[np.int64]

    @property
    def limit_ratio(self) -> float | None:
        """Median of the plans over the median of the limit; None where forwards take no time (a virtual clock)."""
        limit_ns = float(np.median(self.limit_ns))
        return float(np.median([plan.plan_ns for plan in self.plans])) / limit_ns if limit_ns else None


def make_samples(reference: Assembly, recordings: Sequence[Recording], num_samples: int) -> list[Sample]:
    """Evenly spaced observations of all recordings with the history that ``reference`` gives them."""
    pairs = [
        (before, now)
        for recording in recordings
        for before, now in itertools.pairwise((None, *recording.observations))
        if now is not None
    ]
    if not pairs:
        return []
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(num_samples, len(pairs))).astype(int))
    per_step = reference.domain.tokens_per_step
    samples = []
    for i in chosen:
        before, now = pairs[i]
        history = None
        if before is not None:
            tokens = plan_sample(reference, Sample(before, None)).tokens
            history = ChunkHistory(tokens, min((now.step - before.step) * per_step, len(tokens)))
        samples.append(Sample(now, history))
    return samples


def compare(
    assemblies: Sequence[Assembly], reference: Assembly, samples: Sequence[Sample], num_repeats: int, progress: Reporter
) -> dict[str, Comparison]:
    """Decode every sample with every mode, in turn, each time beginning with another one.

    Returns:
        Mode -> what it did.
    """
    progress.phase("same observations", len(samples))
    for assembly in assemblies:
        for sample in samples[:WARMUP_PLANS]:
            plan_sample(assembly, sample)
    plans: dict[str, list[PlanRecord]] = {a.config.mode: [] for a in assemblies}
    equal: dict[str, list[float]] = {mode: [] for mode in plans}
    deviation: dict[str, float] = dict.fromkeys(plans, 0.0)
    difference: dict[str, float] = dict.fromkeys(plans, 0.0)
    engines = {id(a.policy.decoder.engine): a for a in assemblies}  # one of the modes of each engine
    bounds: dict[int, list[tuple[int, int]]] = {key: [] for key in engines}
    for i, sample in enumerate(samples):
        truth = plan_sample(reference, sample)
        for repeat in range(num_repeats):
            for key, assembly in engines.items():
                bounds[key].append(_time_limit(assembly, sample))
            first = (i * num_repeats + repeat) % len(assemblies)
            for assembly in (*assemblies[first:], *assemblies[:first]):
                mode = assembly.config.mode
                chunk = plan_sample(assembly, sample)
                last = assembly.policy.last_record
                assert last is not None, f"{mode=}"
                plans[mode].append(last)
                equal[mode].append(_agreement(chunk.tokens, truth.tokens))
                deviation[mode] = max(deviation[mode], chunk.max_deviation * _unit(assembly))
                difference[mode] = max(difference[mode], _difference(chunk.actions, truth.actions))
        progress.step()
    compared = {}
    for assembly in assemblies:
        mode = assembly.config.mode
        bound = np.array(bounds[id(assembly.policy.decoder.engine)], np.int64).reshape(-1, 2)
        if plans[mode]:
            compared[mode] = Comparison(
                tuple(plans[mode]), float(np.mean(equal[mode])), deviation[mode], difference[mode], bound[:, 0],
                bound[:, 1],
            )  # fmt: skip
    return compared


def plan_sample(assembly: Assembly, sample: Sample) -> ActionChunk:
    """One chunk without a deadline."""
    policy = assembly.policy
    return policy.plan(sample.observation, assembly.clock.now_ns() + NO_DEADLINE_NS, sample.history)


def _time_limit(assembly: Assembly, sample: Sample) -> tuple[int, int]:
    """What the engine alone needs: prefill and one forward over the whole chunk; one single-token forward [ns]."""
    engine, now_ns = assembly.policy.decoder.engine, assembly.clock.now_ns
    inputs = assembly.adapter.encode(sample.observation)
    n = min(assembly.domain.num_tokens, engine.max_step)
    tokens, parents = np.zeros(n, np.int32), np.arange(-1, n - 1, dtype=np.int32)
    start_ns = now_ns()
    engine.prefill(inputs)
    engine.step(tokens, parents)
    whole_ns = now_ns()
    engine.step(tokens[:1], parents[:1])
    return whole_ns - start_ns, now_ns() - whole_ns


def _agreement(tokens: Int32, truth: Int32) -> float:
    n = max(len(tokens), len(truth))
    m = min(len(tokens), len(truth))
    return float((tokens[:m] == truth[:m]).sum()) / n if n else 1.0


def _difference(actions: Float32, truth: Float32) -> float:
    h = min(len(actions), len(truth))
    return float(np.abs(actions[:h] - truth[:h]).max(initial=0.0))


def _unit(assembly: Assembly) -> float:
    """What one unit of the rule's deviation is in the tokenizer's physical unit; for bins, the largest bin."""
    if assembly.config.rule.name not in RULES_IN_BINS:
        return 1.0
    domain = assembly.domain
    return float(domain.unit_per_bin[~domain.never_relaxed].max(initial=0.0))
