"""Draft a dynamic tree with Spec-VLA's published head: one Llama layer that predicts OpenVLA's hidden states.

It reads the whole prompt, pictures included, through the target's own input rows and hidden states, keeps keys and
values of committed rows, and grows EAGLE-2's tree: the ``plan.top_k`` best leaves of a level, the ``plan.gamma`` best
nodes of all. Published settings: gamma 49 (and the root), depth 5 (its first level costs no forward), top_k 8.
Source: Wang et al. 2025, arXiv:2507.22424; EAGLE-2, Li et al. 2024, arXiv:2406.16858.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from vla_spec.drafters._dynamic_tree import DynamicTree
from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._graph_runtime import Call, GraphRuntime
from vla_spec.errors import BadConfig, BadModel
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Bool, Draft, EngineInputs, Float32, Int32, Plan

STEM = "spec_vla_head"


@dataclass(frozen=True, slots=True)
class Options:
    """How sure to be.

    Attributes:
        min_confidence: a node is kept only if the probability of its path is at least this; the best node always is.
            The published drafter keeps all, 0. [0..1]
    """

    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise BadConfig(f"min_confidence is {self.min_confidence}; valid: 0..1")


class _Buffers(NamedTuple):
    """Inputs and outputs of a call over n rows."""

    embeds: Float32  # [n, D]
    hidden: Float32  # [n, D]
    position: npt.NDArray[Any]  # int64 [n]
    mask: Bool  # [n, R]
    write_index: npt.NDArray[Any]  # int64 [1]
    logits: Float32  # [n, V]
    out: Float32  # [n, D]
    call: Call


@final
class SpecVLAHeadDrafter:
    """Owns one graph and a cache of its one layer. Not thread-safe.

    Row i joins the target's hidden state of row i with the embedding of row i + 1, so there is one row less than the
    target has, and one more for each token that is not in the target's cache yet.
    """

    def __init__(
        self, runtime: GraphRuntime, graph: Any, spec: DecoderSpec, token: Float32, target: Any, num_tokens: int,
        options: Options,
    ) -> None:  # fmt: skip
        self._runtime, self._graph, self._spec = runtime, graph, spec
        self._token, self._target, self._num_tokens = token, target, num_tokens
        self._floor = float(np.log(max(options.min_confidence, 1e-30)))
        self._state = runtime.state(spec.state_shape)
        self._buffers: dict[int, _Buffers] = {}
        self._rows = 0
        self._prefix = np.zeros(0, np.int32)

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """A new chunk starts: all rows of the last prompt are stale."""
        self._rows, self._prefix = 0, np.zeros(0, np.int32)

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """At most ``plan.gamma`` nodes, no path longer than ``plan.depth``."""
        prompt = self._target.prompt_embeds
        m = len(prefix)
        depth = min(plan.depth, self._num_tokens - m)
        if depth < 1 or plan.gamma < 1 or not isinstance(features, np.ndarray):
            return EMPTY_DRAFT
        hidden, logits = self._catch_up(prompt, prefix, features)
        tree = DynamicTree(min(max(plan.top_k, 1), self._spec.vocab_size))
        tree.grow(logits)
        total, used = self._rows, 0
        for level in range(1, depth):
            if tree.best_leaf < self._floor:
                break
            frontier = tree.frontier()
            f = len(frontier.tokens)
            if total + used + self._padded(f) > self._spec.rows:
                break
            buffers = self._tied(f)
            buffers.embeds[:f] = self._token[frontier.tokens]
            buffers.hidden[:f] = hidden[frontier.rows]
            mask = buffers.mask
            mask[:] = False
            mask[:f, :total] = True
            mask[:f, total : total + used] = frontier.ancestors
            self._run(buffers, f, total + used, np.full(f, total + level - 1))
            tree.grow(buffers.logits[:f])
            hidden, used = buffers.out[:f].copy(), used + f
        return tree.draft(plan.gamma, self._floor)

    def _catch_up(self, prompt: Float32, prefix: Int32, features: Float32) -> tuple[Float32, Float32]:
        """Rows of all committed tokens that are new; hidden state and logits of the last row."""
        shared = min(len(prefix), len(self._prefix))
        differs = np.flatnonzero(prefix[:shared] != self._prefix[:shared])
        common = int(differs[0]) if len(differs) else shared
        p = len(prompt)
        total = p - 1 + len(prefix)
        start = min(self._rows, p - 1 + common, total - 1) if self._rows else 0
        if start + self._padded(total - start) > self._spec.rows:
            start = 0  # padding would end behind the cache
        n = total - start
        buffers = self._tied(n)
        rows = np.arange(start + 1, total + 1)  # of the target: the tokens that follow
        is_prompt = rows < p
        buffers.embeds[:n][is_prompt] = prompt[rows[is_prompt]]
        buffers.embeds[:n][~is_prompt] = self._token[prefix[rows[~is_prompt] - p]]
        buffers.hidden[:n] = features[start:total, -self._spec.hidden_width :]
        mask = buffers.mask
        mask[:] = False
        mask[:n, :start] = True
        mask[:n, start:total] = np.tri(n, dtype=bool)
        self._run(buffers, n, start, np.arange(start, total))
        self._rows, self._prefix = total, prefix.copy()
        return buffers.out[n - 1 : n].copy(), buffers.logits[n - 1 : n].copy()

    def _run(self, buffers: _Buffers, n: int, at: int, position: npt.NDArray[Any]) -> None:
        """Score n rows that are written at row ``at``; what pads them sees itself only."""
        for i in range(len(buffers.mask)):
            buffers.mask[i, at + i] = True
        buffers.position[:] = 0
        buffers.position[:n] = position
        buffers.write_index[0] = at
        buffers.call.run()

    def _padded(self, n: int) -> int:
        tiers = self._runtime.tiers
        if tiers is None:
            return n
        return next((tier for tier in tiers if tier >= n), n)

    def _tied(self, k: int) -> _Buffers:
        n = self._padded(k)
        if n not in self._buffers:
            spec, empty = self._spec, self._runtime.empty
            arrays: dict[str, Any] = {
                "embeds": empty((n, spec.hidden_width), np.float32),
                "hidden": empty((n, spec.hidden_width), np.float32),
                "position": empty((n,), np.int64), "mask": empty((1, 1, n, spec.rows), np.bool_),
                "write_index": empty((1,), np.int64), "logits": empty((n, spec.vocab_size), np.float32),
                "out": empty((n, spec.hidden_width), np.float32),
            }  # fmt: skip
            names = list(zip(spec.state_names, spec.new_state_names, strict=True))
            call = self._graph.tie(arrays, self._state, names)
            self._buffers[n] = _Buffers(**{**arrays, "mask": arrays["mask"][0, 0]}, call=call)
        return self._buffers[n]


def build(options: Options, parts: Parts) -> SpecVLAHeadDrafter:
    """From configuration; needs ``spec_vla_head.onnx`` in the model folder of an OpenVLA target.

    Raises:
        BadModel: it is not there, or was exported for another target.
    """
    from vla_spec.engines._drafter_runtime import runtime_for
    from vla_spec.engines._model_files import WEIGHTS, ModelFiles
    from vla_spec.engines._safetensors import WeightsFile

    if parts.model_dir is None:
        raise BadModel("drafter spec_vla_head needs a model folder; set `model:` in the configuration")
    path = parts.model_dir / f"{STEM}.safetensors"
    if not path.is_file():
        raise BadModel(f"{path}: missing; `vla-spec export openvla --drafter` writes it")
    if not hasattr(parts.target, "prompt_embeds"):
        raise BadModel("drafter spec_vla_head: this engine does not show the rows of its prompt; valid: a graph engine")
    files = ModelFiles.describe(parts.model_dir)
    metadata = WeightsFile.open(path).metadata
    try:
        spec = DecoderSpec.from_json(json.loads(metadata["spec"]), str(path))
    except (KeyError, ValueError) as error:
        raise BadModel(f"{path}: no description of a drafter in its header ({error!r}); export it again") from error
    if metadata.get("target_sha256") != files.weights_sha256:
        raise BadModel(f"{path}: exported for another target; export it again")
    token = WeightsFile.open(parts.model_dir / WEIGHTS).read(files.token_embedding)
    runtime = runtime_for(parts)
    graph = runtime.open(parts.model_dir / f"{STEM}.onnx")
    return SpecVLAHeadDrafter(runtime, graph, spec, token, parts.target, parts.domain.num_tokens, options)
