"""One record in memory that two processes share: one of them writes, the other reads, and neither ever waits.

A counter is odd while the record is being written. The reader takes a copy and keeps it only if the counter stood
still meanwhile and the copy has the checksum that was written with it; else it tries again some other time. The
checksum makes this safe on processors that show another core's writes in another order (ARM), where a counter alone
is not enough.

Source: the sequence lock of the Linux kernel (Documentation/locking/seqlock.rst), with a checksum in place of barriers.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import zlib
from typing import Any, final

import numpy as np
import numpy.typing as npt

_HEADER = np.dtype([("sequence", "<u8"), ("checksum", "<u8")])


def open_memory(num_bytes: int) -> int:
    """A file in memory for two processes. Returns its descriptor, to be closed by the caller."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("vla_spec")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def size_of(*layouts: np.dtype[Any]) -> int:
    """Bytes of shared memory that slots of these layouts need, one behind the other."""
    return sum(_aligned(_HEADER.itemsize + layout.itemsize) for layout in layouts)


def slots_in(descriptor: int, *layouts: np.dtype[Any]) -> tuple[Slot, ...]:
    """The slots of a shared file, in the order of `size_of`. The descriptor may be closed afterwards."""
    memory = mmap.mmap(descriptor, size_of(*layouts))
    slots, offset = [], 0
    for layout in layouts:
        slots.append(Slot(memory, offset, layout))
        offset += size_of(layout)
    return tuple(slots)


@final
class Slot:
    """The newest record, as seen by its writer or by its reader. Nothing is allocated after construction.

    ``fields`` are arrays of this side's own memory, by name: the writer fills them and calls `publish`, the reader
    calls `poll` and, if that says True, finds them filled. A record that nobody took in time is overwritten.
    """

    def __init__(self, memory: mmap.mmap, offset: int, layout: np.dtype[Any]) -> None:
        header = np.ndarray((), _HEADER, memory, offset)
        self._sequence, self._checksum = header["sequence"], header["checksum"]
        self._shared = np.ndarray((layout.itemsize,), np.uint8, memory, offset + _HEADER.itemsize)
        self._own = np.zeros(layout.itemsize, np.uint8)
        record = np.ndarray((), layout, self._own.data)
        self.fields: dict[str, npt.NDArray[Any]] = {name: record[name] for name in layout.names or ()}
        self._seen = 0

    def publish(self) -> None:
        """Make what is in ``fields`` the newest record. For the writer."""
        number = int(self._sequence) | 1  # odd, also if a writer died in the middle
        self._sequence[...] = number
        self._shared[:] = self._own
        self._checksum[...] = zlib.crc32(self._own.data)
        self._sequence[...] = number + 1

    def poll(self) -> bool:
        """Take the newest record into ``fields`` if there is a new one. For the reader."""
        number = int(self._sequence)
        if number == self._seen or number % 2:
            return False
        checksum = int(self._checksum)
        self._own[:] = self._shared
        if int(self._sequence) != number or zlib.crc32(self._own.data) != checksum:
            return False
        self._seen = number
        return True

    def forget(self) -> None:
        """What was published so far is nothing new. For the reader."""
        self._seen = int(self._sequence)


def _aligned(num_bytes: int) -> int:
    """Rounded up to a whole cache line, so that two slots never share one."""
    return -(-num_bytes // 64) * 64
