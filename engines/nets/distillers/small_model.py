"""Teach an independent small policy (two layers, own small vision stem) to write the target's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vla_spec.engines.nets.distill import DistillOptions, Source
from vla_spec.engines.nets.vla import VLA, VLAConfig


def build(target: VLA) -> VLA:
    """About a million parameters with the target's inputs and tokens."""
    c = target.config
    small = VLA(
        VLAConfig(
            num_words=c.num_words, width=96, num_layers=2, num_heads=3, mlp_width=384, image_size=c.image_size,
            num_cameras=c.num_cameras, tokens_per_camera=2, max_words=c.max_words, text_tokens=1,
            state_size=c.state_size, horizon=c.horizon, action_size=c.action_size, num_bins=c.num_bins,
            stem_channels=(16, 24, 32),
        )
    )  # fmt: skip
    small.state_mean.copy_(target.state_mean)
    small.state_std.copy_(target.state_std)
    return small


def loss(
    small: VLA, source: Source, at: np.ndarray, options: DistillOptions, rng: np.random.Generator
) -> tuple[Tensor, str]:
    """Teacher-forced cross-entropy against the target's tokens, and the share of right ones."""
    data, frames = source.data, source.rows[at]
    phrase = rng.integers(0, source.words.shape[1], len(at))
    tokens = source.tokens[torch.from_numpy(at)]
    logits, _ = small(
        torch.from_numpy(data.images[frames]), torch.from_numpy(source.words[data.task[frames], phrase]),
        torch.from_numpy(data.state[frames]), tokens,
    )  # fmt: skip
    logits = logits.float()
    right = float((logits.argmax(-1) == tokens).float().mean())
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), f"right {right:.2f}"


def export(small: VLA, out: Path) -> None:
    """Write it as a model folder of its own inside the target's."""
    from vla_spec.drafters.small_model import FOLDER
    from vla_spec.engines.export import export_policy

    vocabulary = json.loads((out / "policy.json").read_text(encoding="utf-8"))["vocabulary"]
    with np.load(out / "golden.npz", allow_pickle=False) as golden:
        inputs = {name: golden[name] for name in ("images", "words", "state")}
    export_policy(small, vocabulary, out / FOLDER, inputs)
