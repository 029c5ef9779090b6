"""The nouns: every value that crosses a seam. NumPy arrays in named tuples, no behaviour, no I/O.

Letters used in shapes, everywhere in the project:
  V  tokens that may occur (256 action bins)      T  tokens in one chunk (H * A)
  H  control steps in one chunk                   A  degrees of freedom of one action
  k  drafted tokens (nodes of the tree)           a  accepted tokens (nodes on the winning path)
  m  tokens decoded so far                        D  width of the target's hidden states
Times are integers in nanoseconds on a monotonic clock unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

#: What an adapter hands to an engine: named arrays, e.g. ``images``, ``words``, ``state``.
EngineInputs = dict[str, npt.NDArray[Any]]


class Provenance(IntEnum):
    """Where a token of a chunk came from, best first (a larger value is a weaker guarantee)."""

    EXACT = 0  # the target's own choice given everything before it
    RELAXED = 1  # drafted, differs from the target's choice, within the stated tolerance
    DRAFTED = 2  # drafted and never seen by the target: time ran out
    TAIL = 3  # remainder of the previous chunk
    HOLD = 4  # no plan: hold position (or decelerate to it)


class Rung(IntEnum):
    """The ladder of answers of one planning tick, best first. Every tick ends on exactly one."""

    EXACT = 0
    RELAXED = 1
    DRAFT_TAIL = 2  # verified prefix + unverified draft tail, bounded by limits
    LAST_CHUNK = 3  # remainder of the previous chunk
    HOLD = 4
    STOP = 5  # decelerating stop


@dataclass(frozen=True, slots=True)
class Observation:
    """What the robot sees at one instant.

    Attributes:
        images: camera pictures, uint8 [num_cameras, height, width, 3].
        state: the robot's own state, float32 [S]; Meta-World: gripper x, y, z [m] and opening [0..1].
        instruction: what to do, in words.
        stamp_ns: when it was taken, on the clock that the runtime was given.
        step: control steps since the episode began.
    """

    images: UInt8
    state: Float32
    instruction: str
    stamp_ns: int
    step: int


class Draft(NamedTuple):
    """A token tree. ``parents[i] < i``, or -1 for "follows the last committed token"; a chain is -1, 0, 1, ...

    ``probs`` is the drafter's distribution that each token was drawn from, or None for a point mass
    (the token was chosen, not drawn).
    """

    tokens: Int32  # [k]
    parents: Int32  # [k]
    probs: Float32 | None = None  # [k, V]

    @staticmethod
    def chain(tokens: Int32, probs: Float32 | None = None) -> Draft:
        """A draft without branches."""
        return Draft(tokens, np.arange(-1, len(tokens) - 1, dtype=np.int32), probs)


EMPTY_DRAFT = Draft(np.empty(0, np.int32), np.empty(0, np.int32), None)


class Scores(NamedTuple):
    """What an engine says about n tokens: row i is about the token that would follow token i.

    ``features`` are the hidden states of the same n tokens: opaque, kept where the engine computes; only a
    drafter that was built for that engine looks inside. Buffers may be reused by the next call.
    """

    logits: Float32  # [n, V]
    features: object | None = None


class Verdict(NamedTuple):
    """A rule's decision about a draft."""

    path: Int32  # [a] accepted nodes, root to leaf, as indices into the draft
    next_token: int  # recovered (the draft was rejected there) or bonus (all of the path's tokens were accepted)
    relaxed: Bool  # [a] True where the accepted token is not the target's own choice
    deviation: Float32  # [a] how far it is from the target's choice, in the rule's unit (bins, or physical)


class Committed(NamedTuple):
    """What has been decoded so far in this chunk; rules need it for positions and for error budgets."""

    tokens: Int32  # [m]
    deviation: Float32  # [m]


class Plan(NamedTuple):
    """What a controller allows for one round.

    gamma: most nodes to draft; 0 = plain decoding. depth: longest path; top_k: children per node (1 = a chain).
    tolerance: scale in [0, 1] of the rule's own tolerance, 0 = exact.
    """

    gamma: int
    depth: int
    top_k: int = 1
    tolerance: float = 1.0


#: What a controller plans to end a chunk before its time: the drafter may fill in the rest, nobody verifies it.
LEAVE_REST = Plan(-1, -1)


class Round(NamedTuple):
    """One draft-verify round as measured. Durations in ns; round 0 is the prefill (nothing drafted).

    ``judge_ns`` is the rule and the decoder's own work, ``commit_ns`` the engine's commit alone.
    draft, step, judge and commit follow each other without a gap from ``start_ns`` on (on the decoder's clock) and add
    up to ``total_ns``. ``num_forced``: tokens that were given, not decoded (the fixed beginning of a chunk): they were
    fed in this round and are no yield of it, and the prefill before it yields nothing. 0 in all other rounds.
    """

    num_drafted: int
    num_accepted: int
    num_relaxed: int
    draft_ns: int
    step_ns: int
    judge_ns: int
    commit_ns: int
    total_ns: int
    start_ns: int = 0
    num_forced: int = 0


class StopReason(IntEnum):
    """Why a decode ended."""

    COMPLETE = 0
    DEADLINE = 1  # the controller found that another round does not fit
    BAD_SCORES = 2  # NaN or infinity in the logits
    NO_TIME = 3  # the controller found that not even the prefill fits; nothing was run
    LEFT = 4  # the controller leaves the rest to the drafter, unverified, although there is time


@dataclass(frozen=True, slots=True)
class Decoded:
    """Tokens of one chunk, as far as they were decoded, and how it went.

    Attributes:
        tokens: int32 [m], m <= T.
        provenance: uint8 [m], values of `Provenance`.
        deviation: float32 [m], distance from the target's choice in the rule's unit.
        rounds: one entry per target forward, prefill first.
        stop: why decoding ended.
    """

    tokens: Int32
    provenance: UInt8
    deviation: Float32
    rounds: tuple[Round, ...]
    stop: StopReason


@dataclass(frozen=True, slots=True)
class TokenDomain:
    """What the tokens of one chunk mean, position by position.

    Attributes:
        vocab_size: V.
        num_tokens: T, tokens in a full chunk.
        tokens_per_step: A; a prefix of whole steps can be acted on.
        group: int32 [T]; positions with the same number share one error budget (the translation of one step, say).
        never_relaxed: bool [T]; switches such as a gripper.
        unit_per_bin: float32 [T]; size of one bin in physical units [m, rad, or 1 for switches].
    """

    vocab_size: int
    num_tokens: int
    tokens_per_step: int
    group: Int32
    never_relaxed: Bool
    unit_per_bin: Float32


@dataclass(frozen=True, slots=True)
class ActionChunk:
    """H actions with everything that a consumer needs to judge them.

    Attributes:
        actions: float32 [H, A], in the robot's action space. H may be shorter than a full chunk, never longer.
        provenance: uint8 [H, A], values of `Provenance`.
        rung: the weakest thing in it.
        chunk_id: counts up from 0 in one run.
        instruction: the words that this chunk obeys.
        observation_stamp_ns, observation_step: when and at which control step the observation was taken;
            action i belongs to control step ``observation_step + i``.
        start_ns, ready_ns: planning began and ended.
        deadline_ns: when it was due.
        tokens: int32 [m], the tokens that the actions were decoded from.
        max_deviation: largest distance from the target's choice, in the rule's unit.
    """

    actions: Float32
    provenance: UInt8
    rung: Rung
    chunk_id: int
    instruction: str
    observation_stamp_ns: int
    observation_step: int
    start_ns: int
    ready_ns: int
    deadline_ns: int
    tokens: Int32
    max_deviation: float = 0.0

    @property
    def slack_ns(self) -> int:
        """Time left at the moment it was ready; negative = late."""
        return self.deadline_ns - self.ready_ns

    @property
    def is_late(self) -> bool:
        """Ready after its deadline."""
        return self.slack_ns < 0


class Command(NamedTuple):
    """What the actor sends at one control tick, and why."""

    action: Float32  # [A]
    provenance: Provenance  # the weakest of the action's tokens
    chunk_id: int  # -1 when no chunk is behind it
    row: int  # of the chunk, -1 when none
