"""Spec-VLA's drafter as a graph: one Llama layer over joined token embeddings and hidden states, with a cache.

The cache, the mask and the layer are the decoder's (`decoder.py`). Row i joins the target's hidden state of row i with
the embedding of the token after it, and its output stands in for the hidden state of that next row.
Source: EAGLE, Li et al. 2024, arXiv:2401.15077; Spec-VLA, Wang et al. 2025, arXiv:2507.22424.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs.decoder import GraphWriter, Precision, layer, linear


def spec_vla_head_model(spec: DecoderSpec, weights: WeightsFile, precision: Precision = "fp32") -> onnx.ModelProto:
    """The graph.

    Inputs: embeds fp32 [k, D] of the tokens after the rows; hidden fp32 [k, D], the target's or the drafter's own;
    position int64 [k]; mask bool [1, 1, k, R]; write_index int64 [1]; past_key_0, past_value_0.
    Outputs: logits fp32 [k, V]; out fp32 [k, D]; present_key_0, present_value_0.

    Args:
        spec: of its only layer.
        weights: fc, blocks.0 and the target's head.
        precision: of everything between inputs and outputs.

    Raises:
        BadModel: a weight is missing or of another shape.
    """
    writer = GraphWriter(weights, precision)
    width, cache = spec.hidden_width, [1, spec.num_kv_heads, spec.rows, spec.head_width]
    for name in ("embeds", "hidden"):
        writer.add_input(name, TensorProto.FLOAT, ["k", width])
    writer.add_input("position", TensorProto.INT64, ["k"])
    writer.add_input("mask", TensorProto.BOOL, [1, 1, "k", spec.rows])
    writer.add_input("write_index", TensorProto.INT64, [1])
    for name in spec.state_names:
        writer.add_input(name, writer.type, list(cache))
    halves = [writer.node("Cast", [name], f"{name}.cast", to=writer.type) for name in ("embeds", "hidden")]
    x = writer.node("Concat", halves, "joined", axis=-1)
    x = linear(writer, "fc", x, 2 * width, width, "fc.bias" in weights.tensors, "fc.out")
    x = layer(writer, spec, 0, x, has_norm1=False)
    logits = linear(writer, "head", x, width, spec.vocab_size, False, "head.out")
    for value, name, size in ((logits, "logits", spec.vocab_size), (x, "out", width)):
        writer.node("Cast", [value], name, to=TensorProto.FLOAT)
        writer.add_output(name, TensorProto.FLOAT, ["k", size])
    for name in spec.new_state_names:
        writer.add_output(name, writer.type, list(cache))
    return writer.model("spec_vla_head")
