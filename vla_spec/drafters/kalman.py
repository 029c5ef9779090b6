"""Draft by extrapolating the arm's own motion: a constant-velocity Kalman filter per degree of freedom. No model.

On its own it drafts every token from the actions so far; with a ``base`` it completes what that drafter left open, as
KERV fills the degrees of freedom behind the first rejected one.
Source: KERV, arXiv:2603.01581. Its released code filters token ids as a random walk with a gain near 1, which holds the
last value: ``damping: 0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.interfaces import ActionTokenizer, ChunkHistory, Drafter, ScoreObserver
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Int32, Plan, Scores, TokenDomain


@dataclass(frozen=True, slots=True)
class Options:
    """What moves how, and what is completed.

    Attributes:
        base: drafter whose drafts are completed: a name, or ``{name: ..., options}``; None = the filter drafts alone.
        complete: `rest`: only where all missing tokens of the chunk are asked for, as the policy does for a tail that
            nobody verifies; `always`: also drafts that will be verified, at the price of longer steps.
        context: control steps that the filter looks back, the previous chunk's included. KERV: 10. [steps]
        acceleration_noise: standard deviation of the change of speed per step. Large follows turns, and noise too; the
            default and that of ``damping`` gave the least error on demonstrations, docs/tolerance.md.
            [action units per step]
        measurement_noise: standard deviation of an action around the smooth motion; only its ratio to the other
            matters. [action units]
        damping: factor on the forecast's speed per step ahead; 1 = constant velocity, 0 = the filtered value is held.
    """

    base: str | dict[str, Any] | None = None
    complete: Literal["rest", "always"] = "rest"
    context: int = 10
    acceleration_noise: float = 0.2
    measurement_noise: float = 0.05
    damping: float = 0.8

    def __post_init__(self) -> None:
        from vla_spec.config import resolve_choice

        if self.context < 1:
            raise BadConfig(f"context must be 1 or more, got {self.context}")
        if not (self.acceleration_noise >= 0 and self.measurement_noise > 0):
            raise BadConfig(
                f"need acceleration_noise >= 0 and measurement_noise > 0, got {self.acceleration_noise} and "
                f"{self.measurement_noise}"
            )
        if not 0.0 <= self.damping <= 1.0:
            raise BadConfig(f"damping must be in [0, 1], got {self.damping}")
        if self.base is not None and resolve_choice("drafter", self.base, "base").name == "kalman":
            raise BadConfig("base must be another drafter, got kalman itself")


@final
class KalmanDrafter:
    """State (value, speed) of each degree of freedom; ``value + speed * (d + d^2 + ... + d^j)``, j steps ahead.

    The transition is [[1, 1], [0, 1]], the process noise q^2 [[1/4, 1/2], [1/2, 1]] (a random acceleration during each
    step), the measurement noise r^2; the first action is believed and its speed unknown. Gains depend on nothing but
    how many actions were seen, so they are worked out once. Switches are held. A degree of freedom that was never seen
    ends the draft.
    """

    def __init__(
        self, options: Options, domain: TokenDomain, tokenizer: ActionTokenizer, base: Drafter | None = None
    ) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._per_step, self._num_tokens = domain.tokens_per_step, domain.num_tokens
        self._is_switch: list[bool] = domain.never_relaxed[: domain.tokens_per_step].tolist()
        self._gains = _gains(options)
        self._base: Drafter | None = base
        self._before = EMPTY_DRAFT.tokens  # played before this chunk, whole steps

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """The previous chunk's played steps are the beginning of the motion."""
        if self._base is not None:
            self._base.begin(inputs, history)
        self._before = EMPTY_DRAFT.tokens
        if history is not None:
            end = min(max(history.consumed, 0), len(history.tokens)) // self._per_step * self._per_step
            self._before = history.tokens[max(end - self._options.context * self._per_step, 0) : end]

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """The base's draft, its first path completed by the forecast; without a base the forecast."""
        if self._base is None:
            return Draft.chain(self._forecast(prefix, min(plan.gamma, plan.depth)))
        draft = self._base.propose(prefix, plan, features)
        missing = self._num_tokens - len(prefix)
        is_rest = min(plan.gamma, plan.depth) >= missing
        if draft.probs is not None or not (is_rest or self._options.complete == "always"):
            return draft  # drawn tokens keep their law
        path: list[int] = []
        for node, parent in enumerate(draft.parents.tolist()):
            if parent == (path[-1] if path else -1):
                path.append(node)
        room = min(plan.gamma - len(draft.tokens), plan.depth - len(path))
        added = self._forecast(np.concatenate((prefix, draft.tokens[path])).astype(np.int32), room)
        if not len(added):
            return draft
        first = len(draft.tokens)
        parents = np.arange(first - 1, first - 1 + len(added), dtype=np.int32)
        parents[0] = path[-1] if path else -1
        return Draft(
            np.concatenate((draft.tokens, added)).astype(np.int32),
            np.concatenate((draft.parents, parents)).astype(np.int32),
        )

    def observe(self, draft: Draft, scores: Scores) -> None:
        """For the base, if it learns from scores."""
        base: object = self._base
        if isinstance(base, ScoreObserver):
            base.observe(draft, scores)

    def _forecast(self, prefix: Int32, length: int) -> Int32:
        """The next ``length`` tokens behind ``prefix``, int32; fewer at the chunk's end or without any motion seen."""
        length = min(length, self._num_tokens - len(prefix))
        if length <= 0:
            return EMPTY_DRAFT.tokens
        seen = np.concatenate((self._before, prefix))
        per_step = self._per_step
        num_whole, num_started = divmod(len(seen), per_step)
        padded = np.concatenate((seen, np.zeros(-len(seen) % per_step, np.int32))).astype(np.int32)
        actions = self._tokenizer.decode(padded).astype(float).T.tolist()  # [A][steps]
        num_steps = -(-(num_started + length) // per_step)  # that the forecast touches, the started one included
        ahead = np.zeros((num_steps, per_step), np.float32)
        for dof in range(per_step):
            num_seen = num_whole + (dof < num_started)
            if num_seen == 0:
                first = dof - num_started  # position of its first forecast token behind the prefix
                length = min(length, max(first, 0))
                continue
            behind = num_started > dof  # its forecasts begin one step later
            ahead[behind:, dof] = self._extrapolate(actions[dof][:num_seen], num_steps - behind, self._is_switch[dof])
        tokens = self._tokenizer.encode(ahead)
        return tokens[num_started : num_started + length].astype(np.int32)

    def _extrapolate(self, values: list[float], num_steps: int, is_switch: bool) -> list[float]:
        if is_switch or num_steps <= 0:
            return values[-1:] * num_steps
        values = values[-self._options.context :]
        value, speed = values[0], 0.0
        for measured, (value_gain, speed_gain) in zip(values[1:], self._gains, strict=False):
            value += speed
            error = measured - value
            value += value_gain * error
            speed += speed_gain * error
        ahead = []
        for _ in range(num_steps):
            speed *= self._options.damping
            value += speed
            ahead.append(value)
        return ahead


def _gains(options: Options) -> list[tuple[float, float]]:
    """Gains on value and speed of the second, third, ... action seen."""
    r, q = options.measurement_noise**2, options.acceleration_noise**2
    # Covariance of (value, speed); the first action fixes the value, its speed may be anything.
    p00, p01, p11 = r, 0.0, max(100.0 * q, r)
    gains = []
    for _ in range(options.context - 1):
        p00, p01, p11 = p00 + 2 * p01 + p11 + q / 4, p01 + p11 + q / 2, p11 + q
        value_gain, speed_gain = p00 / (p00 + r), p01 / (p00 + r)
        p00, p01, p11 = (1 - value_gain) * p00, (1 - value_gain) * p01, p11 - speed_gain * p01
        gains.append((value_gain, speed_gain))
    return gains


def build(options: Options, parts: Parts) -> KalmanDrafter:
    """Needs the tokenizer and the domain; the base needs what it needs."""
    base: Drafter | None = None
    if options.base is not None:
        from vla_spec.config import load_plugin, resolve_choice

        choice = resolve_choice("drafter", options.base, "drafter.base")
        base = load_plugin("drafter", choice.name).build(choice.options, parts)
    return KalmanDrafter(options, parts.domain, parts.tokenizer, base)
