"""Sessions of ONNX Runtime: opened on the provider that was asked for, or refused with the nodes that are elsewhere."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_spec.errors import BadModel, MissingDependency, SlowPath

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = (CPU, CUDA, TENSORRT)
#: ONNX Runtime puts arithmetic on shapes on the CPU on purpose; nothing is slow about it.
_SHAPE_OPERATORS = frozenset(
    {
        "Cast", "Concat", "ConstantOfShape", "Equal", "Expand", "Gather", "Range", "Shape", "Size", "Slice", "Squeeze",
        "Unsqueeze", "Where",
    }
)  # fmt: skip

_MOST_SAID = 300


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a session gets.

    Attributes:
        num_threads: of one call.
        provider: one of `PROVIDERS`.
        provider_options: of that provider, as ONNX Runtime names them.
        allow_slow: open even if nodes run elsewhere.
    """

    num_threads: int = 1
    provider: str = CPU
    provider_options: Mapping[str, str] = field(default_factory=dict)
    allow_slow: bool = False


def onnxruntime_module() -> Any:
    """ONNX Runtime.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependency("ONNX Runtime", "pip install 'vla_spec[run]'") from error


def open_session(graph: Path | bytes, options: SessionOptions) -> Any:
    """An inference session on the provider that was asked for.

    Args:
        graph: file, or a graph without external data.
        options: see there.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        BadModel: the graph is missing or corrupt, or of an opset that this version does not know.
        SlowPath: another provider would run it, or some of its nodes; names them.
    """
    ort = onnxruntime_module()
    where = graph.name if isinstance(graph, Path) else "a graph"
    if isinstance(graph, Path) and not graph.is_file():
        raise BadModel(f"{graph}: missing; `vla-spec export` writes it, a drafter's after `vla-spec distill`")
    have = ort.get_available_providers()
    if options.provider not in have and not options.allow_slow:
        raise SlowPath(f"{options.provider} is not in this ONNX Runtime; have {', '.join(have)}")
    try:
        session = ort.InferenceSession(
            str(graph) if isinstance(graph, Path) else graph,
            _settings(ort, options),
            providers=[(name, given) for name, given in _providers(options) if name in have],
        )
    except Exception as error:  # ONNX Runtime's own exception types are private
        reason = " ".join(str(error).split())  # it begins with where in the library's sources, and ends with what
        reason = reason if len(reason) <= _MOST_SAID else f"…{reason[-_MOST_SAID:]}"
        raise BadModel(
            f"{graph if isinstance(graph, Path) else where}: ONNX Runtime can't load it ({reason})"
        ) from error
    # The library lists providers that it then silently does not use: believe the session only.
    if session.get_providers()[0] != options.provider and not options.allow_slow:
        raise SlowPath(f"{where} would run on {session.get_providers()[0]}, asked for {options.provider}")
    elsewhere = nodes_elsewhere(session, options.provider)
    if elsewhere and not options.allow_slow:
        named = ", ".join(f"{count} {node}" for node, count in elsewhere.most_common(4))
        raise SlowPath(
            f"{where}: {elsewhere.total()} nodes would not run on {options.provider} ({named}); set allow_slow: true "
            f"to run it all the same"
        )
    return session


def nodes_elsewhere(session: Any, provider: str) -> Counter[str]:
    """Operators, with the provider that they got instead, and how often; empty where the library does not say.

    Arithmetic on shapes is not counted.
    """
    if provider == CPU or not hasattr(session, "get_provider_graph_assignment_info"):
        return Counter()
    return Counter(
        f"{node.op_type} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type not in _SHAPE_OPERATORS
    )


def _settings(ort: Any, options: SessionOptions) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.num_threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    if options.provider != CPU:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return settings


def _providers(options: SessionOptions) -> list[tuple[str, dict[str, str]]]:
    """The one asked for, and what takes the nodes that it does not know: nearest first."""
    wanted = [(options.provider, dict(options.provider_options))]
    if options.provider == TENSORRT:
        device = options.provider_options.get("device_id", "0")
        wanted.append((CUDA, {"device_id": device, "use_tf32": "0"}))
    if options.provider != CPU:
        wanted.append((CPU, {}))
    return wanted
