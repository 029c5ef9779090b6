"""A decoder in int8 by the real quantiser, with one range for all activations in place of calibrated ones.

Good enough to see whether a quantised graph builds and in what its layers compute; not a model to run.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from vla_spec.calib.quantize import Calibration, Recipe, write_quantized
from vla_spec.engines._model_files import ModelFiles
from vla_spec.engines._quantized_files import hash_file, write_manifest
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs.quantized import find_linears

RANGE = 8.0


def quantise(folder, precision="int8"):
    """Write decoder.int8.onnx (or fp8), its weights and its manifest."""
    graph = folder / "decoder.onnx"
    model = onnx.load(str(graph), load_external_data=False)
    linears = find_linears(model, WeightsFile.open(folder / "target.safetensors"))
    clips = {linear.activation: RANGE for linear in linears}
    weights = ModelFiles.describe(folder).weights_sha256
    write_quantized(
        folder,
        Calibration(weights, hash_file(graph), Recipe(precision=precision, ranges="max"), clips),
        folder / "made up",
    )
    return folder


def shift_a_zero_point(folder):
    """Make the first activation's zero point 3, as another quantiser might; returns the node that uses it."""
    graph = folder / "decoder.int8.onnx"
    model = onnx.load(str(graph), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    zero = numpy_helper.from_array(np.int8(3), "shifted.zero")
    model.graph.initializer.append(zero)
    for other in model.graph.node:
        if other is node or (other.op_type == "DequantizeLinear" and other.input[0] == node.output[0]):
            del other.input[2:]
            other.input.append(zero.name)
    graph.write_bytes(model.SerializeToString())
    write_manifest(folder / "decoder.onnx", "int8", {})
    return node.name
