"""How a backend runs ONNX graphs: what `GraphEngine` and the networks of drafters ask of it. Protocols, no code.

A graph is tied once to fixed buffers, per shape; after that a call is `run` and nothing else, so a backend can capture
it, and the hot path allocates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vla_spec.types import Int32

Array = npt.NDArray[Any]


class TensorSpec(NamedTuple):
    """One input or output of a graph; None = a dynamic dimension."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Call(Protocol):
    """A graph with its buffers."""

    def run(self) -> None:
        """Read the tied inputs, fill the tied outputs. Returns when they are there: one synchronisation."""


class State(Protocol):
    """Tensors that stay where graphs run: key-value caches. Not thread-safe."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, 1, heads, R, head_width]: n cache tensors with R rows each."""

    def move(self, start: int, rows: Int32) -> None:
        """Rows ``rows`` (absolute, ascending, row i >= start + i) become rows start, start + 1, ... O(len(rows))."""

    def clear(self) -> None:
        """All zeros: a row that held NaN would leak through a mask, as 0 * NaN is NaN."""


class Graph(Protocol):
    """An opened graph. Not thread-safe."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """By name."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """By name."""

    def tie(
        self, arrays: Mapping[str, Array], state: State | None = None, state_names: Sequence[tuple[str, str]] = ()
    ) -> Call:
        """Tie the graph to buffers by address.

        Args:
            arrays: host arrays (of `GraphRuntime.empty`) for every input and output that is no state; shapes must be
                ones that the runtime can run (see `GraphRuntime.tiers`). An output that is left out is not wanted.
            state: caches, written in place.
            state_names: name as input and name as output of each of the state's tensors, in order.
        """


class GraphRuntime(Protocol):
    """One library on one device."""

    @property
    def name(self) -> str:
        """Of the engine plugin."""

    @property
    def precision(self) -> str:
        """Of weights and arithmetic: "fp32", "fp16", "int8", ..."""

    @property
    def provider(self) -> str:
        """Where it really runs, as the library reports it."""

    @property
    def is_batch_invariant(self) -> bool:
        """A row's result does not depend on how many rows are in the call, to rounding."""

    @property
    def tiers(self) -> tuple[int, ...] | None:
        """Numbers of rows that a decoder call may have, ascending; None = any. Others are padded up."""

    def open(self, file: Path) -> Graph:
        """Open a graph of a model folder.

        Raises:
            BadModel: missing, corrupt, or not the one that was built.
            SlowPath: it would run somewhere slower than asked for.
        """

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeroed host memory that graphs can be tied to."""

    def state(self, shape: tuple[int, ...]) -> State:
        """Zeroed caches, in the runtime's own precision."""
