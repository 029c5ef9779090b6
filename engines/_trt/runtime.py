"""TensorRT as a `GraphRuntime`: finds each graph's plan, and gives it memory and a place in a stream.

The same code drives ``tensorrt`` and ``tensorrt_rtx``; what only one of them has is asked for by looking for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import numpy.typing as npt

from vla_spec.engines._graph_runtime import Array
from vla_spec.engines._model_files import ModelFiles
from vla_spec.engines._trt.cache_state import DeviceState
from vla_spec.engines._trt.cuda import Cuda, Device, cuda_version
from vla_spec.engines._trt.graph import Capture, TensorRTGraph
from vla_spec.engines._trt.lane import Lane
from vla_spec.engines._trt.library import Library
from vla_spec.engines._trt.loaded import LoadedEngine
from vla_spec.engines._trt.memory import HostArena
from vla_spec.errors import BadConfig, BadModel, DeviceError

#: Size of one number in the cache, by precision. int8 engines keep their cache in half precision.
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 2, "fp8": 2}
#: Word in the configuration -> how far from the least priority to the greatest.
PRIORITIES = {"low": 0.0, "normal": 0.5, "high": 1.0}


class Plans(Protocol):
    """The built engines of one model folder: `vla_spec.engines.cache.BuiltEngine`."""

    @property
    def precision(self) -> str:
        """See `ITEMSIZE`."""

    @property
    def tiers(self) -> tuple[int, ...]:
        """Numbers of rows that the decoder was built for, ascending, the prompt's among them."""

    def plan_file(self, graph: str) -> Path:
        """The plan of a graph, named as its ONNX file without the suffix. Raises BadModel if none was built."""

    def read_plan(self, graph: str) -> bytes:
        """Its bytes, checked. Raises BadModel if they are not what was built."""


@dataclass(frozen=True, slots=True)
class Running:
    """How engines run.

    Attributes:
        device: number of the GPU.
        cuda_graphs: "always" (refuse what can't be captured), "if_possible", "never".
        wait: "spin" (the host polls: soonest, one busy core) or "block" (the host sleeps until the GPU is done).
        priority: of the target's stream: low, normal, high.
        drafter_priority: of the stream that drafters get.
    """

    device: int = 0
    cuda_graphs: str = "always"
    wait: str = "spin"
    priority: str = "high"
    drafter_priority: str = "low"

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("cuda_graphs", self.cuda_graphs, [mode.value for mode in Capture]),
            ("wait", self.wait, ["spin", "block"]),
            ("priority", self.priority, list(PRIORITIES)),
            ("drafter_priority", self.drafter_priority, list(PRIORITIES)),
        ):
            if value not in valid:
                raise BadConfig(f"{name} {value!r}; valid: {', '.join(valid)}")
        if self.device < 0:
            raise BadConfig(f"device {self.device}; valid: 0 or more")


@final
class TensorRTRuntime:
    """Runs the graphs of one model on one GPU, in one stream. Not thread-safe.

    Args:
        model_dir: folder whose graphs it runs.
        find: model folder -> its built engines.
        library: TensorRT or TensorRT-RTX.
        cuda: CUDA.
        running: how to run.
        priority: of the stream; None = as for targets.

    Raises:
        NoDevice: no GPU, or no driver for it.
        DeviceError: no memory.
        BadModel: no engines of this model, or damaged ones.
    """

    name = "tensorrt"

    def __init__(
        self, model_dir: Path, find: Callable[[Path], Plans], library: Library, cuda: Cuda,
        running: Running | None = None, priority: str | None = None,
    ) -> None:  # fmt: skip
        self._running = running = running or Running()
        self._model_dir, self._find, self._library, self._cuda = model_dir.resolve(), find, library, cuda
        cuda.use(running.device)
        self._device = cuda.device(running.device)
        self._plans = find(model_dir)
        if self._plans.precision not in ITEMSIZE:
            raise BadModel(f"{model_dir}: its engine is in {self._plans.precision!r}; valid: {', '.join(ITEMSIZE)}")
        self._step_tiers = [n for n in self._plans.tiers if n <= ModelFiles.describe(model_dir).decoder.max_step]
        least, greatest = cuda.priorities()
        level = round(least + (greatest - least) * PRIORITIES[priority or running.priority])
        self.lane = Lane(cuda, running.device, level, running.wait == "block")
        # Whoever forgets to close the runtime gets it closed when nothing runs on it any more.
        self._closing = weakref.finalize(self, self.lane.close)
        self._arena = HostArena(cuda)
        self._trt_runtime: Any = None
        self._graphs: list[weakref.ref[TensorRTGraph]] = []

    @property
    def precision(self) -> str:
        """What the engines were built in."""
        return self._plans.precision

    @property
    def provider(self) -> str:
        """Library and GPU."""
        d = self._device
        return f"{self._library.backend} {self._library.version} on {d.name} (SM {d.sm}, CUDA {cuda_version(d.driver)})"

    @property
    def is_batch_invariant(self) -> bool:
        """True if all steps have the same size.

        Kernels are chosen per size, and sum in half precision in different orders. With one size there is one kernel,
        and what it computes for a row does not depend on what is in the others.
        """
        return self.precision == "fp32" or len(self._step_tiers) == 1

    @property
    def tiers(self) -> tuple[int, ...] | None:
        """Numbers of rows that were built for."""
        return self._plans.tiers

    @property
    def largest_step(self) -> int:
        """Most tokens of one step; a larger one would be padded to a prompt's size, beyond the end of the cache."""
        return max(self._step_tiers, default=0)

    @property
    def device(self) -> Device:
        """The GPU."""
        return self._device

    @property
    def graphs(self) -> list[TensorRTGraph]:
        """What is open on this runtime."""
        return [graph for ref in self._graphs if (graph := ref()) is not None]

    def aside(self, model_dir: Path | None = None) -> TensorRTRuntime:
        """Another stream in the same CUDA context, with the drafters' priority, for this model or another one."""
        return TensorRTRuntime(
            model_dir or self._model_dir, self._find, self._library, self._cuda, self._running,
            self._running.drafter_priority,
        )  # fmt: skip

    def open(self, file: Path) -> TensorRTGraph:
        """Deserialise the plan that was built from this graph.

        Raises:
            BadModel: none was built, it is of another model, or TensorRT can't read it; says why as far as it does.
            DeviceError: the GPU refuses it.
        """
        self.lane.enter()
        if file.parent.resolve() != self._model_dir:
            raise BadModel(f"{file}: not of {self._model_dir}, whose engines this runtime has")
        plan = self._plans.read_plan(file.stem)
        engine = LoadedEngine(self._library, self._runtime(), plan, self._plans.plan_file(file.stem))
        self.lane.owned.callback(engine.close)
        graph = TensorRTGraph(file.stem, engine, self.lane, self._arena, Capture(self._running.cuda_graphs), self)
        self._graphs.append(weakref.ref(graph))
        return graph

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeroed page-locked memory."""
        self.lane.enter()
        return self._arena.empty(shape, dtype)

    def state(self, shape: tuple[int, ...]) -> DeviceState:
        """Zeroed caches on the device."""
        return DeviceState(shape, ITEMSIZE[self.precision], self.lane)

    def save_kernels(self) -> None:
        """Keep what TensorRT-RTX compiled for this GPU, so that the next start need not. Nothing for TensorRT.

        The file lies beside the plan and is a cache of its library's, which checks it; without it all works, later.
        """
        for graph in self.graphs:
            graph.engine.save_kernels()

    def close(self) -> None:
        """Free everything on the device. Engines on this runtime can't run any more. More than once is fine."""
        self._closing()
        self._arena.close()
        self._trt_runtime = None

    def __enter__(self) -> TensorRTRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _runtime(self) -> Any:
        """The library's runtime, one per lane; engines keep it alive."""
        if self._trt_runtime is None:
            self._trt_runtime = self._library.module.Runtime(self._library.log)
            if self._trt_runtime is None:
                raise DeviceError(f"{self._library.backend} can't start ({self._library.messages()})")
        return self._trt_runtime
