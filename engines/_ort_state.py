"""Key-value caches as ONNX Runtime's own values: on the device of the provider that writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, final

import numpy as np

from vla_spec.engines._graph_runtime import Array
from vla_spec.types import Int32


class Mover(Protocol):
    """Runs the graph that moves rows: ``commit.onnx`` or one like it."""

    def __call__(self, state: OrtState, rows: Array, write_index: Array) -> Callable[[], None]:
        """Tie it to a state and to arrays of this length; returns what runs it."""


@final
class OrtState:
    """Cache tensors [n, 1, heads, R, head_width] in the memory of a device. Not thread-safe.

    Where the provider does not write in place there are two sets of tensors, one to read and one to write, which change
    places after every call (`alternate`).

    Args:
        ort: the library.
        shape: as above.
        device: as the library names it: "cpu", "cuda".
        device_id: which of them.
        mover: see `Mover`.
    """

    def __init__(self, ort: Any, shape: tuple[int, ...], device: str, device_id: int, mover: Mover) -> None:
        self.shape = shape
        self._mover, self._zeros = mover, np.zeros(shape[1:], np.float32)

        def allocate() -> list[Any]:
            return [ort.OrtValue.ortvalue_from_numpy(self._zeros.copy(), device, device_id) for _ in range(shape[0])]

        self._allocate = allocate
        self._sets = [allocate()]
        self._current = 0
        self._moves: dict[int, tuple[Array, Array, Callable[[], None]]] = {}

    @property
    def current(self) -> int:
        """Which set is read by the next call."""
        return self._current

    @property
    def sets(self) -> list[tuple[list[Any], list[Any]]]:
        """What a call reads and what it writes, by `current`."""
        return [(self._sets[i], self._sets[(i + 1) % len(self._sets)]) for i in range(len(self._sets))]

    def separate(self) -> None:
        """From now on calls write into other tensors than they read. Calls that were tied before are void."""
        if len(self._sets) == 1:
            self._sets.append(self._allocate())
        self._moves.clear()

    def alternate(self) -> None:
        """After a call: what was written is what is read next."""
        self._current = (self._current + 1) % len(self._sets)

    def read(self) -> Array:
        """float32, a copy in host memory."""
        return np.stack([value.numpy() for value in self._sets[self._current]])

    def write(self, values: Array) -> None:
        """Set all of it from host memory."""
        for tensor, value in zip(self._sets[self._current], values, strict=True):
            tensor.update_inplace(np.ascontiguousarray(value, np.float32))

    def move(self, start: int, rows: Int32) -> None:
        """Rows ``rows`` become rows start, start + 1, ..."""
        count = len(rows)
        if count not in self._moves:
            arrays = np.zeros(count, np.int64), np.zeros(1, np.int64)
            self._moves[count] = (*arrays, self._mover(self, *arrays))
        kept, write_index, run = self._moves[count]
        kept[:] = rows
        write_index[0] = start
        run()

    def clear(self) -> None:
        """All zeros."""
        for tensor in self._sets[self._current]:
            tensor.update_inplace(self._zeros)
