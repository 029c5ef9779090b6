"""Accept a drafted token only if it is the target's most likely one: plain greedy decoding, token for token.

Source: Stern et al. 2018, arXiv:1811.03115; on trees Miao et al. 2023, arXiv:2305.09781.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.acceptance._longest_path import is_chain, longest_path, num_leading, prefix_verdict
from vla_spec.plugins import Parts
from vla_spec.types import Committed, Draft, Scores, Verdict


@dataclass(frozen=True, slots=True)
class Options:
    """Nothing to set."""


@final
class GreedyRule:
    """``token == argmax(logits of its parent)``; equal logits go to the smaller token id, as in plain decoding.

    Accepted: drafted tokens that match. Recovered: the target's token where the draft first differs. Bonus: the
    target's token after a draft that matched to its end.
    """

    @property
    def exact(self) -> bool:
        """Equals plain greedy decoding."""
        return True

    def judge(
        self,
        draft: Draft,
        scores: Scores,
        committed: Committed,
        rng: np.random.Generator,
        tolerance: float = 1.0,
    ) -> Verdict:
        """See `AcceptanceRule.judge`; uses neither ``committed``, ``rng`` nor ``tolerance``."""
        own = scores.logits.argmax(1)  # [k + 1]
        if is_chain(draft.parents):
            length = num_leading(draft.tokens == own[:-1])
            return prefix_verdict(length, int(own[length]))
        choices: list[int] = own.tolist()
        parents: list[int] = draft.parents.tolist()
        tokens: list[int] = draft.tokens.tolist()
        matches = [token == choices[parent + 1] for token, parent in zip(tokens, parents, strict=True)]
        path = longest_path(parents, matches, [0.0] * len(parents))
        following = choices[path[-1] + 1] if path else choices[0]
        return Verdict(
            np.array(path, np.int32), following, np.zeros(len(path), np.bool_), np.zeros(len(path), np.float32)
        )


def build(options: Options, parts: Parts) -> GreedyRule:
    """The greedy rule needs no part."""
    return GreedyRule()
