"""Train the embedded policy on demonstrations. Can be stopped at any time and goes on from its checkpoint.

Behaviour cloning with soft labels over action levels, multi-token prediction as an auxiliary task, noise on the
fed-back tokens (so that a relaxed token does not derail the rest of the chunk), and an exponential moving average of
the weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vla_spec.engines.nets.demonstrations import Demonstrations, augment, build_vocabulary, encode_phrasings
from vla_spec.engines.nets.grow import grow
from vla_spec.engines.nets.levels import LEVEL_BINS, level_position, soft_cross_entropy, tokens_from_actions
from vla_spec.engines.nets.vla import VLA, VLAConfig
from vla_spec.engines.nets.weights import load_policy, policy_sizes, read_weights
from vla_spec.errors import BadConfig, BadModel, Interrupted
from vla_spec.robots._metaworld_tasks import TASKS


@dataclass(frozen=True)
class TrainOptions:
    """Schedule: warm up, stay, then decay linearly over the last ``decay_steps`` to zero.

    num_layers, mlp_width: of the network; None = the checkpoint's, or 14 and 1408 if there is none yet.
    """

    num_layers: int | None = None
    mlp_width: int | None = None

    steps: int = 20_000
    batch: int = 32
    learning_rate: float = 7e-4
    warmup_steps: int = 300
    decay_steps: int = 6_000
    weight_decay: float = 0.05
    ema: float = 0.999
    shift: int = 2
    token_noise: float = 0.15
    look_ahead_weight: float = 0.2
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "mlp_width", "steps", "batch", "warmup_steps", "decay_steps", "save_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise BadConfig(f"{name} must be 1 or more, got {value}")
        for name in ("weight_decay", "shift", "look_ahead_weight", "seed"):
            if getattr(self, name) < 0:
                raise BadConfig(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise BadConfig(f"learning_rate must be more than 0, got {self.learning_rate}")
        if not 0 <= self.ema < 1:
            raise BadConfig(f"ema must be in 0..1, 1 left out, got {self.ema}")
        if not 0 <= self.token_noise <= 1:
            raise BadConfig(f"token_noise must be in 0..1, got {self.token_noise}")


def save_checkpoint(path: Path, model: VLA, ema: dict[str, torch.Tensor], optimiser, step: int, vocabulary) -> None:  # type: ignore[no-untyped-def]
    """Atomic; weights, average and optimiser state in one safetensors file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"ema.{k}": v for k, v in ema.items()}
    names = [n for n, _ in model.named_parameters()]
    for name, state in zip(names, (optimiser.state[p] for p in model.parameters()), strict=True):
        for key, value in state.items():
            tensors[f"optimiser.{key}.{name}"] = torch.as_tensor(value)
    meta = {"config": model.config.to_json(), "step": str(step), "vocabulary": json.dumps(vocabulary)}
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, meta)
    temporary.replace(path)


def read_checkpoint(
    path: Path, options: TrainOptions, vocabulary: list[str]
) -> tuple[VLAConfig, int, dict[str, torch.Tensor]]:
    """Network sizes, step and tensors of a checkpoint that training can go on from.

    Raises:
        BadModel: corrupt, not a checkpoint of training, or of another vocabulary.
        BadConfig: the options ask for another network.
    """
    saved, metadata = read_weights(path)
    config = policy_sizes(metadata, path)
    if "step" not in metadata:
        raise BadModel(
            f"--checkpoint {path}: weights without the state of their training; to go on from them, name them with "
            f"--start-from and a new file with --checkpoint"
        )
    if json.loads(metadata["vocabulary"]) != vocabulary:
        raise BadModel(f"--checkpoint {path}: trained with another vocabulary")
    for name in ("num_layers", "mlp_width"):
        asked, has = getattr(options, name), getattr(config, name)
        if asked is not None and asked != has:
            raise BadConfig(
                f"train.{name}: {path} has {has}, got {asked}; leave it out, or grow the network with "
                f"--start-from {path} and a new --checkpoint"
            )
    return config, int(metadata["step"]), saved


def train(
    folders: list[Path],
    checkpoint: Path,
    options: TrainOptions,
    report: Callable[[str], None] = print,
    start_from: Path | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> None:
    """Train until ``options.steps``; resumes from ``checkpoint`` if it exists.

    Args:
        folders: of demonstrations.
        checkpoint: safetensors file with all that is needed to go on.
        options: of the schedule.
        report: told one line now and then.
        start_from: averaged weights of an earlier training, grown to this network's size; not looked at if there is a
            checkpoint already.
        should_stop: asked after each step; True = write the checkpoint and stop. None = never.

    Raises:
        BadModel, BadConfig: see `read_checkpoint`; a network that ``start_from`` can't grow to.
        Interrupted: stopped on request.
    """
    vocabulary = build_vocabulary()
    start = 0
    saved: dict[str, torch.Tensor] = {}
    if checkpoint.exists():
        config, start, saved = read_checkpoint(checkpoint, options, vocabulary)
        report(f"resumed at step {start} of {options.steps}")
        if start_from is not None:
            report(f"{checkpoint} is there already: --start-from {start_from} is left out")
    else:
        sizes = {k: v for k in ("num_layers", "mlp_width") if (v := getattr(options, k)) is not None}
        config = VLAConfig(num_words=len(vocabulary), **sizes)
    earlier = None
    if start_from is not None and not saved:
        earlier, words_known = load_policy(start_from)
        if words_known != vocabulary:
            raise BadModel(f"--start-from {start_from}: trained with another vocabulary")
    data = Demonstrations(folders, config.horizon)
    words = encode_phrasings(vocabulary, config.max_words)
    torch.manual_seed(options.seed)
    if earlier is not None:
        try:
            model = grow(earlier, config).train()
        except ValueError as error:
            raise BadConfig(f"--start-from {start_from}: {error}; valid: these two as large or larger") from None
    else:
        model = VLA(config)
        model.state_mean.copy_(torch.from_numpy(data.state.mean(0)))
        model.state_std.copy_(torch.from_numpy(data.state.std(0) + 1e-3))
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=options.learning_rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    ema = {k: v.detach().clone().float() for k, v in model.state_dict().items()}
    if saved:
        model.load_state_dict({k[6:]: v for k, v in saved.items() if k.startswith("model.")})
        ema = {k[4:]: v for k, v in saved.items() if k.startswith("ema.")}
        for name, parameter in model.named_parameters():
            keys = {k.split(".")[1] for k in saved if k.startswith("optimiser.") and k.split(".", 2)[2] == name}
            optimiser.state[parameter] = {k: saved[f"optimiser.{k}.{name}"] for k in keys}
        saved.clear()
    num_params = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("ahead_"))
    report(f"{num_params / 1e6:.1f} M parameters, {len(data)} frames, {len(set(data.episode))} episodes")
    train_rows = np.flatnonzero(~data.is_validation)
    valid_rows = np.flatnonzero(data.is_validation)
    rng = np.random.default_rng(options.seed + start)
    last_level = len(LEVEL_BINS) - 1
    began, loss_sum, ahead_sum, count = time.monotonic(), 0.0, 0.0, 0
    position = torch.arange(config.num_tokens)
    for step in range(start, options.steps):
        rows = np.sort(rng.choice(train_rows, options.batch))
        left = options.steps - step
        scale = min(1.0, (step + 1) / options.warmup_steps, left / options.decay_steps)
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * scale
        images = augment(data.images[rows], rng, options.shift)
        phrase = rng.integers(0, words.shape[1], len(rows))
        state = data.state[rows] + rng.normal(0, 0.004, (len(rows), 4)).astype(np.float32)
        level = level_position(data.actions[rows].reshape(len(rows), -1))
        nearest = np.rint(level)
        noisy = rng.random(nearest.shape) < options.token_noise * rng.random((len(rows), 1)) * 2
        fed = np.clip(nearest + noisy * np.rint(rng.normal(0, 1.5, nearest.shape)), 0, last_level).astype(int)
        with torch.autocast("cpu", torch.bfloat16):
            logits, hidden = model(
                torch.from_numpy(images), torch.from_numpy(words[data.task[rows], phrase]),
                torch.from_numpy(state), torch.from_numpy(LEVEL_BINS[fed]),
            )  # fmt: skip
            jump = torch.from_numpy(rng.integers(1, 16, (len(rows), config.num_tokens)))
            ahead_at = torch.minimum(position + jump, torch.tensor(config.num_tokens - 1))
            ahead = model.look_ahead(hidden, ahead_at)
        label = torch.from_numpy(level).float()
        loss = soft_cross_entropy(logits, label)
        ahead_loss = soft_cross_entropy(ahead, label.gather(1, ahead_at))
        optimiser.zero_grad(set_to_none=True)
        (loss + options.look_ahead_weight * ahead_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        keep = min(options.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            current = model.state_dict()
            torch._foreach_lerp_(list(ema.values()), [current[k].float() for k in ema], 1 - keep)
        loss_sum, ahead_sum, count = loss_sum + loss.item(), ahead_sum + ahead_loss.item(), count + 1
        if (step + 1) % 100 == 0 or step + 1 - start == 10:  # early once, to say how long it will take
            rate = (step + 1 - start) / (time.monotonic() - began)
            report(f"step {step + 1} loss {loss_sum / count:.3f} ahead {ahead_sum / count:.3f} {1 / rate:.3f} s/step")
            loss_sum = ahead_sum = count = 0
        is_stopped = should_stop is not None and should_stop()
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps or is_stopped:
            save_checkpoint(checkpoint, model, ema, optimiser, step + 1, vocabulary)
        if is_stopped and step + 1 < options.steps:
            report(f"{checkpoint}: step {step + 1} of {options.steps}; the same command goes on from here")
            raise Interrupted(f"training stopped at step {step + 1}")
        if (step + 1) % (4 * options.save_every) == 0 or step + 1 == options.steps:
            report(validate(model, ema, data, valid_rows, words))
    report(f"{checkpoint}: step {max(start, options.steps)}, done")


@torch.no_grad()
def validate(model: VLA, ema: dict[str, torch.Tensor], data: Demonstrations, rows: np.ndarray, words) -> str:  # type: ignore[no-untyped-def]
    """Teacher-forced agreement of the averaged weights with held-out episodes, per task."""
    if not len(rows):
        return "validation: no episode is held out; a task with more than 10 episodes holds out 2"
    live = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(ema)
    model.eval()
    hits: dict[int, list[float]] = {}
    for at in range(0, len(rows), 64):
        part = rows[at : at + 64]
        tokens = tokens_from_actions(data.actions[part].reshape(len(part), -1))
        logits, _ = model(
            torch.from_numpy(data.images[part]), torch.from_numpy(words[data.task[part], 0]),
            torch.from_numpy(data.state[part]), torch.from_numpy(tokens),
        )  # fmt: skip
        hit = (logits.argmax(-1).numpy() == tokens).mean(1)
        for t, value in zip(data.task[part], hit, strict=True):
            hits.setdefault(int(t), []).append(float(value))
    model.load_state_dict(live)
    model.train()
    names = list(TASKS)
    per_task = " ".join(f"{names[t]} {np.mean(h):.2f}" for t, h in sorted(hits.items()))
    return f"validation: mean {np.mean([v for h in hits.values() for v in h]):.3f} | {per_task}"
