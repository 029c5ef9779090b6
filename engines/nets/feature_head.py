"""Feature head: one transformer layer that predicts the target's next hidden state, token by token.

In the manner of EAGLE-2 (Li et al. 2024, arXiv:2406.16858), with EAGLE-3's fused features of three depths and self-fed
training steps (Li et al. 2025, arXiv:2503.01840): its own output stands in for the hidden states of drafted tokens.

Row i holds the feature of the token before and token i itself, and its output scores token i + 1. The target's prompt
rows (all but the last) come first as context, with a "prompt" id instead of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_spec.engines.nets.head_config import HeadConfig


class FeatureHead(nn.Module):
    """The drafter network. Token id V means "a prompt row"."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = c = config
        self.capacity = c.prompt_length - 1 + c.num_tokens  # most rows
        self.fuse_norm = nn.LayerNorm(c.feature_width)
        self.fuse = nn.Linear(c.feature_width, c.width)
        self.token = nn.Embedding(c.num_bins + 1, c.width)
        self.join = nn.Linear(2 * c.width, c.width)
        self.position = nn.Parameter(torch.randn(self.capacity, c.width) * 0.02)
        self.norm1 = nn.LayerNorm(c.width)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.norm2 = nn.LayerNorm(c.width)
        self.up = nn.Linear(c.width, c.mlp_width)
        self.down = nn.Linear(c.mlp_width, c.width)
        self.final_norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.num_bins)

    def fused(self, features: Tensor) -> Tensor:
        """Target features [..., 3 * width] -> [..., width]."""
        return self.fuse(self.fuse_norm(features))

    def project(self, fused: Tensor, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows -> residual x [..., r, width] and query, key, value [..., heads, r, head_width]."""
        c, d = self.config, fused.ndim - 1
        x = self.join(torch.cat((fused, self.token(tokens)), -1)) + self.position[position]
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        query, key, value = (
            p.reshape(*x.shape[:-1], c.num_heads, c.width // c.num_heads).transpose(d - 1, d) for p in parts
        )
        return x, query, key, value

    def attend(self, x: Tensor, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The rest of the layer; mask additive [r, all]. Returns the hidden state that stands in for the target's."""
        d = query.ndim
        scores = query @ keys.transpose(d - 2, d - 1) * query.shape[-1] ** -0.5 + mask
        mixed = (scores.softmax(-1) @ values).transpose(d - 3, d - 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] about the token after each row."""
        return self.head(self.final_norm(hidden))

    def unroll(self, features: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
        """Training: logits [n, T, V] of ``steps`` self-fed passes; pass s = 0, 1, ... uses s own hidden states.

        features [n, p + T - 1, 3 * width] of the target, tokens int64 [n, T].
        """
        c = self.config
        n, context = len(tokens), c.prompt_length - 1
        ids = torch.cat((torch.full((n, context), c.num_bins), tokens), 1)
        position = torch.arange(self.capacity)
        fused = self.fused(features)  # row i takes the feature of the row before its token: no shift needed
        gap = position[:, None] - position[None]  # query row minus key row
        keys, values, logits = [], [], []
        for s in range(steps):
            x, query, key, value = self.project(fused, ids, position)
            keys.append(key)
            values.append(value)
            # Own rows stand at the end of the path, the target's everywhere before.
            masks = [gap >= s] + [gap == s - own for own in range(1, s + 1)]
            mask = torch.where(torch.cat(masks, 1), 0.0, -1e9)
            hidden = self.attend(x, query, torch.cat(keys, 2), torch.cat(values, 2), mask)
            logits.append(self.scores(hidden)[:, context:])
            fused = torch.cat((fused[:, :1], hidden[:, :-1]), 1)
        return logits
