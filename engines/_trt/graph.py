"""One TensorRT engine with its calls: per size a context of its own, and the whole round in one captured CUDA graph.

A captured graph holds addresses, shapes and the state of its context, so a context must not be used for anything else
once it is captured: one context per size, all of them sharing one scratch memory, as NVIDIA's TensorRT developer guide
("CUDA Graphs") recommends. They may share it because they run in one stream, one after the other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from typing import Any, final

from vla_spec.engines._graph_runtime import Array, State, TensorSpec
from vla_spec.engines._trt.cache_state import DeviceState
from vla_spec.engines._trt.cuda import CopyKind, Cuda, CudaError, CudaGraph, CudaGraphExec, Stream
from vla_spec.engines._trt.lane import Lane
from vla_spec.engines._trt.loaded import LoadedEngine, Profile, dims
from vla_spec.engines._trt.memory import ALIGNMENT, MAX_GAP, HostArena, Piece, align, place
from vla_spec.errors import BadModel, DeviceError, SlowPath


class Capture(Enum):
    """What becomes of rounds: CUDA graphs or single launches."""

    ALWAYS = "always"
    IF_POSSIBLE = "if_possible"
    NEVER = "never"


@final
class _Handles:
    """What a call has of the libraries, in one place, so that closing the lane leaves nobody with a dead handle."""

    def __init__(self, context: Any) -> None:
        self.context: Any = context
        self.executable: CudaGraphExec | None = None

    def close(self, cuda: Cuda) -> None:
        """The captured graph first: it points into the context."""
        executable, self.executable, self.context = self.executable, None, None
        if executable is not None:
            cuda.destroy_exec(executable)


@final
class TensorRTCall:
    """One engine with fixed shapes and addresses. The first run is plain and real, and is captured behind it.

    Attributes:
        num_nodes: operations in the captured graph; 0 = not captured.
        slow_reason: why it runs uncaptured although a capture was asked for; None = it doesn't.
    """

    def __init__(
        self, name: str, lane: Lane, handles: _Handles, inputs: list[Piece], outputs: list[Piece], kept: object,
        capture: Capture, messages: Callable[[], str],
    ) -> None:  # fmt: skip
        self.name, self._lane, self._handles, self._messages = name, lane, handles, messages
        self._inputs, self._outputs, self._kept = inputs, outputs, kept
        self._capture_mode = capture
        self._is_settled = capture is Capture.NEVER
        self.num_nodes = 0
        self.slow_reason: str | None = None

    @property
    def is_captured(self) -> bool:
        """A round is one launch."""
        return self._handles.executable is not None

    @property
    def copies(self) -> tuple[int, int]:
        """Copies to the device and back in one run."""
        return len(self._inputs), len(self._outputs)

    def run(self) -> None:
        """Inputs to the device, the engine, outputs to the host: in one launch once it is captured. Then wait.

        Raises:
            DeviceError: the GPU failed.
            SlowPath: at the first run: it can't be captured, and has to be.
        """
        lane = self._lane
        lane.enter()
        cuda, stream = lane.cuda, lane.stream
        if self._handles.executable is not None:
            cuda.launch(self._handles.executable, stream)
        else:
            self._enqueue()
        cuda.record(lane.done, stream)
        cuda.wait(lane.done)
        if not self._is_settled:
            # The plain run above was also what TensorRT needs before a capture: it settles what depends on shapes.
            self._capture()
            self._is_settled = True

    def time_on_device(self, num_calls: int) -> list[float]:
        """Run again and again on the inputs as they are, timed by the GPU itself. For checks. [us per call]."""
        lane = self._lane
        lane.enter()
        cuda, stream = lane.cuda, lane.stream
        taken = []
        with ExitStack() as made:
            start, end = (cuda.event(is_blocking=False, has_timing=True) for _ in range(2))
            for event in (start, end):
                made.callback(cuda.destroy_event, event)
            for _ in range(num_calls):
                cuda.record(start, stream)
                if self._handles.executable is not None:
                    cuda.launch(self._handles.executable, stream)
                else:
                    self._enqueue()
                cuda.record(end, stream)
                cuda.wait(end)
                taken.append(1000 * cuda.elapsed_ms(start, end))
        return taken

    def _enqueue(self) -> None:
        cuda, stream = self._lane.cuda, self._lane.stream
        for host, device, size in self._inputs:
            cuda.copy(device, host, size, CopyKind.HOST_TO_DEVICE, stream)
        if not self._handles.context.execute_async_v3(self._lane.handle):
            raise DeviceError(f"{self.name}: TensorRT could not enqueue it ({self._messages()})")
        for host, device, size in self._outputs:
            cuda.copy(host, device, size, CopyKind.DEVICE_TO_HOST, stream)

    def _capture(self) -> None:
        cuda = self._lane.cuda
        can_capture = getattr(self._handles.context, "is_stream_capturable", None)  # TensorRT-RTX only
        if can_capture is not None and not can_capture(self._lane.handle):
            self._stay_slow("TensorRT-RTX says so; it has to be built with the builder flag REQUIRE_USER_ALLOCATION")
            return
        try:
            graph = self._record()
        except DeviceError as error:
            self._stay_slow(str(error))
            return
        try:
            self.num_nodes = cuda.num_nodes(graph)
            self._handles.executable = cuda.instantiate(graph)
        except CudaError as error:
            self.num_nodes = 0
            self._stay_slow(str(error))
        finally:
            cuda.destroy_graph(graph)

    def _record(self) -> CudaGraph:
        """The recording of one round."""
        cuda, stream = self._lane.cuda, self._lane.stream
        cuda.begin_capture(stream)
        try:
            self._enqueue()
        except DeviceError:
            with contextlib.suppress(DeviceError):  # says again that it failed, and makes the stream usable
                cuda.destroy_graph(cuda.end_capture(stream))
            raise
        return cuda.end_capture(stream)

    def _stay_slow(self, reason: str) -> None:
        self.slow_reason = reason
        if self._capture_mode is Capture.ALWAYS:
            raise SlowPath(
                f"{self.name}: can't be captured in a CUDA graph ({reason}); `cuda_graphs: if_possible` runs it "
                f"uncaptured, which costs the host every launch in every round"
            )


@final
class TensorRTGraph:
    """An engine and its calls. Not thread-safe.

    Args:
        name: for messages.
        engine: the plan in the GPU's memory.
        lane: where it runs, and who frees what is made here.
        arena: where host arrays come from.
        capture: what becomes of rounds.
        runtime: lives as long as the graph or a call of it does.

    Attributes:
        calls: those that were tied, in order.
    """

    def __init__(
        self, name: str, engine: LoadedEngine, lane: Lane, arena: HostArena, capture: Capture, runtime: object
    ) -> None:
        self.name, self.engine, self.lane = name, engine, lane
        self._arena, self._capture, self._runtime = arena, capture, runtime
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self.calls: list[TensorRTCall] = []
        #: Device memory that all contexts of this engine share.
        self.scratch_bytes = align(engine.scratch_bytes) if engine.scratch_bytes else 0
        self._scratch: int | None = None
        self._aux_streams: list[Stream] | None = None

    def tie(
        self, arrays: Mapping[str, Array], state: State | None = None, state_names: Sequence[tuple[str, str]] = ()
    ) -> TensorRTCall:
        """A context for these shapes, with its device buffers.

        Raises:
            BadModel: shapes or types that the engine was not built for; names what it was built for.
            DeviceError: no memory.
            SlowPath: the engine would copy its cache.
        """
        self._check_names(arrays, state_names)
        shapes = {name: arrays[name].shape for name in self.inputs if name in arrays}
        shapes.update({past: state.shape[1:] for past, _ in state_names} if state is not None else {})
        profile = self._choose(shapes)
        inputs = {name: arrays[name] for name in self.inputs if name in arrays}
        outputs = {name: arrays[name] for name in self.outputs if name in arrays}
        lane = self.lane
        # Bytes between inputs may be copied along, bytes between outputs only where nobody has an array.
        addresses, to_device = place(inputs, self._arena, lane, MAX_GAP)
        found, to_host = place(outputs, self._arena, lane, ALIGNMENT)
        addresses.update(found)
        if state is not None:
            addresses.update(self._state_addresses(state, state_names))
        handles = _Handles(self._context(profile, shapes))
        lane.owned.callback(handles.close, lane.cuda)
        for name in self.outputs:
            if name not in addresses:  # nobody wants it, but TensorRT writes it
                size = math.prod(dims(handles.context.get_tensor_shape(name))) * self.outputs[name].dtype.itemsize
                addresses[name] = lane.allocate(align(size))
        for name, address in addresses.items():
            if not handles.context.set_tensor_address(name, address):
                raise BadModel(f"{self.name}: TensorRT refuses the address of {name} ({self.engine.said()})")
        sizes = "x".join(str(n) for n in next(iter(shapes.values()), ()))
        kept = (list(arrays.values()), state, self._runtime)
        call = TensorRTCall(
            f"{self.name} ({sizes})", lane, handles, to_device, to_host, kept, self._capture, self.engine.said
        )
        self.calls.append(call)
        return call

    def _context(self, profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """A context of its own for these shapes, on the shared scratch memory."""
        lane = self.lane
        context = self.engine.context()
        if self.engine.is_dynamic and not context.set_optimization_profile_async(profile.number, lane.handle):
            raise BadModel(f"{self.name}: TensorRT refuses profile {profile.number} ({self.engine.said()})")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise BadModel(f"{self.name}: TensorRT refuses {name} of shape {list(shape)} ({self.engine.said()})")
        missing = context.infer_shapes()
        if missing:
            raise BadModel(f"{self.name}: TensorRT does not know the shapes of {', '.join(missing)}")
        if self.scratch_bytes:
            if self._scratch is None:
                self._scratch = lane.allocate(self.scratch_bytes)
            context.set_device_memory(self._scratch, self.scratch_bytes)
        if self.engine.num_aux_streams:  # otherwise TensorRT would make some of no priority
            if self._aux_streams is None:
                self._aux_streams = [self._aux_stream() for _ in range(self.engine.num_aux_streams)]
            context.set_aux_streams([int(stream) for stream in self._aux_streams])
        lane.settle()  # a change of profile may have queued copies
        return context

    def _aux_stream(self) -> Stream:
        cuda = self.lane.cuda
        stream = cuda.stream(self.lane.priority)
        self.lane.owned.callback(cuda.destroy_stream, stream)
        return stream

    def _check_names(self, arrays: Mapping[str, Array], state_names: Sequence[tuple[str, str]]) -> None:
        tied = {*arrays, *(name for pair in state_names for name in pair)}
        missing, unknown = self.inputs.keys() - tied, tied - self.inputs.keys() - self.outputs.keys()
        if missing or unknown:
            wrong = [f"{name} is not given" for name in sorted(missing)] + [
                f"{name} is unknown" for name in sorted(unknown)
            ]
            raise BadModel(
                f"{self.name}: {', '.join(wrong)}; it has the inputs {', '.join(self.inputs)} and the outputs "
                f"{', '.join(self.outputs)}"
            )
        for name, array in arrays.items():
            wanted = (self.inputs.get(name) or self.outputs[name]).dtype
            if array.dtype != wanted:
                raise BadModel(f"{self.name}: {name} is {wanted} in the engine and {array.dtype} for its caller")
            if self._arena.block_of(array) is None:
                raise AssertionError(f"{name}: not memory of this runtime's `empty`")

    def _choose(self, shapes: Mapping[str, tuple[int, ...]]) -> Profile:
        """The profile whose kernels were chosen for shapes as near as possible."""
        fitting = [profile for profile in self.engine.profiles if profile.fits(shapes)]
        if not fitting:
            name = next(
                (n for n in shapes if not any(p.fits({n: shapes[n]}) for p in self.engine.profiles)), next(iter(shapes))
            )
            built = "; ".join(dict.fromkeys(p.range_of(name) for p in self.engine.profiles))
            raise BadModel(
                f"{self.name}: was not built for {name} of shape {list(shapes[name])}; valid: {built}; `vla-spec build "
                f"--tiers` builds for other sizes"
            )
        return min(fitting, key=lambda profile: profile.excess(shapes))

    def _state_addresses(self, state: State, names: Sequence[tuple[str, str]]) -> dict[str, int]:
        """Both names of each cache tensor at the same address: written in place."""
        assert isinstance(state, DeviceState), type(state)
        addresses, aliases = {}, self.engine.aliases
        for (past, present), address in zip(names, state.addresses, strict=True):
            if self.inputs[past].dtype.itemsize != state.itemsize:
                raise BadModel(
                    f"{self.name}: {past} has numbers of {self.inputs[past].dtype.itemsize} bytes, the cache of "
                    f"{state.itemsize}; the engine is of another precision than its manifest says"
                )
            if aliases is not None and aliases.get(present) != past:
                raise SlowPath(
                    f"{self.name}: {present} is not written in place of {past}, so each call would copy the cache; "
                    f"build it again with a TensorRT that has KV-cache updates (10.15 or newer, or TensorRT-RTX)"
                )
            addresses[past] = addresses[present] = address
        return addresses
