"""What engines run, as torch modules: prompt, decoder (the reference of the hand-written graph), drafters."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from vla_spec.engines.nets.block_head import BlockHead
from vla_spec.engines.nets.feature_head import FeatureHead
from vla_spec.engines.nets.head_config import BLOCK_CHOICES, FEATURE_CHOICES, HeadConfig
from vla_spec.engines.nets.vla import VLA
from vla_spec.engines.nets.weights import read_weights
from vla_spec.errors import BadModel


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
    """What block_head.onnx computes: new rows in, n drafted positions out. cache [2, 1, heads, R, head_width]."""

    def __init__(self, head: BlockHead) -> None:
        super().__init__()
        self.model = head

    def forward(
        self, features: Tensor, row: Tensor, write_index: Tensor, last: Tensor, positions: Tensor, history: Tensor,
        mask: Tensor, cache: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        start, end = int(write_index), int(write_index) + len(features)
        cache[0, 0, :, start:end], cache[1, 0, :, start:end] = self.model.context(features, row)
        # The network adds the positions' own keys itself; which of them are real stands behind the rows in the mask.
        rows = cache[:, 0, :, :end]
        own = mask[0, 0, :1, end : end + len(positions)]
        n = int(own.sum())
        logits = self.model.draft(
            rows[0], rows[1], torch.where(mask[0, :, :1, :end], 0.0, -torch.inf), last, positions[:n], history[:n]
        )
        probs, tokens = logits.softmax(-1).topk(BLOCK_CHOICES)
        padding = (0, 0, 0, len(positions) - n)
        return nn.functional.pad(tokens, padding), nn.functional.pad(probs, padding)


class FeatureDraft(nn.Module):
    """What feature_head.onnx computes: n rows, of the chain or a tree. cache [2, 1, heads, R, head_width]."""

    def __init__(self, head: FeatureHead) -> None:
        super().__init__()
        self.model = head

    def forward(
        self, features: Tensor, hidden: Tensor, is_own: Tensor, ids: Tensor, positions: Tensor, write_index: Tensor,
        mask: Tensor, cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        start, end = int(write_index), int(write_index) + len(features)
        fused = torch.where(is_own, hidden, self.model.fused(features))
        x, query, cache[0, 0, :, start:end], cache[1, 0, :, start:end] = self.model.project(fused, ids, positions)
        out = self.model.attend(x, query, cache[0, 0], cache[1, 0], torch.where(mask[0, 0], 0.0, -torch.inf))
        logp, tokens = self.model.scores(out).log_softmax(-1).topk(FEATURE_CHOICES)
        return tokens, logp, out


#: Drafters' networks by the name of their graph: the network, and its module with the graph's inputs.
HEADS: dict[str, tuple[type[BlockHead] | type[FeatureHead], type[BlockDraft] | type[FeatureDraft]]] = {
    "block_head": (BlockHead, BlockDraft), "feature_head": (FeatureHead, FeatureDraft),
}  # fmt: skip


def load_head(file: Path) -> BlockHead | FeatureHead:
    """The head whose weights lie in ``file``, named as its graph.

    Raises:
        BadModel: no such network, or weights that are missing, corrupt or incomplete.
    """
    if file.stem not in HEADS:
        raise BadModel(f"{file}: no network of a drafter has this name; valid: {', '.join(HEADS)}")
    weights, metadata = read_weights(file)
    head = HEADS[file.stem][0](HeadConfig.from_json(metadata.get("config", ""), str(file)))
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise BadModel(f"{file}: its weights don't have the names and sizes of a {file.stem} ({error})") from error
    return head.eval()


def head_module(name: str, weights: Path) -> tuple[nn.Module, Named, Named]:
    """The network behind a drafter's graph, as `reference_module`.

    Raises:
        BadModel: see `load_head`.
    """
    head = load_head(weights)
    c, width = head.config, (None, head.config.feature_width)
    ids, one = ("int64", (None,)), ("int64", (1,))
    if name == "block_head":
        inputs: Named = {
            "features": ("float32", width), "row": ids, "write_index": one, "last": one, "positions": ids,
            "history": ids, "mask": ("bool", (1, 1, None, c.block_rows)),
        }  # fmt: skip
        choices = (None, BLOCK_CHOICES)
        return BlockDraft(cast(BlockHead, head)), inputs, {"tokens": ("int64", choices), "probs": ("float32", choices)}
    inputs = {
        "features": ("float32", width), "hidden": ("float32", (None, c.width)), "is_own": ("bool", (None, 1)),
        "ids": ids, "positions": ids, "write_index": one, "mask": ("bool", (1, 1, None, c.feature_rows)),
    }  # fmt: skip
    choices = (None, FEATURE_CHOICES)
    outputs: Named = {"tokens": ("int64", choices), "logp": ("float32", choices), "out": ("float32", (None, c.width))}
    return FeatureDraft(cast(FeatureHead, head)), inputs, outputs
