"""Accept drafted tokens so that the output has exactly the target's distribution: rejection sampling.

Source: Leviathan et al. 2023, arXiv:2211.17192, Alg. 1, and Chen et al. 2023, arXiv:2302.01318 (chains); Miao et al.
2023 (SpecInfer), arXiv:2305.09781, and Jeon et al. 2024 (recursive rejection), arXiv:2402.14160 (several candidates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from vla_spec.acceptance._longest_path import longest_path
from vla_spec.errors import BadConfig
from vla_spec.plugins import Parts
from vla_spec.types import Committed, Draft, Scores, Verdict

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Options:
    """Sampling.

    Attributes:
        temperature: of the target's distribution; 0 = greedy decoding. The drafter may use any temperature of its own.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise BadConfig(f"temperature must be a number >= 0, got {self.temperature}")


@final
class RejectionRule:
    """At each node: try its children in order, go down to the first that is accepted, else sample what is left.

    With the target's distribution ``target_probs`` after the node and a child's token x drawn from ``draft_probs``:
    accept with probability ``min(1, target_probs[x] / draft_probs[x])``; if rejected, the next child is tried against
    the residual ``target_probs <- norm(max(target_probs - draft_probs, 0))``. A chosen token (no probabilities) is a
    draft from a point mass: accepted with probability ``target_probs[x]``, and the residual has x removed.

    The law is exact if each node's row of ``draft_probs`` is what its token was really drawn from, given its earlier
    siblings: the same row for draws with replacement, the earlier ones removed for draws without. A drafter that
    picks its best k tokens must send no probabilities.
    """

    def __init__(self, options: Options) -> None:
        self._temperature = options.temperature

    @property
    def exact(self) -> bool:
        """The output's law is the target's at this temperature."""
        return True

    def judge(
        self,
        draft: Draft,
        scores: Scores,
        committed: Committed,
        rng: np.random.Generator,
        tolerance: float = 1.0,
    ) -> Verdict:
        """See `AcceptanceRule.judge`; uses neither ``committed`` nor ``tolerance``."""
        parents: list[int] = draft.parents.tolist()
        tokens: list[int] = draft.tokens.tolist()
        if self._temperature == 0.0:
            path, following = self._judge_greedy(tokens, parents, scores)
        else:
            path, following = self._judge_sampled(tokens, parents, draft.probs, scores, rng)
        return Verdict(
            np.array(path, np.int32), following, np.zeros(len(path), np.bool_), np.zeros(len(path), np.float32)
        )

    @staticmethod
    def _judge_greedy(tokens: list[int], parents: list[int], scores: Scores) -> tuple[list[int], int]:
        choices: list[int] = scores.logits.argmax(1).tolist()  # [k + 1]
        matches = [token == choices[parent + 1] for token, parent in zip(tokens, parents, strict=True)]
        path = longest_path(parents, matches, [0.0] * len(parents))
        return path, choices[path[-1] + 1] if path else choices[0]

    def _judge_sampled(
        self,
        tokens: list[int],
        parents: list[int],
        draft_probs: npt.NDArray[Any] | None,
        scores: Scores,
        rng: np.random.Generator,
    ) -> tuple[list[int], int]:
        logits = scores.logits
        weights = np.exp((logits - logits.max(1, keepdims=True)) * np.float32(1.0 / self._temperature))  # [k + 1, V]
        totals: list[float] = weights.sum(1, dtype=np.float64).tolist()
        path: list[int] = []
        at = -1  # the node that was accepted last, -1 = the committed tokens
        residual: Float64 | None = None  # [V] of the node ``at``, None = nothing rejected there yet
        for node, parent in enumerate(parents):  # a child comes after its parent, siblings in order
            if parent != at:
                continue
            token = tokens[node]
            chance = float(weights[at + 1, token]) / totals[at + 1] if residual is None else float(residual[token])
            drawn_with = 1.0 if draft_probs is None else float(draft_probs[node, token])
            if rng.random() * drawn_with < chance:
                path.append(node)
                at, residual = node, None
                continue
            if residual is None:
                residual = weights[at + 1].astype(np.float64) / totals[at + 1]
            left = residual.copy()
            if draft_probs is None:
                left[token] = 0.0
            else:
                np.maximum(left - draft_probs[node], 0.0, out=left)
            rest = float(left.sum())
            # The two distributions agree but for rounding: a rejection had probability 0, so nothing is left over.
            if rest > 0.0:
                residual = left / rest
        if residual is None:
            return path, _sample(weights[at + 1].astype(np.float64), rng)
        return path, _sample(residual, rng)


def _sample(weights: Float64, rng: np.random.Generator) -> int:
    """Draw an index in proportion to non-negative weights; weight 0 is never drawn."""
    ladder = np.cumsum(weights)
    # Rounding may put the point at the very top of the ladder: then the last index with weight is the one.
    point = min(rng.random() * ladder[-1], np.nextafter(ladder[-1], 0.0))
    return int(np.searchsorted(ladder, point, side="right"))


def build(options: Options, parts: Parts) -> RejectionRule:
    """Needs no part."""
    return RejectionRule(options)
