"""Score tokens with TensorRT on an NVIDIA GPU: built engines from the cache, one CUDA graph launch per round.

The same for ``tensorrt`` (a robot's) and ``tensorrt_rtx`` (a workstation's). See docs/tensorrt-runtime.md and
docs/decisions/0023-tensorrt-runtime.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vla_spec.engines import cache
from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._model_files import GOLDEN, require_model_dir
from vla_spec.engines._trt.cuda import Cuda, CudaBindings
from vla_spec.engines._trt.graph import TensorRTGraph
from vla_spec.engines._trt.library import MODULES, Library, open_library
from vla_spec.engines._trt.runtime import ITEMSIZE, Plans, Running, TensorRTRuntime
from vla_spec.errors import BadConfig, BadEngine, BadModel, MissingDependency, SlowPath
from vla_spec.plugins import Parts
from vla_spec.types import EngineInputs

#: Types of tensors between kernels that count, and those that an engine of some precision may have.
FLOATS = ("fp32", "fp16", "bf16", "int8", "fp8", "fp4")
ALLOWED = {
    "fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("bf16",), "int8": ("int8", "fp16"), "fp8": ("fp8", "fp16", "bf16"),
}  # fmt: skip
#: Norms, softmax, and inputs and outputs may be in single precision; not most of an engine.
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Options:
    """How to run.

    max_step: most tokens of one step; None = as many as graph and tiers allow.
    precision: "fp16", "bf16" or "int8": which of the built engines to take.
    tiers: take the engine that was built for exactly these sizes; None = the newest. One size for all steps makes the
        engine batch-invariant: every step then runs the same kernels.
    library: "tensorrt", "tensorrt-rtx", or "auto": the first of these that is installed.
    cache: folder of the engine cache; "" = the user's.
    allow_build: build the engine if it is missing, which takes seconds to minutes; else that is an error.
    device: number of the GPU.
    cuda_graphs: "always" (a size that can't be captured is an error), "if_possible", "never".
    wait: "spin": answers soonest, a core is busy meanwhile; "block": the host sleeps until the GPU is done.
    allow_slow: take an engine most of whose kernels are not in its precision.
    priority, drafter_priority: "low", "normal" or "high": of the target's stream and of the one that drafters get.
    """

    max_step: int | None = None
    precision: str = "fp16"
    tiers: tuple[int, ...] | None = None
    library: str = "auto"
    cache: str = ""
    allow_build: bool = False
    device: int = 0
    cuda_graphs: str = "always"
    wait: str = "spin"
    allow_slow: bool = False
    priority: str = "high"
    drafter_priority: str = "low"

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("library", self.library, ("auto", *MODULES)), ("precision", self.precision, tuple(ITEMSIZE)),
        ):  # fmt: skip
            if value not in valid:
                raise BadConfig(f"engine tensorrt: {name} {value!r}; valid: {', '.join(valid)}")
        if self.max_step is not None and self.max_step < 1:
            raise BadConfig(f"engine tensorrt: max_step {self.max_step}; valid: 1 or more")
        _ = self.running

    @property
    def running(self) -> Running:
        """The part that is the runtime's."""
        return Running(self.device, self.cuda_graphs, self.wait, self.priority, self.drafter_priority)


class Machine(NamedTuple):
    """What an engine runs with: the libraries of this machine, or doubles of them in tests."""

    cuda: Cuda
    library: Library


def this_machine(library: str = "auto") -> Machine:
    """CUDA and TensorRT as they are installed here.

    Raises:
        MissingDependency: a library is missing; says how to get it.
    """
    return Machine(CudaBindings(), find_library(library))


def find_library(name: str = "auto") -> Library:
    """TensorRT, or for "auto" the first one that is installed.

    Raises:
        MissingDependency: not installed.
    """
    if name != "auto":
        return open_library(name)
    reasons = []
    for backend in MODULES:
        try:
            return open_library(backend)
        except MissingDependency as error:
            reasons.append(error)
    raise reasons[-1]


def plans_of(machine: Machine, options: Options) -> Callable[[Path], Plans]:
    """Model folder -> its engine in the cache, for this GPU and library; built if that is allowed."""
    device = machine.cuda.device(options.device)
    library = machine.library
    folder = Path(options.cache).expanduser() if options.cache else None
    wanted = cache.Wanted(
        library.backend, library.version, options.precision, device.sm,
        None if library.builds_ahead else cache.device_identity(device), options.tiers,
    )  # fmt: skip

    def find(model_dir: Path) -> Plans:
        try:
            return cache.load(model_dir, wanted, folder)
        except BadEngine:
            if not options.allow_build:
                raise
        from vla_spec.engines._trt.builder import BuilderOptions
        from vla_spec.engines.build import BuildOptions, build_engine
        from vla_spec.progress import Silent

        builder = BuilderOptions((device.sm,) if library.builds_ahead else ())
        wanted_build = BuildOptions(library.backend, options.precision, options.tiers, builder)
        return build_engine(model_dir, wanted_build, Silent(), folder, None if library.builds_ahead else device)

    return find


def load(model_dir: Path, options: Options, machine: Machine | None = None) -> GraphEngine:
    """An engine that is checked against the golden inputs, with every step size captured.

    Raises:
        MissingDependency: TensorRT or cuda-bindings is not installed.
        NoDevice: no GPU, or no driver.
        BadModel: no engine was built for this model and GPU, or it is damaged, or it does not compute the model.
        BadConfig: max_step is more than the engine was built for.
        SlowPath: a size can't be captured, or most kernels are in another precision.
        DeviceError: the GPU refuses, for lack of memory say. Nothing stays behind then.
    """
    model_dir = require_model_dir(model_dir)
    machine = machine or this_machine(options.library)
    machine.cuda.use(options.device)
    runtime = TensorRTRuntime(model_dir, plans_of(machine, options), machine.library, machine.cuda, options.running)
    try:
        engine = GraphEngine(model_dir, runtime, _max_step(model_dir, options, runtime))
        if not options.allow_slow:
            for graph in runtime.graphs:
                check_layers(graph, runtime.precision)
        warm_up(engine, model_dir)
    except BaseException:
        runtime.close()
        raise
    runtime.save_kernels()
    return engine


def golden_inputs(model_dir: Path) -> EngineInputs:
    """Inputs of a prefill that fit the model, whatever it is."""
    with np.load(model_dir / GOLDEN, allow_pickle=False) as golden:
        names = [name for name in golden.files if not name.endswith(("_logits", "_tokens", "_parents"))]
        return {name: golden[name] for name in names}


def warm_up(engine: GraphEngine, model_dir: Path) -> None:
    """Run every step size once, so that each is captured before a robot waits for it. Commits nothing."""
    runtime = engine.runtime
    inputs = golden_inputs(model_dir)
    engine.prefill(inputs)
    for tier in runtime.tiers or ():
        size = min(tier, engine.max_step)
        engine.step(np.zeros(size, np.int32), np.arange(-1, size - 1, dtype=np.int32))
    engine.prefill(inputs)


def check_layers(graph: TensorRTGraph, precision: str) -> float | None:
    """Refuse an engine that fell back: TensorRT may choose another precision and not say so (TensorRT #4590).

    Args:
        graph: loaded, on its device.
        precision: that its manifest says.

    Returns:
        Share of floating-point tensors between kernels that are in the precision; None = the engine does not tell.

    Raises:
        SlowPath: it is less than half.
    """
    formats = {kind: count for kind, count in graph.engine.inspect().formats.items() if kind in FLOATS}
    if not formats:
        return None
    share = sum(formats.get(kind, 0) for kind in ALLOWED[precision]) / sum(formats.values())
    if share < LEAST_SHARE:
        found = ", ".join(f"{count} in {kind}" for kind, count in formats.items())
        raise SlowPath(
            f"{graph.name}: built for {precision}, but of the tensors between its kernels there are {found}: TensorRT "
            f"fell back; build it again, with another precision maybe, or take it as it is with `allow_slow: true`"
        )
    return share


def _max_step(model_dir: Path, options: Options, runtime: TensorRTRuntime) -> int:
    """As asked for, or as many tokens as there is a tier for."""
    largest = runtime.largest_step
    if not largest:
        raise BadModel(f"{model_dir}: its engine has no size for steps; build it again with `vla-spec build --tiers`")
    if options.max_step is not None and options.max_step > largest:
        raise BadConfig(
            f"engine tensorrt: max_step {options.max_step}; valid: 1 to {largest}, the largest step that the engine "
            f"was built for (see `vla-spec build --tiers`)"
        )
    return options.max_step or largest


def build(options: Options, parts: Parts) -> GraphEngine:
    """From configuration."""
    return load(require_model_dir(parts.model_dir), options)
