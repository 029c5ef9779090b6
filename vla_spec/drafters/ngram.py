"""Draft what followed the last time that the newest tokens occurred, in this chunk or in the previous one.

Source: Saxena 2023 (prompt lookup decoding); Fu et al. 2024, arXiv:2402.02057 (n-gram pool).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Int32, Plan

_BREAK = np.array([-1], np.int32)  # no token: nothing matches across two chunks


@dataclass(frozen=True, slots=True)
class Options:
    """Suffix lookup.

    Attributes:
        max_n: longest suffix that is looked up; longer is surer and rarer.
        min_n: shortest suffix that is trusted; 1 drafts nearly always and is nearly always wrong.
        is_aligned: match only at the same degree of freedom, so that a rotation is not drafted after a translation.
    """

    max_n: int = 7
    min_n: int = 1
    is_aligned: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_n <= self.max_n:
            raise BadConfig(f"need 1 <= min_n <= max_n, got min_n {self.min_n} and max_n {self.max_n}")


@final
class NGramDrafter:
    """The longest suffix of at most ``max_n`` tokens wins, and of its occurrences the latest.

    A match in this chunk whose continuation runs into the end is repeated with its own period, as in LZ77.
    """

    def __init__(self, options: Options, tokens_per_step: int) -> None:
        self._max_n, self._min_n = options.max_n, options.min_n
        self._stride = tokens_per_step if options.is_aligned else 1
        self._previous = EMPTY_DRAFT.tokens

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """Keep the previous chunk as text to search in."""
        self._previous = EMPTY_DRAFT.tokens if history is None else history.tokens

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """A chain, or nothing without a match."""
        num_drafted = min(plan.gamma, plan.depth)
        if num_drafted <= 0:
            return EMPTY_DRAFT
        m, border = len(prefix), len(self._previous)
        text = np.concatenate((self._previous, _BREAK, prefix))
        start = border + 1  # of this chunk in the text
        # Ends of earlier occurrences, at the same degree of freedom: one congruence class in each of the two chunks.
        last, stride = m - 1, self._stride
        phase = last % stride
        ends = np.concatenate((np.arange(phase, border, stride), np.arange(start + phase, start + last, stride)))
        best = ends[:0]
        for n in range(1, min(self._max_n, m) + 1):
            ends = ends[ends >= n - 1]
            ends = ends[text[ends - (n - 1)] == prefix[m - n]]
            if not len(ends):
                break
            if n >= self._min_n:
                best = ends
        if not len(best):
            return EMPTY_DRAFT
        follow = int(best[-1]) + 1
        if follow < start:
            return Draft.chain(text[follow : min(follow + num_drafted, border)])
        return Draft.chain(np.resize(text[follow:], num_drafted))


def build(options: Options, parts: Parts) -> NGramDrafter:
    """Needs the number of tokens per control step, for alignment."""
    return NGramDrafter(options, parts.domain.tokens_per_step)
