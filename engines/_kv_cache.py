"""A fixed-capacity key-value cache in host memory, with tree masks.

Rows enter only by `commit`, so that nothing that was drafted has to be rolled back; a commit copies the accepted rows
and touches no others.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from vla_spec.types import Float32, Int32

MASKED = np.float32(-1e9)  # finite, so that a softmax over a row never makes NaN


class StepBuffers(NamedTuple):
    """Inputs and outputs of one step over k tokens; reused by every step of that size."""

    tokens: np.ndarray  # int64 [k]
    position: np.ndarray  # int64 [k], row of the position table
    mask: Float32  # [k, capacity + k], 0 = may look, -1e9 = may not
    logits: Float32  # [k, V]
    features: Float32  # [k, D]
    rows: Float32  # [2 * layers, heads, k, head_width], keys and values of these tokens


@final
class KVCache:
    """Cache and step buffers of one decoder. Not thread-safe.

    Args:
        num_layers, num_heads, head_width: of the decoder.
        capacity: most rows, prompt included.
        feature_width: D, width of the hidden states that are kept for drafters.
        vocab_size: V.
        max_step: most tokens of one step.
    """

    def __init__(
        self, num_layers: int, num_heads: int, head_width: int, capacity: int, feature_width: int, vocab_size: int,
        max_step: int,
    ) -> None:  # fmt: skip
        self.rows = np.zeros((2 * num_layers, num_heads, capacity, head_width), np.float32)
        self.features = np.zeros((capacity, feature_width), np.float32)
        self.capacity, self.vocab_size, self.max_step = capacity, vocab_size, max_step
        self.length = 0
        self._buffers: dict[int, StepBuffers] = {}
        self._causal = np.where(np.tri(max_step, dtype=bool), np.float32(0), MASKED)
        self._chain = np.arange(-1, max_step - 1, dtype=np.int32)
        self._current: StepBuffers | None = None

    def buffers(self, k: int) -> StepBuffers:
        """The buffers for steps of k tokens, made at their first use."""
        if k not in self._buffers:
            layers, heads, capacity, width = self.rows.shape
            self._buffers[k] = StepBuffers(
                np.zeros(k, np.int64), np.zeros(k, np.int64), np.full((k, capacity + k), MASKED, np.float32),
                np.zeros((k, self.vocab_size), np.float32), np.zeros((k, self.features.shape[1]), np.float32),
                np.zeros((layers, heads, k, width), np.float32),
            )  # fmt: skip
        return self._buffers[k]

    def begin(self, rows: Float32, features: Float32) -> None:
        """Start over with a prompt. rows [2 * layers, heads, p, head_width], features [p, D]."""
        self.length = len(features)
        self.rows[:, :, : self.length] = rows
        self.features[: self.length] = features
        self._current = None

    def prepare(self, tokens: Int32, parents: Int32) -> StepBuffers:
        """Fill tokens, positions and mask for a step over a token tree."""
        k, length = len(tokens), self.length
        assert 1 <= k <= self.max_step, f"{k=} {self.max_step=}"
        buffers = self.buffers(k)
        buffers.tokens[:] = tokens
        buffers.mask[:, :length] = 0
        buffers.mask[:, length : self.capacity] = MASKED
        tree = buffers.mask[:, self.capacity :]
        if np.array_equal(parents, self._chain[:k]):
            tree[:] = self._causal[:k, :k]
            buffers.position[:] = np.arange(length, length + k)
        else:
            tree[:] = MASKED
            for i, parent in enumerate(parents.tolist()):
                if parent >= 0:
                    tree[i] = tree[parent]
                    buffers.position[i] = buffers.position[parent] + 1
                else:
                    buffers.position[i] = length
                tree[i, i] = 0
        # Nodes beyond the end of the chunk can be drafted, never accepted: any valid row of the table will do.
        np.minimum(buffers.position, self.capacity - 1, out=buffers.position)
        self._current = buffers
        return buffers

    def commit(self, path: Int32) -> None:
        """Keep these nodes of the last step."""
        assert self._current is not None, "commit without a step"
        start, end = self.length, self.length + len(path)
        assert end <= self.capacity, f"{end=} {self.capacity=}"
        if len(path) and path[-1] == len(path) - 1:  # a chain from the root: slices are cheaper than gathers
            self.rows[:, :, start:end] = self._current.rows[:, :, : len(path)]
            self.features[start:end] = self._current.features[: len(path)]
        else:
            self.rows[:, :, start:end] = self._current.rows[:, :, path]
            self.features[start:end] = self._current.features[path]
        self.length = end
        self._current = None
