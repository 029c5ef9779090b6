"""A policy whose engine says what it is told to say and takes the time that it is told to take."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vla_spec.acceptance import greedy
from vla_spec.action_space import ActionSpace
from vla_spec.clock import VirtualClock
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.errors import BadObservation
from vla_spec.ladder import Ladder
from vla_spec.policy import Policy, PolicyOptions
from vla_spec.tokenizers import uniform_bins
from vla_spec.types import EMPTY_DRAFT, Draft, Plan, Scores, TokenDomain

V, H, A = 256, 8, 4
T = H * A
MS = 1_000_000
LOW, HIGH = np.full(A, -1, np.float32), np.full(A, 1, np.float32)
SPACE = ActionSpace.from_limits(LOW, HIGH, switches=[3])
TOKENIZER = uniform_bins.build(uniform_bins.Options())
DOMAIN = TokenDomain(
    V, T, A, np.repeat(np.arange(H), A).astype(np.int32), np.tile([False, False, False, True], H),
    np.full(T, 2 / V, np.float32),
)  # fmt: skip


@dataclass
class FakeEngine:
    """Greedy token at chunk position p is ``tokens[p]``. A call advances the clock by its cost."""

    clock: VirtualClock
    tokens: np.ndarray = field(default_factory=lambda: np.arange(T, dtype=np.int32) + 100)
    prefill_ns: int = 0
    step_ns: int = 0
    max_step: int = 16
    nan_at: int | None = None  # logits about this position are NaN
    error_at: int | None = None  # asking about this position raises
    info: None = None
    features: None = None
    length: int = 0
    num_prefills: int = 0

    def prefill(self, inputs):
        self.num_prefills += 1
        self.length = 1
        self.clock.advance(self.prefill_ns)
        return self._scores(np.array([0]))

    def step(self, tokens, parents):
        self.clock.advance(self.step_ns)
        depth = []
        for parent in parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return self._scores(self.length + np.array(depth))

    def commit(self, path):
        self.length += len(path)

    def _scores(self, positions):
        if self.error_at is not None and (positions >= self.error_at).any():
            raise RuntimeError("engine fell over")
        logits = np.zeros((len(positions), V), np.float32)
        logits[np.arange(len(positions)), self.tokens[np.minimum(positions, T - 1)]] = 10
        if self.nan_at is not None:
            logits[positions >= self.nan_at] = np.nan
        return Scores(logits)


@dataclass
class FakeDrafter:
    """Drafts ``tokens`` by position."""

    tokens: np.ndarray | None = None
    error: Exception | None = None
    num_calls: int = 0

    def begin(self, inputs, history):
        pass

    def propose(self, prefix, plan, features):
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        if self.tokens is None:
            return EMPTY_DRAFT
        m = len(prefix)
        return Draft.chain(self.tokens[m : m + min(plan.gamma, plan.depth)])


@dataclass
class FakeController:
    """``gamma`` until no more than ``stop_at`` tokens are left, or until the time is up."""

    gamma: int = 0
    stop_at: int = 0

    def begin(self, remaining_ns, history=None):
        return True

    def plan(self, remaining_ns, tokens_left):
        return None if remaining_ns <= 0 or tokens_left <= self.stop_at else Plan(self.gamma, self.gamma)

    def record(self, measured):
        pass


class FakeAdapter:
    domain, tokenizer = DOMAIN, TOKENIZER

    def __init__(self, clock=None, encode_ns=0):
        self.clock, self.encode_ns = clock, encode_ns

    def encode(self, observation):
        if self.clock is not None:
            self.clock.advance(self.encode_ns)
        if not observation.instruction:
            raise BadObservation("instruction", "empty", "a sentence")
        return {"state": observation.state[None]}

    def decode(self, tokens):
        return TOKENIZER.decode(tokens)


def make_policy(clock, engine=None, drafter=None, controller=None, adapter=None, options=None, ladder=None):
    decoder = SpeculativeDecoder(
        engine or FakeEngine(clock),
        drafter or FakeDrafter(),
        greedy.build(greedy.Options(), None),
        controller or FakeController(),
        T,
        clock.now_ns,
        np.random.default_rng(0),
    )
    options = options or PolicyOptions(reserve_ns=0)
    return Policy(adapter or FakeAdapter(), decoder, SPACE, clock.now_ns, ladder or Ladder(), options=options)
