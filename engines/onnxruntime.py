"""Score tokens with ONNX Runtime. Owns two sessions (prefill, step) and one KV cache; not thread-safe.

The cache lives in host memory and is bound to the step graph once per step size: the host copies nothing for a step,
and for a commit the accepted rows.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from vla_spec.engines._cached_engine import CachedEngine
from vla_spec.engines._kv_cache import KVCache, StepBuffers
from vla_spec.engines._model_files import check_weights, read_sizes, require_model_dir
from vla_spec.errors import BadModel, MissingDependency, SlowPath
from vla_spec.interfaces import EngineInfo
from vla_spec.plugins import Parts
from vla_spec.types import EngineInputs, Int32, Scores

#: Largest difference to the reference logits on the golden inputs that still counts as the same model.
GOLDEN_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Options:
    """How to run.

    max_step: most tokens of one step.
    provider: ONNX Runtime's execution provider.
    allow_slow: start even if the library would run on another provider than the one asked for.
    """

    max_step: int = 32
    provider: str = "CPUExecutionProvider"
    allow_slow: bool = False


def open_session(path: Path, num_threads: int, provider: str = "CPUExecutionProvider", allow_slow: bool = False) -> Any:
    """An inference session, or a clear error.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        BadModel: the graph is missing or corrupt.
        SlowPath: another provider than the one asked for would run it.
    """
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependency("ONNX Runtime", "pip install 'vla_spec[run]'") from error
    if not path.is_file():
        raise BadModel(f"{path}: missing; `vla-spec export` writes it, a drafter's after `vla-spec distill`")
    if provider not in ort.get_available_providers() and not allow_slow:
        raise SlowPath(f"{provider} is not in this ONNX Runtime; have {', '.join(ort.get_available_providers())}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # ONNX Runtime's own exception types are private
        raise BadModel(f"{path}: ONNX Runtime can't load it ({str(error).splitlines()[0][:200]})") from error
    # The library lists providers that it then silently does not use: believe the session only.
    if session.get_providers()[0] != provider and not allow_slow:
        raise SlowPath(f"{path.name} would run on {session.get_providers()[0]}, asked for {provider}")
    return session


@final
class OnnxRuntimeEngine(CachedEngine):
    """The embedded default.

    Raises:
        BadModel: files missing, corrupt, or not the model that export verified (golden inputs are run at load).
        SlowPath: the provider that was asked for is not what would run.
    """

    def __init__(self, model_dir: Path, options: Options | None = None, num_threads: int = 1) -> None:
        options = options or Options()
        digest = check_weights(require_model_dir(model_dir))
        sizes = read_sizes(model_dir)
        self._prefill = open_session(
            model_dir / "prefill.onnx", num_threads, options.provider, options.allow_slow
        )
        self._step = open_session(model_dir / "step.onnx", num_threads, options.provider, options.allow_slow)
        self._cache = KVCache(
            sizes["num_layers"], sizes["num_heads"], sizes["head_width"], sizes["capacity"], sizes["feature_width"],
            sizes["vocab_size"], options.max_step,
        )  # fmt: skip
        self._bindings: dict[int, Any] = {}
        self._past_names = [i.name for i in self._step.get_inputs()][3:]
        self._output_names = [o.name for o in self._step.get_outputs()]
        self._info = EngineInfo(
            "onnxruntime", digest, "fp32", self._step.get_providers()[0], has_tree_mask=True, has_inplace_kv=True,
            is_batch_invariant=True,
        )  # fmt: skip
        self._check_golden(model_dir / "golden.npz")

    def prefill(self, inputs: EngineInputs) -> Scores:
        """Start over. Returns one row, about the first token of the chunk."""
        logits, features, rows = self._prefill.run(None, {k: inputs[k] for k in ("images", "words", "state")})
        self._cache.begin(rows, features)
        return Scores(logits, features[-1:])

    def step(self, tokens: Int32, parents: Int32) -> Scores:
        """Score n tokens on top of the committed ones."""
        buffers = self._cache.prepare(tokens, parents)
        binding = self._bindings.get(len(tokens))
        if binding is None:
            binding = self._bindings[len(tokens)] = self._bind(buffers)
        self._step.run_with_iobinding(binding)
        return Scores(buffers.logits, buffers.features)

    def _bind(self, buffers: StepBuffers) -> Any:
        """Tie the step graph to the cache and to these buffers, by address, once."""
        binding = self._step.io_binding()

        def tie(bind: Any, name: str, array: np.ndarray) -> None:
            assert array.flags.c_contiguous, name
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        for name, array in zip(("tokens", "position", "mask"), buffers[:3], strict=True):
            tie(binding.bind_input, name, array)
        for name, array in zip(self._past_names, self._cache.rows, strict=True):
            tie(binding.bind_input, name, array)
        outputs = (buffers.logits, buffers.features, *buffers.rows)
        for name, array in zip(self._output_names, outputs, strict=True):
            tie(binding.bind_output, name, array)
        return binding

    def _check_golden(self, path: Path) -> None:
        """Run the golden inputs through prefill, a chain and a tree, against what the reference computed."""
        if not path.is_file():
            raise BadModel(f"{path}: missing; `vla-spec export` writes it")
        with np.load(path, allow_pickle=False) as golden:
            got = [self.prefill({k: golden[k] for k in ("images", "words", "state")}).logits.copy()]
            for name in ("chain", "tree"):
                got.append(self.step(golden[f"{name}_tokens"], golden[f"{name}_parents"]).logits.copy())
            worst = max(
                float(np.abs(g - golden[f"{name}_logits"]).max())
                for g, name in zip(got, ("prefill", "chain", "tree"), strict=True)
            )
        if not worst <= GOLDEN_TOLERANCE:
            raise BadModel(
                f"{path.parent}: golden inputs give logits {worst:.2g} away from the reference, at most "
                f"{GOLDEN_TOLERANCE} is accepted; the graphs and the weights don't belong together"
            )


def build(options: Options, parts: Parts) -> OnnxRuntimeEngine:
    """From configuration."""
    return OnnxRuntimeEngine(require_model_dir(parts.model_dir), options, parts.num_threads)
