"""What a network really computes in. A library may fall back to another precision without a word (TensorRT #4590).

Two looks: at the network that is handed to the builder, which with strong typing says the type of every tensor (needs
no GPU), and at the finished engine, which needs the device and answers for what its kernels read and write.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from vla_spec.errors import BadModel

#: Layers that do arithmetic on weights or caches: these have to be in the precision that was asked for.
HEAVY = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "ATTENTION_INPUT", "KV_CACHE_UPDATE")
NAMES = {
    "HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32", "INT8": "int8", "FP8": "fp8", "FP4": "fp4", "INT4": "int4",
    "INT32": "int32", "INT64": "int64", "BOOL": "bool", "UINT8": "uint8",
}  # fmt: skip
_QUANTISED = ("int8", "fp8", "fp4", "int4")


@dataclass(frozen=True, slots=True)
class NetworkSummary:
    """The layers of a parsed network.

    Attributes:
        num_layers: all of them.
        kv_updates: cache tensors that are updated in place.
        attentions: native attention layers.
        precisions: kind of heavy layer -> precision -> how many; fed by DEQUANTIZE it counts as the quantised type.
        normalisations: precision -> how many.
        other_names: heavy layers in single precision, the first few.
    """

    num_layers: int
    kv_updates: int
    attentions: int
    precisions: dict[str, dict[str, int]]
    normalisations: dict[str, int]
    other_names: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As stored in manifest.json."""
        return {**asdict(self), "other_names": list(self.other_names)}


def summarise(network: Any) -> NetworkSummary:
    """Count the layers of an ``INetworkDefinition`` by kind and precision."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    made_by = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    counts: dict[str, Counter[str]] = {}
    norms: Counter[str] = Counter()
    single: list[str] = []
    for layer in layers:
        kind = layer.type.name
        if kind == "NORMALIZATION":
            norms[_type(layer.get_output(0))] += 1
        if kind not in HEAVY:
            continue
        precision = _precision(layer, made_by)
        if precision not in _arithmetic_on_numbers():
            continue  # a matrix product over indices or masks
        counts.setdefault(kind, Counter())[precision] += 1
        if precision == "fp32":
            single.append(layer.name)
    return NetworkSummary(
        len(layers),
        sum(counts.get("KV_CACHE_UPDATE", Counter()).values()),
        sum(counts.get("ATTENTION_INPUT", Counter()).values()),
        {kind: dict(sorted(counter.items())) for kind, counter in sorted(counts.items())},
        dict(sorted(norms.items())),
        tuple(single[:5]),
    )


def check_summary(graph: str, summary: NetworkSummary, precision: str, kv_updates: int, attentions: int) -> None:
    """Refuse a network that is not what was asked for.

    Args:
        graph: its name, for errors.
        summary: what was found.
        precision: of heavy layers; "int8", "fp8" = as quantised as the graph is, the rest fp16.
        kv_updates: updates of cache tensors that there have to be.
        attentions: attention layers of the library's own that there have to be.

    Raises:
        BadModel: native layers are missing, layers are in another precision, or nothing is quantised.
    """
    if (summary.kv_updates, summary.attentions) != (kv_updates, attentions):
        raise BadModel(
            f"{graph}: the network has {summary.kv_updates} cache updates and {summary.attentions} attention layers of "
            f"the library's own; valid: {kv_updates} and {attentions}"
        )
    is_quantised = precision in _QUANTISED
    allowed = {precision, "fp16"} if is_quantised else {precision}
    found = {p for kind in summary.precisions.values() for p in kind}
    if found - allowed:
        wrong, named = ", ".join(sorted(found - allowed)), ", ".join(summary.other_names)
        raise BadModel(
            f"{graph}: layers are in {wrong}{f' ({named})' if named else ''}; valid: {', '.join(sorted(allowed))}"
        )
    if is_quantised and precision not in found:
        raise BadModel(f"{graph}: no layer is quantised; valid: a graph with QuantizeLinear and DequantizeLinear")


def _arithmetic_on_numbers() -> tuple[str, ...]:
    return ("fp32", "fp16", "bf16", *_QUANTISED)


def _type(tensor: Any) -> str:
    return NAMES.get(tensor.dtype.name, tensor.dtype.name.lower())


def _precision(layer: Any, made_by: dict[str, Any]) -> str:
    """Of its first input; of what was dequantised to be it, if it was, and if all factors were."""
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    inputs = [tensor for tensor in inputs if tensor is not None]
    if layer.type.name in ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION"):
        stored = [_stored(tensor, made_by) for tensor in inputs[:2]]
        if all(kind in _QUANTISED for kind in stored):
            return stored[0]
    return _type(inputs[0])


def _stored(tensor: Any, made_by: dict[str, Any]) -> str:
    """Type before a DEQUANTIZE, looked for through layers that only move numbers."""
    layer = made_by.get(tensor.name)
    while layer is not None and layer.type.name in ("SHUFFLE", "IDENTITY"):
        tensor = layer.get_input(0)
        layer = made_by.get(tensor.name)
    if layer is not None and layer.type.name == "DEQUANTIZE":
        return _type(layer.get_input(0))
    return _type(tensor)


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """What an engine on its device says about its kernels.

    Attributes:
        num_layers: kernels and fused groups.
        formats: element type -> tensors between kernels.
        single_names: layers that read or write single precision although nothing outside asks for it, the first few.
    """

    num_layers: int
    formats: dict[str, int]
    single_names: tuple[str, ...]


#: Words of the inspector's "Format/Datatype" -> precision; longest first.
_WORDS = {
    "FP32": "fp32", "FP16": "fp16", "Half": "fp16", "BF16": "bf16", "BFloat16": "bf16", "Int8": "int8", "INT8": "int8",
    "FP8": "fp8", "FP4": "fp4", "Float": "fp32",
}  # fmt: skip


def read_inspector(text: str) -> EngineSummary:
    """Read the JSON of ``EngineInspector.get_engine_information``; layers may be bare names without details.

    Raises:
        BadModel: not that JSON.
    """
    try:
        layers = json.loads(text)["Layers"]
        formats: Counter[str] = Counter()
        single = []
        for layer in layers:
            if not isinstance(layer, dict):
                continue
            tensors = (*layer.get("Inputs", ()), *layer.get("Outputs", ()))
            own = [_word(str(tensor.get("Format/Datatype", ""))) for tensor in tensors]
            formats.update(kind for kind in own if kind)
            if own and all(kind == "fp32" for kind in own if kind) and any(own):
                single.append(str(layer.get("Name", "?")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadModel(f"the engine inspector's answer can't be read ({error!r})") from error
    return EngineSummary(len(layers), dict(sorted(formats.items())), tuple(single[:5]))


def inspect_engine(module: Any, engine: Any) -> EngineSummary:
    """Ask a deserialised engine, on its device, what its kernels read and write."""
    inspector = engine.create_engine_inspector()
    return read_inspector(inspector.get_engine_information(module.LayerInformationFormat.JSON))


def _word(text: str) -> str:
    return next((kind for word, kind in _WORDS.items() if word.lower() in text.lower()), "")
