"""Feature head: one transformer layer that predicts the target's next hidden state, token by token.

In the manner of EAGLE-2 (Li et al. 2024, arXiv:2406.16858) with EAGLE-3's fused features and self-fed training steps
(arXiv:2503.01840). Its own output stands in for the target's hidden states of drafted tokens.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from vla_spec.engines.nets.vla import Block


@dataclass(frozen=True)
class FeatureHeadConfig:
    """Sizes; ``width`` is the target's."""

    width: int = 192
    feature_width: int = 576
    num_heads: int = 6
    mlp_width: int = 512
    prompt_length: int = 13
    num_tokens: int = 32
    num_bins: int = 256

    @property
    def capacity(self) -> int:
        """Most rows: one per token that has a predecessor with features."""
        return self.prompt_length + self.num_tokens

    def to_json(self) -> str:
        """As stored in the safetensors header."""
        return json.dumps(asdict(self))


class FeatureHead(nn.Module):
    """Row i takes the feature of token i - 1 and token i, and predicts the hidden state that scores token i + 1."""

    def __init__(self, config: FeatureHeadConfig) -> None:
        super().__init__()
        self.config = c = config
        self.fuse_norm = nn.LayerNorm(c.feature_width)
        self.fuse = nn.Linear(c.feature_width, c.width)
        self.token = nn.Embedding(c.num_bins, c.width)
        self.join = nn.Linear(2 * c.width, c.width)
        self.position = nn.Parameter(torch.randn(c.capacity, c.width) * 0.02)
        self.prompt_token = nn.Parameter(torch.randn(c.width) * 0.02)
        self.block = Block(c.width, c.num_heads, c.mlp_width)
        self.final_norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.num_bins)

    def fused(self, features: Tensor) -> Tensor:
        """Target features [..., 3 * width] -> [..., width]."""
        return self.fuse(self.fuse_norm(features))

    def rows(self, fused: Tensor, token_embedding: Tensor, position: Tensor) -> Tensor:
        """Inputs of the layer [..., width]; fused and embedding [..., width], position [...]."""
        return self.join(torch.cat((fused, token_embedding), -1)) + self.position[position]

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] from the layer's output, which also serves as the next step's fused feature."""
        return self.head(self.final_norm(hidden))


