"""From single to half precision, on the graph: a strongly typed TensorRT network computes in what its graph says.

Graphs are exported in single precision with weights stored in half (see docs/model-folder.md), so nearly all that
happens here is that ``Cast`` nodes behind weights lose their work. The outside stays as it was: inputs and outputs keep
their types, so that every runtime fills the same buffers; only caches change, because they never leave the device.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vla_spec.errors import BadModel

Half = Literal["fp16", "bf16"]
TYPES: dict[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
#: Largest finite number of fp16; constants beyond it (masks such as -1e9) become this and not infinity, 0 * inf is NaN.
LARGEST = {"fp16": 65504.0, "bf16": 3.3895314e38}
#: Operator -> inputs that are float32 whatever the operator computes in.
SINGLE_ONLY = {"Resize": (1, 2)}
STATE_PREFIXES = ("past_", "present_")


def to_half(model: onnx.ModelProto, precision: str, where: str) -> onnx.ModelProto:
    """A copy of a graph that computes in half precision.

    Inputs in float32 and uint8 are cast as they come in (uint8 may not enter anything but a cast there), outputs in
    float32 as they leave; inputs ``past_...`` and outputs ``present_...`` become half themselves.

    Args:
        model: float32; external tensors are left where they are.
        precision: "fp16" or "bf16".
        where: for errors.

    Raises:
        BadModel: control flow, or a type that has no half (double).
    """
    kind = TYPES[precision]
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    _refuse_foreign(graph, where)
    del graph.value_info[:]
    singles = {
        node.input[i]
        for node in graph.node
        for i in SINGLE_ONLY.get(node.op_type, ())
        if i < len(node.input) and node.input[i]
    }
    renamed: dict[str, str] = {}
    before: list[Any] = []
    for value in graph.input:
        elem = value.type.tensor_type.elem_type
        if elem == TensorProto.FLOAT and value.name.startswith(STATE_PREFIXES):
            value.type.tensor_type.elem_type = kind
        elif elem in (TensorProto.FLOAT, TensorProto.UINT8):
            renamed[value.name] = f"{value.name}.half"
            before.append(_cast(value.name, renamed[value.name], kind))
    for i, tensor in enumerate(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            renamed[tensor.name] = f"{tensor.name}.half"
            before.append(_cast(tensor.name, renamed[tensor.name], kind))
        else:
            half = _half_tensor(numpy_helper.to_array(tensor), f"{tensor.name}.half", precision)
            renamed[tensor.name] = half.name
            if tensor.name in singles:
                graph.initializer.append(half)  # it is kept as well, for those who want it in single
            else:
                graph.initializer[i].CopyFrom(half)
    for node in graph.node:
        keep = SINGLE_ONLY.get(node.op_type, ())
        for i, name in enumerate(node.input):
            if name in renamed and i not in keep:
                node.input[i] = renamed[name]
        if not (node.op_type == "Constant" and node.output[0] in singles):
            _retype(node, kind, precision)
    produced = {name for node in graph.node for name in node.output}
    after: list[Any] = []
    for value in graph.output:
        if value.type.tensor_type.elem_type != TensorProto.FLOAT or value.name not in produced:
            continue
        if value.name.startswith(STATE_PREFIXES):
            value.type.tensor_type.elem_type = kind
            continue
        inner = f"{value.name}.half"
        for node in graph.node:
            node.input[:] = [inner if name == value.name else name for name in node.input]
            node.output[:] = [inner if name == value.name else name for name in node.output]
        after.append(_cast(inner, value.name, TensorProto.FLOAT))
    nodes = [*before, *_with_single_inputs(graph.node, graph.initializer), *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return out


def _refuse_foreign(graph: Any, where: str) -> None:
    for node in graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise BadModel(f"{where}: node {node.name or node.op_type} branches; valid: a graph without control flow")
        if node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.DOUBLE for a in node.attribute):
            raise BadModel(f"{where}: node {node.name} computes in double precision; valid: float32")
    for value in (*graph.input, *graph.initializer):
        elem = value.data_type if isinstance(value, TensorProto) else value.type.tensor_type.elem_type
        if elem == TensorProto.DOUBLE:
            raise BadModel(f"{where}: {value.name} is in double precision; valid: float32")


def _retype(node: Any, kind: int, precision: str) -> None:
    """Types that a node states itself."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = kind
        elif node.op_type == "EyeLike" and attribute.name == "dtype" and attribute.i == TensorProto.FLOAT:
            attribute.i = kind
        elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_half_tensor(numpy_helper.to_array(attribute.t), attribute.t.name, precision))
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            value = np.float32(attribute.f if attribute.name == "value_float" else attribute.floats)
            attribute.CopyFrom(helper.make_attribute("value", _half_tensor(value, "", precision)))


def _half_tensor(value: Any, name: str, precision: str) -> TensorProto:
    array = np.asarray(value, np.float32)
    largest = LARGEST[precision]
    array = np.where(np.isfinite(array), np.clip(array, -largest, largest), array).astype(np.float32)
    if precision == "bf16":
        # Rounded to nearest even on the bits: numpy has no bfloat16.
        bits = array.view(np.uint32).astype(np.uint64)
        rounded = np.where(
            np.isfinite(array), bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1)), bits
        )
        raw = (rounded >> np.uint64(16)).astype("<u2").tobytes()
        return helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, raw, raw=True)
    with np.errstate(under="ignore"):
        return numpy_helper.from_array(array.astype(np.float16), name)


def _with_single_inputs(nodes: Any, initializers: Any) -> list[Any]:
    """The nodes, with a cast in front of inputs that have to be single and are now half."""
    constants = {tensor.name for tensor in initializers if tensor.data_type == TensorProto.FLOAT}
    constants |= {node.output[0] for node in nodes if node.op_type == "Constant"}
    out = []
    for node in nodes:
        for i in SINGLE_ONLY.get(node.op_type, ()):
            if i < len(node.input) and node.input[i] and node.input[i] not in constants:
                single = f"{node.input[i]}.single"
                out.append(_cast(node.input[i], single, TensorProto.FLOAT))
                node.input[i] = single
        out.append(node)
    return out


def _cast(name: str, output: str, kind: int) -> Any:
    return helper.make_node("Cast", [name], [output], name=f"{output}.cast", to=kind)
