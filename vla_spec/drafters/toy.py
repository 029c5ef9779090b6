"""Draft the toy engine's own path with seeded mistakes: realistic partial acceptance without a model.

For closed-loop studies of controllers and of the ladder. Which positions a draft gets wrong is drawn per chunk and
position, not per call: the same chunk is as easy or as hard for every draft length and every decoding mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from vla_spec.engines.toy import ToyEngine
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Int32, Plan


@dataclass(frozen=True, slots=True)
class Options:
    """How often a drafted token is wrong.

    Attributes:
        error: chance at the first drafted position, 0..1.
        growth: added to it per position further on, since a real drafter sees less and less of its own prefix. The
            defaults give about six tokens per round, as the shipped block head does.
    """

    error: float = 0.08
    growth: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.error <= 1 or not 0 <= self.growth <= 1:
            raise BadConfig(f"error is {self.error}, growth is {self.growth}; valid: 0..1")


@final
class ToyDrafter:
    """Owns a twin of the target and decodes the chunk ahead, once. Not thread-safe."""

    def __init__(self, options: Options, twin: ToyEngine, num_tokens: int, vocab_size: int, seed: int) -> None:
        self._twin = twin
        self._num_tokens, self._vocab_size, self._seed = num_tokens, vocab_size, seed
        self._chance = options.error + options.growth * np.arange(num_tokens)  # [T] by draft position
        self._num_chunks = 0
        self._inputs: EngineInputs | None = None
        self._path = np.zeros(0, np.int32)  # the target's greedy choices after some prefix; empty = not decoded yet
        self._luck = np.zeros(num_tokens)  # [T] a drafted token is wrong where its luck is below its chance of error

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """A new chunk starts."""
        self._inputs, self._path = inputs, np.zeros(0, np.int32)
        self._luck = self._draw(self._num_chunks)
        self._num_chunks += 1

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """A chain; a wrong token is one bin off."""
        m = len(prefix)
        n = min(plan.gamma, plan.depth, self._num_tokens - m)
        if n < 1 or self._inputs is None:
            return EMPTY_DRAFT
        if len(self._path) < m or (self._path[:m] != prefix).any():
            self._path = self._decode(self._inputs, prefix)
        tokens = self._path[m : m + n].copy()
        wrong = self._is_wrong(self._luck[m : m + n])
        tokens[wrong] = np.where(tokens[wrong] > 0, tokens[wrong] - 1, 1)
        return Draft.chain(tokens)

    def accepted(self, chunk: int | None = None) -> npt.NDArray[np.int64]:
        """How much of a long draft an exact rule accepts, by chunk position; int64 [T].

        Entry m is for a draft that starts when m tokens are decoded.

        Args:
            chunk: number of the chunk, as `begin` counts them; None = this one.
        """
        luck = self._luck if chunk is None else self._draw(chunk)
        counts = np.zeros(self._num_tokens, np.int64)
        for m in range(self._num_tokens):
            wrong = self._is_wrong(luck[m:])
            counts[m] = int(wrong.argmax()) if wrong.any() else len(wrong)
        return counts

    def _draw(self, chunk: int) -> npt.NDArray[np.float64]:
        return np.random.default_rng([self._seed, chunk]).random(self._num_tokens)

    def _is_wrong(self, luck: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Where a draft over these positions is wrong."""
        return np.asarray(luck < self._chance[: len(luck)])

    def _decode(self, inputs: EngineInputs, prefix: Int32) -> Int32:
        """The prefix, then what the target would choose greedily; int32 [T]."""
        twin, tokens, no_parent, root = self._twin, prefix.tolist(), np.full(1, -1, np.int32), np.zeros(1, np.int32)
        twin.prefill(inputs)
        scores = None
        for token in tokens:
            scores = twin.step(np.array([token], np.int32), no_parent)
            twin.commit(root)
        assert scores is not None, "a prefix has at least one token"
        while len(tokens) < self._num_tokens:
            tokens.append(int(scores.logits[0].argmax()))
            scores = twin.step(np.array(tokens[-1:], np.int32), no_parent)
            twin.commit(root)
        return np.array(tokens, np.int32)


def build(options: Options, parts: Parts) -> ToyDrafter:
    """Needs the toy engine as its target."""
    if not isinstance(parts.target, ToyEngine):
        raise BadConfig("drafter toy: knows the toy engine only; choose engine: toy, or another drafter")
    domain = parts.domain
    return ToyDrafter(options, parts.target.twin(), domain.num_tokens, domain.vocab_size, parts.seed)
