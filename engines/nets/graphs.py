"""What every engine runs, as graphs: prefill (prompt in, cache rows out), step (k tokens of a tree), drafters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_spec.engines.nets.block_head import BlockHead
from vla_spec.engines.nets.feature_head import FeatureHead
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


class BlockDraft(nn.Module):
    """The block head as one graph: new rows in, n drafted positions out.

    features [r, D], row int64 [r], past_key / past_value [heads, capacity, head_width], mask [1, 1, capacity + r],
    last int64 [1], position / history int64 [n] -> tokens int64 [n, 4], probs [n, 4], key and value rows.
    """

    def __init__(self, head: BlockHead) -> None:
        super().__init__()
        self.model = head

    def forward(
        self, features: Tensor, row: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor, last: Tensor,
        position: Tensor, history: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        keys, values = self.model.context(features, row)
        all_keys, all_values = torch.cat((past_key, keys), 1), torch.cat((past_value, values), 1)
        logits = self.model.draft(all_keys, all_values, mask[0], last, position, history)
        probs, tokens = logits.softmax(-1).topk(4)
        return tokens, probs, keys, values


class FeatureDraft(nn.Module):
    """The feature head as one graph over r rows of a tree; a row is fed by the target or by the head itself.

    features [r, D], hidden [r, width], is_own [r, 1] (1 = use hidden), tokens / position int64 [r],
    past_key / past_value [heads, past, head_width], mask [r, past + r], past = cache rows and rows of the tree so far
    -> tokens int64 [r, 8], log-probabilities [r, 8], hidden [r, width], key and value rows.
    """

    def __init__(self, head: FeatureHead) -> None:
        super().__init__()
        self.model = head

    def forward(
        self, features: Tensor, hidden: Tensor, is_own: Tensor, tokens: Tensor, position: Tensor, past_key: Tensor,
        past_value: Tensor, mask: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        fused = self.model.fused(features) * (1 - is_own) + hidden * is_own
        x, query, key, value = self.model.project(fused, tokens, position)
        keys, values = torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)
        out = self.model.attend(x, query, keys, values, mask)
        logp, best = self.model.scores(out).log_softmax(-1).topk(8)
        return best, logp, out, key, value
