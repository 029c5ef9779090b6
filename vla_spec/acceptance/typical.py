"""Accept a drafted token that the target finds plausible, judged against the entropy of its distribution.

Source: Cai et al. 2024 (Medusa), arXiv:2401.10774, section 2.3.1, after Hewitt et al. 2022, arXiv:2210.15191.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.acceptance._longest_path import depths, longest_path
from vla_spec.errors import BadConfig
from vla_spec.plugins import Parts
from vla_spec.types import Committed, Draft, Scores, TokenDomain, Verdict


@dataclass(frozen=True, slots=True)
class Options:
    """Typical acceptance.

    Attributes:
        epsilon: probability that is always enough, however sure the target is.
        delta: factor of exp(-entropy); smaller accepts more where the target is unsure. Medusa: sqrt(epsilon).
        temperature: of the distribution that is judged.
        respect_never_relaxed: keep switches (the domain's never-relaxed positions) exact.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    temperature: float = 1.0
    respect_never_relaxed: bool = True

    def __post_init__(self) -> None:
        if not (self.epsilon > 0.0 and self.delta > 0.0):
            raise BadConfig(f"epsilon and delta must be > 0, got {self.epsilon} and {self.delta}")
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise BadConfig(f"temperature must be a number > 0, got {self.temperature}")


@final
class TypicalRule:
    """``target_probs[token] > min(epsilon, delta * exp(-entropy)) / tolerance``, or the token is the most likely one.

    The accepted token is the draft's; the one that follows the path is the target's most likely one. With tolerance 0
    only the most likely token passes. Plausible tokens may lie far apart in space (left or right around an obstacle),
    and nothing bounds that here; deviations are reported in bins.
    """

    def __init__(self, options: Options, domain: TokenDomain) -> None:
        self._epsilon, self._delta, self._temperature = options.epsilon, options.delta, options.temperature
        never = domain.never_relaxed if options.respect_never_relaxed else np.zeros(domain.num_tokens, np.bool_)
        self._is_exact_at: list[bool] = never.tolist()

    @property
    def exact(self) -> bool:
        """Never."""
        return False

    def judge(
        self,
        draft: Draft,
        scores: Scores,
        committed: Committed,
        rng: np.random.Generator,
        tolerance: float = 1.0,
    ) -> Verdict:
        """See `AcceptanceRule.judge`; deviations are in bins."""
        logits = scores.logits
        choices: list[int] = logits.argmax(1).tolist()  # [k + 1]
        parents: list[int] = draft.parents.tolist()
        tokens: list[int] = draft.tokens.tolist()
        first, end = len(committed.tokens), len(self._is_exact_at)
        plausible = (
            self._is_plausible(draft, scores, tolerance) if parents and tolerance > 0.0 else [False] * len(parents)
        )
        deviation = [abs(token - choices[parent + 1]) for token, parent in zip(tokens, parents, strict=True)]  # [k]
        accepted = [
            off == 0 or (likely and first + depth < end and not self._is_exact_at[first + depth])
            for off, likely, depth in zip(deviation, plausible, depths(parents), strict=True)
        ]
        path = longest_path(parents, accepted, deviation)
        following = choices[path[-1] + 1] if path else choices[0]
        off_path = np.array([deviation[node] for node in path], np.float32)
        return Verdict(np.array(path, np.int32), following, off_path > 0, off_path)

    def _is_plausible(self, draft: Draft, scores: Scores, tolerance: float) -> list[bool]:
        """For each node: does its token pass the threshold of its parent's distribution."""
        scaled = scores.logits * np.float32(1.0 / self._temperature)  # [k + 1, V]
        scaled -= scaled.max(1, keepdims=True)
        weights = np.exp(scaled)
        total = weights.sum(1)  # [k + 1]
        # entropy = log(total) - sum(weights * scaled) / total, so exp(-entropy) needs no second logarithm of V numbers
        minus_entropy = np.einsum("nv,nv->n", weights, scaled) / total - np.log(total)
        threshold = np.minimum(self._epsilon, self._delta * np.exp(minus_entropy)) / tolerance  # [k + 1]
        rows = draft.parents + 1
        likely: list[bool] = (weights[rows, draft.tokens] / total[rows] > threshold[rows]).tolist()
        return likely


def build(options: Options, parts: Parts) -> TypicalRule:
    """Needs the domain's never-relaxed positions."""
    return TypicalRule(options, parts.domain)
