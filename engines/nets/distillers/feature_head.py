"""Teach the feature head to go on by itself: several passes, each fed with its own hidden states of the one before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vla_spec.engines.nets.distill import DistillOptions, Source
from vla_spec.engines.nets.feature_head import FeatureHead
from vla_spec.engines.nets.head_config import HeadConfig
from vla_spec.engines.nets.vla import VLA

PASSES = 4
MLP_WIDTH = 512


def build(target: VLA) -> FeatureHead:
    """A head for this target that starts from its token table and output layer."""
    head = FeatureHead(HeadConfig.for_target(target.config, MLP_WIDTH))
    with torch.no_grad():
        head.token.weight[:-1].copy_(target.token.weight)
        head.head.load_state_dict(target.head.state_dict())
    return head


def loss(
    head: FeatureHead, source: Source, at: np.ndarray, options: DistillOptions, rng: np.random.Generator
) -> tuple[Tensor, str]:
    """Cross-entropy of every pass, and the share of right tokens after s own steps."""
    rows = torch.from_numpy(at)
    tokens = source.tokens[rows]
    total, right = torch.zeros(()), []
    for s, logits in enumerate(head.unroll(source.features[rows].float(), tokens, PASSES)):
        # The first s rows of pass s have no such history.
        part, label = logits[:, s:-1].float(), tokens[:, s + 1 :]
        total = total + options.decay**s * F.cross_entropy(part.flatten(0, 1), label.flatten())
        right.append(f"{float((part.argmax(-1) == label).float().mean()):.2f}")
    return total, f"right per pass {' '.join(right)}"


def export(head: FeatureHead, out: Path) -> None:
    """Write it into a model folder."""
    from vla_spec.engines.export import export_head

    export_head("feature_head", head, out)
