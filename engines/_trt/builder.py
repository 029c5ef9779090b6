"""Build one TensorRT engine from one ONNX graph. Written against names that ``tensorrt`` and ``tensorrt_rtx`` share.

The library answers failure with None and says why to its logger only; here every failure is one error that carries what
the parser or the builder said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from vla_spec.clock import NS_PER_S, MonotonicClock
from vla_spec.engines._model_files import WEIGHTS
from vla_spec.engines._trt.half_precision import to_half
from vla_spec.engines._trt.inspection import NetworkSummary, summarise
from vla_spec.engines._trt.library import Library
from vla_spec.engines._trt.profiles import Profile, SymbolicShape
from vla_spec.errors import BadConfig, BadModel

#: What quantisation leaves in floating point, and what the other precisions are.
FLOAT_OF = {"fp16": "fp16", "bf16": "bf16", "int8": "fp16", "fp8": "fp16"}
#: Precisions that need a graph which was quantised to them.
QUANTISED = ("int8", "fp8")
PRECISIONS = tuple(FLOAT_OF)
#: Operators of opset 24 without which there is no decoder graph.
NEEDED_OPSET = {"TensorScatter": 24, "Attention": 23}


@dataclass(frozen=True, slots=True)
class BuilderOptions:
    """What the builder is told beside graph and profiles; part of the cache key.

    Attributes:
        capabilities: compute capabilities to build ahead for, 89 = 8.9; empty = the device that is here.
        workspace_bytes: most scratch memory of a kernel; None = the library's own.
        optimization_level: 0 (fastest build) to 5; None = the library's own.
        detailed: keep what the engine inspector needs to tell precisions of kernels.
    """

    capabilities: tuple[int, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    detailed: bool = True

    def __post_init__(self) -> None:
        if len(set(self.capabilities)) < len(self.capabilities):
            raise BadConfig(f"sm {self.capabilities}: names one twice; valid: each once")
        if self.workspace_bytes is not None and self.workspace_bytes < 1 << 20:
            raise BadConfig(f"workspace_bytes {self.workspace_bytes}; valid: from {1 << 20} on")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise BadConfig(f"optimization_level {self.optimization_level}; valid: 0 to 5")


class Prepared(NamedTuple):
    """A graph in the precision that it is going to be built in.

    name: stem of its file. source: the file, beside which external tensors are looked for. model: serialised ONNX.
    shapes: of inputs, dynamic dimensions by name. caches: inputs that are updated in place. attentions: nodes.
    """

    name: str
    source: Path
    model: bytes
    shapes: dict[str, SymbolicShape]
    caches: int
    attentions: int


class Built(NamedTuple):
    """One serialised engine.

    plan: anything with a buffer. seconds: of parsing and building. is_decomposed: no attention kernel of the library
    fits one of the sizes, so that it may compute attention there from its parts.
    """

    plan: Any
    summary: NetworkSummary
    seconds: float
    is_decomposed: bool


def prepare(file: Path, precision: str) -> Prepared:
    """Read a graph, check it, and bring it to half precision.

    Raises:
        BadModel: missing, truncated, no valid ONNX, or written for an older opset.
        BadConfig: a precision that TensorRT can't run the decoder in.
    """
    if precision not in FLOAT_OF:
        reason = "; Attention in fp32 has no kernel there" if precision == "fp32" else ""
        raise BadConfig(f"precision {precision!r}; valid: {', '.join(PRECISIONS)}{reason}")
    if not file.is_file():
        raise BadModel(f"{file}: missing; `vla-spec export` writes it")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own type, whose place moves with its version
        raise BadModel(f"{file}: not an ONNX graph, or cut off ({_first_line(error)})") from error
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise BadModel(f"{file}: opset {opset}; valid: up to {newest}, the newest that this onnx knows")
    for node in model.graph.node:
        needed = NEEDED_OPSET.get(node.op_type, 0) if node.domain in ("", "ai.onnx") else 0
        if opset < needed:
            raise BadModel(f"{file}: opset {opset} has no {node.op_type}; valid: {needed} or later; export it again")
    try:
        onnx.checker.check_model(str(file))
    except Exception as error:  # the checker's own type, or protobuf's
        raise BadModel(f"{file}: not a valid ONNX graph ({_first_line(error)})") from error
    _check_externals(model, file)
    nodes = model.graph.node
    caches = sum(node.op_type == "TensorScatter" for node in nodes)
    attentions = sum(node.op_type == "Attention" for node in nodes)
    half = to_half(model, FLOAT_OF[precision], str(file))
    shapes = {
        value.name: tuple(d.dim_param or int(d.dim_value) for d in value.type.tensor_type.shape.dim)
        for value in half.graph.input
    }
    return Prepared(file.stem, file, half.SerializeToString(deterministic=True), shapes, caches, attentions)


def stems_of(stem: str) -> tuple[str, ...]:
    """Stems of the files that a graph's weights may lie in: its own, and of the graph that it was quantised from."""
    return tuple(dict.fromkeys((stem, stem.partition(".")[0])))


def _check_externals(model: onnx.ModelProto, file: Path) -> None:
    """Weights lie in files that are part of the model (and so of the key), and are there to their last byte.

    Raises:
        BadModel: they don't.
    """
    # A quantised graph, ``decoder.int8``, may still point to what was not quantised.
    allowed = tuple(dict.fromkeys((WEIGHTS, *(f"{stem}.safetensors" for stem in stems_of(file.stem)))))
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        name = place.get("location", "")
        if name not in allowed:
            raise BadModel(f"{file}: tensor {tensor.name} points to {name!r}; valid: {' or '.join(allowed)}")
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
        size = (file.parent / name).stat().st_size
        if end > size:
            raise BadModel(f"{file.parent / name}: cut off, {size} bytes; {file.name} needs {end}")


def check_capabilities(library: Library, capabilities: Sequence[int]) -> None:
    """Raises BadConfig for devices that the library can't build for from here."""
    if not library.builds_ahead:
        if capabilities:
            raise BadConfig(
                f"sm {_list(capabilities)}: {library.backend} builds for the device that is here only; valid: no sm, "
                f"run on that device; or --backend tensorrt-rtx"
            )
        return
    valid = library.capabilities
    wrong = [sm for sm in capabilities if sm not in valid]
    if not capabilities or wrong:
        raise BadConfig(
            f"sm {_list(wrong) or 'is not given'}: {library.backend} {library.version} can't build for it; valid: "
            f"{_list(valid)}; other devices (Orin 87, H100 90, Thor) need full TensorRT on the device"
        )


def build(library: Library, graph: Prepared, profiles: Sequence[Profile], options: BuilderOptions) -> Built:
    """Parse and build.

    Args:
        library: what builds.
        graph: see `prepare`.
        profiles: one per set of sizes; a single empty one where nothing is dynamic.
        options: see `BuilderOptions`.

    Raises:
        BadConfig: a device that can't be built for, or profiles that contradict the graph or each other.
        BadModel: the parser or the builder refuses the graph; with its reason.
    """
    check_capabilities(library, options.capabilities)
    trt, clock = library.module, MonotonicClock()
    library.messages()  # of earlier builds
    start_ns = clock.now_ns()
    builder = trt.Builder(library.log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, library.log)
    if not parser.parse(graph.model, str(graph.source)):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        reason = "; ".join(errors) or library.messages()
        raise BadModel(f"{graph.source}: {library.backend} {library.version} can't read it ({reason})")
    summary = summarise(network)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    for number, profile in enumerate(profiles):
        if profile:
            _add_profile(builder, config, network, graph, profile, number)
    plan, complaint, is_decomposed = builder.build_serialized_network(network, config), "", False
    if plan is None:
        complaint = library.messages()
        # Asked for only where it is needed: with it, a missing kernel would never be noticed.
        is_decomposed = "decomposable" in complaint and _allow_decomposition(trt, network)
        if is_decomposed:
            plan = builder.build_serialized_network(network, config)
    if plan is None:
        complaint = library.messages() or complaint
        raise BadModel(
            f"{graph.source}: {library.backend} {library.version} can't build it for "
            f"{_list(options.capabilities) or 'this device'} ({_shortened(complaint) or 'it gives no reason'})"
        )
    return Built(plan, summary, (clock.now_ns() - start_ns) / NS_PER_S, is_decomposed)


def _allow_decomposition(trt: Any, network: Any) -> bool:
    """Mark attention layers so that they may be computed from their parts. False = this library can't be told."""
    kind = getattr(trt, "IAttentionInputLayer", None)
    if kind is None:
        return False
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = kind  # the API's own way from a layer to its kind
            layer.attention.decomposable = True
    return True


def _network_flags(trt: Any) -> int:
    """Strongly typed, where that is not the only way."""
    flag = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(trt: Any, config: Any, options: BuilderOptions) -> None:
    if options.capabilities:
        config.num_compute_capabilities = len(options.capabilities)
        for i, sm in enumerate(options.capabilities):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i):
                raise BadConfig(f"sm {sm}: the library refuses it")
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Without it TensorRT-RTX allocates while it runs, which no CUDA graph can capture; full TensorRT has no such flag.
    captured = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if captured is not None:
        config.set_flag(captured)


def _add_profile(
    builder: Any, config: Any, network: Any, graph: Prepared, profile: Profile, number: int
) -> None:  # fmt: skip
    """One optimisation profile; refused by us before the library does it with a message about its own files."""
    out = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = graph.shapes[tensor.name]
        if all(isinstance(d, int) for d in shape):
            continue
        unknown = [d for d in shape if isinstance(d, str) and d not in profile]
        if unknown:
            raise BadConfig(f"{graph.name}: profile {number} says nothing about dimension {', '.join(unknown)}")
        sizes = [[profile[d][point] if isinstance(d, str) else d for d in shape] for point in range(3)]
        if any(not 1 <= a <= b <= c for a, b, c in zip(*sizes, strict=True)):
            raise BadConfig(
                f"{graph.name}: profile {number} of {tensor.name} is {', '.join(map(str, sizes))}; valid: 1 <= "
                f"smallest <= best <= largest in every dimension"
            )
        out.set_shape(tensor.name, *sizes)
    if config.add_optimization_profile(out) < 0:
        raise BadConfig(f"{graph.name}: the library refuses profile {number}, {dict(profile)}")


def _parser_error(error: Any) -> str:
    name, operator = error.node_name(), error.node_operator()
    where = f"node {name or '?'}, {operator}: " if name or operator else ""
    return _shortened(" ".join(f"{where}{error.desc()}".split()))


def _shortened(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[:most]} …"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return _shortened(lines[0]) if lines else type(error).__name__


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


__all__ = ["PRECISIONS", "BuilderOptions", "Built", "Prepared", "build", "check_capabilities", "prepare"]
