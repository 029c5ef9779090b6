"""Draft nothing: plain autoregressive decoding, the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Int32, Plan


@dataclass(frozen=True, slots=True)
class Options:
    """Nothing to set."""


@final
class NoDrafter:
    """Always the empty draft."""

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """Nothing to prepare."""

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """The empty draft."""
        return EMPTY_DRAFT


def build(options: Options, parts: Parts) -> NoDrafter:
    """Needs no part."""
    return NoDrafter()
