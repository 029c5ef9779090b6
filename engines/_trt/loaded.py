"""A deserialised plan: checked before, described once, and the only holder of the library's objects.

TensorRT answers failure with None; what it has to say goes to its logger. Everything here turns that into one sentence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from vla_spec.atomic import replacing
from vla_spec.engines._graph_runtime import TensorSpec
from vla_spec.engines._trt.inspection import EngineSummary, inspect_engine
from vla_spec.engines._trt.library import Library
from vla_spec.errors import BadModel, DeviceError

#: Why TensorRT-RTX calls a plan invalid -> what to do about it.
REMEDIES = {
    "VERSION_MISMATCH": "it was built with another version; build it again",
    "UNSUPPORTED_CC": "it was built for GPUs of another compute capability; build it for this one",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it; update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it; update CUDA",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it; build for fewer or smaller tiers, or end other "
    "programs on the GPU",
    "MALFORMED_ENGINE": "the file is no plan of this library, or damaged; build it again",
    "CUDA_ERROR": "CUDA does not work here (see nvidia-smi)",
}
Shape = tuple[int, ...]


class Profile(NamedTuple):
    """Shapes that an engine was built for, by input: (smallest, best, largest)."""

    number: int
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """All of these shapes are within it."""
        return all(
            len(shape) == len(self.shapes[name][0])
            and all(a <= n <= b for a, n, b in zip(self.shapes[name][0], shape, self.shapes[name][2], strict=True))
            for name, shape in shapes.items()
        )

    def range_of(self, name: str) -> str:
        """Shapes of one input, for people."""
        smallest, _, largest = self.shapes[name]
        return f"{list(smallest)}" if smallest == largest else f"{list(smallest)} to {list(largest)}"

    def excess(self, shapes: Mapping[str, Shape]) -> int:
        """How far the shapes are from what the kernels were chosen for."""
        return sum(
            abs(a - b) for name, shape in shapes.items() for a, b in zip(shape, self.shapes[name][1], strict=True)
        )


@final
class LoadedEngine:
    """One plan in the GPU's memory.

    Args:
        library: TensorRT.
        runtime: its ``Runtime``.
        plan: the plan's bytes.
        plan_file: where they are from.

    Attributes:
        inputs, outputs: name -> type and shape.
        profiles: shapes that it was built for.
        aliases: output -> the input whose memory it shares; None = the library does not tell.
        scratch_bytes: what one running context needs at most.
        num_aux_streams: how many streams it uses besides the caller's.

    Raises:
        BadModel: damaged, or built for another device or version.
        DeviceError: the GPU refuses it.
    """

    def __init__(self, library: Library, runtime: Any, plan: bytes, plan_file: Path) -> None:
        self._library, self._kernels_file = library, plan_file.with_suffix(".kernels")
        library.messages()  # forget what was said about something else
        _check_validity(library, runtime, plan, plan_file)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BadModel(
                f"{plan_file}: {library.backend} {library.version} can't load it ({self.said()}); `vla-spec build` "
                f"builds it for this device"
            )
        trt = library.module
        self._engine: Any = engine
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            shape = tuple(n if n >= 0 else None for n in dims(engine.get_tensor_shape(name)))
            (self.inputs if is_input else self.outputs)[name] = TensorSpec(
                _numpy_type(trt, engine.get_tensor_dtype(name)), shape
            )
        #: Some input has no fixed shape, so that a context has to be told its profile.
        self.is_dynamic = any(None in spec.shape for spec in self.inputs.values())
        self.profiles = [
            Profile(i, {name: self._profile_shapes(name, i) for name in self.inputs})
            for i in range(engine.num_optimization_profiles if self.is_dynamic else 1)
        ]
        alias = getattr(engine, "get_aliased_input_tensor", None)
        self.aliases = None if alias is None else {name: alias(name) for name in self.outputs}
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self.num_aux_streams = int(engine.num_aux_streams)
        self._kernels: Any = None
        self._config = self._runtime_config()

    def context(self) -> Any:
        """An execution context without memory of its own.

        Raises:
            DeviceError: the GPU refuses, or the engine was closed.
        """
        if self._engine is None:
            raise DeviceError("the TensorRT engine was closed; make a new one")
        wanted = self._config
        if wanted is None:
            wanted = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(wanted)
        if context is None:
            raise DeviceError(f"TensorRT could not make an execution context ({self.said()})")
        return context

    def said(self) -> str:
        """What the library complained about since it was asked last."""
        return self._library.messages() or "it does not say why"

    def inspect(self) -> EngineSummary:
        """What its kernels read and write; without names of types if it was built without details."""
        if self._engine is None:
            raise DeviceError("the TensorRT engine was closed; make a new one")
        return inspect_engine(self._library.module, self._engine)

    def save_kernels(self) -> None:
        """Keep what TensorRT-RTX compiled for this GPU beside the plan, so that the next start need not compile it.

        Of use only: the library checks the file when it reads it, and all works without. So where it can't be written,
        as in a folder of someone else, it is not.
        """
        if self._kernels is None:
            return
        found = bytes(self._kernels.serialize())
        with contextlib.suppress(OSError):
            if not self._kernels_file.is_file() or self._kernels_file.read_bytes() != found:
                with replacing(self._kernels_file) as temporary:
                    temporary.write_bytes(found)

    def close(self) -> None:
        """Give the engine back to the library."""
        self._engine = self._config = self._kernels = None

    def _runtime_config(self) -> Any:
        """How TensorRT-RTX makes contexts; None for TensorRT, which compiles nothing at run time."""
        trt = self._library.module
        specialization = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is None:
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Compiling lazily would leave its makeshift kernels in a captured graph for good.
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # whole rounds are captured here, copies included
        self._kernels = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            if self._kernels_file.is_file():
                self._kernels.deserialize(self._kernels_file.read_bytes())  # False = of another driver: compile again
        config.set_runtime_cache(self._kernels)
        return config

    def _profile_shapes(self, name: str, number: int) -> tuple[Shape, Shape, Shape]:
        fixed = tuple(n for n in self.inputs[name].shape if n is not None)
        if len(fixed) == len(self.inputs[name].shape):  # whether a profile knows it is the library's affair
            return fixed, fixed, fixed
        smallest, best, largest = (dims(value) for value in self._engine.get_tensor_profile_shape(name, number))
        return smallest, best, largest


def dims(value: Any) -> Shape:
    """The library's dimensions as numbers."""
    return tuple(int(n) for n in value)


def _check_validity(library: Library, runtime: Any, plan: bytes, plan_file: Path) -> None:
    """Ask TensorRT-RTX what it thinks of a plan before it is loaded; TensorRT has no such question."""
    ask = getattr(runtime, "get_engine_validity", None)
    if ask is None:
        return
    validity, found = ask(plan)
    if validity != library.module.EngineValidity.INVALID:
        return
    reasons = library.module.EngineInvalidityDiagnostics.__members__
    texts = [REMEDIES.get(name, name) for name, flag in reasons.items() if int(found) & int(flag)]
    raise BadModel(
        f"{plan_file}: {library.backend} {library.version} refuses it: "
        f"{'; '.join(texts) or library.messages() or 'no reason is given'}; `vla-spec build` builds it again"
    )


def _numpy_type(trt: Any, kind: Any) -> np.dtype[Any]:
    """The numpy type of the same size; bfloat16, which numpy lacks, is two opaque bytes."""
    return np.dtype("V2") if kind == trt.DataType.BF16 else np.dtype(trt.nptype(kind))
