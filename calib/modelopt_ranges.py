"""Ranges of activations as NVIDIA's Model Optimizer finds them, read back from the graph that it quantises.

Source: nvidia-modelopt, ``modelopt.onnx.quantization.quantize``. Its graph itself is not used: it holds all weights
once more, and every bias is an operand of its product there; what it knows, the scales, go into ours.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs.quantized import LARGEST, Linear
from vla_spec.errors import BadModel, MissingDependency

#: Above this a graph's weights don't fit into one file of protocol buffers. [bytes]
_LARGEST_FILE = 1 << 30
Feed = dict[str, npt.NDArray[Any]]


def modelopt_clips(
    model: Any, weights: WeightsFile, linears: Sequence[Linear], calls: Sequence[Feed], precision: str, method: str
) -> dict[str, float]:
    """Largest magnitude to represent of every activation, as the library chooses it.

    Args:
        model: fp32, as exported, external tensors not loaded.
        weights: what they point to.
        linears: the products to quantise, see `find_linears`.
        calls: inputs of the graph, as recorded.
        precision: "int8" or "fp8".
        method: one of `LIBRARY_METHODS`, "modelopt-max" for one.

    Raises:
        MissingDependency: no nvidia-modelopt, or one without its ONNX part.
        BadModel: it fails, or leaves a product as it is.
    """
    onnx, quantization = importlib.import_module("onnx"), _import()
    heard = io.StringIO()  # three libraries report to the terminal
    with (
        tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(heard),
        contextlib.redirect_stderr(heard),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        source, result = Path(folder) / "model.onnx", Path(folder) / "quantized.onnx"
        whole = _with_weights(model, weights)
        large = whole.ByteSize() > _LARGEST_FILE
        onnx.save(whole, str(source), save_as_external_data=large)
        try:
            quantization.quantize(
                str(source), quantize_mode=precision, calibration_data_reader=_reader(calls),
                calibration_method=method.removeprefix("modelopt-"), calibration_eps=["cpu"], output_path=str(result),
                high_precision_dtype="fp32", log_level="ERROR", op_types_to_quantize=["Gemm"],
                use_external_data_format=large,
            )  # fmt: skip
            quantized = onnx.load(str(result), load_external_data=not large)
        except Exception as error:  # whatever three libraries raise
            raise BadModel(f"{model.graph.name}: nvidia-modelopt can't quantise it ({error!r})") from error
    values = {tensor.name: tensor for tensor in quantized.graph.initializer}
    clips: dict[str, float] = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in values:
            scale = onnx.numpy_helper.to_array(values[node.input[1]])
            if scale.size == 1:
                clips[node.input[0]] = float(scale.reshape(())) * LARGEST[precision]
    left = [linear.activation for linear in linears if linear.activation not in clips]
    if left:
        raise BadModel(
            f"{model.graph.name}: nvidia-modelopt left {left[0]} as it is; valid: a range for every activation"
        )
    return {linear.activation: clips[linear.activation] for linear in linears}


def _import() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("modelopt.onnx.quantization")
    except ImportError as error:
        raise MissingDependency("nvidia-modelopt with its ONNX part", "pip install 'vla_spec[modelopt]'") from error


def _with_weights(model: Any, weights: WeightsFile) -> Any:
    """The graph with its weights inside, in single precision, where a Cast made them that before."""
    from vla_spec.engines.graphs.quantized import stored_names

    onnx = importlib.import_module("onnx")
    stored, out = stored_names(model, weights), onnx.ModelProto()
    out.CopyFrom(model)
    kept = [node for node in model.graph.node if not (node.op_type == "Cast" and node.input[0] in stored)]
    used = {name for node in kept for name in node.input}
    inside = [tensor for tensor in model.graph.initializer if tensor.name not in stored]
    read = [onnx.numpy_helper.from_array(weights.read(stored[name]), name) for name in stored if name in used]
    del out.graph.node[:], out.graph.initializer[:]
    out.graph.node.extend(kept)
    out.graph.initializer.extend([*inside, *read])
    return out


def _reader(calls: Sequence[Feed]) -> Any:
    base = importlib.import_module("onnxruntime.quantization").CalibrationDataReader

    class Reader(base):  # type: ignore[misc, valid-type]
        """The calls, in order."""

        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self._rest: Iterator[Feed] = iter(calls)

        def get_first(self) -> Feed:
            # The one with most rows: products with few rows would not be quantised.
            return max(calls, key=lambda call: sum(np.size(array) for array in call.values()))

        def get_next(self) -> Feed | None:
            return next(self._rest, None)

    return Reader()
