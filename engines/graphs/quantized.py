"""A graph in eight bits: every large matrix product between quantise and dequantise nodes, the rest as it was.

Static and symmetric: one number per activation tensor, found by calibration, and one per row of a weight. So a row's
result does not depend on what else is in the call, and TensorRT, which refuses zero points, reads the same file as
ONNX Runtime and OpenVINO. Eight bits are integers, or numbers with four bits of exponent (fp8 E4M3, Micikevicius et
al. 2022, arXiv:2209.05433), in which only GPUs compute. Biases are added behind the product in floating point:
TensorRT refuses int32 biases.

Source: Jacob et al. 2018, arXiv:1712.05877 (integer arithmetic); Xiao et al. 2023, arXiv:2211.10438 (migration);
Wu et al. 2020, arXiv:2004.09602 (per row weights, per tensor activations).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from vla_spec.engines._safetensors import WeightsFile
from vla_spec.errors import BadModel
from vla_spec.types import Float32

#: Largest magnitude of a quantised number, by precision. In int8, -128 is left out, so that the range is symmetric.
LARGEST = {"int8": 127.0, "fp8": 448.0}
Arrays = dict[str, npt.NDArray[Any]]


class Linear(NamedTuple):
    """One matrix product x [k, width_in] times a stored weight [width_out, width_in], transposed."""

    output: str  # also the name of its node
    activation: str  # x
    weight: str  # as the graph calls it
    stored: str  # as the weights file calls it
    bias: str | None


def find_linears(model: onnx.ModelProto, weights: WeightsFile) -> list[Linear]:
    """The products that can be quantised: `Gemm` with a transposed weight that lies in the weights file.

    Raises:
        BadModel: the graph has none.
    """
    stored = stored_names(model, weights)
    out = []
    for node in model.graph.node:
        flags = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if (
            node.op_type == "Gemm"
            and node.input[1] in stored
            and flags.get("transB", 0) == 1
            and flags.get("transA", 0) == 0
            and flags.get("alpha", 1.0) == flags.get("beta", 1.0) == 1.0
        ):
            bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
            out.append(Linear(node.output[0], node.input[0], node.input[1], stored[node.input[1]], bias))
    if not out:
        raise BadModel(
            f"{model.graph.name}: no matrix product with a weight of {weights.path.name}; nothing to quantise"
        )
    return out


def activations_of(linears: list[Linear], weights: WeightsFile) -> dict[str, int]:
    """The tensors to calibrate, in the graph's order -> width."""
    return {linear.activation: weights.tensors[linear.stored].shape[1] for linear in linears}


def observed_model(model: onnx.ModelProto, weights: WeightsFile) -> onnx.ModelProto:
    """The same graph with the activations as further outputs, fp32 [k, width]."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for name, width in activations_of(find_linears(model, weights), weights).items():
        if name not in {value.name for value in out.graph.output}:
            out.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["k", width]))
    return out


def quantized_model(
    model: onnx.ModelProto, weights: WeightsFile, clips: Mapping[str, float],
    migrations: Mapping[str, Float32] | None = None, kept: Collection[str] = (), precision: str = "int8",
) -> tuple[onnx.ModelProto, Arrays]:  # fmt: skip
    """The graph in eight bits.

    Args:
        model: fp32, as exported, external data not loaded.
        weights: what its external tensors point to.
        clips: activation tensor -> largest magnitude that is represented; products whose activation is not named stay
            as they are.
        migrations: activation tensor -> [width]: what its channels are divided by, and the weights behind it
            multiplied with.
        kept: weights, as the weights file calls them, that stay as they are.
        precision: "int8" or "fp8".

    Returns:
        The graph, whose new tensors point nowhere yet (see `point_to`), and these tensors: ``NAME.quantized`` int8
        (or fp8, as uint8) [width_out, width_in], ``NAME.scale`` fp32 [width_out].

    Raises:
        BadModel: nothing to quantise, a clip of an unknown tensor or one that is no positive number, or weights that
            are not finite.
    """
    linears = find_linears(model, weights)
    wanted = {linear.output: linear for linear in linears if linear.activation in clips and linear.stored not in kept}
    unknown = sorted(set(clips) - {linear.activation for linear in linears})
    wrong = [f"{name} = {clip}" for name, clip in clips.items() if not (np.isfinite(clip) and clip > 0)]
    if unknown or wrong or not wanted:
        reason = f"no tensor {unknown[0]}" if unknown else f"clip {wrong[0]}" if wrong else "no clip at all"
        raise BadModel(f"{model.graph.name}: {reason}; valid: positive numbers for {', '.join(clips) or 'activations'}")
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    rewriter = _Rewriter(model, weights, dict(migrations or {}), precision)
    for node in model.graph.node:
        linear = wanted.get(node.output[0])
        if linear is None:
            rewriter.nodes.append(node)
        else:
            rewriter.quantize(linear, clips[linear.activation])
    used = {name for node in rewriter.nodes for name in node.input}
    # A weight that went over to int8 leaves its Cast and its reference behind.
    nodes = [
        node
        for node in rewriter.nodes
        if node.op_type != "Cast" or node.output[0] in used or node.output[0] in {v.name for v in model.graph.output}
    ]
    used = {name for node in nodes for name in node.input}
    out.graph.node.extend(nodes)
    initializers = [t for t in (*model.graph.initializer, *rewriter.initializers) if t.name in used]
    del out.graph.initializer[:]
    out.graph.initializer.extend(initializers)
    return out, rewriter.tensors


def point_to(model: onnx.ModelProto, file: WeightsFile) -> None:
    """Let every tensor of the graph that this file has point into it, in place."""
    for tensor in model.graph.initializer:
        place = file.tensors.get(tensor.name)
        if place is None or tensor.data_location == TensorProto.EXTERNAL:
            continue
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", file.path.name), ("offset", place.offset), ("length", place.length)):
            tensor.external_data.add(key=key, value=str(value))


def quantize_rows(weight: Float32, precision: str = "int8") -> tuple[npt.NDArray[Any], Float32]:
    """[out, in] -> int8 or fp8 [out, in] and scales [out], to nearest; a row of zeros gets scale 1."""
    limit, largest = LARGEST[precision], np.abs(weight).max(1)
    scale = np.where(largest > 0, largest / limit, 1.0).astype(np.float32)
    scaled = np.clip(weight / scale[:, None], -limit, limit)
    return (np.rint(scaled) if precision == "int8" else scaled).astype(_dtype(precision)), scale


def _dtype(precision: str) -> Any:
    if precision == "int8":
        return np.int8
    import ml_dtypes  # comes with onnx

    return ml_dtypes.float8_e4m3fn


class _Rewriter:
    """Collects what the new graph is made of."""

    def __init__(
        self, model: onnx.ModelProto, weights: WeightsFile, migrations: dict[str, Float32], precision: str
    ) -> None:
        self.weights, self._precision = weights, precision
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.tensors: Arrays = {}
        self._migrations = migrations
        self._done: set[str] = set()
        self._producers = {node.output[0]: node for node in model.graph.node}
        self._stored = stored_names(model, weights)

    def quantize(self, linear: Linear, clip: float) -> None:
        """Append one product in int8."""
        weight = self.weights.read(linear.stored)
        if not np.isfinite(weight).all():
            raise BadModel(f"{self.weights.path}: {linear.stored} has numbers that are not finite")
        x, factor = linear.activation, self._migrations.get(linear.activation)
        if factor is not None:
            weight = weight * factor[None]
        if x not in self._done:
            self._done.add(x)
            source = x if factor is None else self._migrate(x, factor)
            scale = self._constant(f"{x}.scale", np.float32(clip / LARGEST[self._precision]))
            zero = self._zero(f"{x}.zero", ())
            self._node("QuantizeLinear", [source, scale, zero], f"{x}.quantized")
            self._node("DequantizeLinear", [f"{x}.quantized", scale, zero], f"{x}.dequantized")
        name = linear.weight
        if f"{name}.quantized" not in self.tensors:
            values, of_rows = quantize_rows(weight, self._precision)
            self.tensors[f"{name}.quantized"] = values.view(np.uint8) if self._precision == "fp8" else values
            self.tensors[f"{name}.scale"] = of_rows
            inputs = [
                self._constant(f"{name}.quantized", values),
                self._constant(f"{name}.scale", of_rows),
                self._zero(f"{name}.zero", (len(weight),)),
            ]
            self._node("DequantizeLinear", inputs, f"{name}.dequantized", axis=0)
        inputs = [f"{x}.dequantized", f"{name}.dequantized"]
        if linear.bias is None:
            self._node("Gemm", inputs, linear.output, transB=1)
        else:
            self._node("Gemm", inputs, f"{linear.output}.product", transB=1)
            self._node("Add", [f"{linear.output}.product", linear.bias], linear.output)

    def _migrate(self, x: str, factor: Float32) -> str:
        return self._node(
            "Mul", [x, self._constant(f"{x}.migration", (1 / factor).astype(np.float32))], f"{x}.migrated"
        )

    def _constant(self, name: str, value: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _zero(self, name: str, shape: tuple[int, ...]) -> str:
        """Says the type and nothing else."""
        return self._constant(name, np.zeros(shape, _dtype(self._precision)))

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output


def stored_names(model: onnx.ModelProto, weights: WeightsFile) -> dict[str, str]:
    """Tensor as nodes see it -> name in the weights file, for external ones, a Cast in between or not."""
    by_offset = {place.offset: name for name, place in weights.tensors.items()}
    out: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place.get("location") == weights.path.name and int(place["offset"]) in by_offset:
                out[tensor.name] = by_offset[int(place["offset"])]
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in out:
            out[node.output[0]] = out[node.input[0]]
    return out
