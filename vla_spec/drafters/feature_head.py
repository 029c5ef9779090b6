"""Draft a dynamic tree with one transformer layer that predicts the target's hidden states.

In each of ``plan.depth`` small forwards the ``plan.top_k`` best leaves by cumulative log-probability are expanded into
``plan.top_k`` children; of all nodes the best ``plan.gamma`` are kept, which always form a tree because a parent is at
least as probable as its child.
Source: EAGLE-2, Li et al. 2024, arXiv:2406.16858; used for VLA by Spec-VLA, Wang et al. 2025, arXiv:2507.22424.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from vla_spec.errors import BadModel
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Float32, Int32, Plan

MASKED = np.float32(-1e9)
NUM_CHILDREN = 8  # what the graph returns per row


@dataclass(frozen=True)
class Options:
    """How sure to be.

    min_confidence: a node is kept only if the probability of its path is at least this; the best node always is. [0..1]
    """

    min_confidence: float = 0.05


@final
class FeatureHeadDrafter:
    """Owns one session and the keys and values of committed rows. Not thread-safe.

    Chain row c (counted after the prompt rows) belongs to chunk token c; it takes the target's feature of the row
    before that token.
    """

    def __init__(self, session: Any, prompt_length: int, num_tokens: int, options: Options) -> None:
        self._session, self._options = session, options
        self._context, self._num_tokens = prompt_length - 1, num_tokens
        shapes = {i.name: i.shape for i in session.get_inputs()}
        heads, _, width = shapes["past_key"]
        self._capacity = prompt_length - 1 + num_tokens
        self._keys = np.zeros((heads, self._capacity, width), np.float32)
        self._values = np.zeros_like(self._keys)
        self._feature_width, self._width = shapes["features"][1], shapes["hidden"][1]
        self._prompt_id = 256
        self._floor = np.log(max(options.min_confidence, 1e-9))
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
        best, logp, hidden = self._catch_up(prefix, features)
        width = min(max(plan.top_k, 1), NUM_CHILDREN)
        # Level 1: children of the last committed row.
        tokens = best[:width].astype(np.int32)
        score = logp[:width].astype(np.float64)
        parents = np.full(width, -1, np.int32)
        all_tokens, all_scores, all_parents = [tokens], [score], [parents]
        first = 0  # number of nodes before the current level
        frontier = np.arange(width)
        states = np.repeat(hidden[None], width, 0)  # [f, width]: hidden state that feeds each leaf
        total = self._rows
        tree_keys = np.zeros((self._keys.shape[0], 0, self._keys.shape[2]), np.float32)
        tree_values = np.zeros_like(tree_keys)
        ancestors = np.zeros((width, 0), bool)  # [f, rows of the tree so far]
        for level in range(1, depth):
            if width == 1 and score[0] < self._floor:
                break
            f = len(frontier)
            n_tree = tree_keys.shape[1]
            mask = np.full((f, self._capacity + n_tree + f), MASKED, np.float32)
            mask[:, :total] = 0
            mask[:, self._capacity : self._capacity + n_tree][ancestors] = 0
            mask[np.arange(f), self._capacity + n_tree + np.arange(f)] = 0
            position = np.full(f, min(self._context + m + level - 1, self._capacity - 1), np.int64)
            best, logp, out, keys, values = self._session.run(
                None,
                {
                    "features": np.zeros((f, self._feature_width), np.float32), "hidden": states,
                    "is_own": np.ones((f, 1), np.float32), "tokens": tokens[frontier].astype(np.int64),
                    "position": position, "past_key": np.concatenate((self._keys, tree_keys), 1),
                    "past_value": np.concatenate((self._values, tree_values), 1), "mask": mask,
                },
            )  # fmt: skip
            tree_keys, tree_values = np.concatenate((tree_keys, keys), 1), np.concatenate((tree_values, values), 1)
            grown = (score[frontier][:, None] + logp[:, :width]).ravel()
            new_tokens = best[:, :width].astype(np.int32).ravel()
            new_parents = np.repeat(first + frontier, width).astype(np.int32)
            row_of = np.repeat(np.arange(f), width)
            first += len(tokens)
            tokens, score = new_tokens, grown
            all_tokens.append(tokens)
            all_scores.append(score)
            all_parents.append(new_parents)
            frontier = np.sort(np.argsort(-score, kind="stable")[:width])
            chosen = row_of[frontier]
            states = out[chosen]
            own = np.zeros((f, f), bool)
            own[np.arange(f), np.arange(f)] = True
            ancestors = np.concatenate((ancestors, own), 1)[chosen]
        return self._keep(
            np.concatenate(all_tokens), np.concatenate(all_scores), np.concatenate(all_parents), plan.gamma
        )

    def _keep(self, tokens: Int32, scores: Any, parents: Int32, gamma: int) -> Draft:
        """The best nodes, in an order where parents come first, with parents renumbered."""
        order = np.argsort(-scores, kind="stable")[:gamma]
        confident = scores[order] >= self._floor
        confident[0] = True  # at least one node
        order = np.sort(order[confident])
        number = np.full(len(tokens) + 1, -1, np.int32)  # the last entry stands for parent -1
        number[order] = np.arange(len(order))
        return Draft(tokens[order], number[parents[order]])

    def _catch_up(self, prefix: Int32, features: Float32) -> tuple[Any, Any, Any]:
        """Rows of all committed tokens that are new; returns children and hidden state of the last row."""
        shared = min(len(prefix), len(self._prefix))
        differs = np.flatnonzero(prefix[:shared] != self._prefix[:shared])
        common = int(differs[0]) if len(differs) else shared
        total = self._context + len(prefix)
        start = min(self._rows, self._context + common, total - 1) if self._rows else 0
        r = total - start
        tokens = np.full(total, self._prompt_id, np.int64)
        tokens[self._context :] = prefix
        mask = np.full((r, self._capacity + r), MASKED, np.float32)
        mask[:, :start] = 0
        mask[:, self._capacity :][np.tri(r, dtype=bool)] = 0
        best, logp, out, keys, values = self._session.run(
            None,
            {
                "features": features[start:total], "hidden": np.zeros((r, self._width), np.float32),
                "is_own": np.zeros((r, 1), np.float32), "tokens": tokens[start:],
                "position": np.arange(start, total, dtype=np.int64), "past_key": self._keys,
                "past_value": self._values, "mask": mask,
            },
        )  # fmt: skip
        self._keys[:, start:total], self._values[:, start:total] = keys, values
        self._rows, self._prefix = total, prefix.copy()
        return best[-1], logp[-1], out[-1]


def build(options: Options, parts: Parts) -> FeatureHeadDrafter:
    """From configuration; needs ``feature_head.onnx`` in the model folder."""
    from vla_spec.engines._model_files import ModelFiles
    from vla_spec.engines.onnxruntime import open_session

    if parts.model_dir is None:
        raise BadModel("drafter feature_head needs a model folder; set `model:` in the configuration")
    session = open_session(parts.model_dir / "feature_head.onnx", parts.num_threads)
    prompt_length = ModelFiles.describe(parts.model_dir).base_rows
    return FeatureHeadDrafter(session, prompt_length, parts.domain.num_tokens, options)
