"""What engines run, as torch modules: prompt, decoder (the reference of the hand-written graph), drafters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_spec.engines.nets.block_head import BlockHead
from vla_spec.engines.nets.feature_head import FeatureHead
from vla_spec.engines.nets.vla import VLA


class Prompt(nn.Module):
    """images uint8 [1, cameras, s, s, 3], words int64 [1, w], state [1, s] -> embeds [p, D]."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, words: Tensor, state: Tensor) -> tuple[Tensor]:
        return (self.model.embed_prompt(images, words, state)[0],)


class Decoder(nn.Module):
    """The layers over k rows and a cache that they write in place.

    embeds [k, D], mask bool [1, 1, k, R], write_index int64 [1], cache [2 * layers, 1, heads, R, head_width]
    -> logits [k, V], features [k, F].
    """

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeds: Tensor, mask: Tensor, write_index: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        model, start, k = self.model, int(write_index), len(embeds)
        blank = torch.where(mask, 0.0, -torch.inf)
        x, taps, third = embeds, [], len(model.blocks) // 3
        for i, block in enumerate(model.blocks):
            query, key, value = (
                part.view(1, k, block.num_heads, block.head_width).transpose(1, 2)
                for part in block.qkv(block.norm1(x)).chunk(3, -1)
            )
            cache[2 * i][:, :, start : start + k], cache[2 * i + 1][:, :, start : start + k] = key, value
            scores = query @ cache[2 * i].transpose(2, 3) * block.head_width**-0.5 + blank
            mixed = scores.softmax(-1) @ cache[2 * i + 1]
            x = x + block.out(mixed.transpose(1, 2).reshape(k, -1))
            x = x + block.down(torch.nn.functional.gelu(block.up(block.norm2(x))))
            if i + 1 in (third, 2 * third):
                taps.append(x)
        x = model.final_norm(x)
        return model.head(x), torch.cat((*taps, x), -1)


Named = dict[str, tuple[str, tuple[int | None, ...]]]


def reference_module(name: str, model: VLA) -> tuple[nn.Module | None, Named, Named]:
    """The network behind the graph ``<name>.onnx``, and its inputs and outputs (dtype, shape; None = dynamic)."""
    c = model.config
    if name == "prompt":
        images = (1, c.num_cameras, c.image_size, c.image_size, 3)
        inputs: Named = {
            "images": ("uint8", images), "words": ("int64", (1, c.max_words)), "state": ("float32", (1, c.state_size)),
        }  # fmt: skip
        return Prompt(model), inputs, {"embeds": ("float32", (c.prompt_length, c.width))}
    if name == "decoder":
        inputs = {
            "embeds": ("float32", (None, c.width)),
            "mask": ("bool", (1, 1, None, None)), "write_index": ("int64", (1,)),
        }  # fmt: skip
        return Decoder(model), inputs, {"logits": ("float32", (None, c.num_bins)),
            "features": ("float32", (None, c.feature_width))}  # fmt: skip
    return None, {}, {}


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
