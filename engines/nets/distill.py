"""Distil drafters on the target's own greedy chunks. Resumable like `train`.

First the target decodes every chosen frame (its tokens and hidden states are kept in memory), then each drafter learns
to say what the target said, from any prefix of the chunk. The weight of a position falls with its distance from the
prefix, because a draft is only worth as much as the tokens before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla_spec.engines.nets.block_head import BlockHead, BlockHeadConfig
from vla_spec.engines.nets.feature_head import FeatureHead, FeatureHeadConfig
from vla_spec.engines.nets.demonstrations import Demonstrations, encode_words
from vla_spec.engines.nets.vla import VLA, VLAConfig
from vla_spec.robots._metaworld_tasks import TASKS


class Outputs(NamedTuple):
    """What the target said: tokens int64 [N, T]; features fp16 [N, p + T - 1, D]; history int64 [N, T] (V = no plan)."""

    tokens: Tensor
    features: Tensor
    history: Tensor


@dataclass(frozen=True)
class DistillOptions:
    """max_frames bounds memory (40 kB a frame); execute_horizon is how far the previous chunk was played."""

    steps: int = 4000
    batch: int = 48
    prefixes: int = 4
    learning_rate: float = 1e-3
    decay: float = 0.9
    max_frames: int = 24_000
    execute_horizon: int = 4
    save_every: int = 500
    seed: int = 0


@torch.inference_mode()
def greedy_chunks(model: VLA, images: Tensor, words: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy decoding of a batch: tokens int64 [n, T] and features fp16 [n, p + T - 1, D]."""
    c = model.config
    prompt = model.embed_prompt(images, words, state)
    x, features, past = model.run_blocks(prompt, torch.zeros(c.prompt_length, c.prompt_length))
    kept = [features.half()]
    tokens = [model.head(x[:, -1]).argmax(-1)]
    for t in range(c.num_tokens - 1):
        x = (model.token(tokens[-1]) + model.position[c.prompt_length + t])[:, None]
        x, features, rows = model.run_blocks(x, torch.zeros(1, c.prompt_length + t + 1), past)
        past = [
            (torch.cat((p[0], r[0]), 2), torch.cat((p[1], r[1]), 2)) for p, r in zip(past, rows, strict=True)
        ]
        kept.append(features.half())
        tokens.append(model.head(x[:, -1]).argmax(-1))
    return torch.stack(tokens, 1), torch.cat(kept, 1)


def target_outputs(
    model: VLA, vocabulary: list[str], data: Demonstrations, options: DistillOptions, report: Callable[[str], None]
) -> tuple[Outputs, np.ndarray]:
    """Decode whole episodes until ``max_frames``; returns the outputs and the frames they belong to."""
    c, rng = model.config, np.random.default_rng(options.seed)
    episodes = rng.permutation(np.unique(data.episode))
    counts = np.bincount(data.episode)
    chosen = episodes[np.cumsum(counts[episodes]) <= options.max_frames]
    rows = np.flatnonzero(np.isin(data.episode, chosen))
    words = np.stack(
        [np.stack([encode_words(p, vocabulary, c.max_words) for p in t.phrasings]) for t in TASKS.values()]
    )
    tokens = torch.empty(len(rows), c.num_tokens, dtype=torch.long)
    features = torch.empty(len(rows), c.prompt_length + c.num_tokens - 1, 3 * c.width, dtype=torch.float16)
    began = time.monotonic()
    for at in range(0, len(rows), 128):
        part = rows[at : at + 128]
        phrase = rng.integers(0, words.shape[1], len(part))
        tokens[at : at + 128], features[at : at + 128] = greedy_chunks(
            model, torch.from_numpy(data.images[part]), torch.from_numpy(words[data.task[part], phrase]),
            torch.from_numpy(data.state[part]),
        )  # fmt: skip
        if at % 2560 == 0:
            report(f"target outputs {at + len(part)}/{len(rows)} {time.monotonic() - began:.0f} s")
    # The chunk that was planned execute_horizon steps earlier in the same episode says what to expect now.
    index = {(int(data.episode[r]), int(data.step[r])): i for i, r in enumerate(rows)}
    history = torch.full_like(tokens, c.num_bins)
    shift = options.execute_horizon * c.action_size
    for (episode, step), i in index.items():
        earlier = index.get((episode, step - options.execute_horizon))
        if earlier is not None:
            history[i, : c.num_tokens - shift] = tokens[earlier, shift:]
    return Outputs(tokens, features, history), rows


def block_head_loss(
    head: BlockHead, batch: Outputs, prefix: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """Loss, and whether each drafted token is right [n, q, T] (nan before the prefix).

    prefix int64 [n, q]: tokens decoded so far, 1..T-1; drafted are positions prefix..T-1.
    """
    c = head.config
    n, q = prefix.shape
    keys, values = head.context(batch.features.float(), torch.arange(batch.features.shape[1]))
    rows = torch.arange(batch.features.shape[1])
    mask = torch.where(rows < c.prompt_length + prefix[..., None] - 1, 0.0, -1e9)[:, :, None, None]  # [n, q, 1, 1, r]
    offset = torch.arange(c.num_tokens)
    position = prefix[..., None] + offset  # [n, q, T]
    is_real = position < c.num_tokens
    at = position.clamp(max=c.num_tokens - 1)
    gather = lambda x: x[:, None].expand(n, q, -1).gather(2, at)  # noqa: E731
    label, history = gather(batch.tokens), gather(batch.history)
    drop = torch.rand(n, q, 1) < 0.15 if head.training else torch.zeros(n, q, 1, dtype=torch.bool)
    history = torch.where(drop, torch.tensor(c.num_bins), history)
    last = batch.tokens[:, None].expand(n, q, -1).gather(2, prefix[..., None] - 1)
    logits = head.draft(keys[:, None], values[:, None], mask, last, at, history).float()
    weight = torch.where(is_real, decay**offset.float(), 0.0)
    loss = F.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="none").view(label.shape)
    right = torch.where(is_real, (logits.argmax(-1) == label).float(), torch.nan)
    return (loss * weight).sum() / weight.sum(), right


def accepted_length(right: Tensor) -> float:
    """Mean number of leading right tokens of a draft of up to 16, plus the bonus token. right [..., T] with nan."""
    lead = torch.nan_to_num(right[..., :16], 0.0).cumprod(-1).sum(-1)
    return float(lead.mean()) + 1


def distill_block_head(
    model: VLA, outputs: Outputs, is_validation: np.ndarray, checkpoint: Path, options: DistillOptions,
    report: Callable[[str], None] = print,
) -> BlockHead:  # fmt: skip
    """Train the block head; resumes from ``checkpoint``."""
    c = model.config
    torch.manual_seed(options.seed)
    head = BlockHead(BlockHeadConfig(
        c.width, 3 * c.width, c.num_heads, 4 * c.width, c.prompt_length, c.num_tokens, c.num_bins
    ))  # fmt: skip
    with torch.no_grad():  # start from the target's own token table and output layer
        head.token.weight.copy_(model.token.weight)
        head.history.weight[:-1].copy_(model.token.weight)
        head.head.load_state_dict(model.head.state_dict())
    optimiser = torch.optim.AdamW(head.parameters(), lr=options.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    start = resume(head, checkpoint, report)
    train_rows, valid_rows = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
    rng, began = np.random.default_rng(options.seed + start), time.monotonic()
    for step in range(start, options.steps):
        set_rate(optimiser, options, step, start)
        rows = torch.from_numpy(rng.choice(train_rows, options.batch))
        batch = Outputs(*(t[rows] for t in outputs))
        prefix = torch.from_numpy(rng.integers(1, c.num_tokens, (options.batch, options.prefixes)))
        head.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = block_head_loss(head, batch, prefix, options.decay)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            report(
                f"block head step {step + 1} loss {loss.item():.3f} length {accepted_length(right):.2f} "
                f"{(time.monotonic() - began) / (step + 1 - start):.3f} s/step"
            )
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_progress(head, checkpoint, step + 1)
            with torch.no_grad():
                head.eval()
                rows = torch.from_numpy(valid_rows[:512])
                batch = Outputs(*(t[rows] for t in outputs))
                prefix = torch.from_numpy(np.random.default_rng(0).integers(1, c.num_tokens, (len(rows), 4)))
                _, right = block_head_loss(head, batch, prefix, options.decay)
                first = prefix * 0 + 1
                _, whole = block_head_loss(head, batch, first, options.decay)
            report(
                f"validation: length from any prefix {accepted_length(right):.2f}, after the prefill "
                f"{accepted_length(whole):.2f}, right by distance {right.nanmean((0, 1))[:16].numpy().round(2)}"
            )
    return head.eval()


def distill_feature_head(
    model: VLA, outputs: Outputs, is_validation: np.ndarray, checkpoint: Path, options: DistillOptions,
    report: Callable[[str], None] = print, passes: int = 4,
) -> FeatureHead:  # fmt: skip
    """Train the feature head with self-fed passes; resumes from ``checkpoint``."""
    c = model.config
    torch.manual_seed(options.seed)
    head = FeatureHead(FeatureHeadConfig(
        c.width, 3 * c.width, c.num_heads, 512, c.prompt_length, c.num_tokens, c.num_bins
    ))  # fmt: skip
    with torch.no_grad():
        head.token.weight[:-1].copy_(model.token.weight)
        head.head.load_state_dict(model.head.state_dict())
    optimiser = torch.optim.AdamW(head.parameters(), lr=options.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    start = resume(head, checkpoint, report)
    train_rows, valid_rows = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
    rng, began = np.random.default_rng(options.seed + start), time.monotonic()

    def losses(rows: Tensor) -> tuple[Tensor, list[float]]:
        tokens = outputs.tokens[rows]
        all_logits = head.unroll(outputs.features[rows].float(), tokens, passes)
        total, hits = torch.zeros(()), []
        for s, logits in enumerate(all_logits):
            # Pass s starts after s own steps, so its first s rows have no such history.
            part, label = logits[:, s:-1].float(), tokens[:, s + 1 :]
            total = total + options.decay ** s * F.cross_entropy(part.flatten(0, 1), label.flatten())
            hits.append(float((part.argmax(-1) == label).float().mean()))
        return total, hits

    for step in range(start, options.steps):
        set_rate(optimiser, options, step, start)
        rows = torch.from_numpy(rng.choice(train_rows, options.batch))
        head.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss, hits = losses(rows)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            report(
                f"feature head step {step + 1} loss {loss.item():.3f} right per pass {np.round(hits, 2)} "
                f"{(time.monotonic() - began) / (step + 1 - start):.3f} s/step"
            )
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_progress(head, checkpoint, step + 1)
            with torch.no_grad():
                head.eval()
                _, hits = losses(torch.from_numpy(valid_rows[:256]))
            report(f"validation: right after s own steps {np.round(hits, 3)}")
    return head.eval()


def resume(head: torch.nn.Module, checkpoint: Path, report: Callable[[str], None]) -> int:
    """Load ``checkpoint`` if there is one; returns its step."""
    if not checkpoint.exists():
        return 0
    saved = load_file(checkpoint)
    step = int(saved.pop("step"))
    head.load_state_dict(saved)
    report(f"resumed at step {step}")
    return step


def save_progress(head: torch.nn.Module, checkpoint: Path, step: int) -> None:
    """Write weights and step atomically."""
    temporary = checkpoint.with_suffix(".tmp")
    save_file({**head.state_dict(), "step": torch.tensor(step)}, temporary)
    temporary.replace(checkpoint)


def set_rate(optimiser: torch.optim.Optimizer, options: DistillOptions, step: int, start: int) -> None:
    """Short warm-up, then linear decay over the last 60 %."""
    scale = min(1.0, (step + 1 - start) / 100, (options.steps - step) / (0.6 * options.steps))
    for group in optimiser.param_groups:
        group["lr"] = options.learning_rate * scale


def distill_small_model(
    model: VLA, vocabulary: list[str], data: Demonstrations, outputs: Outputs, rows: np.ndarray, checkpoint: Path,
    options: DistillOptions, report: Callable[[str], None] = print,
) -> VLA:  # fmt: skip
    """Train an independent small policy on the target's tokens. ``rows``: frame of each entry of ``outputs``."""
    c = model.config
    torch.manual_seed(options.seed)
    config = VLAConfig(
        num_words=c.num_words, width=96, num_layers=2, num_heads=3, mlp_width=384, image_size=c.image_size,
        num_cameras=c.num_cameras, tokens_per_camera=2, max_words=c.max_words, text_tokens=1, state_size=c.state_size,
        horizon=c.horizon, action_size=c.action_size, num_bins=c.num_bins, stem_channels=(16, 24, 32),
    )  # fmt: skip
    small = VLA(config)
    small.state_mean.copy_(model.state_mean)
    small.state_std.copy_(model.state_std)
    optimiser = torch.optim.AdamW(small.parameters(), lr=options.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    start = resume(small, checkpoint, report)
    words = np.stack(
        [np.stack([encode_words(p, vocabulary, c.max_words) for p in t.phrasings]) for t in TASKS.values()]
    )
    valid = data.is_validation[rows]
    train_at, valid_at = np.flatnonzero(~valid), np.flatnonzero(valid)
    rng, began = np.random.default_rng(options.seed + start), time.monotonic()

    def logits_of(at: np.ndarray) -> tuple[Tensor, Tensor]:
        frames = rows[at]
        phrase = rng.integers(0, words.shape[1], len(at))
        tokens = outputs.tokens[torch.from_numpy(at)]
        logits, _ = small(
            torch.from_numpy(data.images[frames]), torch.from_numpy(words[data.task[frames], phrase]),
            torch.from_numpy(data.state[frames]), tokens,
        )  # fmt: skip
        return logits.float(), tokens

    for step in range(start, options.steps):
        set_rate(optimiser, options, step, start)
        small.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits, tokens = logits_of(np.sort(rng.choice(train_at, options.batch)))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            hit = float((logits.argmax(-1) == tokens).float().mean())
            rate = (time.monotonic() - began) / (step + 1 - start)
            report(f"small model step {step + 1} loss {loss.item():.3f} right {hit:.2f} {rate:.3f} s/step")
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_progress(small, checkpoint, step + 1)
            with torch.no_grad():
                small.eval()
                logits, tokens = logits_of(valid_at[:256])
            report(f"validation: teacher-forced right {float((logits.argmax(-1) == tokens).float().mean()):.3f}")
    return small.eval()
