"""The policy as the two graphs that every engine runs: prefill (prompt in, cache rows out) and step (k tokens of a tree)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_spec.engines.nets.vla import VLA


class Prefill(nn.Module):
    """images uint8 [1, cameras, s, s, 3], words int64 [1, w], state [1, s] -> logits [1, V], features [p, D], rows."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, words: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        prompt = model.embed_prompt(images, words, state)
        length = model.config.prompt_length
        x, features, rows = model.run_blocks(prompt, torch.zeros(length, length))
        return model.head(x[:, -1]), features[0], torch.cat([r for row in rows for r in row])


class Step(nn.Module):
    """k tokens with a tree mask against a fixed-capacity cache.

    tokens, position int64 [k]; mask [k, capacity + k]; past: 2 * layers tensors [heads, capacity, head_width]
    -> logits [k, V], features [k, D], then 2 * layers tensors [heads, k, head_width].
    """

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, position: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        x = model.token(tokens) + model.position[position]  # [k, width]
        rows: list[Tensor] = []
        taps: list[Tensor] = []
        third = len(model.blocks) // 3
        for i, block in enumerate(model.blocks):
            # Two-dimensional on purpose: a linear layer becomes one Gemm node instead of MatMul and Add.
            qkv = block.qkv(block.norm1(x)).view(-1, 3, block.num_heads, block.head_width).permute(1, 2, 0, 3)
            query, key, value = qkv[0], qkv[1], qkv[2]  # [heads, k, head_width]
            rows += [key, value]
            keys, values = torch.cat((past[2 * i], key), 1), torch.cat((past[2 * i + 1], value), 1)
            scores = query @ keys.transpose(1, 2) * block.head_width**-0.5 + mask
            mixed = (scores.softmax(-1) @ values).transpose(0, 1).reshape(-1, model.config.width)
            x = x + block.out(mixed)
            x = x + block.down(torch.nn.functional.gelu(block.up(block.norm2(x))))
            if i + 1 in (third, 2 * third):
                taps.append(x)
        x = model.final_norm(x)
        return model.head(x), torch.cat((*taps, x), -1), *rows
