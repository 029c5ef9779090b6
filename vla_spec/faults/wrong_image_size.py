"""Pictures of another size, another number of cameras, or none at all: a driver that came up in another mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

from vla_spec.injection import Chance as Options
from vla_spec.injection import Draws, Fault
from vla_spec.plugins import Parts
from vla_spec.types import Observation


@final
class WrongImageSize(Fault):
    """One of four kinds of wrongness, which the seed picks."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def observe(self, plan: int, seen: Observation, past: Sequence[Observation]) -> Observation:
        """Pictures that don't fit."""
        if self.draws.uniform(plan, 0) >= self._options.probability:
            return seen
        wrong: Any = (seen.images[:, :-1], seen.images[:-1], seen.images[:0], None)[self.draws.below(4, plan, 1)]
        return replace(seen, images=wrong)


def build(options: Options, parts: Parts) -> WrongImageSize:
    """Needs the seed."""
    return WrongImageSize(options, Draws(parts.seed, "wrong_image_size"))
