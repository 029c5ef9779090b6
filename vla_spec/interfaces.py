"""The verbs, on one page: what an engine, a drafter, a rule, a controller, a tokenizer, an adapter and a robot do.

Protocols, not base classes: a plugin is any final class with these methods. Contract tests find every plugin by
its folder and hold it to the text below.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from vla_spec.types import (
    Committed,
    Draft,
    EngineInputs,
    Float32,
    Int32,
    Observation,
    Plan,
    Round,
    Scores,
    TokenDomain,
    Verdict,
)


class EngineInfo(NamedTuple):
    """What an engine is and what may be claimed of it."""

    name: str  # plugin name
    model_hash: str  # sha256 of the weights, hex
    precision: str  # "fp32", "int8", ...
    provider: str  # where it really runs, as the library reports it
    has_tree_mask: bool  # `step` accepts branches; otherwise chains only
    has_inplace_kv: bool  # the cache is written in place, commit is O(path)
    is_batch_invariant: bool  # `step(n)` equals n times `step(1)` to rounding; exactness is claimed only if True


@runtime_checkable
class Engine(Protocol):
    """Owns weights and one KV cache. Targets and drafter models are both engines. Not thread-safe.

    Tokens are ids of the token domain, 0 <= id < V. `step` on a tree scores each node as if its root-to-node path
    had been fed one token at a time. Rows of a step live in the cache only if `commit` names them before the next
    `step`; an uncommitted step leaves no trace. `commit` costs O(path), never O(cache).
    """

    @property
    def info(self) -> EngineInfo:
        """Identity and capabilities."""

    @property
    def length(self) -> int:
        """Committed cache rows, prompt included."""

    @property
    def max_step(self) -> int:
        """Most tokens that one `step` takes."""

    @property
    def features(self) -> object | None:
        """Hidden states of the committed rows, row i for cache row i; opaque, None if the engine has none.

        CPU engines: float32 [length, D], valid until the next `prefill`.
        """

    def prefill(self, inputs: EngineInputs) -> Scores:
        """Start over with these inputs. Returns one row: about the first token of the chunk."""

    def step(self, tokens: Int32, parents: Int32) -> Scores:
        """Score n tokens on top of the committed ones. tokens, parents: int32 [n], 1 <= n <= max_step."""

    def commit(self, path: Int32) -> None:
        """Keep these nodes of the last `step` (root to leaf, ascending, each the child of the one before)."""


class ChunkHistory(NamedTuple):
    """The previous chunk: a source of drafts, the answer if there is no better one, and the beginning of the new chunk.

    The tokens ``consumed .. consumed + num_forced`` are going to be played while the new chunk is planned, whatever it
    says; a policy that can takes them as the new chunk's beginning, so that the rest continues what the arm does.
    """

    tokens: Int32  # [m] of the previous chunk
    consumed: int  # how many of them belong to control steps that lie before the new observation
    num_forced: int = 0  # how many of those behind them are fixed, whole control steps
    actions: Float32 | None = None  # [h, A] as they are played, unverified ones bounded; None = what the tokens say


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens. Told all tokens so far at every call, it re-syncs itself by longest common prefix."""

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """A new chunk starts."""

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """At most ``plan.gamma`` nodes, no path longer than ``plan.depth``; fewer or none is fine.

        Args:
            prefix: int32 [m], m >= 1, the tokens decoded so far; the last one is not in the target's cache yet.
            plan: limits of this round.
            features: the target's `Engine.features`, whose last row belongs to the token before ``prefix[-1]``.
        """


@runtime_checkable
class ScoreObserver(Protocol):
    """A drafter that learns from what the target said about its draft, rejected tokens included, has this too.

    The decoder asks once, when it is given the drafter; a wrapper has the method and passes it on if the wrapped
    drafter has it. See docs/decisions/0010-drafters-that-see-scores.md.
    """

    def observe(self, draft: Draft, scores: Scores) -> None:
        """Called once per round, prefill included, before the verdict is committed. Copy what is to be kept.

        Args:
            draft: what was verified; empty after a prefill or a plain round.
            scores: k + 1 finite rows, as for `AcceptanceRule.judge`.
        """


@runtime_checkable
class AcceptanceRule(Protocol):
    """Decides which path of a draft is accepted, and which token follows. A pure function of its arguments."""

    @property
    def exact(self) -> bool:
        """True if the output's law is the target's own (greedy: token for token). Proved by a test."""

    def judge(
        self,
        draft: Draft,
        scores: Scores,
        committed: Committed,
        rng: np.random.Generator,
        tolerance: float = 1.0,
    ) -> Verdict:
        """Judge a draft.

        Args:
            draft: k nodes; none = plain decoding.
            scores: k + 1 rows: row 0 about what follows the committed tokens, row i + 1 about what follows node i.
            committed: decoded so far; ``len(committed.tokens)`` is the chunk position that a root node would take.
            rng: the only source of randomness.
            tolerance: scale of the rule's own tolerance, in [0, 1].
        """


@runtime_checkable
class DeadlineController(Protocol):
    """Says how much to draft in the next round, or that no further round fits. Writes parameters only."""

    def begin(self, remaining_ns: int, history: ChunkHistory | None = None) -> bool:
        """A new chunk starts. False = not even its first token would be in time: spend no forward on it.

        Args:
            remaining_ns: until the deadline, may be negative.
            history: the previous chunk, which says how the arm is moving; None = there is none.
        """

    def plan(self, remaining_ns: int, tokens_left: int) -> Plan | None:
        """Plan one round, or None = stop now. remaining_ns: until the deadline, may be negative.

        `LEAVE_REST` = stop although there is time: what is missing is the drafter's, unverified, bounded and labelled.
        """

    def record(self, measured: Round) -> None:
        """Learn from a finished round."""


@runtime_checkable
class ActionTokenizer(Protocol):
    """Actions to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """V."""

    def encode(self, actions: Float32) -> Int32:
        """float32 [H, A] -> int32 [H * A], time-major. Values outside the range are clipped."""

    def decode(self, tokens: Int32) -> Float32:
        """int32 [m] -> float32 [m // A, A]: whole steps only, a started step is left out."""

    def distance(self, token: Int32, other: Int32, position: Int32) -> Float32:
        """How far apart two tokens are at chunk positions ``position``, in physical units; shapes broadcast."""


@runtime_checkable
class Adapter(Protocol):
    """The only place that knows a model family or a modality."""

    @property
    def domain(self) -> TokenDomain:
        """What the tokens mean."""

    @property
    def tokenizer(self) -> ActionTokenizer:
        """How tokens become actions."""

    def encode(self, observation: Observation) -> EngineInputs:
        """Observation -> engine inputs. Raises BadObservation, which says what is wrong and what is valid."""

    def decode(self, tokens: Int32) -> Float32:
        """Tokens -> actions [h, A] in the robot's units."""

    def example(self) -> Observation:
        """Some observation that is valid, for warm-up and for tests."""


@runtime_checkable
class Robot(Protocol):
    """A simulator, a replay or a ROS robot."""

    @property
    def action_low(self) -> Float32:
        """float32 [A]."""

    @property
    def action_high(self) -> Float32:
        """float32 [A]."""

    @property
    def dt_s(self) -> float:
        """Control period [s]."""

    def reset(self, seed: int) -> None:
        """Start an episode; the same seed gives the same episode."""

    def observe(self, now_ns: int) -> Observation:
        """Look. The stamp is ``now_ns``."""

    def act(self, action: Float32, now_ns: int) -> Float32:
        """Do one control step; returns the action that was really sent (clipped, say)."""

    def close(self) -> None:
        """Free what it holds."""


__all__ = [
    "AcceptanceRule",
    "ActionTokenizer",
    "Adapter",
    "ChunkHistory",
    "DeadlineController",
    "Drafter",
    "Engine",
    "EngineInfo",
    "Robot",
    "ScoreObserver",
]
