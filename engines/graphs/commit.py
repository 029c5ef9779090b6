"""Moves the accepted rows of a tree to the front of the scratch rows, for caches that don't lie in host memory."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines.graphs.decoder import GraphWriter, Precision


def commit_model(spec: DecoderSpec, precision: Precision = "fp32") -> onnx.ModelProto:
    """Inputs: rows int64 [a], to keep; write_index int64 [1], where they go; the cache. Output: the cache."""
    writer = GraphWriter(None, precision)
    cache = [1, spec.num_kv_heads, spec.rows, spec.head_width]
    writer.add_input("rows", TensorProto.INT64, ["a"])
    writer.add_input("write_index", TensorProto.INT64, [1])
    for past, present in zip(spec.state_names, spec.new_state_names, strict=True):
        writer.add_input(past, writer.type, list(cache))
        kept = writer.node("Gather", [past, "rows"], f"{past}.kept", axis=2)
        writer.node("TensorScatter", [past, kept, "write_index"], present, axis=2)
        writer.add_output(present, writer.type, list(cache))
    return writer.model("commit")
