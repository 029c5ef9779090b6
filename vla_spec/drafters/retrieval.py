"""Draft what was done when the target saw something alike: nearest neighbour among recorded chunks. No model.

The query is a row of hidden states that the target has computed anyway (its last prompt row), so that a look-up costs
one small matrix-vector product and no encoder of its own.
Source: the retrieval branch of HeiSD, arXiv:2603.17573, whose keys are picture embeddings and whose chunks are the
demonstration's next actions; REST, He et al. 2023, arXiv:2311.08252 (drafts from a datastore).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from vla_spec.drafters._retrieval_index import RetrievalIndex
from vla_spec.errors import BadConfig, BadModel
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Float32, Int32, Plan

#: The index that is looked for beside the target's weights.
FILE_NAME = "retrieval.npz"


@dataclass(frozen=True, slots=True)
class Options:
    """Where to look, and whom to trust.

    Attributes:
        index: file that `vla-spec calibrate retrieval` wrote; None = ``retrieval.npz`` in the model folder.
        neighbours: entries that are candidates; more = longer search for one that agrees with what was decoded. HeiSD
            calls it Top-K.
        min_similarity: cosine below which nothing is drafted: the target never saw anything like it. [-1..1]
    """

    index: Path | None = None
    neighbours: int = 8
    min_similarity: float = 0.5

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise BadConfig(f"neighbours must be 1 or more, got {self.neighbours}")
        if not -1.0 <= self.min_similarity <= 1.0:
            raise BadConfig(f"min_similarity must be in [-1, 1], got {self.min_similarity}")


@final
class RetrievalDrafter:
    """Candidates are ranked anew in every round: least distance of their newest step's tokens, then similarity.

    A chain is the best candidate's continuation. With ``plan.top_k`` > 1 the candidates' continuations are merged into
    a tree, the best first, equal beginnings once. Not thread-safe.
    """

    def __init__(self, options: Options, index: RetrievalIndex, tokens_per_step: int) -> None:
        self._options, self._index, self._per_step = options, index, tokens_per_step
        self._candidates: Int32 | None = None  # [c, T], most similar first; None = not looked up yet
        #: Of the last look-up, in [-1, 1]; NaN before the first.
        self.similarity = float("nan")

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """A new chunk starts; the look-up waits for the target's features."""
        self._candidates = None

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """The best candidates' continuations; nothing where the target saw nothing alike."""
        room = min(plan.gamma, plan.depth)
        if room < 1 or not isinstance(features, np.ndarray):
            return EMPTY_DRAFT
        if self._candidates is None:
            self._candidates = self._look_up(features[len(features) - len(prefix)])
        m = len(prefix)
        if not len(self._candidates) or m >= self._candidates.shape[1]:
            return EMPTY_DRAFT
        since = max(m - self._per_step, 0)
        off = np.abs(self._candidates[:, since:m] - prefix[since:]).sum(axis=1)
        ranked = self._candidates[np.argsort(off, kind="stable"), m:]
        if plan.top_k <= 1:
            return Draft.chain(ranked[0, :room].copy())
        return _merged(ranked, plan)

    def _look_up(self, row: Float32) -> Int32:
        found, similarity = self._index.nearest(row, self._options.neighbours)
        self.similarity = float(similarity[0]) if len(similarity) else float("nan")
        return self._index.tokens[found[similarity >= self._options.min_similarity]]


def _merged(ranked: Int32, plan: Plan) -> Draft:
    """A tree of rows, best row first: at most gamma nodes, depth and top_k as the plan says."""
    tokens: list[int] = []
    parents: list[int] = []
    children: dict[int, dict[int, int]] = {-1: {}}  # node -> token -> child
    for row in ranked[:, : plan.depth].tolist():
        at = -1
        for token in row:
            following = children[at].get(token)
            if following is None:
                if len(tokens) == plan.gamma or len(children[at]) == plan.top_k:
                    break
                following = len(tokens)
                tokens.append(token)
                parents.append(at)
                children[at][token] = following
                children[following] = {}
            at = following
    return Draft(np.array(tokens, np.int32), np.array(parents, np.int32))


def build(options: Options, parts: Parts) -> RetrievalDrafter:
    """Needs an index of the same model and the same kind of chunk.

    Raises:
        BadModel: no index, a broken one, or one of another model.
    """
    path = options.index
    if path is None:
        if parts.model_dir is None:
            raise BadModel("drafter retrieval needs an index; set drafter.index, or use an engine with a model folder")
        path = parts.model_dir / FILE_NAME
    index = RetrievalIndex.load(path)
    domain = parts.domain
    if index.tokens.shape[1] != domain.num_tokens or index.tokens.max() >= domain.vocab_size:
        raise BadModel(
            f"{path}: chunks of {index.tokens.shape[1]} tokens up to {index.tokens.max()}; the model has "
            f"{domain.num_tokens} of 0..{domain.vocab_size - 1}"
        )
    if parts.target is not None and parts.target.info.model_hash != index.model_hash:
        raise BadModel(
            f"{path}: made with model {index.model_hash[:12]}, the one that is loaded is "
            f"{parts.target.info.model_hash[:12]}; `vla-spec calibrate retrieval` makes it anew"
        )
    return RetrievalDrafter(options, index, domain.tokens_per_step)
