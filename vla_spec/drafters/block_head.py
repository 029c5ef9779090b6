"""Draft many tokens at once from the target's hidden states, conditioned on what the previous chunk had planned.

A one-layer network (`engines/nets/block_head.py`) on ONNX Runtime: one small forward per round. Its confidences decide
where a chain ends and, with ``top_k`` > 1, where a tree branches.
Source: Medusa, Cai et al. 2024, arXiv:2401.10774 (several tokens per pass); EAGLE-3, Li et al. 2025, arXiv:2503.01840
(hidden states of several depths); EAGLE-2, Li et al. 2024, arXiv:2406.16858 (tree by cumulative probability).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from vla_spec.errors import BadModel
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Int32, Plan


@dataclass(frozen=True)
class Options:
    """How far to draft.

    min_confidence: a node is drafted only if the product of confidences on its path is at least this, in a tree half of
        it; the first node always is. Lower = longer drafts, more wasted verification. [0..1]
    use_history: tell the network what the previous chunk had planned.
    """

    min_confidence: float = 0.3
    use_history: bool = True


@final
class BlockHeadDrafter:
    """Owns one session and the keys and values of the target's committed rows. Not thread-safe."""

    def __init__(self, session: Any, prompt_length: int, num_tokens: int, options: Options) -> None:
        self._session, self._options = session, options
        self._prompt_length, self._num_tokens = prompt_length, num_tokens
        shapes = {i.name: i.shape for i in session.get_inputs()}
        heads, capacity, width = shapes["past_key"]
        self._keys = np.zeros((heads, capacity, width), np.float32)
        self._values = np.zeros_like(self._keys)
        self._no_plan = 256
        self._history = np.full(2 * num_tokens, self._no_plan, np.int64)
        self._mask = np.full((1, 1, 2 * capacity), -1e9, np.float32)
        self._capacity = capacity
        self._rows = 0  # target rows whose keys and values are known
        self._prefix = np.zeros(0, np.int32)

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """A new chunk starts."""
        self._rows, self._prefix = 0, np.zeros(0, np.int32)
        self._history[:] = self._no_plan
        if history is not None and self._options.use_history:
            plan = history.tokens[history.consumed :][: self._num_tokens]
            self._history[: len(plan)] = plan

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """A chain, or with ``plan.top_k`` > 1 the best ``plan.gamma`` nodes of a tree."""
        m = len(prefix)
        n = min(plan.depth, self._num_tokens - m)
        if n < 1 or plan.gamma < 1 or not isinstance(features, np.ndarray):
            return EMPTY_DRAFT
        total = self._prompt_length + m - 1
        assert len(features) >= total, f"{len(features)=} {total=}"
        self._forget_changed_rows(prefix)
        start = min(self._rows, total - 1)  # at least one row, so that no dimension is ever zero
        r = total - start
        mask = self._mask[:, :, : self._capacity + r]
        mask[..., :start] = 0
        mask[..., start : self._capacity] = -1e9
        mask[..., self._capacity :] = 0
        position = np.arange(m, m + n, dtype=np.int64)
        tokens, probs, keys, values = self._session.run(
            None,
            {
                "features": features[start:total], "row": np.arange(start, total, dtype=np.int64),
                "past_key": self._keys, "past_value": self._values, "mask": mask,
                "last": prefix[-1:].astype(np.int64), "position": position, "history": self._history[m : m + n],
            },
        )  # fmt: skip
        self._keys[:, start:total], self._values[:, start:total] = keys, values
        self._rows, self._prefix = total, prefix.copy()
        if plan.top_k > 1:
            return self._tree(tokens, probs, plan)
        confidence = np.cumprod(probs[:, 0])
        length = int(np.searchsorted(-confidence, -self._options.min_confidence, side="right"))
        length = max(1, min(length, plan.gamma, n))
        return Draft.chain(tokens[:length, 0].astype(np.int32))

    def _forget_changed_rows(self, prefix: Int32) -> None:
        """Rows stay valid up to the longest common prefix with the tokens of the last call."""
        shared = min(len(prefix), len(self._prefix))
        differs = np.flatnonzero(prefix[:shared] != self._prefix[:shared])
        common = int(differs[0]) if len(differs) else shared
        self._rows = min(self._rows, self._prompt_length + common) if self._rows else 0

    def _tree(self, tokens: Any, probs: Any, plan: Plan) -> Draft:
        """Best-first by path probability; later positions do not depend on the branch, so a branch may rejoin."""
        width = min(plan.top_k, tokens.shape[1])
        chosen: list[int] = []
        parents: list[int] = []
        heap = [(-float(probs[0, j]), 0, j, -1) for j in range(width)]
        heapq.heapify(heap)
        floor = self._options.min_confidence * 0.5
        while heap and len(chosen) < plan.gamma:
            negative, depth, j, parent = heapq.heappop(heap)
            if chosen and -negative < floor:
                break
            node = len(chosen)
            chosen.append(int(tokens[depth, j]))
            parents.append(parent)
            if depth + 1 < len(tokens):
                for child in range(width):
                    heapq.heappush(heap, (negative * float(probs[depth + 1, child]), depth + 1, child, node))
        return Draft(np.array(chosen, np.int32), np.array(parents, np.int32))


def build(options: Options, parts: Parts) -> BlockHeadDrafter:
    """From configuration; needs ``block_head.onnx`` in the model folder."""
    from vla_spec.engines._model_files import ModelFiles
    from vla_spec.engines.onnxruntime import open_session

    if parts.model_dir is None:
        raise BadModel("drafter block_head needs a model folder; set `model:` in the configuration")
    session = open_session(parts.model_dir / "block_head.onnx", parts.num_threads)
    prompt_length = ModelFiles.describe(parts.model_dir).base_rows
    return BlockHeadDrafter(session, prompt_length, parts.domain.num_tokens, options)
