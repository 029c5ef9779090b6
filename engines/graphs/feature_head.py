"""The feature head as one graph over n rows, of the chain or of a tree. See `engines/nets/feature_head.py`.

A row is fed by the target's features or by the head's own hidden state of the row before. Rows of a tree are scratch
behind the chain's; the mask says which ancestors a row sees.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs import layers
from vla_spec.engines.graphs.decoder import GraphWriter, Precision
from vla_spec.engines.nets.head_config import FEATURE_CHOICES, HeadConfig


def feature_head_model(config: HeadConfig, weights: WeightsFile, precision: Precision = "fp32") -> onnx.ModelProto:
    """The feature head with these weights.

    Inputs: features fp32 [n, F], of the target; hidden fp32 [n, width], of the head itself; is_own bool [n, 1], True =
    use hidden; ids int64 [n], tokens or V for a prompt row; positions int64 [n]; write_index int64 [1], where the first
    row goes; mask bool [1, 1, n, R]; past_key, past_value [1, heads, R, head_width].
    Outputs: tokens int64 [n, 8], logp fp32 [n, 8], best first; out fp32 [n, width], the head's own hidden states;
    present_key, present_value.

    Raises:
        BadModel: a weight is missing or of another shape.
    """
    c, writer = config, GraphWriter(weights, precision)
    writer.add_input("features", TensorProto.FLOAT, ["n", c.feature_width])
    writer.add_input("hidden", TensorProto.FLOAT, ["n", c.width])
    writer.add_input("is_own", TensorProto.BOOL, ["n", 1])
    writer.add_input("ids", TensorProto.INT64, ["n"])
    writer.add_input("positions", TensorProto.INT64, ["n"])
    writer.add_input("write_index", TensorProto.INT64, [1])
    writer.add_input("mask", TensorProto.BOOL, [1, 1, "n", c.feature_rows])
    y = writer.node("Cast", ["features"], "features.own", to=writer.type)
    y = layers.layer_norm(writer, "fuse_norm", y, c.feature_width)
    y = layers.linear(writer, "fuse", y, (c.feature_width, c.width), "fuse.out")
    own = writer.node("Cast", ["hidden"], "hidden.own", to=writer.type)
    fused = writer.node("Where", ["is_own", own, y], "fused")
    token = layers.lookup(writer, "token.weight", (c.num_bins + 1, c.width), "ids", "token.of")
    y = writer.node("Concat", [fused, token], "joined", axis=-1)
    y = layers.linear(writer, "join", y, (2 * c.width, c.width), "join.out")
    where = layers.lookup(writer, "position", (c.feature_capacity, c.width), "positions", "positions.of")
    x = writer.node("Add", [y, where], "x")
    y = layers.layer_norm(writer, "norm1", x, c.width)
    y = layers.linear(writer, "qkv", y, (c.width, 3 * c.width), "qkv.out", has_bias=False)
    writer.split(y, ["query", "new.key", "new.value"], [c.width] * 3, axis=1)
    mixed = layers.attend(writer, "query", "new.key", "new.value", c.num_heads, c.head_width, c.feature_rows)
    x = layers.rest_of_layer(writer, x, mixed, c.width, c.mlp_width)
    writer.node("Cast", [x], "out", to=TensorProto.FLOAT)
    layers.best_tokens(writer, x, c.width, c.num_bins, FEATURE_CHOICES, "LogSoftmax", "logp")
    writer.add_output("out", TensorProto.FLOAT, ["n", c.width])
    return writer.model("feature_head")
