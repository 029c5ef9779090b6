"""Key-value caches in device memory: one allocation, and one copy per row that a tree commits, however many layers.

All layers' keys and values lie behind each other, so row r of every head of every layer lies one pitch apart, and a
strided copy moves it everywhere at once. Tensors must begin at multiples of 256 bytes: where they don't by themselves,
there is room for some heads more between them, so that rows stay one pitch apart. A chain that is accepted from its
root moves nothing at all.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import final

import numpy as np

from vla_spec.engines._trt.cuda import CopyKind
from vla_spec.engines._trt.lane import Lane
from vla_spec.engines._trt.memory import ALIGNMENT
from vla_spec.types import Int32, UInt8


@final
class DeviceState:
    """Cache tensors [n, 1, heads, R, head_width] on the device, each at a multiple of 256 bytes. Not thread-safe.

    Args:
        shape: of all tensors together.
        itemsize: of one number. [bytes]
        lane: whose order the copies keep, and who frees the memory.
    """

    def __init__(self, shape: tuple[int, ...], itemsize: int, lane: Lane) -> None:
        _, one, self._num_heads, self._num_rows, width = shape
        assert one == 1, shape
        self._shape, self._lane = shape, lane
        self.itemsize = itemsize
        self._row_bytes = width * itemsize
        self._pitch = self._num_rows * self._row_bytes  # from a head to the next
        self._tensor_bytes = self._num_heads * self._pitch
        self._stride = _slots(shape, itemsize) * self._pitch  # from a tensor to the next
        self.size = state_bytes(shape, itemsize)
        self._start = lane.allocate(self.size)
        self.clear()

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, 1, heads, R, head_width]."""
        return self._shape

    @property
    def addresses(self) -> list[int]:
        """Device address of each tensor."""
        return [self._start + i * self._stride for i in range(self._shape[0])]

    def move(self, start: int, rows: Int32) -> None:
        """Rows ``rows`` become rows start, start + 1, ...; in the stream's order, nobody waits."""
        lane = self._lane
        lane.enter()
        height = self.size // self._pitch
        for target, source, count in _runs(start, rows.tolist()):
            lane.cuda.copy_2d(
                self._start + target * self._row_bytes, self._pitch, self._start + source * self._row_bytes,
                self._pitch, count * self._row_bytes, height, CopyKind.DEVICE_TO_DEVICE, lane.stream,
            )  # fmt: skip

    def read(self) -> UInt8:
        """All rows as bytes, uint8 [n, heads, R, row bytes]. For checks: it waits, and copies everything."""
        lane, n = self._lane, self._shape[0]
        lane.settle()
        address = lane.cuda.allocate_pinned(self.size)
        try:
            lane.cuda.copy(address, self._start, self.size, CopyKind.DEVICE_TO_HOST, lane.stream)
            lane.settle()
            content = np.frombuffer(ctypes.string_at(address, self.size), np.uint8)
        finally:
            lane.cuda.free_pinned(address)
        tensors = content.reshape(n, self._stride)[:, : self._tensor_bytes]
        return tensors.reshape(n, self._num_heads, self._num_rows, self._row_bytes)

    def clear(self) -> None:
        """All zeros; in the stream's order."""
        self._lane.enter()
        self._lane.cuda.fill(self._start, 0, self.size, self._lane.stream)


def _runs(start: int, rows: list[int]) -> Iterator[tuple[int, int, int]]:
    """(target, source, count) of copies that move neighbours together; none overlaps itself, none is for nothing."""
    i = 0
    while i < len(rows):
        target, source = start + i, rows[i]
        assert source >= target, f"{rows=} {start=}"
        count = 1
        # A copy may be as long as source and target are apart: beyond that it would read what it has written.
        while i + count < len(rows) and rows[i + count] == source + count and count < source - target:
            count += 1
        if source != target:
            yield target, source, count
        i += count


def state_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Device memory that a `DeviceState` of this shape takes."""
    n, _, _, num_rows, width = shape
    return n * _slots(shape, itemsize) * num_rows * width * itemsize


def _slots(shape: tuple[int, ...], itemsize: int) -> int:
    """Heads that there is room for in each tensor: the real ones, up to where the next tensor is aligned."""
    _, _, num_heads, num_rows, width = shape
    unit = ALIGNMENT // math.gcd(num_rows * width * itemsize, ALIGNMENT)
    return math.ceil(num_heads / unit) * unit
