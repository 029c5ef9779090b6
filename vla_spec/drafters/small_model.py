"""Draft with an independent small policy: it sees the same observation and writes the same kind of tokens.

The classic drafter: one small forward per drafted token, plus its own prefill per chunk.
Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318; for multimodal targets Gagrani et
al. 2024, arXiv:2404.08856.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from vla_spec.errors import BadModel
from vla_spec.interfaces import ChunkHistory, Engine
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Int32, Plan

FOLDER = "small"  # inside the target's model folder
#: Keys of policy.json that say what a model sees and what its tokens mean.
SHARED = (
    "adapter", "image_size", "num_cameras", "state_size", "max_words", "vocabulary", "horizon", "action_size",
    "tokenizer",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How far to draft.

    min_confidence: drafting stops after a token whose path probability falls below this. [0..1]
    """

    min_confidence: float = 0.2


@final
class SmallModelDrafter:
    """Owns one small engine. Chains only; ``plan.top_k`` is not used. Not thread-safe."""

    def __init__(self, engine: Engine, options: Options) -> None:
        self._engine, self._options = engine, options
        self._inputs: EngineInputs = {}
        self._has_prompt = False
        self._cached = np.zeros(0, np.int32)  # tokens whose rows are in the small engine's cache

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """A new chunk starts; the small prefill runs at the first `propose`."""
        self._inputs, self._has_prompt = inputs, False
        self._cached = np.zeros(0, np.int32)

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """At most ``min(gamma, depth)`` tokens, each the small model's own greedy choice."""
        length = min(plan.gamma, plan.depth)
        if length < 1 or not self._inputs:
            return EMPTY_DRAFT
        known = len(self._cached)
        if not self._has_prompt or known >= len(prefix) or not np.array_equal(self._cached, prefix[:known]):
            self._engine.prefill(self._inputs)
            self._has_prompt, self._cached = True, np.zeros(0, np.int32)
        # An engine has no way back from a commit, so drafted tokens are never committed: each pass scores the new
        # tokens together with the draft so far. For a network this small k tokens cost little more than one.
        new = prefix[len(self._cached) :]
        if len(new) + length - 1 > self._engine.max_step:
            length = max(1, self._engine.max_step - len(new) + 1)
        chain = np.empty(len(new) + length, np.int32)
        chain[: len(new)] = new
        parents = np.arange(-1, len(chain) - 1, dtype=np.int32)
        end, confidence = len(new), 1.0
        while True:
            row = self._engine.step(chain[:end], parents[:end]).logits[-1]
            token = int(row.argmax())
            confidence /= float(np.exp(row - row[token]).sum())
            chain[end] = token
            end += 1
            if end == len(chain) or confidence < self._options.min_confidence:
                break
        self._engine.commit(np.arange(len(new), dtype=np.int32))
        self._cached = prefix.astype(np.int32)
        return Draft.chain(chain[len(new) : end].copy())


def check_policy(folder: Path, target: Path) -> None:
    """A small model sees what its target sees and writes the same tokens.

    Raises:
        BadModel: their policy.json differ in that; names the keys.
    """
    small, large = (_policy(path / "policy.json") for path in (folder, target))
    differs = [key for key in SHARED if small.get(key) != large.get(key)]
    if differs:
        raise BadModel(
            f"{folder / 'policy.json'}: {', '.join(differs)} differ from the target's; valid: a small model with the "
            f"target's inputs and tokens; distill and export it again"
        )


def _policy(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadModel(f"{file}: missing or no JSON ({error}); `vla-spec export` writes it") from error
    return values if isinstance(values, dict) else {}


def build(options: Options, parts: Parts) -> SmallModelDrafter:
    """From configuration; needs the folder ``small`` inside the model folder."""
    from vla_spec.engines._drafter_runtime import runtime_for
    from vla_spec.engines._graph_engine import GraphEngine

    if parts.model_dir is None:
        raise BadModel("drafter small_model needs a model folder; set `model:` in the configuration")
    folder = parts.model_dir / FOLDER
    if folder.is_dir():
        check_policy(folder, parts.model_dir)
    return SmallModelDrafter(GraphEngine(folder, runtime_for(parts, folder)), options)
