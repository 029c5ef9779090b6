"""A decoder graph quantised by rule and not by calibration: int8 weights per row, activations in a fixed range.

Good enough to see whether a quantised graph builds and in what its layers compute; not a model to run.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vla_spec.engines._safetensors import WeightsFile

ACTIVATION_RANGE = 8.0


def quantise(folder, activation_zero_point=0, kind=np.int8):
    """Write decoder.int8.onnx beside decoder.onnx: QDQ around every Gemm."""
    model = onnx.load(str(folder / "decoder.onnx"), load_external_data=False)
    weights = WeightsFile.open(folder / "target.safetensors")
    graph, nodes, casts = model.graph, [], {}
    for node in graph.node:
        if node.op_type == "Cast" and node.output[0] in weights.tensors:
            casts[node.output[0]] = node
    scale = numpy_helper.from_array(np.float32(ACTIVATION_RANGE / 127), "activation.scale")
    zero = numpy_helper.from_array(kind(activation_zero_point), "activation.zero")
    graph.initializer.extend([scale, zero])
    quantised = set()
    for node in graph.node:
        if node.op_type == "Gemm":
            name = node.input[1]
            weight = weights.read(name)
            per_row = np.maximum(np.abs(weight).max(1), 1e-6).astype(np.float32) / 127
            graph.initializer.extend(
                [
                    numpy_helper.from_array(np.rint(weight / per_row[:, None]).astype(np.int8), f"{name}.int8"),
                    numpy_helper.from_array(per_row, f"{name}.scale"),
                    numpy_helper.from_array(np.zeros(len(weight), np.int8), f"{name}.zero"),
                ]
            )
            x, out = node.input[0], node.output[0]
            q, d, w = f"{out}.q", f"{out}.dq", f"{name}.dq"
            nodes += [
                helper.make_node("QuantizeLinear", [x, "activation.scale", "activation.zero"], [q], name=q),
                helper.make_node("DequantizeLinear", [q, "activation.scale", "activation.zero"], [d], name=d),
                helper.make_node(
                    "DequantizeLinear", [f"{name}.int8", f"{name}.scale", f"{name}.zero"], [w], name=w, axis=0
                ),
            ]
            node.input[0], node.input[1] = d, w
            quantised.add(name)
        nodes.append(node)
    kept = [node for node in nodes if not (node.op_type == "Cast" and node.output[0] in quantised)]
    stored = {casts[name].input[0] for name in quantised if name in casts}
    initializers = [tensor for tensor in graph.initializer if tensor.name not in stored]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(initializers)
    (folder / "decoder.int8.onnx").write_bytes(model.SerializeToString())
    return folder
