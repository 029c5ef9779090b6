"""Buffers that live as long as an engine: page-locked host arrays, device memory beside them, copies between the two.

Host arrays come from few large blocks, one behind the other. Arrays that lie together are copied together: a call with
four small inputs costs one copy instead of four.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from vla_spec.engines._graph_runtime import Array
from vla_spec.engines._trt.cuda import Cuda
from vla_spec.engines._trt.lane import Lane
from vla_spec.errors import VlaSpecError

#: TensorRT wants tensors at multiples of this.
ALIGNMENT = 256
#: Small arrays share blocks of this size. [bytes]
BLOCK = 1 << 20
#: Inputs this far apart are still copied at once: the bytes between them cost less than another copy. [bytes]
MAX_GAP = 4096


def align(size: int) -> int:
    """The next multiple of `ALIGNMENT`, at least one."""
    return max(1, math.ceil(size / ALIGNMENT)) * ALIGNMENT


class Piece(NamedTuple):
    """One copy between host and device, of one or several arrays that lie together. size in bytes."""

    host: int
    device: int
    size: int


@final
class HostArena:
    """Zeroed page-locked numpy arrays. A block is freed when the last array in it is gone, and not before."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._open: Any = None  # the block that small arrays are cut from, a ctypes array
        self._used = 0
        self._starts: list[int] = []  # ascending
        self._sizes: dict[int, int] = {}  # start -> size

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeros, at a multiple of `ALIGNMENT`."""
        kind = np.dtype(dtype)
        size = align(math.prod(shape) * kind.itemsize)
        if size >= BLOCK:
            block, offset = self._block(size), 0
        else:
            if self._open is None or self._used + size > BLOCK:
                self._open, self._used = self._block(BLOCK), 0
            block, offset = self._open, self._used
            self._used += size
        return np.frombuffer(block, kind, math.prod(shape), offset).reshape(shape)

    def block_of(self, array: Array) -> int | None:
        """Address of the block that the array lies in; None = it is not page-locked by this arena."""
        address = array.ctypes.data
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        start = self._starts[at]
        return start if address + array.nbytes <= start + self._sizes[start] else None

    def close(self) -> None:
        """Let go of the block that is being filled; arrays that are still held keep theirs."""
        self._open = None

    def _block(self, size: int) -> Any:
        address = self._cuda.allocate_pinned(size)
        block = (ctypes.c_char * size).from_address(address)
        ctypes.memset(address, 0, size)
        bisect.insort(self._starts, address)
        self._sizes[address] = size
        # numpy arrays hold the ctypes array, so memory is never given back under an array that can still be read.
        # At the end of the process the driver does it; by then CUDA may be gone.
        weakref.finalize(block, _give_back, self._cuda, self._starts, self._sizes, address).atexit = False
        return block


def _give_back(cuda: Cuda, starts: list[int], sizes: dict[int, int], address: int) -> None:
    """Free a block. Not a method: it would keep the arena, and the arena the block."""
    starts.remove(address)
    del sizes[address]
    with contextlib.suppress(VlaSpecError):  # a lost device
        cuda.free_pinned(address)


def place(
    arrays: Mapping[str, Array], arena: HostArena, lane: Lane, max_gap: int
) -> tuple[dict[str, int], list[Piece]]:
    """Give each host array a place on the device, those that lie together one allocation.

    Args:
        arrays: of `HostArena.empty`, or contiguous parts of them.
        arena: where they come from.
        lane: owns the device memory.
        max_gap: arrays with fewer bytes than this between them lie together.

    Returns:
        Name -> device address, and the copies that bring all of them across.
    """
    addresses: dict[str, int] = {}
    pieces = []
    for group in _groups(arrays, arena, max_gap):
        start = arrays[group[0]].ctypes.data
        size = max(arrays[name].ctypes.data + arrays[name].nbytes for name in group) - start
        device = lane.allocate(align(size))
        pieces.append(Piece(start, device, size))
        addresses.update({name: device + arrays[name].ctypes.data - start for name in group})
    return addresses, pieces


def _groups(arrays: Mapping[str, Array], arena: HostArena, max_gap: int) -> Iterable[list[str]]:
    """Names of arrays that can be copied at once, in the order of their addresses."""
    group: list[str] = []
    for name in sorted(arrays, key=lambda name: (arrays[name].ctypes.data, arrays[name].nbytes)):
        array = arrays[name]
        assert array.flags.c_contiguous, name
        if group:
            first, last = arrays[group[0]], arrays[group[-1]]
            gap = array.ctypes.data - (last.ctypes.data + last.nbytes)
            is_aligned = (array.ctypes.data - first.ctypes.data) % ALIGNMENT == 0
            if not (0 <= gap < max_gap and is_aligned and arena.block_of(array) == arena.block_of(first)):
                yield group
                group = []
        group.append(name)
    if group:
        yield group
