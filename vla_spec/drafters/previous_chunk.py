"""Draft the remainder of the previous chunk, shifted by the control steps that were consumed since. Costs nothing.

The last plan for the same instant is the cheapest guess there is: chunks of successive observations overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Int32, Plan


@dataclass(frozen=True, slots=True)
class Options:
    """Nothing to set."""


@final
class PreviousChunkDrafter:
    """Token m + i of the new chunk is drafted as token ``consumed + m + i`` of the previous one, as a chain.

    Drafts nothing in the first chunk and beyond the previous chunk's end.
    """

    def __init__(self) -> None:
        self._remainder = np.empty(0, np.int32)

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """Align the previous chunk with the new one."""
        self._remainder = EMPTY_DRAFT.tokens if history is None else history.tokens[max(history.consumed, 0) :]

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """The next tokens of the remainder, whatever the prefix is."""
        num_drafted = max(min(plan.gamma, plan.depth), 0)
        return Draft.chain(self._remainder[len(prefix) : len(prefix) + num_drafted])


def build(options: Options, parts: Parts) -> PreviousChunkDrafter:
    """Needs no part."""
    return PreviousChunkDrafter()
