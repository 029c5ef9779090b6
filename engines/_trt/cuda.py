"""The one thin layer over CUDA: memory, copies, streams, events, captured graphs. Everything else is plain Python.

`Cuda` is the whole interface; `CudaBindings` is it over NVIDIA's ``cuda-bindings`` (CUDA runtime API), and imports it
when it is made. The tests have a fake of every method that moves real bytes, so that the order of operations is
checked on machines without a GPU. Addresses are integers; handles of streams, events and graphs are opaque.

Source of the semantics: CUDA Runtime API, sections "Memory Management", "Stream Management" and "Graph Management".
"""

from __future__ import annotations

import importlib
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, final

from vla_spec.errors import DeviceError, MissingDependency, NoDevice

#: What a user installs; the major version has to be one that the driver supports.
INSTALL = "pip install 'vla_spec[tensorrt-rtx]' (with a driver for CUDA 12: pip install 'cuda-bindings<13')"
#: Names of runtime errors which say that there is nothing to run on.
_NO_DEVICE = {
    "cudaErrorInsufficientDriver": "the NVIDIA driver is missing or older than CUDA {runtime} needs",
    "cudaErrorNoDevice": "no NVIDIA GPU is visible (see nvidia-smi and CUDA_VISIBLE_DEVICES)",
    "cudaErrorSystemDriverMismatch": "the NVIDIA driver and its kernel module have different versions; reboot",
    "cudaErrorSystemNotReady": "the NVIDIA driver is not ready (see nvidia-smi)",
    "cudaErrorCompatNotSupportedOnDevice": "the driver is too old for CUDA {runtime} on this GPU",
    "cudaErrorStubLibrary": "libcuda is a stub of the CUDA toolkit, not the driver's",
}
Stream = Any
Event = Any
CudaGraph = Any
CudaGraphExec = Any


class CopyKind(IntEnum):
    """Direction of a copy, with the numbers of ``cudaMemcpyKind``."""

    HOST_TO_DEVICE = 1
    DEVICE_TO_HOST = 2
    DEVICE_TO_DEVICE = 3


class Device(NamedTuple):
    """What a GPU says about itself.

    capability: (major, minor), 8.9 = (8, 9). driver, runtime: highest CUDA version that the driver supports, and the
    one of the bindings, as 12040 for 12.4.
    """

    number: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    num_multiprocessors: int
    l2_bytes: int
    bus_width_bits: int
    has_ecc: bool
    is_integrated: bool
    driver: int
    runtime: int

    @property
    def sm(self) -> int:
        """Compute capability as one number, 89 for 8.9."""
        return self.capability[0] * 10 + self.capability[1]


class CudaError(DeviceError):
    """A CUDA call failed.

    Attributes:
        code: as ``cudaErrorMemoryAllocation``.
        call: name of the function.
    """

    def __init__(self, call: str, code: str, message: str, hint: str = "") -> None:
        self.call, self.code = call, code
        super().__init__(f"{call} failed: {message} ({code}){hint}")

    @property
    def is_out_of_memory(self) -> bool:
        """The device or the pinnable host memory is full."""
        return self.code == "cudaErrorMemoryAllocation"


class Cuda(Protocol):
    """CUDA as far as an engine needs it. All calls are for the device of `use`. Raise `CudaError` or `NoDevice`."""

    def num_devices(self) -> int:
        """Visible GPUs; at least one, else `NoDevice` is raised."""

    def use(self, index: int) -> None:
        """Make a device the calling thread's own; its primary context is shared by the whole process."""

    def device(self, index: int) -> Device:
        """What it is."""

    def memory(self) -> tuple[int, int]:
        """Free and installed device memory [bytes]."""

    def allocate(self, size: int) -> int:
        """Device memory, 256-byte aligned. Returns the address."""

    def free(self, address: int) -> None:
        """Give device memory back."""

    def allocate_pinned(self, size: int) -> int:
        """Page-locked host memory, which copies can read and write while the host goes on. Returns the address."""

    def free_pinned(self, address: int) -> None:
        """Give page-locked memory back."""

    def priorities(self) -> tuple[int, int]:
        """Least and greatest stream priority; smaller numbers go first, so least >= greatest."""

    def stream(self, priority: int) -> Stream:
        """A stream that does not wait for the default stream."""

    def destroy_stream(self, stream: Stream) -> None:
        """Let it go; what is queued still runs."""

    def synchronize(self, stream: Stream) -> None:
        """Wait until everything in the stream is done."""

    def event(self, is_blocking: bool, has_timing: bool = False) -> Event:
        """An event; is_blocking = whoever waits for it sleeps instead of spinning."""

    def destroy_event(self, event: Event) -> None:
        """Let it go."""

    def record(self, event: Event, stream: Stream) -> None:
        """The event happens when everything in the stream up to here is done."""

    def wait(self, event: Event) -> None:
        """The host waits for the event."""

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Time between two events that have happened, made with ``has_timing`` [ms]."""

    def copy(self, target: int, source: int, size: int, kind: CopyKind, stream: Stream) -> None:
        """Copy bytes, in the stream's order."""

    def copy_2d(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: CopyKind,
        stream: Stream,
    ) -> None:  # fmt: skip
        """Copy ``height`` pieces of ``width`` bytes, which lie a pitch apart, in the stream's order."""

    def fill(self, target: int, value: int, size: int, stream: Stream) -> None:
        """Set bytes of device memory, in the stream's order."""

    def begin_capture(self, stream: Stream) -> None:
        """What follows in the stream is recorded and not run; other threads are not restricted meanwhile."""

    def end_capture(self, stream: Stream) -> CudaGraph:
        """The recording."""

    def num_nodes(self, graph: CudaGraph) -> int:
        """Operations in a recording."""

    def instantiate(self, graph: CudaGraph) -> CudaGraphExec:
        """Make a recording runnable."""

    def destroy_graph(self, graph: CudaGraph) -> None:
        """Let a recording go; what was made from it stays."""

    def destroy_exec(self, executable: CudaGraphExec) -> None:
        """Let a runnable recording go."""

    def launch(self, executable: CudaGraphExec, stream: Stream) -> None:
        """Run a recording, in the stream's order."""


@final
class CudaBindings:
    """`Cuda` over the package ``cuda-bindings``.

    Raises:
        MissingDependency: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise MissingDependency("cuda-bindings", INSTALL) from error
        c = self._cuda
        self._ok = c.cudaError_t.cudaSuccess
        self._kinds = {kind: c.cudaMemcpyKind(int(kind)) for kind in CopyKind}

    def num_devices(self) -> int:
        count: int = self._call("cudaGetDeviceCount")
        if not count:
            raise NoDevice("CUDA: " + _NO_DEVICE["cudaErrorNoDevice"])
        return count

    def use(self, index: int) -> None:
        count = self.num_devices()
        if not 0 <= index < count:
            raise NoDevice(f"CUDA: no device {index}; valid: 0 to {count - 1}")
        self._call("cudaSetDevice", index)

    def device(self, index: int) -> Device:
        p = self._call("cudaGetDeviceProperties", index)
        name = p.name.split(b"\0")[0].decode(errors="replace") if isinstance(p.name, bytes) else str(p.name)
        return Device(
            index, name, (p.major, p.minor), p.totalGlobalMem, p.multiProcessorCount, p.l2CacheSize, p.memoryBusWidth,
            bool(p.ECCEnabled), bool(p.integrated), self._call("cudaDriverGetVersion"),
            self._call("cudaRuntimeGetVersion"),
        )  # fmt: skip

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cudaMemGetInfo")
        return free, total

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size, what=f" for {size / 2**20:.1f} MiB of device memory"))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> int:
        flags = self._cuda.cudaHostAllocDefault
        return int(self._call("cudaHostAlloc", size, flags, what=f" for {size / 2**20:.1f} MiB of page-locked memory"))

    def free_pinned(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def priorities(self) -> tuple[int, int]:
        least, greatest = self._call("cudaDeviceGetStreamPriorityRange")
        return least, greatest

    def stream(self, priority: int) -> Stream:
        return self._call("cudaStreamCreateWithPriority", self._cuda.cudaStreamNonBlocking, priority)

    def destroy_stream(self, stream: Stream) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Stream) -> None:
        self._call("cudaStreamSynchronize", stream)

    def event(self, is_blocking: bool, has_timing: bool = False) -> Event:
        c = self._cuda
        flags = c.cudaEventBlockingSync if is_blocking else c.cudaEventDefault
        return self._call("cudaEventCreateWithFlags", flags if has_timing else flags | c.cudaEventDisableTiming)

    def destroy_event(self, event: Event) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: Event, stream: Stream) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: Event) -> None:
        self._call("cudaEventSynchronize", event)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        return float(self._call("cudaEventElapsedTime", start, end))

    def copy(self, target: int, source: int, size: int, kind: CopyKind, stream: Stream) -> None:
        self._call("cudaMemcpyAsync", target, source, size, self._kinds[kind], stream)

    def copy_2d(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: CopyKind,
        stream: Stream,
    ) -> None:  # fmt: skip
        self._call(
            "cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, height, self._kinds[kind], stream
        )

    def fill(self, target: int, value: int, size: int, stream: Stream) -> None:
        self._call("cudaMemsetAsync", target, value, size, stream)

    def begin_capture(self, stream: Stream) -> None:
        # Thread-local: another thread may allocate or synchronise meanwhile without breaking the capture.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Stream) -> CudaGraph:
        return self._call("cudaStreamEndCapture", stream)

    def num_nodes(self, graph: CudaGraph) -> int:
        return int(self._call("cudaGraphGetNodes", graph)[1])

    def instantiate(self, graph: CudaGraph) -> CudaGraphExec:
        return self._call("cudaGraphInstantiate", graph, 0)

    def destroy_graph(self, graph: CudaGraph) -> None:
        self._call("cudaGraphDestroy", graph)

    def destroy_exec(self, executable: CudaGraphExec) -> None:
        self._call("cudaGraphExecDestroy", executable)

    def launch(self, executable: CudaGraphExec, stream: Stream) -> None:
        self._call("cudaGraphLaunch", executable, stream)

    def _call(self, name: str, *arguments: Any, what: str = "") -> Any:
        """The results of a runtime function, without the error code."""
        code, *results = getattr(self._cuda, name)(*arguments)
        if code != self._ok:
            raise self._error(name, code, what)
        return results[0] if len(results) == 1 else results

    def _error(self, call: str, code: Any, what: str) -> CudaError | NoDevice:
        c = self._cuda
        name = str(getattr(code, "name", code))
        if name in _NO_DEVICE:
            version = c.cudaRuntimeGetVersion()[1]
            return NoDevice("CUDA: " + _NO_DEVICE[name].format(runtime=cuda_version(version)))
        text = c.cudaGetErrorString(code)[1]
        message = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        # Most errors stay until they are read; one that is reported once must not fail the next call as well.
        c.cudaGetLastError()
        error = CudaError(call + what, name, message)
        return CudaError(call + what, name, message, _full(self)) if error.is_out_of_memory else error


def cuda_version(number: int) -> str:
    """12040 -> "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _full(cuda: CudaBindings) -> str:
    """How full the device is, for a message; nothing if it can't even say that."""
    try:
        free, total = cuda.memory()
    except (CudaError, NoDevice):
        return ""
    return (
        f"; {free / 2**20:.0f} of {total / 2**20:.0f} MiB are free: end other programs on this GPU, build for fewer or "
        f"smaller tiers, or choose a smaller precision"
    )
