"""Block head: several future tokens from one small pass over the target's hidden states.

One transformer layer. Its keys and values come from the target's hidden states (three depths, as EAGLE-3,
arXiv:2503.01840), computed once per committed row; its queries are the positions to draft, each told the last token and
what the previous chunk had planned for that control step. Drafting costs one small forward per round, not one per token
(multi-token heads: Medusa, arXiv:2401.10774; Gloeckle et al., arXiv:2404.19737).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_spec.engines.nets.head_config import HeadConfig


class BlockHead(nn.Module):
    """The drafter network. ``history`` ids: 0..V-1, or V for "no plan"."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = c = config
        self.capacity = c.prompt_length + c.num_tokens  # most committed rows
        self.fuse_norm = nn.LayerNorm(c.feature_width)
        self.fuse = nn.Linear(c.feature_width, c.width)
        self.row_position = nn.Parameter(torch.randn(self.capacity, c.width) * 0.02)
        self.token = nn.Embedding(c.num_bins, c.width)
        self.history = nn.Embedding(c.num_bins + 1, c.width)
        self.position = nn.Parameter(torch.randn(c.num_tokens, c.width) * 0.1)
        self.ago = nn.Parameter(torch.randn(c.num_tokens, c.width) * 0.1)  # distance from the last token
        self.context_norm = nn.LayerNorm(c.width)
        self.kv = nn.Linear(c.width, 2 * c.width, bias=False)
        self.norm1 = nn.LayerNorm(c.width)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.norm2 = nn.LayerNorm(c.width)
        self.up = nn.Linear(c.width, c.mlp_width)
        self.down = nn.Linear(c.mlp_width, c.width)
        self.final_norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.num_bins)

    def _split(self, x: Tensor, parts: int) -> list[Tensor]:
        """[..., r, parts * width] -> parts times [..., heads, r, head_width]."""
        c, d = self.config, x.ndim - 1  # axes counted from the front: the exporter writes negative ones as they are
        heads = [p.reshape(*x.shape[:-1], c.num_heads, c.width // c.num_heads) for p in x.chunk(parts, -1)]
        return [h.transpose(d - 1, d) for h in heads]

    def context(self, features: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., heads, r, head_width] of target rows: features [..., r, 3 * width], row [r]."""
        x = self.fuse(self.fuse_norm(features)) + self.row_position[row]
        keys, values = self._split(self.kv(self.context_norm(x)), 2)
        return keys, values

    def draft(
        self, keys: Tensor, values: Tensor, mask: Tensor, last: Tensor, position: Tensor, history: Tensor
    ) -> Tensor:
        """Logits [..., n, V] for n positions in a row.

        keys, values [..., heads, r, head_width]; mask [..., 1, 1, r] additive; last [..., 1];
        position, history [..., n].
        """
        c = self.config
        ago = (position - position[..., :1]).clamp(0, c.num_tokens - 1)
        x = self.token(last) + self.position[position] + self.ago[ago] + self.history(history)
        query, key, value = self._split(self.qkv(self.norm1(x)), 3)
        scale = (c.width // c.num_heads) ** -0.5
        d = query.ndim
        to_rows = query @ keys.transpose(keys.ndim - 2, keys.ndim - 1) * scale + mask
        scores = torch.cat((to_rows, query @ key.transpose(d - 2, d - 1) * scale), -1).softmax(-1)
        r = keys.shape[-2]
        mixed = scores[..., :r] @ values + scores[..., r:] @ value
        mixed = mixed.transpose(d - 3, d - 2).reshape(x.shape)
        x = x + self.out(mixed)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.final_norm(x))
