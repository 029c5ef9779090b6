"""Accept a drafted token that lies within r bins of the target's most likely one.

Source: Wang et al. 2025 (Spec-VLA), arXiv:2507.22424.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.acceptance._longest_path import depths, longest_path
from vla_spec.errors import BadConfig
from vla_spec.plugins import Parts
from vla_spec.types import Committed, Draft, Scores, TokenDomain, Verdict


@dataclass(frozen=True, slots=True)
class Options:
    """Relaxed acceptance in bins.

    Attributes:
        max_bins: r, largest accepted distance, 0 = exact. [bins]
        respect_never_relaxed: keep switches (the domain's never-relaxed positions) exact. The paper's code relaxes
            every position, the gripper too: False is that.
    """

    max_bins: int = 9
    respect_never_relaxed: bool = True

    def __post_init__(self) -> None:
        if self.max_bins < 0:
            raise BadConfig(f"max_bins must be >= 0, got {self.max_bins}")


@final
class RelaxedBinsRule:
    """``|token - argmax| <= r * tolerance``, the longest such path, and the accepted token is the draft's.

    The target's own choice is its argmax after the (relaxed) prefix, so errors do not add up in token space, but
    nothing bounds their sum in space: a larger r accepts more and strays further. `relaxed_physical` bounds both.
    """

    def __init__(self, options: Options, domain: TokenDomain) -> None:
        self._max_bins = options.max_bins
        never = domain.never_relaxed if options.respect_never_relaxed else np.zeros(domain.num_tokens, np.bool_)
        self._is_exact_at: list[bool] = never.tolist()

    @property
    def exact(self) -> bool:
        """Only with ``max_bins = 0``."""
        return self._max_bins == 0

    def judge(
        self,
        draft: Draft,
        scores: Scores,
        committed: Committed,
        rng: np.random.Generator,
        tolerance: float = 1.0,
    ) -> Verdict:
        """See `AcceptanceRule.judge`; deviations are in bins."""
        choices: list[int] = scores.logits.argmax(1).tolist()  # [k + 1]
        parents: list[int] = draft.parents.tolist()
        tokens: list[int] = draft.tokens.tolist()
        first, end = len(committed.tokens), len(self._is_exact_at)
        radius = self._max_bins * tolerance
        deviation = [abs(token - choices[parent + 1]) for token, parent in zip(tokens, parents, strict=True)]  # [k]
        accepted = [
            off == 0 or (off <= radius and first + depth < end and not self._is_exact_at[first + depth])
            for off, depth in zip(deviation, depths(parents), strict=True)
        ]
        path = longest_path(parents, accepted, deviation)
        following = choices[path[-1] + 1] if path else choices[0]
        off_path = np.array([deviation[node] for node in path], np.float32)
        return Verdict(np.array(path, np.int32), following, off_path > 0, off_path)


def build(options: Options, parts: Parts) -> RelaxedBinsRule:
    """Needs the domain's never-relaxed positions."""
    return RelaxedBinsRule(options, parts.domain)
