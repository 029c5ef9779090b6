"""A target without weights: pseudo-random but repeatable scores that depend on inputs and on every token before.

For tests, examples and closed-loop studies of the runtime; a step takes tens of microseconds. Not thread-safe.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.interfaces import EngineInfo
from vla_spec.plugins import Parts
from vla_spec.types import EngineInputs, Float32, Int32, Scores, TokenDomain

_NUM_ROWS = 4096  # of the noise tables; a path picks its row by hash
_FEATURE_SIZE = 8
_MASK = (1 << 64) - 1
_FLOOR = -12.0  # logit of a token far from the plan


@dataclass(frozen=True, slots=True)
class Options:
    """What the toy plans, how much of it depends on what, and how long it takes.

    Attributes:
        vocab_size: V, None = the domain's.
        num_tokens: T, None = the domain's.
        max_step: most tokens of one step.
        drift: share of the plan's tokens, 0..1, that two successive observations disagree about.
        surprise: share of tokens, 0..1, whose best value is moved by the tokens decoded before them.
        spread: standard deviation of the distribution around its best value. [bins]
        noise: standard deviation of the logits' noise, which makes the distribution differ in every context.
        prefill_ms, step_base_ms, step_per_token_ms: pretended time, told to ``sleep_ns`` and to nobody else. [ms]
        seed: of the whole plan; added to the parts' seed.
    """

    vocab_size: int | None = None
    num_tokens: int | None = None
    max_step: int = 32
    drift: float = 0.1
    surprise: float = 0.05
    spread: float = 1.0
    noise: float = 0.1
    prefill_ms: float = 0.0
    step_base_ms: float = 0.0
    step_per_token_ms: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_step < 1 or not self.spread > 0.0 or not self.noise >= 0.0:
            raise BadConfig(
                f"need max_step >= 1, spread > 0, noise >= 0, got {self.max_step}, {self.spread}, {self.noise}"
            )
        for name, share in (("drift", self.drift), ("surprise", self.surprise)):
            if not 0.0 <= share <= 1.0:
                raise BadConfig(f"{name} must be in [0, 1], got {share}")
        for name, ms in (
            ("prefill_ms", self.prefill_ms),
            ("step_base_ms", self.step_base_ms),
            ("step_per_token_ms", self.step_per_token_ms),
        ):
            if not ms >= 0.0:
                raise BadConfig(f"{name} must be >= 0, got {ms}")
        for count in (self.vocab_size, self.num_tokens):
            if count is not None and count < 2:
                raise BadConfig(f"vocab_size and num_tokens must be at least 2, got {count}")


@final
class ToyEngine:
    """``logits[v] = -(v - best)^2 / (2 spread^2) + noise[hash(path)][v]``, floored far from ``best``.

    ``best`` is a smooth trajectory in time (one sine per degree of freedom, its phase set by the instruction), moved
    by a few bins at a share ``drift`` of positions that the observation picks, and at a share ``surprise`` of contexts
    that the path of tokens picks. Two observations of one episode so have mostly the same plan: the remainder of the
    previous chunk is a good draft if it is shifted by the steps consumed.

    Every input array is hashed. Two names mean more: ``words`` sets the trajectory, ``step`` (one integer) says at
    which control step of the trajectory the observation was taken; without it every observation is of step 0.

    Like a real cache, each committed row holds the state of its prefix (a 64-bit hash); a step computes rows on top,
    and `commit` copies those of one path.
    """

    #: Told how long each call is pretended to take [ns]; None = takes no pretended time. To be set by whoever owns
    #: the clock, e.g. to a virtual clock's ``advance``.
    sleep_ns: Callable[[int], None] | None

    def __init__(self, options: Options, domain: TokenDomain, sleep_ns: Callable[[int], None] | None = None) -> None:
        self._options, self._domain, self.sleep_ns = options, domain, sleep_ns
        self._stride = domain.tokens_per_step
        num_bins = domain.vocab_size if options.vocab_size is None else options.vocab_size
        num_tokens = domain.num_tokens if options.num_tokens is None else options.num_tokens
        self._num_bins, self._num_tokens, self._max_step = num_bins, num_tokens, options.max_step
        rng = np.random.default_rng(options.seed)
        # Row b of the view is the shape around best value b: a window of one long array.
        offsets = np.arange(-num_bins + 1, num_bins, dtype=np.float32)
        shape = np.maximum(-(offsets**2) / np.float32(2 * options.spread**2), np.float32(_FLOOR))
        self._shapes = np.lib.stride_tricks.sliding_window_view(shape, num_bins)[::-1]  # [V, V]
        self._noise = rng.normal(0.0, 1.0, (_NUM_ROWS, num_bins)).astype(np.float32) * np.float32(options.noise)
        self._surprise = self._jumps(rng, options.surprise, (_NUM_ROWS,))  # [R] moves of the best value
        self._drift = self._jumps(rng, options.drift / 2, (_NUM_ROWS, num_tokens))  # each of two observations has half
        self._feature_table = rng.normal(0.0, 1.0, (_NUM_ROWS, _FEATURE_SIZE)).astype(np.float32)
        self._frequency = rng.uniform(0.005, 0.03, self._stride)  # [A] cycles per control step
        self._amplitude = rng.uniform(0.2, 0.45, self._stride) * num_bins  # [A] bins
        self._step_of = np.arange(num_tokens + options.max_step) // self._stride
        self._dof_of = np.arange(num_tokens + options.max_step) % self._stride

        capacity = 1 + num_tokens + options.max_step
        self._states: list[int] = [0] * capacity  # one per cache row; row 0 is the prompt
        self._features = np.zeros((capacity, _FEATURE_SIZE), np.float32)
        self._length = 0
        self._plan = np.zeros(num_tokens + options.max_step, np.int64)  # best value by chunk position
        self._step_states: list[int] = []  # of the last step, by node
        self._step_parents: list[int] = []
        digest = hashlib.sha256(repr((options, num_bins, num_tokens, self._stride)).encode()).hexdigest()
        self._info = EngineInfo("toy", digest, "fp32", "numpy", True, True, True)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def length(self) -> int:
        return self._length

    @property
    def max_step(self) -> int:
        return self._max_step

    @property
    def features(self) -> Float32:
        return self._features[: self._length]

    def twin(self) -> ToyEngine:
        """Another engine with the same weights, so to speak, and a cache of its own."""
        return ToyEngine(self._options, self._domain)

    def prefill(self, inputs: EngineInputs) -> Scores:
        digest = self._options.seed & 0xFFFFFFFF
        for name in sorted(inputs):
            digest = zlib.crc32(np.ascontiguousarray(inputs[name]).tobytes(), zlib.crc32(name.encode(), digest))
        self._plan = self._trajectory(inputs, digest)
        state = _next_state(digest, 0)
        self._keep(0, state)
        self._length = 1
        self._step_states, self._step_parents = [], []
        self._spend(self._options.prefill_ms)
        return self._scores([state], np.zeros(1, np.int64))

    def step(self, tokens: Int32, parents: Int32) -> Scores:
        before = self._states[self._length - 1]
        first = self._length - 1  # chunk position of a token that follows the committed ones
        states: list[int] = []
        positions: list[int] = []  # of the token that each node's row is about
        step_parents: list[int] = parents.tolist()
        for token, parent in zip(tokens.tolist(), step_parents, strict=True):
            states.append(_next_state(before if parent < 0 else states[parent], token + 1))
            positions.append(first + 1 if parent < 0 else positions[parent] + 1)
        self._step_states, self._step_parents = states, step_parents
        self._spend(self._options.step_base_ms + self._options.step_per_token_ms * len(states))
        return self._scores(states, np.array(positions))

    def commit(self, path: Int32) -> None:
        parent = -1
        for node in path.tolist():
            assert self._step_parents[node] == parent, f"{node=} {parent=} {self._step_parents=}"
            self._keep(self._length, self._step_states[node])
            self._length += 1
            parent = node
        self._step_states, self._step_parents = [], []

    def _keep(self, row: int, state: int) -> None:
        self._states[row] = state
        self._features[row] = self._feature_table[(state >> 40) % _NUM_ROWS]

    def _scores(self, states: list[int], positions: np.ndarray) -> Scores:
        rows = np.array([(state >> 20) % _NUM_ROWS for state in states])  # [n]
        last = len(self._plan) - 1
        best = self._plan[np.minimum(positions, last)] + self._surprise[rows]
        np.maximum(best, 0, out=best)  # the two are five times as fast as np.clip on a handful of numbers
        np.minimum(best, self._num_bins - 1, out=best)
        logits = self._shapes[best]  # [n, V]
        logits += self._noise[rows]
        features = self._feature_table[[(state >> 40) % _NUM_ROWS for state in states]]  # [n, D]
        return Scores(logits, features)

    def _trajectory(self, inputs: EngineInputs, digest: int) -> np.ndarray:
        """Best value by chunk position, before surprises. int64 [T + max_step]."""
        words = inputs.get("words")
        episode = zlib.crc32(b"" if words is None else np.ascontiguousarray(words).tobytes(), self._options.seed)
        phase = (episode % 997) / 997.0 + np.arange(self._stride) / self._stride  # [A] cycles
        now = int(np.asarray(inputs["step"]).reshape(-1)[0]) if "step" in inputs else 0
        dof = self._dof_of
        angle = 2 * np.pi * (self._frequency[dof] * (now + self._step_of) + phase[dof])
        plan = np.rint(self._num_bins / 2 + self._amplitude[dof] * np.sin(angle)).astype(np.int64)
        plan[: self._num_tokens] += self._drift[digest % _NUM_ROWS]
        return plan

    @staticmethod
    def _jumps(rng: np.random.Generator, share: float, shape: tuple[int, ...]) -> np.ndarray:
        """Moves by 1 to 4 bins either way at a share of places, 0 elsewhere."""
        size = rng.integers(1, 5, shape) * rng.choice((-1, 1), shape)
        return np.where(rng.random(shape) < share, size, 0)

    def _spend(self, duration_ms: float) -> None:
        if self.sleep_ns is not None and duration_ms > 0.0:
            self.sleep_ns(round(duration_ms * 1e6))


def _next_state(state: int, symbol: int) -> int:
    """Mix one symbol into a 64-bit state. Source: Steele et al. 2014 (SplitMix64), doi:10.1145/2660193.2660195."""
    mixed = (state + (symbol + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def build(options: Options, parts: Parts) -> ToyEngine:
    """Needs the token domain."""
    if options.vocab_size is not None and options.vocab_size != parts.domain.vocab_size:
        raise BadConfig(f"vocab_size is {options.vocab_size} but the token domain has {parts.domain.vocab_size}")
    if options.num_tokens is not None and options.num_tokens != parts.domain.num_tokens:
        raise BadConfig(f"num_tokens is {options.num_tokens} but the token domain has {parts.domain.num_tokens}")
    return ToyEngine(dataclasses.replace(options, seed=options.seed + parts.seed), parts.domain)
