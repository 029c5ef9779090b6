"""What a tolerance does to actions and to speed on recorded observations: deviation, acceptance, decode time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vla_spec.assemble import Assembly
from vla_spec.comparison import WARMUP_PLANS, Sample
from vla_spec.progress import Reporter
from vla_spec.runtime import NO_DEADLINE_NS
from vla_spec.types import Decoded

Floats = npt.NDArray[np.float64]
NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class OpenLoopRow:
    """One tolerance on recorded observations. Lengths in the tokenizer's physical unit; per degree of freedom [A].

    Attributes:
        cap: 0 = exact.
        chunks: decoded chunks behind these numbers.
        deviation_max, deviation_rms: of all tokens from the target's own choice given what stands before them.
        difference_max, difference_rms: from the action that exact decoding gives for the same observation.
        displacement_max: largest distance between where the steps played before the next plan lead and where exact
            ones would.
        group_sum_max: largest sum of deviations in one group.
        relaxed_share: tokens that are not the target's choice.
        switch_flips: switch tokens that differ from exact decoding's.
        acceptance_length, forwards_per_chunk: means.
        decode_ms_p50, decode_ms_p99: behind the prefill, warm-up left out.
        speedup_decode: median of exact decoding / median.
    """

    cap: float
    chunks: int
    deviation_max: tuple[float, ...]
    deviation_rms: tuple[float, ...]
    difference_max: tuple[float, ...]
    difference_rms: tuple[float, ...]
    displacement_max: float
    group_sum_max: float
    relaxed_share: float
    switch_flips: int
    acceptance_length: float
    forwards_per_chunk: float
    decode_ms_p50: float
    decode_ms_p99: float
    speedup_decode: float


@dataclass(slots=True)
class _Tally:
    """What one tolerance did so far, over chunks."""

    deviation: list[Floats] = field(default_factory=list)  # [H, A] each
    difference: list[Floats] = field(default_factory=list)  # [H, A], signed
    group_sum: float = 0.0
    num_relaxed: int = 0
    num_tokens: int = 0
    switch_flips: int = 0
    accepted: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)


def open_loop_rows(
    exact: Assembly,
    relaxed: Sequence[Assembly],
    caps: Sequence[float],
    samples: Sequence[Sample],
    num_repeats: int,
    progress: Reporter,
) -> tuple[OpenLoopRow, ...]:
    """Decode every sample with exact decoding and every tolerance in turn; exact first in the result."""
    assemblies = (exact, *relaxed)
    tallies = [_Tally() for _ in assemblies]
    progress.phase("same observations", len(samples))
    for assembly in assemblies:
        for sample in samples[:WARMUP_PLANS]:
            _decode(assembly, sample)
    for i, sample in enumerate(samples):
        truth = _decode(exact, sample)
        for repeat in range(num_repeats):
            first = (i * num_repeats + repeat) % len(assemblies)
            for at in (*range(first, len(assemblies)), *range(first)):
                _count(tallies[at], assemblies[at], _decode(assemblies[at], sample), truth)
        progress.step()
    base = float(np.median(tallies[0].decode_ms)) if samples else 0.0
    horizon = exact.runtime.execute_horizon
    moves = ~exact.domain.never_relaxed[: exact.domain.tokens_per_step]
    return tuple(
        _row(cap, tally, base, horizon, moves) for cap, tally in zip((0.0, *caps), tallies, strict=True) if samples
    )


def _decode(assembly: Assembly, sample: Sample) -> Decoded:
    inputs = assembly.adapter.encode(sample.observation)
    return assembly.policy.decoder.decode(inputs, assembly.clock.now_ns() + NO_DEADLINE_NS, sample.history)


def _count(tally: _Tally, assembly: Assembly, decoded: Decoded, truth: Decoded) -> None:
    domain, tokenizer = assembly.domain, assembly.adapter.tokenizer
    shape = (-1, domain.tokens_per_step)
    whole = len(decoded.tokens) // domain.tokens_per_step * domain.tokens_per_step
    position = np.arange(whole, dtype=np.int32)
    tokens, other = decoded.tokens[:whole], truth.tokens[:whole]
    sign = np.sign(tokens - other)
    tally.deviation.append(decoded.deviation[:whole].astype(np.float64).reshape(shape))
    tally.difference.append((sign * tokenizer.distance(tokens, other, position)).astype(np.float64).reshape(shape))
    tally.group_sum = max(tally.group_sum, float(np.bincount(domain.group[:whole], decoded.deviation[:whole]).max()))
    tally.num_relaxed += int((decoded.deviation > 0).sum())
    tally.num_tokens += len(decoded.tokens)
    tally.switch_flips += int((tokens != other)[domain.never_relaxed[:whole]].sum())
    rounds = decoded.rounds[1:]
    tally.accepted.extend(measured.num_accepted + 1 for measured in rounds)
    tally.forwards.append(len(decoded.rounds))
    tally.decode_ms.append(sum(measured.total_ns for measured in rounds) / NS_PER_MS)


def _row(cap: float, tally: _Tally, base_ms: float, horizon: int, moves: npt.NDArray[np.bool_]) -> OpenLoopRow:
    deviation, difference = np.stack(tally.deviation), np.stack(tally.difference)  # [chunks, H, A]
    played = difference[:, :horizon, moves].sum(axis=1)  # [chunks, M]
    return OpenLoopRow(
        cap=cap,
        chunks=len(deviation),
        deviation_max=_numbers(deviation.max(axis=(0, 1))),
        deviation_rms=_numbers(np.sqrt((deviation**2).mean(axis=(0, 1)))),
        difference_max=_numbers(np.abs(difference).max(axis=(0, 1))),
        difference_rms=_numbers(np.sqrt((difference**2).mean(axis=(0, 1)))),
        displacement_max=float(np.sqrt((played**2).sum(axis=1)).max()),
        group_sum_max=tally.group_sum,
        relaxed_share=tally.num_relaxed / max(tally.num_tokens, 1),
        switch_flips=tally.switch_flips,
        acceptance_length=float(np.mean(tally.accepted)) if tally.accepted else 1.0,
        forwards_per_chunk=float(np.mean(tally.forwards)),
        decode_ms_p50=float(np.median(tally.decode_ms)),
        decode_ms_p99=float(np.percentile(tally.decode_ms, 99)),
        speedup_decode=base_ms / max(float(np.median(tally.decode_ms)), 1e-9),
    )


def _numbers(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
