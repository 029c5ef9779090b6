"""Score tokens with OpenVINO on the CPU: the flattest engine, as it scores many tokens for little more than one.

Not thread-safe. Needs the extra ``[openvino]``. The decoder is compiled once per number of rows in ``sizes``, as
OpenVINO spends most of a millisecond per call of the embedded policy on shapes that it does not know beforehand; other
numbers of rows are padded up to the next. Every size has copies of the weights.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt

from vla_spec.engines._graph_engine import GOLDEN_TOLERANCE, GraphEngine
from vla_spec.engines._graph_runtime import Array, GraphRuntime, State, TensorSpec
from vla_spec.engines._host_state import HostState
from vla_spec.engines._model_files import DECODER_GRAPH, GOLDEN, WEIGHTS, ModelFiles, require_model_dir
from vla_spec.engines._openvino_graph import MASK, WRITE_INDEX, openvino_module, read_graph
from vla_spec.engines._quantized_files import quantized_graph
from vla_spec.errors import BadConfig, BadModel, SlowPath
from vla_spec.plugins import Parts

PRECISIONS = ("fp32", "bf16", "int8")
SIZES = (1, 2, 4, 8, 16, 32)
#: Larger weights are not copied for every size unless a configuration says so. [bytes]
MOST_COPIED = 128 << 20
_ALIGNMENT = 64  # of a cache line and of the widest vector register


@dataclass(frozen=True, slots=True)
class Options:
    """How to run.

    Attributes:
        max_step: most tokens of one step.
        precision: fp32; bf16 (arithmetic in bfloat16, only where the CPU has it); int8 (the quantised decoder graph of
            the model folder).
        sizes: numbers of rows that the decoder is compiled for; () = once for all, slower per call and with one copy of
            the weights; None = 1, 2, 4, ... 32, or () for models of more than 128 MiB.
        allow_slow: start even if the CPU lacks the precision.
    """

    max_step: int = 32
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    sizes: tuple[int, ...] | None = None
    allow_slow: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise BadConfig(f"precision is {self.precision!r}; valid: {', '.join(PRECISIONS)}")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))
            if any(not isinstance(size, int) or size < 1 for size in self.sizes) or list(self.sizes) != sorted(
                set(self.sizes)
            ):
                raise BadConfig(f"sizes is {list(self.sizes)}; valid: numbers of rows from 1, ascending")


@final
class _Cache:
    """Turns a mask over the cache into one over cache and new rows, and writes the new rows where they belong."""

    def __init__(self, tensors: Array, rows: Array, mask: Array, write_index: Array) -> None:
        self._tensors, self._rows, self._narrow, self._write_index = tensors, rows, mask, write_index
        self._size, self._num_new = tensors.shape[3], rows.shape[3]
        self.mask: Array = _aligned((*mask.shape[:3], self._size + self._num_new), np.bool_)

    def before(self) -> None:
        """The rows that are about to be written are looked at in the call, not in the cache."""
        start, end, size = int(self._write_index[0]), int(self._write_index[0]) + self._num_new, self._size
        self.mask[..., :size] = self._narrow
        self.mask[..., start:end] = False
        self.mask[..., size:] = self._narrow[..., start:end]

    def after(self) -> None:
        """Into the cache."""
        start = int(self._write_index[0])
        self._tensors[:, :, :, start : start + self._num_new] = self._rows


@final
class OpenVinoCall:
    """A request with its buffers."""

    def __init__(self, request: Any, cache: _Cache | None, kept: list[Any]) -> None:
        self._infer, self._cache = request.infer, cache
        self._kept = kept  # the request knows addresses only

    def run(self) -> None:
        """One forward."""
        if self._cache is None:
            self._infer()
        else:
            self._cache.before()
            self._infer()
            self._cache.after()


@final
class OpenVinoGraph:
    """One graph, compiled for each number of rows in ``sizes`` when it is first tied, else once. Not thread-safe."""

    def __init__(
        self, model: Any, new_rows: list[str], compile_model: Callable[[Any], Any], sizes: Sequence[int]
    ) -> None:
        self._model, self._new_rows, self._compile, self._sizes = model, new_rows, compile_model, frozenset(sizes)
        self._shapes = {name: value.get_partial_shape() for value in model.inputs for name in value.get_names()}
        self._compiled: dict[int | None, Any] = {}
        self.inputs: Mapping[str, TensorSpec] = {n: _spec(v) for v in model.inputs for n in v.get_names()}
        if new_rows:
            self.inputs = {**self.inputs, WRITE_INDEX: TensorSpec(np.dtype(np.int64), (1,))}
        self.outputs: Mapping[str, TensorSpec] = {n: _spec(v) for v in model.outputs for n in v.get_names()}

    def tie(
        self, arrays: Mapping[str, Array], state: State | None = None, state_names: Sequence[tuple[str, str]] = ()
    ) -> OpenVinoCall:
        """Share memory with numpy arrays."""
        given = {name: array for name, array in arrays.items() if name in self._shapes or name in self.outputs}
        cache = None
        if state is not None:
            assert isinstance(state, HostState)
            rows = self._row_count(arrays)
            made = _aligned((*state.shape[:3], rows, state.shape[4]), np.float32)
            cache = _Cache(state.tensors, made, arrays[MASK], arrays[WRITE_INDEX])
            given[MASK] = cache.mask
            for (past, present), tensor, new in zip(state_names, state.tensors, made, strict=True):
                given[past], given[present] = tensor, new
        request = self._request(given)
        tensors = {name: openvino_module().Tensor(array, shared_memory=True) for name, array in given.items()}
        for name, tensor in tensors.items():
            request.set_tensor(name, tensor)
        return OpenVinoCall(request, cache, [given, tensors])

    def _row_count(self, arrays: Mapping[str, Array]) -> int:
        """How many cache rows a call with these inputs makes: the graph knows."""
        shapes = {name: list(array.shape) for name, array in arrays.items() if name in self._shapes and name != MASK}
        self._model.reshape(shapes)
        rows = self._model.output(self._new_rows[0]).get_partial_shape()[2]
        self._model.reshape(self._shapes)
        return int(rows.get_length())

    def _request(self, given: Mapping[str, Array]) -> Any:
        embeds = given.get("embeds")
        size = len(embeds) if embeds is not None and len(embeds) in self._sizes else None
        if size not in self._compiled:
            if size is not None:
                self._model.reshape({name: list(given[name].shape) for name in self._shapes})
            self._compiled[size] = self._compile(self._model)
            self._model.reshape(self._shapes)
        return self._compiled[size].create_infer_request()


@functools.cache
def the_core() -> Any:
    """One OpenVINO core per process, never given up.

    A core installs a stack for signal handlers and puts back what was there before when it goes. Two that go in the
    order in which they came leave a pointer to freed memory behind, and the next Ctrl-C is a segmentation fault (seen
    with 2026.4.1).
    """
    return openvino_module().Core()


@final
class OpenVinoRuntime:
    """OpenVINO on the CPU, on host memory.

    Args:
        num_threads: of one call.
        precision: see `Options`.
        sizes: ascending; numbers of rows that decoders are compiled for.
        allow_slow: start even if the CPU lacks the precision.

    Raises:
        MissingDependency: OpenVINO is not installed.
        SlowPath: the CPU has no bfloat16 arithmetic.
    """

    name = "openvino"

    def __init__(
        self, num_threads: int = 1, precision: str = "fp32", sizes: Sequence[int] = (), allow_slow: bool = False
    ) -> None:
        self._core = the_core()
        self._num_threads, self._sizes, self._allow_slow = num_threads, tuple(sizes), allow_slow
        self.precision, self.provider = precision, "CPU"
        can = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in can and not allow_slow:
            raise SlowPath(f"this CPU has no bf16 arithmetic; OpenVINO finds {', '.join(can)}; use precision fp32")
        if precision == "bf16" and "BF16" not in can:
            self.precision = "fp32"  # what OpenVINO then computes in
        self.tiers: tuple[int, ...] | None = None

    @property
    def is_batch_invariant(self) -> bool:
        """In fp32 to rounding. In bf16 and int8 rows differ now and then with the number of rows in the call."""
        return self.precision == "fp32"

    def open(self, file: Path) -> OpenVinoGraph:
        """Read; it is compiled when it is tied."""
        if not file.is_file():
            raise BadModel(f"{file}: missing; `vla-spec export` writes it, a drafter's after `vla-spec distill`")
        is_decoder = file.name == DECODER_GRAPH
        if self.precision == "int8":
            file = quantized_graph(file, "int8", is_needed=False)
        model, new_rows = read_graph(file, has_plain_attention=self.precision != "bf16")
        graph = OpenVinoGraph(model, new_rows, self._compile, self._sizes if is_decoder else ())
        if is_decoder and self._sizes:
            rows = graph.inputs["past_key_0"].shape[2]
            # Longer prompts than the largest size run as they are.
            self.tiers = (*self._sizes, *range(self._sizes[-1] + 1, (rows or 0) + 1))
        return graph

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeroed numpy memory, aligned."""
        return _aligned(shape, dtype)

    def state(self, shape: tuple[int, ...]) -> HostState:
        """Zeroed caches."""
        return HostState(shape)

    def aside(self, model_dir: Path | None = None) -> GraphRuntime:
        """What networks of drafters run on: ONNX Runtime where it is installed.

        They are small, and called with every number of rows: OpenVINO takes twice as long for them, and milliseconds
        whenever a shape is new (docs/cpu-engines.md).
        """
        del model_dir
        if importlib.util.find_spec("onnxruntime") is None:
            return OpenVinoRuntime(self._num_threads, self.precision, (), self._allow_slow)
        from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime

        return OnnxRuntimeRuntime(self._num_threads, precision="int8" if self.precision == "int8" else "fp32")

    def _compile(self, model: Any) -> Any:
        compiled = self._core.compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": self._num_threads,
                "ENABLE_CPU_PINNING": False,  # which cores to use is the deployment's business (docs/realtime.md)
                "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
            },
        )
        self.provider = "+".join(compiled.get_property("EXECUTION_DEVICES"))
        return compiled


def check_sizes(engine: GraphEngine, model_dir: Path, sizes: Sequence[int]) -> None:
    """Compile every size now, and score the golden chain with it: a size that is compiled wrongly is found here.

    Raises:
        BadModel: a size does not give the reference's logits.
    """
    tolerance = GOLDEN_TOLERANCE.get(engine.info.precision, np.inf)
    with np.load(model_dir / GOLDEN, allow_pickle=False) as golden:
        steps = ("prefill_", "chain_", "tree_")
        engine.prefill({name: golden[name] for name in golden.files if not name.startswith(steps)})
        tokens, wanted = golden["chain_tokens"], golden["chain_logits"]
    for size in sizes:
        chain = np.resize(tokens, size).astype(np.int32)
        found = engine.step(chain, np.arange(-1, size - 1, dtype=np.int32)).logits
        same = min(size, len(wanted))
        worst = float(np.abs(found[:same] - wanted[:same]).max() / wanted.std())
        if not (worst <= tolerance or tolerance == np.inf):
            raise BadModel(
                f"{model_dir}: OpenVINO with {size} rows gives logits {worst:.2g} of their spread away from the "
                f"reference, at most {tolerance:g} is accepted; set sizes: []"
            )


def _aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    block = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + size].view(kind).reshape(shape)


def _spec(value: Any) -> TensorSpec:
    shape = tuple(d.get_length() if d.is_static else None for d in value.get_partial_shape())
    return TensorSpec(np.dtype(value.get_element_type().to_dtype()), shape)


def build(options: Options, parts: Parts) -> GraphEngine:
    """From configuration."""
    model_dir = require_model_dir(parts.model_dir)
    if options.precision == "int8":
        quantized_graph(model_dir / DECODER_GRAPH, "int8", is_needed=True)
    most = min(options.max_step, ModelFiles.describe(model_dir).decoder.max_step)
    sizes = options.sizes
    if sizes is None:
        sizes = SIZES if (model_dir / WEIGHTS).stat().st_size <= MOST_COPIED else ()
    if sizes:
        # Steps of up to `most` rows are padded to a size, and padding writes cache rows that have to exist.
        sizes = (*(size for size in sizes if size < most), most)
    runtime = OpenVinoRuntime(parts.num_threads, options.precision, sizes, options.allow_slow)
    engine = GraphEngine(model_dir, runtime, options.max_step)
    check_sizes(engine, model_dir, sizes or (1, most))
    return engine
