"""What runs the networks of drafters: the target's own runtime, so that both share one device."""

from __future__ import annotations

from typing import cast

from vla_spec.engines._graph_runtime import GraphRuntime
from vla_spec.plugins import Parts


def runtime_for(parts: Parts) -> GraphRuntime:
    """The target's runtime; ONNX Runtime on the CPU if it has none (a toy, a wrapper around something else)."""
    runtime = getattr(parts.target, "runtime", None)
    if runtime is None:
        from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime

        runtime = OnnxRuntimeRuntime(parts.num_threads)
    return cast(GraphRuntime, runtime)
