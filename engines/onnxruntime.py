"""Score tokens with ONNX Runtime: the embedded default. Not thread-safe.

On the CPU, everything that a graph reads and writes lies in host memory and is bound to it by address once per number
of rows. With the CUDA and TensorRT providers caches stay on the device. The cache is bound as input and as output:
`TensorScatter` then writes new rows in place, which ONNX Runtime does not promise, so it is proved when a graph is
first tied, and where it does not hold the cache is copied.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt

from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._graph_runtime import Array, State, TensorSpec
from vla_spec.engines._host_state import HostState
from vla_spec.engines._model_files import COMMIT_GRAPH, DECODER_GRAPH, ModelFiles, require_model_dir
from vla_spec.engines._ort_session import (
    CPU,
    CUDA,
    PROVIDERS,
    TENSORRT,
    SessionOptions,
    onnxruntime_module,
    open_session,
)
from vla_spec.engines._ort_state import OrtState
from vla_spec.engines._quantized_files import quantized_graph
from vla_spec.errors import BadConfig, MissingDependency
from vla_spec.plugins import Parts

PRECISIONS = ("fp32", "int8", "fp16")
_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8,
}  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How to run.

    Attributes:
        max_step: most tokens of one step.
        precision: fp32; int8 (the quantised decoder graph of the model folder); fp16 (TensorRT's provider only).
        provider: ONNX Runtime's execution provider.
        device_id: which GPU.
        cache_dir: where TensorRT's provider keeps the engines that it builds; None = it builds them at every start.
        allow_slow: start even if the library would run on another provider than the one asked for, or nodes of it.
    """

    max_step: int = 32
    precision: Literal["fp32", "int8", "fp16"] = "fp32"
    provider: str = CPU
    device_id: int = 0
    cache_dir: str | None = None
    allow_slow: bool = False

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise BadConfig(f"provider is {self.provider!r}; valid: {', '.join(PROVIDERS)}")
        if self.precision not in PRECISIONS:
            raise BadConfig(f"precision is {self.precision!r}; valid: {', '.join(PRECISIONS)}")
        if self.precision == "fp16" and self.provider != TENSORRT:
            raise BadConfig(
                f"precision is 'fp16' with provider {self.provider}; valid: fp32, int8; fp16 with {TENSORRT}"
            )
        if self.device_id < 0:
            raise BadConfig(f"device_id is {self.device_id}; valid: 0 or more")


@final
class OnnxRuntimeCall:
    """A session with everything bound.

    Args:
        session: what runs.
        bindings: one, or one for each set of tensors that the state has.
        fed: name -> host array of inputs on a device: the library copies them when it binds, not when it runs.
        is_on_device: outputs have to be waited for.
        state: of which sets change places, or None.
        after: called after each run.
        kept: what the bindings know by address only.
    """

    def __init__(
        self, session: Any, bindings: list[Any], fed: Mapping[str, Array], is_on_device: bool, state: OrtState | None,
        after: Callable[[], None] | None, kept: list[Any],
    ) -> None:  # fmt: skip
        self._run, self._bindings, self._fed = session.run_with_iobinding, bindings, fed
        self._is_on_device = is_on_device
        self._state, self._after, self._kept = state, after, kept

    def run(self) -> None:
        """One forward."""
        binding = self._bindings[self._state.current if self._state is not None else 0]
        for name, array in self._fed.items():
            _bind_array(binding.bind_input, name, array)
        self._run(binding)
        if self._is_on_device:
            binding.synchronize_outputs()
        if self._state is not None:
            self._state.alternate()
        if self._after is not None:
            self._after()


@final
class OnnxRuntimeGraph:
    """One session. Not thread-safe.

    Args:
        session: opened.
        is_on_device: caches are `OrtState`, and host arrays are copied to and fro.
    """

    def __init__(self, session: Any, is_on_device: bool = False) -> None:
        self._session, self._is_on_device = session, is_on_device
        self._writes_in_place: bool | None = None
        self.inputs: Mapping[str, TensorSpec] = {i.name: _spec(i) for i in session.get_inputs()}
        self.outputs: Mapping[str, TensorSpec] = {o.name: _spec(o) for o in session.get_outputs()}

    @property
    def writes_in_place(self) -> bool | None:
        """Whether cache rows are written without copying the cache; None = not yet known, or there is no cache."""
        return self._writes_in_place

    def tie(
        self, arrays: Mapping[str, Array], state: State | None = None, state_names: Sequence[tuple[str, str]] = ()
    ) -> OnnxRuntimeCall:
        """Bind host arrays and caches by address."""
        if state is None:
            binding, fed = self._bind(arrays)
            return OnnxRuntimeCall(self._session, [binding], fed, self._is_on_device, None, None, list(arrays.values()))
        if self._writes_in_place is None:
            self._prove(arrays, state, state_names)
        return self._tie(arrays, state, state_names, bool(self._writes_in_place))

    def _tie(
        self, arrays: Mapping[str, Array], state: State, state_names: Sequence[tuple[str, str]], in_place: bool
    ) -> OnnxRuntimeCall:
        kept: list[Any] = list(arrays.values())
        if isinstance(state, OrtState):
            if not in_place:
                state.separate()
            bindings = []
            for past, present in state.sets:
                binding, fed = self._bind(arrays)
                for (name, new_name), old, new in zip(state_names, past, present, strict=True):
                    binding.bind_ortvalue_input(name, old)
                    binding.bind_ortvalue_output(new_name, new)
                bindings.append(binding)
            return OnnxRuntimeCall(self._session, bindings, fed, self._is_on_device, state, None, kept)
        assert isinstance(state, HostState)
        read = state.tensors
        written = read if in_place else np.zeros_like(read)
        binding, fed = self._bind(arrays)
        for (name, new_name), old, new in zip(state_names, read, written, strict=True):
            _bind_array(binding.bind_input, name, old)
            _bind_array(binding.bind_output, new_name, new)
        after = None if in_place else lambda: np.copyto(read, written)
        return OnnxRuntimeCall(self._session, [binding], fed, self._is_on_device, None, after, [*kept, read, written])

    def _bind(self, arrays: Mapping[str, Array]) -> tuple[Any, dict[str, Array]]:
        """A binding of host arrays, and the inputs that have to be bound before every run."""
        binding, fed = self._session.io_binding(), {}
        for name, array in arrays.items():
            if name not in self.inputs:
                _bind_array(binding.bind_output, name, array)
            elif self._is_on_device:
                fed[name] = array
            else:
                _bind_array(binding.bind_input, name, array)
        return binding, fed

    def _prove(self, arrays: Mapping[str, Array], state: State, state_names: Sequence[tuple[str, str]]) -> None:
        """Run once on caches full of known numbers: rows of the call have to change in place, all others to stay.

        Not more than that: what the call computes from them is checked by the golden inputs. The state is zeros
        afterwards; nothing was in it, as this is the first time that the graph is tied.
        """
        mine = {name: np.zeros_like(array) for name, array in arrays.items()}
        rows = state.shape[3]
        for name, array in mine.items():
            if array.dtype == np.bool_:
                array.fill(True)
            elif name == "rows":
                array[:] = np.arange(rows - 1, rows - 1 - len(array), -1)
            elif array.dtype == np.float32 and name in self.inputs:
                array[...] = np.linspace(-1, 1, max(array.size, 1), dtype=np.float32).reshape(array.shape)
        known = np.empty(state.shape, np.float32)
        known[...] = np.linspace(0.25, 0.5, rows, dtype=np.float32)[:, None]
        _write(state, known)
        self._tie(mine, state, state_names, True).run()
        changed = (_read(state) != known).any((0, 1, 2, 4))  # [R]
        count = int(changed.sum())
        self._writes_in_place = 0 < count < state.shape[3] and bool(changed[:count].all())
        state.clear()
        if not self._writes_in_place:
            logger.warning("ONNX Runtime does not write the cache in place: it is copied in every call")


@final
class OnnxRuntimeRuntime:
    """ONNX Runtime with one provider.

    Args:
        num_threads: of one call.
        provider, allow_slow, precision, device_id, cache_dir: see `Options`.
        pads_one: int8 decoders score one row as two, which is faster on the CPU.
    """

    name = "onnxruntime"

    def __init__(
        self, num_threads: int = 1, provider: str = CPU, allow_slow: bool = False, precision: str = "fp32",
        device_id: int = 0, cache_dir: Path | None = None, pads_one: bool = False,
    ) -> None:  # fmt: skip
        self.precision, self.provider = precision, provider
        self.tiers: tuple[int, ...] | None = None
        self._num_threads, self._wanted, self._allow_slow = num_threads, provider, allow_slow
        self._device_id, self._cache_dir, self._pads_one = device_id, cache_dir, pads_one
        self._is_on_device = provider != CPU
        self._commit_graph: Path | None = None
        self._movers: dict[tuple[int, ...], OnnxRuntimeGraph] = {}

    @property
    def is_batch_invariant(self) -> bool:
        """In fp32 on the CPU to rounding; in int8 to the bit, if one row is padded. Elsewhere kernels may differ."""
        return self.provider == CPU and (self.precision == "fp32" or (self.precision == "int8" and self._pads_one))

    def open(self, file: Path) -> OnnxRuntimeGraph:
        """A session of its own."""
        is_decoder = file.name == DECODER_GRAPH
        options: dict[str, str] = {}
        if self._wanted != CPU:
            options = self._device_options(file if is_decoder else None)
        if self.precision == "int8":
            if is_decoder and self._pads_one:
                spec = ModelFiles.describe(file.parent).decoder
                self.tiers = tuple(range(2, spec.rows + 1)) if spec.max_step > 1 else None
            file = quantized_graph(file, "int8", is_needed=False)
        session = open_session(file, SessionOptions(self._num_threads, self._wanted, options, self._allow_slow))
        self.provider = session.get_providers()[0]
        if self.provider == CPU and self.precision == "fp16":
            self.precision = "fp32"  # allow_slow: what really runs
        self._commit_graph = file.parent / COMMIT_GRAPH
        return OnnxRuntimeGraph(session, self._is_on_device)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeroed numpy memory."""
        return np.zeros(shape, dtype)

    def state(self, shape: tuple[int, ...]) -> HostState | OrtState:
        """Zeroed caches."""
        if not self._is_on_device:
            return HostState(shape)
        with contextlib.suppress(MissingDependency):  # it is said again if rows have to be moved
            self._moving_graph(shape)
        return self._empty_state(shape)

    def aside(self, model_dir: Path | None = None) -> OnnxRuntimeRuntime:
        """What networks of drafters run on: the same, without padding."""
        del model_dir
        if not self._pads_one:
            return self
        return OnnxRuntimeRuntime(
            self._num_threads, self._wanted, self._allow_slow, self.precision, self._device_id, self._cache_dir
        )

    def _device_options(self, decoder: Path | None) -> dict[str, str]:
        """Options of CUDA's and TensorRT's providers, as strings."""
        options = {"device_id": str(self._device_id)}
        if self._wanted == CUDA:
            # TF32 keeps ten bits of the mantissa, which is not what fp32 says.
            return {**options, "use_tf32": "0"}
        options["trt_fp16_enable"] = str(self.precision == "fp16")
        options["trt_int8_enable"] = str(self.precision == "int8")
        if self._cache_dir is not None:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            for kind in ("engine", "timing"):
                options[f"trt_{kind}_cache_enable"] = "True"
                options[f"trt_{kind}_cache_path"] = str(self._cache_dir)
        if decoder is not None:
            # Without a profile the provider builds again, in the middle of a step, whenever a size is new to it.
            spec = ModelFiles.describe(decoder.parent).decoder
            for kind, k in (("min", 1), ("opt", min(8, spec.max_step)), ("max", spec.rows)):
                shapes = {"embeds": (k, spec.hidden_width), "mask": (1, 1, k, spec.rows)}
                if spec.rope_theta is not None:
                    shapes["position"] = (k,)
                options[f"trt_profile_{kind}_shapes"] = ",".join(
                    f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items()
                )
        return options

    def _mover(self, state: OrtState, rows: Array, write_index: Array) -> Callable[[], None]:
        graph = self._moving_graph(state.shape)
        pasts = [name for name in graph.inputs if name.startswith("past_")]
        names = [(past, past.replace("past", "present", 1)) for past in pasts]
        return graph.tie({"rows": rows, "write_index": write_index}, state, names).run

    def _moving_graph(self, shape: tuple[int, ...]) -> OnnxRuntimeGraph:
        """commit.onnx where it is of this form (the decoder's), a graph like it elsewhere (a drafter's); proved."""
        if shape in self._movers:
            return self._movers[shape]
        options = SessionOptions(self._num_threads, self._wanted, self._device_options(None), self._allow_slow)
        graph = None
        if self._commit_graph is not None and self._commit_graph.is_file():
            graph = OnnxRuntimeGraph(open_session(self._commit_graph, options), True)
            if [spec.shape for name, spec in graph.inputs.items() if name.startswith("past_")] != [shape[1:]] * shape[
                0
            ]:
                graph = None
        if graph is None:
            try:
                from vla_spec.engines.graphs.moving import moving_model
            except ImportError as error:
                raise MissingDependency("onnx", "pip install onnx") from error
            written = moving_model(shape[0], shape[1:]).SerializeToString()
            graph = OnnxRuntimeGraph(open_session(written, options), True)
        self._movers[shape] = graph
        # On a state of its own, as the first tie of a graph overwrites what it is tied to.
        self._mover(self._empty_state(shape), np.zeros(1, np.int64), np.zeros(1, np.int64))
        return graph

    def _empty_state(self, shape: tuple[int, ...]) -> OrtState:
        device = "cpu" if self.provider == CPU else "cuda"
        return OrtState(onnxruntime_module(), shape, device, self._device_id, self._mover)


def _bind_array(method: Any, name: str, array: Array) -> None:
    assert array.flags.c_contiguous, name
    method(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _read(state: State) -> Array:
    if isinstance(state, OrtState):
        return state.read()
    assert isinstance(state, HostState)
    return state.tensors


def _write(state: State, values: Array) -> None:
    if isinstance(state, OrtState):
        state.write(values)
    else:
        assert isinstance(state, HostState)
        state.tensors[...] = values


def _spec(value: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else None for d in value.shape)
    return TensorSpec(np.dtype(_TYPES[value.type]), shape)


def build(options: Options, parts: Parts) -> GraphEngine:
    """From configuration."""
    model_dir = require_model_dir(parts.model_dir)
    if options.precision == "int8":
        quantized_graph(model_dir / DECODER_GRAPH, "int8", is_needed=True)
    runtime = OnnxRuntimeRuntime(
        parts.num_threads, options.provider, options.allow_slow, options.precision, options.device_id,
        Path(options.cache_dir).expanduser() if options.cache_dir else None,
        pads_one=options.provider == CPU and options.precision == "int8",
    )  # fmt: skip
    return GraphEngine(model_dir, runtime, options.max_step)
