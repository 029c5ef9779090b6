"""Pictures of floating-point numbers with NaN among them: a preprocessing step that divided by zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np

from vla_spec.injection import Chance as Options
from vla_spec.injection import Draws, Fault
from vla_spec.plugins import Parts
from vla_spec.types import Observation


@final
class NanImages(Fault):
    """Same shape, other type."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def observe(self, plan: int, seen: Observation, past: Sequence[Observation]) -> Observation:
        """Pictures that no engine should get."""
        if self.draws.uniform(plan) >= self._options.probability:
            return seen
        images: Any = seen.images.astype(np.float32)
        images.reshape(-1)[:: max(1, images.size // 7)] = np.nan
        return replace(seen, images=images)


def build(options: Options, parts: Parts) -> NanImages:
    """Needs the seed."""
    return NanImages(options, Draws(parts.seed, "nan_images"))
