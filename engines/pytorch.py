"""Score tokens with PyTorch: the reference that other engines are checked against. Not thread-safe.

It runs the networks as they were trained, not the exported graphs, so it checks those as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._graph_runtime import Array, State, TensorSpec
from vla_spec.engines._host_state import HostState
from vla_spec.engines._model_files import WEIGHTS, adapter_of, require_model_dir
from vla_spec.errors import BadModel, MissingDependency
from vla_spec.plugins import Parts


@dataclass(frozen=True)
class Options:
    """max_step: most tokens of one step."""

    max_step: int = 32


@final
class _TorchCall:
    """A module with its buffers."""

    def __init__(self, torch: Any, module: Any, inputs: list[Array], outputs: list[Array]) -> None:
        self._torch, self._module = torch, module
        self._inputs = [torch.from_numpy(array) for array in inputs]
        self._outputs = [torch.from_numpy(array) for array in outputs]

    def run(self) -> None:
        """One forward."""
        with self._torch.inference_mode():
            for buffer, value in zip(self._outputs, self._module(*self._inputs), strict=True):
                buffer.copy_(value)


@final
class TorchGraph:
    """A torch module in the place of a graph: the same inputs in this order, and the cache, written in place."""

    def __init__(
        self, torch: Any, module: Any, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
    ) -> None:
        self._torch, self._module = torch, module
        self.inputs, self.outputs = inputs, outputs

    def tie(
        self, arrays: Mapping[str, Array], state: State | None = None, state_names: Sequence[tuple[str, str]] = ()
    ) -> _TorchCall:
        """Share memory with numpy arrays."""
        inputs = [arrays[name] for name in self.inputs]
        if state is not None:
            assert isinstance(state, HostState)
            inputs.append(state.tensors)
        return _TorchCall(self._torch, self._module, inputs, [arrays[name] for name in self.outputs])


@final
class PyTorchRuntime:
    """fp32, eager, on the CPU. Needs the extra ``[torch]``.

    Raises:
        MissingDependency: PyTorch is not installed.
    """

    name, precision, provider, is_batch_invariant = "pytorch", "fp32", "cpu", True
    tiers: tuple[int, ...] | None = None

    def __init__(self, num_threads: int = 1) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingDependency("PyTorch", "pip install 'vla_spec[torch]'") from error
        torch.set_num_threads(num_threads)
        self._torch: Any = torch
        self._models: dict[Path, Any] = {}

    def open(self, file: Path) -> TorchGraph:
        """The network that the graph of this name was exported from.

        Raises:
            BadModel: weights missing, incomplete or corrupt; or there is no such network.
        """
        from vla_spec.engines.nets.graphs import HEADS, head_module, reference_module
        from vla_spec.engines.nets.weights import load_model

        if file.stem in HEADS:
            head, inputs, outputs = head_module(file.stem, file.with_suffix(".safetensors"))
            return TorchGraph(self._torch, head, _specs(inputs), _specs(outputs))
        if adapter_of(file.parent) == "openvla":
            from vla_spec.engines.nets.openvla import reference

            module, inputs, outputs = reference.reference_module(file)
        else:
            weights = file.parent / WEIGHTS
            if weights not in self._models:
                self._models[weights] = load_model(weights)
            module, inputs, outputs = reference_module(file.stem, self._models[weights])
        if module is None:
            raise BadModel(f"{file}: the PyTorch engine has no network of this name")
        return TorchGraph(self._torch, module, _specs(inputs), _specs(outputs))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeroed numpy memory."""
        return np.zeros(shape, dtype)

    def state(self, shape: tuple[int, ...]) -> HostState:
        """Zeroed caches."""
        return HostState(shape)


def _specs(named: Mapping[str, tuple[str, tuple[int | None, ...]]]) -> Mapping[str, TensorSpec]:
    return {name: TensorSpec(np.dtype(kind), shape) for name, (kind, shape) in named.items()}


def build(options: Options, parts: Parts) -> GraphEngine:
    """From configuration."""
    return GraphEngine(require_model_dir(parts.model_dir), PyTorchRuntime(parts.num_threads), options.max_step)
