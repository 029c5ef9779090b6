"""The engine raises: out of memory, a lost device, an assertion in a library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import Call, CallKind, Draws, Fault
from vla_spec.plugins import Parts


@dataclass(frozen=True, slots=True)
class Options:
    """How often and where.

    Attributes:
        probability: of each plan.
        most_rounds: the prefill, or the step or the commit of one of the first so many rounds, raises.
    """

    probability: float = 0.01
    most_rounds: int = 4

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and self.most_rounds >= 0):
            raise BadConfig(
                f"probability is {self.probability}, valid: 0..1; most_rounds is {self.most_rounds}, valid: 0 or more"
            )


@final
class EngineException(Fault):
    """The call's time has passed when it raises."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def before(self, call: Call) -> None:
        """Raise, if this is the call."""
        draws = self.draws
        if call.kind is CallKind.DRAFT or draws.uniform(call.plan, 0) >= self._options.probability:
            return
        if draws.below(self._options.most_rounds + 1, call.plan, 1) != call.round:
            return
        in_commit = call.round > 0 and draws.uniform(call.plan, 2) < 0.25
        if (call.kind is CallKind.COMMIT) == in_commit:
            raise (RuntimeError, MemoryError, ValueError)[draws.below(3, call.plan, 3)]("injected engine fault")


def build(options: Options, parts: Parts) -> EngineException:
    """Needs the seed."""
    return EngineException(options, Draws(parts.seed, "engine_exception"))
