"""Somebody changes the order while a chunk is being played or planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from vla_spec.injection import Chance, Draws, Fault
from vla_spec.plugins import Parts


@dataclass(frozen=True, slots=True)
class Options(Chance):
    """How often.

    Attributes:
        probability: of each control step.
    """

    probability: float = 0.005


@final
class InstructionChange(Fault):
    """The new order is another one of the sentences on offer; with fewer than two nothing changes."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def instruction(self, step: int, current: str, offered: Sequence[str]) -> str:
        """Another order."""
        others = [sentence for sentence in offered if sentence != current]
        if others and self.draws.uniform(step, 0) < self._options.probability:
            return others[self.draws.below(len(others), step, 1)]
        return current


def build(options: Options, parts: Parts) -> InstructionChange:
    """Needs the seed."""
    return InstructionChange(options, Draws(parts.seed, "instruction_change"))
