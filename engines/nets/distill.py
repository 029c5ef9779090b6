"""Distil drafters on the target's own greedy chunks. Resumable like `train`.

First the target decodes every chosen frame (its tokens and hidden states are kept in memory), then each drafter learns
to say what the target said, from any prefix of the chunk. What a drafter learns from is in `distillers/<name>.py`; the
loop is here.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vla_spec.atomic import replacing
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.nets.demonstrations import Demonstrations, encode_phrasings
from vla_spec.engines.nets.head_config import TARGET_KEY
from vla_spec.engines.nets.vla import VLA
from vla_spec.engines.nets.weights import policy_sha256
from vla_spec.errors import BadConfig, BadModel, Interrupted, UnknownOption


@dataclass(frozen=True)
class DistillOptions:
    """How long and on what.

    Attributes:
        steps, batch, learning_rate: of the optimiser (AdamW, linear decay over the last 60 %).
        decay: weight of a drafted position relative to the one before: a draft is only worth as much as what precedes.
        max_frames: bounds memory, about 51 kB a frame.
        execute_horizon: control steps of the previous chunk that were played before this one was planned.
        save_every: steps between checkpoints.
        seed: for everything random.
    """

    steps: int = 4000
    batch: int = 48
    learning_rate: float = 1e-3
    decay: float = 0.9
    max_frames: int = 24_000
    execute_horizon: int = 4
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "max_frames", "execute_horizon", "save_every"):
            if getattr(self, name) < 1:
                raise BadConfig(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise BadConfig(f"learning_rate must be more than 0, got {self.learning_rate}")
        if not 0 < self.decay <= 1:
            raise BadConfig(f"decay must be in 0..1, 0 left out, got {self.decay}")
        if self.seed < 0:
            raise BadConfig(f"seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True)
class Source:
    """What the target said, and about what.

    Attributes:
        target: the network.
        data: demonstrations; ``rows`` int64 [N] are the frames that were decoded.
        words: int64 [tasks, phrasings, max_words].
        tokens: int64 [N, T], greedy. features: fp16 [N, p + T - 1, D].
        history: int64 [N, T], what the chunk of ``execute_horizon`` steps before had planned; V = no plan.
        is_validation: bool [N].
        target_sha256: the target's identity, see `policy_sha256`.
    """

    target: VLA
    data: Demonstrations
    words: np.ndarray
    rows: np.ndarray
    tokens: Tensor
    features: Tensor
    history: Tensor
    is_validation: np.ndarray
    target_sha256: str


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
        past = [(torch.cat((p[0], r[0]), 2), torch.cat((p[1], r[1]), 2)) for p, r in zip(past, rows, strict=True)]
        kept.append(features.half())
        tokens.append(model.head(x[:, -1]).argmax(-1))
    return torch.stack(tokens, 1), torch.cat(kept, 1)


def target_outputs(
    model: VLA, vocabulary: list[str], data: Demonstrations, options: DistillOptions, report: Callable[[str], None]
) -> Source:
    """Decode whole episodes, chosen at random, until ``max_frames``.

    Raises:
        BadConfig: no episode to learn from fits into ``max_frames``, or no chunk is as long as ``execute_horizon``.
    """
    c, rng = model.config, np.random.default_rng(options.seed)
    episodes = rng.permutation(np.unique(data.episode))
    counts = np.bincount(data.episode)
    chosen = episodes[np.cumsum(counts[episodes]) <= options.max_frames]
    rows = np.flatnonzero(np.isin(data.episode, chosen))
    if data.is_validation[rows].all():
        raise BadConfig(
            f"distill.max_frames: {options.max_frames} frames hold no whole episode to learn from, the longest has "
            f"{counts.max()}; valid: as many frames as memory has room for"
        )
    if options.execute_horizon >= c.horizon:
        raise BadConfig(f"distill.execute_horizon: {options.execute_horizon}; valid: less than {c.horizon}, a chunk")
    words = encode_phrasings(vocabulary, c.max_words)
    tokens = torch.empty(len(rows), c.num_tokens, dtype=torch.long)
    features = torch.empty(len(rows), c.prompt_length + c.num_tokens - 1, c.feature_width, dtype=torch.float16)
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
    identity = policy_sha256(model, vocabulary)
    return Source(model, data, words, rows, tokens, features, history, data.is_validation[rows], identity)


def distillers() -> list[str]:
    """Names of the drafters that can be distilled."""
    files = (Path(__file__).parent / "distillers").glob("*.py")
    return sorted(file.stem for file in files if not file.stem.startswith("_"))


def distiller(name: str) -> ModuleType:
    """The module of one drafter, with ``build``, ``loss`` and ``export``.

    Raises:
        UnknownOption: no such file.
    """
    if name not in distillers():
        raise UnknownOption("drafter to distill", name, distillers())
    return importlib.import_module(f"vla_spec.engines.nets.distillers.{name}")


def distill(
    name: str,
    source: Source,
    checkpoint: Path,
    options: DistillOptions,
    report: Callable[[str], None] = print,
    should_stop: Callable[[], bool] | None = None,
) -> nn.Module:
    """Train one drafter until ``options.steps``; goes on from ``checkpoint`` if it exists.

    Raises:
        UnknownOption: no such drafter.
        BadModel: the checkpoint is corrupt, or of another drafter or target.
        Interrupted: ``should_stop``, which is asked after each step, said yes; the checkpoint is written.
    """
    recipe = distiller(name)
    torch.manual_seed(options.seed)
    network: nn.Module = recipe.build(source.target)
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    start = restore(network, checkpoint, source.target_sha256)
    if start:
        report(f"{name}: resumed at step {start} of {options.steps}")
    train_at, valid_at = np.flatnonzero(~source.is_validation), np.flatnonzero(source.is_validation)
    rng, began = np.random.default_rng(options.seed + start), time.monotonic()
    for step in range(start, options.steps):
        scale = min(1.0, (step + 1 - start) / 100, (options.steps - step) / (0.6 * options.steps))
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * scale
        network.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss, said = recipe.loss(network, source, np.sort(rng.choice(train_at, options.batch)), options, rng)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 - start == 10:  # early once, to say how long it will take
            rate = (time.monotonic() - began) / (step + 1 - start)
            report(f"{name} step {step + 1} loss {loss.item():.3f} {said} {rate:.3f} s/step")
        is_stopped = should_stop is not None and should_stop()
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps or is_stopped:
            with replacing(checkpoint) as temporary:
                saved = {**network.state_dict(), "step": torch.tensor(step + 1)}
                save_file(saved, temporary, {TARGET_KEY: source.target_sha256})
            if is_stopped and step + 1 < options.steps:
                report(f"{checkpoint}: step {step + 1} of {options.steps}; the same command goes on from here")
                raise Interrupted(f"{name} stopped at step {step + 1}")
            network.eval()
            if len(valid_at):
                with torch.no_grad():
                    _, said = recipe.loss(network, source, valid_at[:512], options, np.random.default_rng(0))
                report(f"{name} validation: {said}")
    report(f"{checkpoint}: step {max(start, options.steps)}, done")
    return network.eval()


def restore(network: nn.Module, checkpoint: Path, target_sha256: str) -> int:
    """Load a checkpoint of `distill` if there is one; returns its step.

    Args:
        network: gets its weights.
        checkpoint: may be missing.
        target_sha256: identity of the policy that it has to be distilled for.

    Raises:
        BadModel: corrupt, or of another drafter or target.
    """
    if not checkpoint.exists():
        return 0
    try:
        saved = load_file(checkpoint)
        step = int(saved.pop("step"))
        network.load_state_dict(saved)
    except (OSError, SafetensorError, KeyError) as error:
        raise BadModel(f"{checkpoint}: not a checkpoint of `vla-spec distill` ({error}); delete it") from error
    except RuntimeError as error:  # shapes or names
        raise BadModel(
            f"{checkpoint}: of another drafter, or distilled for a policy of another size; delete it, or name another "
            f"folder"
        ) from error
    found = WeightsFile.open(checkpoint).metadata.get(TARGET_KEY)
    if found != target_sha256:
        says = f"distilled for the policy {found[:12]}…" if found else "does not say for which policy it was distilled"
        raise BadModel(
            f"{checkpoint}: {says}; valid: {target_sha256[:12]}…, the one given; delete it, or name another folder"
        )
    return step
