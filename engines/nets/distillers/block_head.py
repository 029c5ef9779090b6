"""Teach the block head to say the rest of the chunk from any prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vla_spec.engines.nets.block_head import BlockHead
from vla_spec.engines.nets.distill import DistillOptions, Source
from vla_spec.engines.nets.head_config import HeadConfig
from vla_spec.engines.nets.vla import VLA

PREFIXES = 4  # per chunk and step: the keys and values of a chunk serve all of them
HISTORY_DROP = 0.15  # share of chunks that are drafted without the previous plan, as the first of an episode is
DRAFT = 16  # positions that the reported length looks at


def build(target: VLA) -> BlockHead:
    """A head for this target that starts from its token table and output layer."""
    head = BlockHead(HeadConfig.for_target(target.config, 4 * target.config.width))
    with torch.no_grad():
        head.token.weight.copy_(target.token.weight)
        head.history.weight[:-1].copy_(target.token.weight)
        head.head.load_state_dict(target.head.state_dict())
    return head


def loss(
    head: BlockHead, source: Source, at: np.ndarray, options: DistillOptions, rng: np.random.Generator
) -> tuple[Tensor, str]:
    """Cross-entropy over all positions after a random prefix, and the mean number of leading right tokens + 1."""
    c = head.config
    n, q = len(at), PREFIXES
    rows = torch.from_numpy(at)
    tokens, features, plans = source.tokens[rows], source.features[rows].float(), source.history[rows]
    prefix = torch.from_numpy(rng.integers(1, c.num_tokens, (n, q)))
    row = torch.arange(features.shape[1])
    keys, values = head.context(features, row)
    mask = torch.where(row < c.prompt_length + prefix[..., None] - 1, 0.0, -1e9)[:, :, None, None]  # [n, q, 1, 1, r]
    offset = torch.arange(c.num_tokens)
    position = prefix[..., None] + offset  # [n, q, T]
    is_real = position < c.num_tokens
    position = position.clamp(max=c.num_tokens - 1)

    def pick(x: Tensor) -> Tensor:
        return x[:, None].expand(n, q, -1).gather(2, position)

    label, history = pick(tokens), pick(plans)
    if head.training:
        drop = torch.from_numpy(rng.random((n, q, 1)) < HISTORY_DROP)
        history = torch.where(drop, torch.tensor(c.num_bins), history)
    last = tokens[:, None].expand(n, q, -1).gather(2, prefix[..., None] - 1)
    logits = head.draft(keys[:, None], values[:, None], mask, last, position, history).float()
    weight = torch.where(is_real, options.decay ** offset.float(), 0.0)
    entropy = F.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="none").view(label.shape)
    right = ((logits.argmax(-1) == label) & is_real).float()
    length = float(right[..., :DRAFT].cumprod(-1).sum(-1).mean()) + 1
    return (entropy * weight).sum() / weight.sum(), f"tokens per forward {length:.2f}"


def export(head: BlockHead, out: Path) -> None:
    """Write it into a model folder."""
    from vla_spec.engines.export import export_head

    export_head("block_head", head, out)
