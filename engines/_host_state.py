"""Key-value caches in host memory, for runtimes on the CPU."""

from __future__ import annotations

from typing import final

import numpy as np

from vla_spec.types import Float32, Int32


@final
class HostState:
    """Cache tensors [n, 1, heads, R, head_width] as one numpy array. Not thread-safe."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.tensors: Float32 = np.zeros(shape, np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, 1, heads, R, head_width]."""
        return self.tensors.shape

    def move(self, start: int, rows: Int32) -> None:
        """Rows ``rows`` become rows start, start + 1, ..."""
        # The right side is gathered into a copy first, so overlapping is no matter.
        self.tensors[:, :, :, start : start + len(rows)] = self.tensors[:, :, :, rows]

    def clear(self) -> None:
        """All zeros."""
        self.tensors.fill(0)
