"""What runs the networks of drafters: the target's own runtime, so that both share one device."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from vla_spec.engines._graph_runtime import GraphRuntime
from vla_spec.plugins import Parts


def runtime_for(parts: Parts, model_dir: Path | None = None) -> GraphRuntime:
    """The target's runtime; ONNX Runtime on the CPU if it has none (a toy, a wrapper around something else).

    A runtime on a GPU has one method more, ``aside(model_dir)``: a stream of its own, with less priority.

    Args:
        parts: with the target.
        model_dir: folder of a model that is not the target's.
    """
    runtime = getattr(parts.target, "runtime", None)
    if runtime is None:
        from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime

        runtime = OnnxRuntimeRuntime(parts.num_threads)
    aside = getattr(runtime, "aside", None)
    if aside is not None:
        runtime = aside(model_dir)
    return cast(GraphRuntime, runtime)
