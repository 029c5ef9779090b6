"""The toy robot's adapter: what `engines/toy.py` needs to plan for `robots/toy.py`, without any model folder.

Checks observations like the embedded policy's adapter, and also tells the engine the control step, so that successive
plans agree about the future.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.adapters.vla import PolicyConfig, VLAAdapter
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ActionTokenizer
from vla_spec.plugins import Parts
from vla_spec.tokenizers import uniform_bins
from vla_spec.types import EngineInputs, Float32, Int32, Observation, TokenDomain


@dataclass(frozen=True, slots=True)
class Options:
    """What the toy policy looks like.

    Attributes:
        horizon: H, control steps in a chunk.
        image_size: pictures are image_size x image_size, as the robot makes them.
    """

    horizon: int = 8
    image_size: int = 16

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.image_size < 1:
            raise BadConfig(f"horizon and image_size must be 1 or more, got {self.horizon} and {self.image_size}")


@final
class ToyAdapter:
    """Four degrees of freedom, the last one a gripper; 256 uniform bins."""

    def __init__(self, options: Options) -> None:
        config = PolicyConfig(
            image_size=options.image_size,
            num_cameras=3,
            state_size=4,
            horizon=options.horizon,
            action_size=4,
            max_words=8,
            vocabulary=("<pad>", "<unknown>", "go", "to", "the", "goal"),
            tokenizer={"name": "uniform_bins"},
            never_relaxed_dofs=(3,),
            groups=(0, 0, 0, 1),
            state_low=(-1.0, -1.0, -1.0, 0.0),
            state_high=(1.0, 1.0, 1.0, 1.0),
        )
        self._inner = VLAAdapter(config, uniform_bins.build(uniform_bins.Options()))

    @property
    def domain(self) -> TokenDomain:
        return self._inner.domain

    @property
    def tokenizer(self) -> ActionTokenizer:
        return self._inner.tokenizer

    def encode(self, observation: Observation) -> EngineInputs:
        return {**self._inner.encode(observation), "step": np.array([observation.step], np.int64)}

    def decode(self, tokens: Int32) -> Float32:
        return self._inner.decode(tokens)

    def example(self) -> Observation:
        """Some observation that is valid, for warm-up and for tests."""
        return self._inner.example()


def build(options: Options, parts: Parts | None = None) -> ToyAdapter:
    """Needs no other part."""
    return ToyAdapter(options)
