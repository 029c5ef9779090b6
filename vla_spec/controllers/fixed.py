"""The same plan in every round until time is up: the baseline that adaptive controllers are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import Plan, Round


@dataclass(frozen=True, slots=True)
class Options:
    """A constant plan.

    Attributes:
        gamma: most nodes to draft, 0 = plain decoding.
        depth: longest path, None = gamma.
        top_k: children per node, 1 = a chain.
        tolerance: scale in [0, 1] of the rule's own tolerance.
    """

    gamma: int = 6
    depth: int | None = None
    top_k: int = 1
    tolerance: float = 1.0

    def __post_init__(self) -> None:
        if self.gamma < 0 or (self.depth is not None and self.depth < 0) or self.top_k < 1:
            raise BadConfig(f"need gamma >= 0, depth >= 0, top_k >= 1, got {self.gamma}, {self.depth}, {self.top_k}")
        if not 0.0 <= self.tolerance <= 1.0:
            raise BadConfig(f"tolerance must be in [0, 1], got {self.tolerance}")


@final
class FixedController:
    """Stops only when the deadline has passed, so its last round may end late by one whole round."""

    def __init__(self, options: Options) -> None:
        depth = options.gamma if options.depth is None else options.depth
        self._plan = Plan(options.gamma, depth, options.top_k, options.tolerance)

    def begin(self, remaining_ns: int, history: ChunkHistory | None = None) -> bool:
        """Keeps no state."""
        return remaining_ns > 0

    def plan(self, remaining_ns: int, tokens_left: int) -> Plan | None:
        """The constant plan, None once the deadline has passed."""
        return self._plan if remaining_ns > 0 else None

    def record(self, measured: Round) -> None:
        """Learns nothing."""


def build(options: Options, parts: Parts) -> FixedController:
    """Needs no part."""
    return FixedController(options)
