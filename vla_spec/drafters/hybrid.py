"""One drafter where the arm moves fast and straight, another where it is slow or turns; chosen once per chunk.

Source: the hybrid boundary of HeiSD, arXiv:2603.17573: retrieval where F is large, the trained drafter where it is
small. F, its window and its limits are those of the controller `kinematic`, schedule `boundary`. The paper's switching
value is not published; ours is an option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory, Drafter, ScoreObserver
from vla_spec.kinematics import Motion, PlayedSteps, boundary
from vla_spec.plugins import Parts
from vla_spec.types import Draft, EngineInputs, Int32, Plan, Scores


@dataclass(frozen=True, slots=True)
class Options:
    """Two drafters and what lies between them.

    Attributes:
        fast: drafter where F is above ``switch_at``: a name, or ``{name: ..., options}``.
        slow: the other one; also where nothing is known of the motion yet.
        switch_at: of F. [0..1]
        window: steps that F looks back over. HeiSD: 15.
        radius, length: mean radius and path length of the window that count as 1; the defaults are 95th percentiles
            over the shipped policy's demonstrations. [physical unit]
        radius_share: weight of the radius in F. HeiSD: 0.5.
        is_delta: actions are increments; False = positions.
    """

    fast: str | dict[str, Any] = "previous_chunk"
    slow: str | dict[str, Any] = "ngram"
    switch_at: float = 0.5
    window: int = 15
    radius: float = 0.062
    length: float = 0.25
    radius_share: float = 0.5
    is_delta: bool = True

    def __post_init__(self) -> None:
        from vla_spec.config import resolve_choice

        for name in ("fast", "slow"):
            if resolve_choice("drafter", getattr(self, name), name).name == "hybrid":
                raise BadConfig(f"{name} must be another drafter, got hybrid itself")
        for name in ("switch_at", "radius_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise BadConfig(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("window", "radius", "length"):
            if not getattr(self, name) > 0:
                raise BadConfig(f"{name} must be more than 0, got {getattr(self, name)}")


@final
class HybridDrafter:
    """Asks ``fast`` or ``slow`` throughout a chunk; the other one hears nothing of it."""

    def __init__(self, options: Options, fast: Drafter, slow: Drafter, motion: Motion, tokens_per_step: int) -> None:
        self._options, self._fast, self._slow = options, fast, slow
        self._played = PlayedSteps(motion, tokens_per_step, options.window)
        self._chosen = slow
        #: Chunks since construction that each drafted.
        self.num_fast = self.num_slow = 0

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """Choose."""
        options = self._options
        self._played.update(history)
        far = boundary(self._played.increments, options.radius, options.length, options.radius_share)
        is_fast = far > options.switch_at
        self._chosen = self._fast if is_fast else self._slow
        self.num_fast += is_fast
        self.num_slow += not is_fast
        self._chosen.begin(inputs, history)

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """The chosen one's draft."""
        return self._chosen.propose(prefix, plan, features)

    def observe(self, draft: Draft, scores: Scores) -> None:
        """For the chosen one, if it learns from scores."""
        if isinstance(self._chosen, ScoreObserver):
            self._chosen.observe(draft, scores)


def build(options: Options, parts: Parts) -> HybridDrafter:
    """Needs what both drafters need, the domain's switches and the tokenizer's unit."""
    from vla_spec.config import load_plugin, resolve_choice

    built: list[Drafter] = []
    for name in ("fast", "slow"):
        choice = resolve_choice("drafter", getattr(options, name), f"drafter.{name}")
        built.append(load_plugin("drafter", choice.name).build(choice.options, parts))
    motion = Motion(parts.domain, parts.tokenizer, options.is_delta)
    return HybridDrafter(options, built[0], built[1], motion, parts.domain.tokens_per_step)
