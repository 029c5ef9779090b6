"""Score tokens with PyTorch: the reference that other engines are checked against. Not thread-safe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from vla_spec.engines._cached_engine import CachedEngine
from vla_spec.engines._kv_cache import KVCache
from vla_spec.engines._model_files import check_weights, read_sizes
from vla_spec.errors import MissingDependency
from vla_spec.interfaces import EngineInfo
from vla_spec.plugins import Parts
from vla_spec.types import EngineInputs, Int32, Scores


@dataclass(frozen=True)
class Options:
    """max_step: most tokens of one step."""

    max_step: int = 32


@final
class PyTorchEngine(CachedEngine):
    """fp32, eager. Needs the extra ``[torch]``.

    Raises:
        MissingDependency: PyTorch is not installed.
        BadModel: weights missing, incomplete or corrupt.
    """

    def __init__(self, model_dir: Path, max_step: int = 32, num_threads: int = 1) -> None:
        try:
            import torch

            from vla_spec.engines.nets.graphs import Prefill, Step
            from vla_spec.engines.nets.weights import load_model
        except ImportError as error:
            raise MissingDependency("PyTorch", "pip install 'vla_spec[torch]'") from error
        torch.set_num_threads(num_threads)
        sizes = read_sizes(model_dir)
        self._torch: Any = torch
        model = load_model(model_dir / "target.safetensors")
        self._prefill, self._step = Prefill(model), Step(model)
        self._cache = KVCache(
            sizes["num_layers"], sizes["num_heads"], sizes["head_width"], sizes["capacity"], sizes["feature_width"],
            sizes["vocab_size"], max_step,
        )  # fmt: skip
        self._info = EngineInfo(
            "pytorch", check_weights(model_dir), "fp32", "cpu", has_tree_mask=True, has_inplace_kv=True,
            is_batch_invariant=True,
        )  # fmt: skip

    def prefill(self, inputs: EngineInputs) -> Scores:
        """Start over. Returns one row, about the first token of the chunk."""
        torch = self._torch
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.ascontiguousarray(inputs[k])) for k in ("images", "words", "state")]
            logits, features, rows = (t.numpy() for t in self._prefill(*tensors))
        self._cache.begin(rows, features)
        return Scores(logits, features[-1:])

    def step(self, tokens: Int32, parents: Int32) -> Scores:
        """Score n tokens on top of the committed ones."""
        torch, buffers = self._torch, self._cache.prepare(tokens, parents)
        with torch.inference_mode():
            inputs = [torch.from_numpy(a) for a in (buffers.tokens, buffers.position, buffers.mask)]
            logits, features, *rows = self._step(*inputs, *(torch.from_numpy(r) for r in self._cache.rows))
        buffers.logits[:], buffers.features[:] = logits.numpy(), features.numpy()
        for row, new in zip(buffers.rows, rows, strict=True):
            row[:] = new.numpy()
        return Scores(buffers.logits, buffers.features)


def build(options: Options, parts: Parts) -> PyTorchEngine:
    """From configuration."""
    from vla_spec.engines._model_files import require_model_dir

    return PyTorchEngine(require_model_dir(parts.model_dir), options.max_step, parts.num_threads)
