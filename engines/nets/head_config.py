"""Sizes of a drafter head: a small network on the target's hidden states."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from vla_spec.engines.nets.vla import VLAConfig


@dataclass(frozen=True)
class HeadConfig:
    """All but ``mlp_width`` are the target's; ``feature_width`` is D, ``num_bins`` is V."""

    width: int
    feature_width: int
    num_heads: int
    mlp_width: int
    prompt_length: int
    num_tokens: int
    num_bins: int

    @staticmethod
    def for_target(target: VLAConfig, mlp_width: int) -> HeadConfig:
        """A head that fits this target."""
        t = target
        return HeadConfig(t.width, t.feature_width, t.num_heads, mlp_width, t.prompt_length, t.num_tokens, t.num_bins)

    def to_json(self) -> str:
        """As stored in the safetensors header."""
        return json.dumps(asdict(self))
