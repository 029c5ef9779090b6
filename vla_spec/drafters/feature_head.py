"""Draft a dynamic tree with one transformer layer that predicts the target's hidden states.

In each of ``plan.depth`` small forwards the ``plan.top_k`` best leaves by cumulative log-probability are expanded into
``plan.top_k`` children; of all nodes the best ``plan.gamma`` are kept, which always form a tree because a parent is at
least as probable as its child.
Source: EAGLE-2, Li et al. 2024, arXiv:2406.16858; used for VLA by Spec-VLA, Wang et al. 2025, arXiv:2507.22424.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt

from vla_spec.drafters._head_graph import HeadGraph, common_length, open_head
from vla_spec.engines._graph_runtime import Array, GraphRuntime
from vla_spec.engines.nets.head_config import FEATURE_CHOICES, HeadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Bool, Draft, EngineInputs, Float32, Int32, Plan

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """How sure to be.

    min_confidence: a node is kept only if the probability of its path is at least this; the best node always is. [0..1]
    """

    min_confidence: float = 0.05


@final
class FeatureHeadDrafter:
    """Owns the network and the keys and values of committed rows. Not thread-safe.

    Chain row c (counted after the prompt rows) belongs to chunk token c; it takes the target's feature of the row
    before that token. Rows of the tree are written behind the chain's; those of nodes that lead nowhere are given up
    when the room is used up.

    Args:
        file: the network's graph, in the target's model folder.
        config: its sizes.
        runtime: what runs it.
        num_tokens: T.
        options: how sure to be.
    """

    def __init__(
        self, file: Path, config: HeadConfig, runtime: GraphRuntime, num_tokens: int, options: Options
    ) -> None:
        c, ids = config, np.int64
        self._context, self._num_tokens, self._capacity = c.prompt_length - 1, num_tokens, c.feature_capacity
        self._network = HeadGraph(
            file, runtime, c, c.feature_rows,
            {
                "features": (np.float32, ("n", c.feature_width)), "hidden": (np.float32, ("n", c.width)),
                "is_own": (np.bool_, ("n", 1)), "ids": (ids, ("n",)), "positions": (ids, ("n",)),
                "write_index": (ids, (1,)), "mask": (np.bool_, (1, 1, "n", c.feature_rows)),
            },
            {
                "tokens": (ids, ("n", FEATURE_CHOICES)), "logp": (np.float32, ("n", FEATURE_CHOICES)),
                "out": (np.float32, ("n", c.width)),
            },
            {"n": c.feature_capacity},
        )  # fmt: skip
        self._prompt_id = c.num_bins
        self._floor = float(np.log(max(options.min_confidence, 1e-9)))
        self._causal = np.tri(c.feature_capacity, dtype=bool)
        self._counting = np.arange(2 * c.feature_capacity, dtype=np.int64)
        self._ids = np.empty(c.feature_capacity, np.int64)
        self._rows = 0
        self._prefix = np.zeros(0, np.int32)

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """A new chunk starts."""
        self._rows, self._prefix = 0, np.zeros(0, np.int32)

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """At most ``plan.gamma`` nodes, no path longer than ``plan.depth``."""
        m = len(prefix)
        depth = min(plan.depth, self._num_tokens - m)
        if depth < 1 or plan.gamma < 1 or not isinstance(features, np.ndarray):
            return EMPTY_DRAFT
        best, logp, out = self._catch_up(prefix, features)
        if not np.isfinite(logp.sum()):
            self._network.state.clear()  # masked or not, NaN in a cache spreads
            self._rows = 0
            return EMPTY_DRAFT
        width = min(max(plan.top_k, 1), FEATURE_CHOICES)
        # Level 1: children of the last committed row.
        tokens = best[-1, :width].astype(np.int32)
        score = logp[-1, :width].astype(np.float64)
        all_tokens, all_parents, all_scores = [tokens], [np.full(width, -1, np.int32)], score
        states = np.repeat(out[-1:], width, 0)  # [f, width]: hidden state that feeds each leaf
        row_of = np.arange(width)  # of the nodes of a level: which of ``states`` feeds it
        ancestors = np.zeros((width, self._network.rows - self._rows), bool)  # [f, rows of the tree]
        first, used = 0, 0  # nodes before the current level, rows of the tree so far
        for level in range(1, depth):
            # Of the leaves only those that may still be among the best get children: a child is at most as probable as
            # its parent.
            frontier = np.sort(np.argsort(-score, kind="stable")[:width])
            frontier = frontier[score[frontier] >= self._least(all_scores, plan.gamma)]
            f = len(frontier)
            if not f:
                break
            chosen = row_of[frontier]
            states, ancestors = states[chosen], ancestors[chosen]
            used, ancestors = self._make_room(used, self._network.padded("n", f), ancestors)
            if used < 0:
                break
            best, logp, out = self._grow(tokens[frontier], states, ancestors, used, m + level - 1)
            ancestors[:, used : used + f] = np.eye(f, dtype=bool)
            used += f
            all_parents.append(np.repeat(first + frontier, width).astype(np.int32))
            first += len(tokens)
            tokens, score = (
                best[:, :width].astype(np.int32).ravel(),
                (score[frontier][:, None] + logp[:, :width]).ravel(),
            )
            row_of = np.repeat(np.arange(f), width)
            states = out
            all_tokens.append(tokens)
            all_scores = np.concatenate((all_scores, score))
        return self._keep(np.concatenate(all_tokens), all_scores, np.concatenate(all_parents), plan.gamma)

    def _least(self, scores: Float64, gamma: int) -> float:
        """Score that a node must have to be kept, as far as it is known."""
        if len(scores) <= gamma:
            return self._floor
        return max(self._floor, float(np.partition(scores, len(scores) - gamma)[len(scores) - gamma]))

    def _make_room(self, used: int, size: int, ancestors: Bool) -> tuple[int, Bool]:
        """Rows of the tree in use, and who sees them, once ``size`` more fit; -1 if they don't."""
        room = ancestors.shape[1]
        if used + size <= room:
            return used, ancestors
        live = np.flatnonzero(ancestors.any(0)).astype(np.int32)
        self._network.state.move(self._rows, live + np.int32(self._rows))
        moved = np.zeros_like(ancestors)
        moved[:, : len(live)] = ancestors[:, live]
        return (len(live) if len(live) + size <= room else -1), moved

    def _grow(
        self, tokens: Int32, states: Float32, ancestors: Bool, used: int, place: int
    ) -> tuple[Array, Array, Array]:
        """Children of f leaves: tokens [f, 8], log-probabilities [f, 8], hidden states [f, width].

        Args:
            tokens: of the leaves.
            states: hidden states that feed them.
            ancestors: bool [f, rows of the tree], who sees which.
            used: rows of the tree so far.
            place: of the leaves in the chunk.
        """
        f, total = len(tokens), self._rows
        arrays, call = self._network.tied(self._network.padded("n", f))
        arrays["hidden"][:f], arrays["hidden"][f:] = states, 0
        arrays["is_own"][:] = True
        arrays["ids"][:f], arrays["ids"][f:] = tokens, self._prompt_id
        arrays["positions"][:] = min(self._context + place, self._capacity - 1)
        arrays["write_index"][0] = total + used
        mask = arrays["mask"][0, 0]
        mask[:, :total] = True
        mask[:f, total:] = ancestors
        mask[f:, total:] = False
        mask[self._counting[:f], total + used + self._counting[:f]] = True
        call.run()
        return arrays["tokens"][:f], arrays["logp"][:f], arrays["out"][:f]

    def _keep(self, tokens: Int32, scores: Float64, parents: Int32, gamma: int) -> Draft:
        """The best nodes, in an order where parents come first, with parents renumbered."""
        order = np.argsort(-scores, kind="stable")[:gamma]
        confident = scores[order] >= self._floor
        confident[0] = True  # at least one node
        order = np.sort(order[confident])
        number = np.full(len(tokens) + 1, -1, np.int32)  # the last entry stands for parent -1
        number[order] = np.arange(len(order))
        return Draft(tokens[order], number[parents[order]])

    def _catch_up(self, prefix: Int32, features: Float32) -> tuple[Array, Array, Array]:
        """Rows of all committed tokens that are new; tokens, scores and hidden states of the last of them."""
        network, total = self._network, self._context + len(prefix)
        known = self._context + common_length(prefix, self._prefix)
        self._ids[: self._context] = self._prompt_id
        self._ids[self._context : total] = prefix
        n = network.padded("n", total - min(self._rows, known, total - 1))
        # A call of a fixed size computes rows again that are known; only at the start are there too few of them.
        start = max(0, total - n)
        r = total - start
        arrays, call = network.tied(n)
        arrays["features"][:r], arrays["features"][r:] = features[start:total], 0
        arrays["is_own"][:] = False
        arrays["ids"][:r], arrays["ids"][r:] = self._ids[start:total], self._prompt_id
        np.minimum(self._counting[start : start + n], self._capacity - 1, out=arrays["positions"])
        arrays["write_index"][0] = start
        mask = arrays["mask"][0, 0]
        mask[:, :start] = True
        mask[:, start:] = False
        mask[:, start : start + n] = self._causal[:n, :n]
        call.run()
        self._rows, self._prefix = total, prefix.copy()
        return arrays["tokens"][:r], arrays["logp"][:r], arrays["out"][:r]


def build(options: Options, parts: Parts) -> FeatureHeadDrafter:
    """From configuration; needs ``feature_head.onnx`` and its weights in the model folder."""
    file, config, runtime = open_head("feature_head", parts)
    return FeatureHeadDrafter(file, config, runtime, parts.domain.num_tokens, options)
