"""Draft many tokens at once from the target's hidden states, conditioned on what the previous chunk had planned.

A one-layer network (`engines/nets/block_head.py`) on the target's runtime: one small forward per round. Its confidences
decide where a chain ends and, with ``top_k`` > 1, where a tree branches.
Source: Medusa, Cai et al. 2024, arXiv:2401.10774 (several tokens per pass); EAGLE-3, Li et al. 2025, arXiv:2503.01840
(hidden states of several depths); EAGLE-2, Li et al. 2024, arXiv:2406.16858 (tree by cumulative probability).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from vla_spec.drafters._head_graph import HeadGraph, common_length, open_head
from vla_spec.engines._graph_runtime import Array, GraphRuntime
from vla_spec.engines.nets.head_config import BLOCK_CHOICES, HeadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Float32, Int32, Plan


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
    """Owns the network and the keys and values of the target's committed rows. Not thread-safe.

    Args:
        file: the network's graph, in the target's model folder.
        config: its sizes.
        runtime: what runs it.
        num_tokens: T.
        options: how far to draft.
    """

    def __init__(
        self, file: Path, config: HeadConfig, runtime: GraphRuntime, num_tokens: int, options: Options
    ) -> None:
        c = config
        self._options = options
        self._prompt_length, self._num_tokens, self._capacity = c.prompt_length, num_tokens, c.block_capacity
        ids = np.int64
        self._network = HeadGraph(
            file, runtime, c, c.block_rows,
            {
                "features": (np.float32, ("r", c.feature_width)), "row": (ids, ("r",)), "write_index": (ids, (1,)),
                "last": (ids, (1,)), "positions": (ids, ("n",)), "history": (ids, ("n",)),
                "mask": (np.bool_, (1, 1, "n", c.block_rows)),
            },
            {"tokens": (ids, ("n", BLOCK_CHOICES)), "probs": (np.float32, ("n", BLOCK_CHOICES))},
            {"r": c.block_capacity, "n": c.num_tokens},
        )  # fmt: skip
        self._no_plan = c.num_bins
        self._history = np.full(2 * c.num_tokens, self._no_plan, np.int64)
        self._counting = np.arange(c.block_capacity + c.num_tokens, dtype=np.int64)
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
        # Rows stay valid up to the longest common prefix with the tokens of the last call. At least one row is always
        # read again, so that no dimension is ever zero.
        known = self._prompt_length + common_length(prefix, self._prefix)
        tokens, probs = self._run(min(self._rows, known, total - 1), total, features, prefix, n)
        self._rows, self._prefix = total, prefix.copy()
        if not np.isfinite(probs.sum()):
            self._network.state.clear()  # masked or not, NaN in a cache spreads
            self._rows = 0
            return EMPTY_DRAFT
        if plan.top_k > 1:
            return self._tree(tokens, probs, plan)
        confidence = np.cumprod(probs[:, 0])
        length = int(np.searchsorted(-confidence, -self._options.min_confidence, side="right"))
        length = max(1, min(length, plan.gamma, n))
        return Draft.chain(tokens[:length, 0].astype(np.int32))

    def _run(self, done: int, total: int, features: Float32, prefix: Int32, n: int) -> tuple[Array, Array]:
        """Read target rows from ``done`` on, draft n positions: tokens and probabilities, [n, 4]."""
        m, network = len(prefix), self._network
        r, padded = network.padded("r", total - done), network.padded("n", n)
        # A call of a fixed size reads rows again that are known; only at the start are there too few of them.
        start = max(0, total - r)
        arrays, call = network.tied(r, padded)
        arrays["features"][: total - start] = features[start:total]
        arrays["features"][total - start :] = 0
        np.minimum(self._counting[start : start + r], self._capacity - 1, out=arrays["row"])
        arrays["write_index"][0], arrays["last"][0] = start, prefix[-1]
        np.minimum(self._counting[m : m + padded], network.config.num_tokens - 1, out=arrays["positions"])
        arrays["history"][:] = self._history[m : m + padded]
        mask = arrays["mask"]
        mask[..., :total] = True
        mask[..., total:] = False
        mask[..., start + r : start + r + n] = True
        call.run()
        return arrays["tokens"][:n], arrays["probs"][:n]

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
    """From configuration; needs ``block_head.onnx`` and its weights in the model folder."""
    file, config, runtime = open_head("block_head", parts)
    return BlockHeadDrafter(file, config, runtime, parts.domain.num_tokens, options)
