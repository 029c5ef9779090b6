"""The block head as one graph: new rows of the target in, n drafted positions out. See `engines/nets/block_head.py`.

One `TensorScatter` writes the keys of the new rows and, behind them, those of the drafted positions, so that one
`Attention` reads both under a mask. The positions' rows are scratch: the next call writes over them.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs import layers
from vla_spec.engines.graphs.decoder import GraphWriter, Precision
from vla_spec.engines.nets.head_config import BLOCK_CHOICES, HeadConfig


def block_head_model(config: HeadConfig, weights: WeightsFile, precision: Precision = "fp32") -> onnx.ModelProto:
    """The block head with these weights.

    Inputs: features fp32 [r, F], of target rows; row int64 [r], which ones; write_index int64 [1], where the first of
    them goes; last int64 [1], the last token; positions, history int64 [n], in the chunk and the previous plan's token
    there; mask bool [1, 1, n, R]; past_key, past_value [1, heads, R, head_width]. Row write_index + r + j of the cache
    is position j.
    Outputs: tokens int64 [n, 4], probs fp32 [n, 4], best first; present_key, present_value.

    Raises:
        BadModel: a weight is missing or of another shape.
    """
    c, writer = config, GraphWriter(weights, precision)
    writer.add_input("features", TensorProto.FLOAT, ["r", c.feature_width])
    writer.add_input("row", TensorProto.INT64, ["r"])
    writer.add_input("write_index", TensorProto.INT64, [1])
    writer.add_input("last", TensorProto.INT64, [1])
    writer.add_input("positions", TensorProto.INT64, ["n"])
    writer.add_input("history", TensorProto.INT64, ["n"])
    writer.add_input("mask", TensorProto.BOOL, [1, 1, "n", c.block_rows])
    # Keys and values of the target's rows.
    y = writer.node("Cast", ["features"], "features.own", to=writer.type)
    y = layers.layer_norm(writer, "fuse_norm", y, c.feature_width)
    y = layers.linear(writer, "fuse", y, (c.feature_width, c.width), "fuse.out")
    where = layers.lookup(writer, "row_position", (c.block_capacity, c.width), "row", "row_position.of")
    y = layers.layer_norm(writer, "context_norm", writer.node("Add", [y, where], "context.x"), c.width)
    y = layers.linear(writer, "kv", y, (c.width, 2 * c.width), "kv.out", has_bias=False)
    writer.split(y, ["context.key", "context.value"], [c.width, c.width], axis=1)
    # The positions to draft: all of a chunk's are told the last token, their place, and how far behind it they are.
    first = writer.node("Gather", ["positions", writer.constant("first", np.array([0], np.int64))], "positions.first")
    ago = writer.node("Sub", ["positions", first], "positions.ago")
    x = layers.add(
        writer,
        [
            layers.lookup(writer, "position", (c.num_tokens, c.width), "positions", "positions.of"),
            layers.lookup(writer, "ago", (c.num_tokens, c.width), ago, "ago.of"),
            layers.lookup(writer, "history.weight", (c.num_bins + 1, c.width), "history", "history.of"),
            layers.lookup(writer, "token.weight", (c.num_bins, c.width), "last", "last.of"),
        ],
        "x",
    )
    y = layers.layer_norm(writer, "norm1", x, c.width)
    y = layers.linear(writer, "qkv", y, (c.width, 3 * c.width), "qkv.out", has_bias=False)
    writer.split(y, ["query", "block.key", "block.value"], [c.width] * 3, axis=1)
    keys, values = (
        writer.node("Concat", [f"context.{kind}", f"block.{kind}"], f"new.{kind}", axis=0) for kind in ("key", "value")
    )
    mixed = layers.attend(writer, "query", keys, values, c.num_heads, c.head_width, c.block_rows)
    x = layers.rest_of_layer(writer, x, mixed, c.width, c.mlp_width)
    layers.best_tokens(writer, x, c.width, c.num_bins, BLOCK_CHOICES, "Softmax", "probs")
    return writer.model("block_head")
