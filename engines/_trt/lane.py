"""A lane: one stream of some priority, and everything on the device that belongs to it, freed together."""

from __future__ import annotations

import contextlib
import threading
from contextlib import ExitStack
from typing import Any, final

from vla_spec.engines._trt.cuda import Cuda
from vla_spec.errors import DeviceError, VlaSpecError


@final
class Lane:
    """Not thread-safe, but it may be used from one thread after another.

    Args:
        cuda: CUDA.
        device: number of the GPU.
        priority: of the stream, see `Cuda.priorities`.
        is_blocking: the host sleeps while it waits, instead of spinning.
    """

    def __init__(self, cuda: Cuda, device: int, priority: int, is_blocking: bool) -> None:
        self.cuda, self.device, self.priority, self.is_open = cuda, device, priority, True
        self._thread = threading.get_ident()
        #: Frees what is made for the lane, last first.
        self.owned = ExitStack()
        with ExitStack() as made:
            self.stream: Any = cuda.stream(priority)
            made.callback(cuda.destroy_stream, self.stream)
            self.done: Any = cuda.event(is_blocking)
            made.callback(cuda.destroy_event, self.done)
            self.owned = made.pop_all()
        #: The stream as TensorRT wants it.
        self.handle = int(self.stream)

    def enter(self) -> None:
        """Make the device current in this thread, if the last one was another. Cheap."""
        if threading.get_ident() != self._thread:
            self.cuda.use(self.device)
            self._thread = threading.get_ident()
        if not self.is_open:
            raise DeviceError("the TensorRT engine was closed; make a new one")

    def allocate(self, size: int) -> int:
        """Device memory for as long as the lane lives. Returns the address."""
        self.enter()
        address = self.cuda.allocate(size)
        self.owned.callback(self.cuda.free, address)
        return address

    def settle(self) -> None:
        """Wait until everything in the stream is done. Not for the hot path."""
        self.enter()
        self.cuda.synchronize(self.stream)

    def close(self) -> None:
        """Free everything. What fails, as all does on a lost device, keeps nothing else from being freed."""
        if not self.is_open:
            return
        with contextlib.suppress(VlaSpecError):
            self.settle()
        self.is_open = False
        with contextlib.suppress(VlaSpecError):
            self.owned.close()
