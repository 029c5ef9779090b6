"""Score tokens with ONNX Runtime: the embedded default. Not thread-safe.

Everything that a graph reads and writes lies in host memory and is bound to it by address once per number of rows. The
cache is bound as input and as output: `TensorScatter` then writes new rows in place.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._graph_runtime import Array, State, TensorSpec
from vla_spec.engines._host_state import HostState
from vla_spec.engines._model_files import require_model_dir
from vla_spec.errors import BadModel, MissingDependency, SlowPath
from vla_spec.plugins import Parts

CPU = "CPUExecutionProvider"
_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How to run.

    max_step: most tokens of one step.
    provider: ONNX Runtime's execution provider.
    allow_slow: start even if the library would run on another provider than the one asked for.
    """

    max_step: int = 32
    provider: str = CPU
    allow_slow: bool = False


def open_session(path: Path, num_threads: int, provider: str = CPU, allow_slow: bool = False) -> Any:
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
class _BoundCall:
    """A session with everything bound."""

    def __init__(self, session: Any, binding: Any, kept: list[Array]) -> None:
        self._run, self._binding = session.run_with_iobinding, binding
        self._kept = kept  # the binding knows addresses only

    def run(self) -> None:
        """One forward."""
        self._run(self._binding)


@final
class OnnxRuntimeGraph:
    """One session. Not thread-safe."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs: Mapping[str, TensorSpec] = {i.name: _spec(i) for i in session.get_inputs()}
        self.outputs: Mapping[str, TensorSpec] = {o.name: _spec(o) for o in session.get_outputs()}

    def tie(
        self, arrays: Mapping[str, Array], state: State | None = None, state_names: Sequence[tuple[str, str]] = ()
    ) -> _BoundCall:
        """Bind host arrays and caches by address."""
        binding, kept = self._session.io_binding(), list(arrays.values())

        def bind(method: Any, name: str, array: Array) -> None:
            assert array.flags.c_contiguous, name
            method(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        for name, array in arrays.items():
            bind(binding.bind_input if name in self.inputs else binding.bind_output, name, array)
        if state is not None:
            assert isinstance(state, HostState)
            kept.append(state.tensors)
            for tensor, (past, present) in zip(state.tensors, state_names, strict=True):
                bind(binding.bind_input, past, tensor)
                bind(binding.bind_output, present, tensor)
        return _BoundCall(self._session, binding, kept)


@final
class OnnxRuntimeRuntime:
    """ONNX Runtime on host memory."""

    name, precision, is_batch_invariant = "onnxruntime", "fp32", True
    tiers: tuple[int, ...] | None = None

    def __init__(self, num_threads: int = 1, provider: str = CPU, allow_slow: bool = False) -> None:
        self._num_threads, self._wanted, self._allow_slow = num_threads, provider, allow_slow
        self.provider = provider

    def open(self, file: Path) -> OnnxRuntimeGraph:
        """A session of its own."""
        session = open_session(file, self._num_threads, self._wanted, self._allow_slow)
        self.provider = session.get_providers()[0]
        return OnnxRuntimeGraph(session)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeroed numpy memory."""
        return np.zeros(shape, dtype)

    def state(self, shape: tuple[int, ...]) -> HostState:
        """Zeroed caches."""
        return HostState(shape)


def _spec(value: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else None for d in value.shape)
    return TensorSpec(np.dtype(_TYPES[value.type]), shape)


def build(options: Options, parts: Parts) -> GraphEngine:
    """From configuration."""
    runtime = OnnxRuntimeRuntime(parts.num_threads, options.provider, options.allow_slow)
    return GraphEngine(require_model_dir(parts.model_dir), runtime, options.max_step)
