"""The one decoder graph: k rows in, logits and new cache rows out. Prefill, steps and trees differ in the mask only.

The cache has a fixed capacity. `TensorScatter` (ONNX opset 24) writes the call's keys and values at ``write_index`` and
`Attention` reads the whole cache under an explicit mask, so a rollback is a smaller number, and nothing is ever moved
or concatenated. ONNX Runtime runs the graph as it is; TensorRT maps both to its own KV-cache and attention layers.

Weights stay in the safetensors file that the graph points to, as torch stores them ([out, in]: `Gemm` transposes).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.errors import BadModel

OPSET = 24
IR_VERSION = 11
Precision = Literal["fp32", "fp16", "bf16"]
TYPES: dict[str, int] = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_STORED = {"F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "F32": TensorProto.FLOAT}


class GraphWriter:
    """Collects nodes, weights, inputs and outputs of one graph. Node names are the names of their first output."""

    def __init__(self, weights: WeightsFile | None, precision: Precision) -> None:
        self.weights, self.type = weights, TYPES[precision]
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._known: set[str] = set()
        self._stored: set[str] = set()

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def split(self, value: str, outputs: list[str], sizes: list[int], axis: int) -> None:
        """Cut ``value`` into pieces of these sizes."""
        lengths = self.constant(f"sizes_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))
        self.nodes.append(helper.make_node("Split", [value, lengths], outputs, name=outputs[0], axis=axis))

    def is_first(self, name: str) -> bool:
        """True once per name: what is named so has to be made now."""
        is_new = name not in self._known
        self._known.add(name)
        return is_new

    def constant(self, name: str, value: Any) -> str:
        """A small array inside the graph, once per name."""
        if self.is_first(name):
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def float_constant(self, name: str, value: Any) -> str:
        """The same, in the graph's precision."""
        if self.is_first(name):
            array = np.asarray(value, np.float32)
            self.initializers.append(
                helper.make_tensor(name, self.type, array.shape, array.reshape(-1).tolist())
                if self.type == TensorProto.BFLOAT16
                else numpy_helper.from_array(
                    array.astype(np.float16 if self.type == TensorProto.FLOAT16 else np.float32), name
                )
            )
        return name

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        """A tensor of the weights file: a reference, and a Cast where the graph's precision is another one.

        Raises:
            BadModel: the file has no such tensor, or one of another shape.
        """
        if name in self._known:
            return name
        stored = self.stored_weight(name, shape)
        self._known.add(name)
        if stored != name:
            self.node("Cast", [stored], name, to=self.type)
        return name

    def stored_weight(self, name: str, shape: tuple[int, ...]) -> str:
        """The same as it is stored, without a Cast; for tables of which few rows are read.

        Raises:
            BadModel: as `weight`.
        """
        assert self.weights is not None, name
        stored = self.weights.tensors.get(name)
        if stored is None or stored.shape != shape or stored.dtype not in _STORED:
            found = "missing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
            raise BadModel(f"{self.weights.path}: tensor {name} is {found}; valid: F16, BF16 or F32 {list(shape)}")
        kind = _STORED[stored.dtype]
        tensor = TensorProto(
            name=name if kind == self.type else f"{name}.stored", data_type=kind, dims=shape,
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip
        if tensor.name in self._stored:
            return str(tensor.name)
        self._stored.add(tensor.name)
        place = {"location": self.weights.path.name, "offset": stored.offset, "length": stored.length}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return str(tensor.name)

    def add_input(self, name: str, kind: int, shape: list[int | str]) -> str:
        """Declare a graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def add_output(self, name: str, kind: int, shape: list[int | str]) -> None:
        """Declare a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def model(self, name: str) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="vla_spec"
        )


def decoder_model(spec: DecoderSpec, weights: WeightsFile, precision: Precision = "fp32") -> onnx.ModelProto:
    """The decoder of ``spec`` with these weights.

    Inputs: embeds fp32 [k, D]; position int64 [k] (rotary positions only); mask bool [1, 1, k, R], True = may look;
    write_index int64 [1]; past_key_i, past_value_i [1, H_kv, R, head_width].
    Outputs: logits fp32 [k, V]; features fp32 [k, F]; present_key_i, present_value_i, like the inputs.

    Raises:
        BadModel: a weight is missing or of another shape.
    """
    writer = GraphWriter(weights, precision)
    cache = [1, spec.num_kv_heads, spec.rows, spec.head_width]
    writer.add_input("embeds", TensorProto.FLOAT, ["k", spec.hidden_width])
    if spec.rope_theta is not None:
        writer.add_input("position", TensorProto.INT64, ["k"])
    writer.add_input("mask", TensorProto.BOOL, [1, 1, "k", spec.rows])
    writer.add_input("write_index", TensorProto.INT64, [1])
    for name in spec.state_names:
        writer.add_input(name, writer.type, list(cache))
    x = writer.node("Cast", ["embeds"], "x", to=writer.type)
    taps = []
    for i in range(spec.num_layers):
        x = layer(writer, spec, i, x)
        if i + 1 in spec.taps:
            taps.append(x)
    x = _norm(writer, spec, "final_norm", x)
    has_bias = "head.bias" in weights.tensors
    logits = linear(writer, "head", x, spec.hidden_width, spec.vocab_size, has_bias, "head.out")
    features = writer.node("Concat", [*taps, x], "features.all", axis=-1) if taps else x
    for value, name, width in ((logits, "logits", spec.vocab_size), (features, "features", spec.feature_width)):
        # A Cast even where nothing is cast, so that the outputs have these names; the libraries remove it.
        writer.node("Cast", [value], name, to=TensorProto.FLOAT)
        writer.add_output(name, TensorProto.FLOAT, ["k", width])
    for name in spec.new_state_names:
        writer.add_output(name, writer.type, list(cache))
    return writer.model("decoder")


def layer(writer: GraphWriter, spec: DecoderSpec, i: int, x: str, has_norm1: bool = True) -> str:
    """One pre-norm transformer layer over x [k, D]; without ``has_norm1`` attention reads x as it is."""
    prefix, width = f"blocks.{i}", spec.head_width
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    y = _norm(writer, spec, f"{prefix}.norm1", x) if has_norm1 else x
    y = linear(
        writer, f"{prefix}.qkv", y, spec.hidden_width, (heads + 2 * kv_heads) * width, False, f"{prefix}.qkv.out"
    )
    parts = [f"{prefix}.{kind}" for kind in ("query", "key", "value")]
    writer.split(y, parts, [heads * width, kv_heads * width, kv_heads * width], axis=1)
    turned = []
    for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True):
        shape = writer.constant(f"heads_{count}", np.array([1, -1, count, width], np.int64))
        y = writer.node("Reshape", [part, shape], f"{part}.split")
        y = writer.node("Transpose", [y], f"{part}.heads", perm=[0, 2, 1, 3])  # [1, heads, k, width]
        if spec.rope_theta is not None and not part.endswith("value"):
            y = _rotate(writer, spec, y, f"{part}.rotated")
        turned.append(y)
    query, *new = turned
    present = [
        writer.node("TensorScatter", [f"past_{kind}_{i}", rows, "write_index"], f"present_{kind}_{i}", axis=2)
        for kind, rows in zip(("key", "value"), new, strict=True)
    ]
    y = writer.node("Attention", [query, *present, "mask"], f"{prefix}.attention", scale=width**-0.5)
    y = writer.node("Transpose", [y], f"{prefix}.mixed", perm=[0, 2, 1, 3])
    y = writer.node(
        "Reshape", [y, writer.constant("flat", np.array([-1, heads * width], np.int64))], f"{prefix}.mixed.flat"
    )
    y = linear(writer, f"{prefix}.out", y, heads * width, spec.hidden_width, False, f"{prefix}.out.out")
    x = writer.node("Add", [x, y], f"{prefix}.attended")
    y = _norm(writer, spec, f"{prefix}.norm2", x)
    has_bias = spec.mlp == "gelu"
    hidden = linear(writer, f"{prefix}.up", y, spec.hidden_width, spec.mlp_width, has_bias, f"{prefix}.up.out")
    if spec.mlp == "gelu":
        hidden = writer.node("Gelu", [hidden], f"{prefix}.gelu")
    else:
        gate = linear(writer, f"{prefix}.gate", y, spec.hidden_width, spec.mlp_width, False, f"{prefix}.gate.out")
        sigmoid = writer.node("Sigmoid", [gate], f"{prefix}.sigmoid")
        gate = writer.node("Mul", [gate, sigmoid], f"{prefix}.silu")
        hidden = writer.node("Mul", [gate, hidden], f"{prefix}.gated")
    y = linear(writer, f"{prefix}.down", hidden, spec.mlp_width, spec.hidden_width, has_bias, f"{prefix}.down.out")
    return writer.node("Add", [x, y], f"{prefix}.x")


def linear(
    writer: GraphWriter, name: str, x: str, width_in: int, width_out: int, has_bias: bool, output: str
) -> str:  # fmt: skip
    """X [k, width_in] times the stored [width_out, width_in] matrix, transposed by Gemm itself."""
    inputs = [x, writer.weight(f"{name}.weight", (width_out, width_in))]
    if has_bias:
        inputs.append(writer.weight(f"{name}.bias", (width_out,)))
    return writer.node("Gemm", inputs, output, transB=1)


def _norm(writer: GraphWriter, spec: DecoderSpec, name: str, x: str) -> str:
    weight = writer.weight(f"{name}.weight", (spec.hidden_width,))
    if spec.norm == "rms":
        return writer.node("RMSNormalization", [x, weight], f"{name}.out", axis=-1, epsilon=spec.norm_epsilon)
    bias = writer.weight(f"{name}.bias", (spec.hidden_width,))
    return writer.node("LayerNormalization", [x, weight, bias], f"{name}.out", axis=-1, epsilon=spec.norm_epsilon)


def _rotate(writer: GraphWriter, spec: DecoderSpec, x: str, output: str) -> str:
    """Rotary positions, halves (not pairs) turned against each other, as Llama does."""
    assert spec.rope_theta is not None
    if writer.is_first("rope"):
        half = spec.head_width // 2
        angle = np.arange(spec.rows)[:, None] * spec.rope_theta ** (-np.arange(half) / half)[None]
        writer.float_constant("rope.cosine", np.cos(angle))
        writer.float_constant("rope.sine", np.sin(angle))
        axis = writer.constant("axis_0", np.array([0], np.int64))
        writer.node("Unsqueeze", ["position", axis], "position.batched")  # [1, k]
    return writer.node("RotaryEmbedding", [x, "rope.cosine", "rope.sine", "position.batched"], output)
