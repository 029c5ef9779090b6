"""CUDA on a machine without a GPU, strict: a test double of every function of `vla_spec.engines._trt.cuda.Cuda`.

It moves real bytes, but only when somebody waits: streams are queues, so a result that is read without waiting is not
there, and an order that is wrong gives wrong numbers. Fresh memory is full of ones (floats: NaN). Misuse that real CUDA
punishes with a crash or silence is an AssertionError here.
"""

from __future__ import annotations

import ctypes
from collections import Counter

import numpy as np

from vla_spec.engines._trt.cuda import CopyKind, CudaError, Device
from vla_spec.errors import NoDevice

ALIGNMENT = 256


class FakeCuda:
    """Attributes for tests.

    calls: names of host calls that reach the driver, in order. done: what devices really did, in order, with sizes.
    fail: name of a method -> list of outcomes of its next calls, None = works, a code = fails.
    """

    def __init__(self, memory=1 << 30, capability=(8, 9), num_devices=1):
        self.calls, self.done = [], []
        self.fail = {}
        self._memory, self._capability, self._num = memory, capability, num_devices
        self.device_blocks, self.pinned_blocks = {}, {}  # address -> numpy array over it
        self.streams, self.events, self.graphs, self.execs = {}, {}, {}, {}
        self._next = 1000
        self._capturing = {}  # stream -> operations
        self.current = None

    # --- for tests ---

    def count(self, name):
        return Counter(self.calls)[name]

    def forget(self):
        self.calls.clear()
        self.done.clear()

    @property
    def live(self):
        """Everything that was made and not given back."""
        kinds = ("device_blocks", "pinned_blocks", "streams", "events", "graphs", "execs")
        return {kind: len(getattr(self, kind)) for kind in kinds if getattr(self, kind)}

    @property
    def used(self):
        return sum(block.nbytes for block in self.device_blocks.values())

    def view(self, address, size):
        """The bytes of live device memory, for a kernel."""
        return self._bytes(address, size, self.device_blocks, "device")

    def is_capturing(self, stream):
        return stream in self._capturing

    def enqueue(self, stream, name, work):
        """Add an operation to a stream, or to what is captured from it."""
        assert stream in self.streams, f"{name}: stream {stream} does not live"
        self._capturing.get(stream, self.streams[stream]["queue"]).append((name, work))

    # --- Cuda ---

    def num_devices(self):
        self._enter("num_devices")
        if not self._num:
            raise NoDevice("CUDA: no NVIDIA GPU is visible (see nvidia-smi and CUDA_VISIBLE_DEVICES)")
        return self._num

    def use(self, index):
        count = self.num_devices()
        if not 0 <= index < count:
            raise NoDevice(f"CUDA: no device {index}; valid: 0 to {count - 1}")
        self._enter("use")
        self.current = index

    def device(self, index):
        return Device(index, "Fake GPU", self._capability, self._memory, 76, 48 << 20, 192, False, False, 13000, 13000)

    def memory(self):
        return self._memory - self.used, self._memory

    def allocate(self, size):
        self._enter("allocate")
        assert not self._capturing, "cudaMalloc breaks a capture"
        assert size > 0
        if self.used + size > self._memory:
            raise CudaError("cudaMalloc", "cudaErrorMemoryAllocation", "out of memory", "; 0 of 1 MiB are free")
        return self._take(size, self.device_blocks)

    def free(self, address):
        self._enter("free")
        self._drop(address, self.device_blocks)

    def allocate_pinned(self, size):
        self._enter("allocate_pinned")
        assert not self._capturing, "cudaHostAlloc breaks a capture"
        return self._take(size, self.pinned_blocks)

    def free_pinned(self, address):
        self._enter("free_pinned")
        self._drop(address, self.pinned_blocks)

    def priorities(self):
        return 0, -5

    def stream(self, priority):
        self._enter("stream")
        assert -5 <= priority <= 0
        return self._make(self.streams, {"priority": priority, "queue": []})

    def destroy_stream(self, stream):
        self._enter("destroy_stream")
        self._drain(stream)
        del self.streams[stream]

    def synchronize(self, stream):
        self._enter("synchronize")
        assert stream not in self._capturing, "a capture was broken by waiting for its stream"
        self._drain(stream)

    def event(self, is_blocking, has_timing=False):
        self._enter("event")
        return self._make(self.events, {"blocking": is_blocking, "timing": has_timing, "at": None})

    def destroy_event(self, event):
        self._enter("destroy_event")
        del self.events[event]

    def record(self, event, stream):
        self._enter("record")
        assert stream not in self._capturing, "an event of a capture can't be waited for"
        mark = object()
        self.events[event]["at"] = (stream, mark)
        self.streams[stream]["queue"].append(("mark", mark))

    def wait(self, event):
        self._enter("wait")
        at = self.events[event]["at"]
        assert at is not None, "an event that was never recorded"
        self._drain(*at)

    def elapsed_ms(self, start, end):
        assert all(self.events[event]["timing"] for event in (start, end)), "made without timing"
        return 0.25

    def copy(self, target, source, size, kind, stream):
        self._enter("copy")
        to, of = self._pair(target, source, size, size, kind)
        self.enqueue(stream, f"{kind.name.lower()} {size}", lambda: to.__setitem__(slice(None), of))

    def copy_2d(self, target, target_pitch, source, source_pitch, width, height, kind, stream):
        self._enter("copy_2d")
        assert width <= min(target_pitch, source_pitch)
        spans = [(height - 1) * pitch + width for pitch in (target_pitch, source_pitch)]
        to, of = self._pair(target, source, *spans, kind)

        def rows(flat, pitch):
            return np.lib.stride_tricks.as_strided(flat, (height, width), (pitch, 1))

        if kind is CopyKind.DEVICE_TO_DEVICE and target_pitch == source_pitch:
            assert abs(target - source) % target_pitch >= width, "source and target overlap: undefined"

        def work():
            rows(to, target_pitch)[:] = rows(of, source_pitch)

        self.enqueue(stream, f"copy_2d {width}x{height}", work)

    def fill(self, target, value, size, stream):
        self._enter("fill")
        to = self.view(target, size)
        self.enqueue(stream, f"fill {size}", lambda: to.fill(value))

    def begin_capture(self, stream):
        self._enter("begin_capture")
        assert stream not in self._capturing
        self._capturing[stream] = []

    def end_capture(self, stream):
        operations = self._capturing.pop(stream)  # also where it fails: the stream is usable again
        self._enter("end_capture")
        return self._make(self.graphs, operations)

    def num_nodes(self, graph):
        return len(self.graphs[graph])

    def instantiate(self, graph):
        self._enter("instantiate")
        return self._make(self.execs, list(self.graphs[graph]))

    def destroy_graph(self, graph):
        self._enter("destroy_graph")
        del self.graphs[graph]

    def destroy_exec(self, executable):
        self._enter("destroy_exec")
        del self.execs[executable]

    def launch(self, executable, stream):
        self._enter("launch")
        assert stream not in self._capturing
        for name, work in self.execs[executable]:
            self.enqueue(stream, name, work)

    # --- inside ---

    def _enter(self, name):
        self.calls.append(name)
        outcomes = self.fail.get(name)
        code = outcomes.pop(0) if outcomes else None
        if code:
            raise CudaError(name, code, "made to fail by a test")

    def _make(self, kind, value):
        self._next += 1
        kind[self._next] = value
        return self._next

    def _take(self, size, blocks):
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        block = raw[offset : offset + size]
        blocks[block.ctypes.data] = block
        return block.ctypes.data

    def _drop(self, address, blocks):
        assert address in blocks, "freed twice, or never allocated"
        for stream in self.streams:  # cudaFree waits for the device
            self._drain(stream)
        blocks.pop(address).fill(0xEE)

    def _bytes(self, address, size, blocks, where):
        for start, block in blocks.items():
            if start <= address and address + size <= start + block.nbytes:
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not in live {where} memory")

    def _pair(self, target, source, target_size, source_size, kind):
        host = self.pinned_blocks, "page-locked"
        device = self.device_blocks, "device"
        to = host if kind is CopyKind.DEVICE_TO_HOST else device
        of = host if kind is CopyKind.HOST_TO_DEVICE else device
        return self._bytes(target, target_size, *to), self._bytes(source, source_size, *of)

    def _drain(self, stream, mark=None):
        """Do what is queued, up to a mark that is still there."""
        queue = self.streams[stream]["queue"]
        if mark is not None and not any(work is mark for _, work in queue):
            return
        while queue:
            name, work = queue.pop(0)
            if name == "mark":
                if work is mark:
                    return
                continue
            work()
            self.done.append(name)


def host_array(address, shape, dtype):
    """An array over raw memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
