"""Layers that the graphs of drafters are made of. As in the decoder, weights are used as torch stores them."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from vla_spec.engines.graphs.decoder import GraphWriter

NORM_EPSILON = 1e-5  # torch's own default


def linear(writer: GraphWriter, name: str, x: str, sizes: tuple[int, int], output: str, has_bias: bool = True) -> str:
    """X [k, a] -> [k, b] with ``name.weight`` [b, a]; sizes = (a, b)."""
    inputs = [x, writer.weight(f"{name}.weight", (sizes[1], sizes[0]))]
    if has_bias:
        inputs.append(writer.weight(f"{name}.bias", (sizes[1],)))
    return writer.node("Gemm", inputs, output, transB=1)


def layer_norm(writer: GraphWriter, name: str, x: str, width: int) -> str:
    """Over the last axis."""
    inputs = [x, writer.weight(f"{name}.weight", (width,)), writer.weight(f"{name}.bias", (width,))]
    return writer.node("LayerNormalization", inputs, f"{name}.out", axis=-1, epsilon=NORM_EPSILON)


def lookup(writer: GraphWriter, table: str, shape: tuple[int, int], ids: str, output: str) -> str:
    """Rows ``ids`` [k] of a table [n, width]."""
    return writer.node("Gather", [writer.weight(table, shape), ids], output, axis=0)


def add(writer: GraphWriter, values: list[str], output: str) -> str:
    """Sum of several, from left to right."""
    x = values[0]
    for i, value in enumerate(values[1:], 2):
        x = writer.node("Add", [x, value], output if i == len(values) else f"{output}.{i}")
    return x


def to_heads(writer: GraphWriter, x: str, heads: int, head_width: int) -> str:
    """[k, heads * head_width] -> [1, heads, k, head_width]."""
    shape = writer.constant(f"heads_{heads}", np.array([1, -1, heads, head_width], np.int64))
    y = writer.node("Reshape", [x, shape], f"{x}.split")
    return writer.node("Transpose", [y], f"{x}.heads", perm=[0, 2, 1, 3])


def attend(
    writer: GraphWriter, query: str, keys: str, values: str, heads: int, head_width: int, rows: int
) -> str:  # fmt: skip
    """Write keys and values [k, width] into the cache behind ``write_index``, read all of it under ``mask``.

    Declares the cache (past_key, past_value -> present_key, present_value, [1, heads, rows, head_width]) and uses the
    inputs ``mask`` bool [1, 1, n, rows] and ``write_index`` int64 [1].

    Returns:
        What query [n, width] found, [n, width].
    """
    cache = [1, heads, rows, head_width]
    present = []
    for kind, new in (("key", keys), ("value", values)):
        writer.add_input(f"past_{kind}", writer.type, list(cache))
        inputs = [f"past_{kind}", to_heads(writer, new, heads, head_width), "write_index"]
        present.append(writer.node("TensorScatter", inputs, f"present_{kind}", axis=2))
        writer.add_output(f"present_{kind}", writer.type, list(cache))
    y = to_heads(writer, query, heads, head_width)
    y = writer.node("Attention", [y, *present, "mask"], "attention", scale=head_width**-0.5)
    y = writer.node("Transpose", [y], "mixed", perm=[0, 2, 1, 3])
    flat = writer.constant("flat", np.array([-1, heads * head_width], np.int64))
    return writer.node("Reshape", [y, flat], "mixed.flat")


def rest_of_layer(writer: GraphWriter, x: str, mixed: str, width: int, mlp_width: int) -> str:
    """Output projection and feed-forward part of a pre-norm layer, both added to x [k, width]."""
    y = linear(writer, "out", mixed, (width, width), "out.out", has_bias=False)
    x = writer.node("Add", [x, y], "attended")
    y = linear(writer, "up", layer_norm(writer, "norm2", x, width), (width, mlp_width), "up.out")
    y = linear(writer, "down", writer.node("Gelu", [y], "gelu"), (mlp_width, width), "down.out")
    return writer.node("Add", [x, y], "layer.x")


def best_tokens(writer: GraphWriter, x: str, width: int, num_bins: int, count: int, op: str, output: str) -> None:
    """Norm, head, and the ``count`` best tokens: outputs ``tokens`` int64 [k, count] and ``output`` fp32 [k, count].

    In single precision from the logits on, whatever the network computes in.

    ``op`` makes it of the logits: Softmax or LogSoftmax.
    """
    logits = linear(writer, "head", layer_norm(writer, "final_norm", x, width), (width, num_bins), "head.out")
    single = writer.node("Cast", [logits], "logits", to=TensorProto.FLOAT)
    y = writer.node(op, [single], "scores", axis=-1)
    number = writer.constant("count", np.array([count], np.int64))
    writer.nodes.append(
        helper.make_node("TopK", [y, number], [output, "tokens"], name=output, axis=-1, largest=1, sorted=1)
    )
    writer.add_output("tokens", TensorProto.INT64, ["n", count])
    writer.add_output(output, TensorProto.FLOAT, ["n", count])
