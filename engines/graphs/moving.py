"""Moves rows of any caches, as `commit` does for the decoder's: for networks of drafters, which come without one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto

from vla_spec.engines.graphs.decoder import GraphWriter


def moving_model(num_tensors: int, shape: Sequence[int]) -> onnx.ModelProto:
    """Inputs: rows int64 [a]; write_index int64 [1]; past_0, past_1, ... fp32 ``shape``. Outputs: present_0, ..."""
    writer = GraphWriter(None, "fp32")
    writer.add_input("rows", TensorProto.INT64, ["a"])
    writer.add_input("write_index", TensorProto.INT64, [1])
    for i in range(num_tensors):
        writer.add_input(f"past_{i}", TensorProto.FLOAT, list(shape))
        kept = writer.node("Gather", [f"past_{i}", "rows"], f"past_{i}.kept", axis=2)
        writer.node("TensorScatter", [f"past_{i}", kept, "write_index"], f"present_{i}", axis=2)
        writer.add_output(f"present_{i}", TensorProto.FLOAT, list(shape))
    return writer.model("moving")
