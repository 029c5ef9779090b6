"""ONNX graphs as OpenVINO runs them: what its reader does not know, what it does slowly, and which of it is needed.

OpenVINO has no ``TensorScatter``. Its reader leaves such nodes as they are, and here each becomes a concatenation of
the cache and the call's new rows; the rows come back as outputs, and the caller writes them into the cache. Writing in
place by ``ScatterUpdate`` is possible and was slower (docs/cpu-engines.md).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from vla_spec.errors import BadModel, MissingDependency

_UNKNOWN = "ONNXFrameworkNode"
MASK, WRITE_INDEX = "mask", "write_index"


def openvino_module(part: str = "") -> Any:
    """OpenVINO, or one of its modules.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return importlib.import_module(f"openvino.{part}" if part else "openvino")
    except ImportError as error:
        raise MissingDependency("OpenVINO", "pip install 'vla_spec[openvino]'") from error


def read_graph(file: Path, has_plain_attention: bool) -> tuple[Any, list[str]]:
    """An ``openvino.Model`` that can be compiled, and the names of the outputs that hold new cache rows.

    Where there are such outputs, ``mask`` [1, 1, k, R + r] speaks about the R rows of the cache and behind them the r
    rows of the call, and ``write_index`` is no input any more.

    Args:
        file: of a model folder; its weights may be external.
        has_plain_attention: write attention as two products and a softmax. Faster in fp32, wrong in bf16 (one row,
            static shapes; OpenVINO 2026.4).

    Raises:
        BadModel: the graph is corrupt, or has nodes that OpenVINO does not know.
    """
    library = openvino_module()
    reader = openvino_module("frontend").FrontEndManager().load_by_framework("onnx")
    try:
        model = reader.convert_partially(reader.load(str(file)))
    except Exception as error:  # what OpenVINO raises has no common base
        raise BadModel(f"{file}: OpenVINO can't read it ({_last_line(error)})") from error
    if not model.get_results():
        raise BadModel(f"{file}: OpenVINO finds nothing in it; export it again")
    unknown = [op for op in model.get_ordered_ops() if op.get_type_name() == _UNKNOWN]
    wrong = [op.get_friendly_name() for op in unknown if not _is_scatter(op)]
    if wrong:
        raise BadModel(f"{file}: OpenVINO does not know the operators of {', '.join(wrong)}; use another engine")
    new_rows = [next(iter(op.output(0).get_names())) for op in unknown]
    for op in unknown:
        _append(op)
    if unknown:
        inputs = {p.get_friendly_name(): p for p in model.get_parameters()}
        if MASK not in inputs:
            raise BadModel(f"{file}: a graph with a cache has an input {MASK}; export it again")
        inputs[MASK].set_partial_shape(library.PartialShape([1, 1, -1, -1]))
        readers = inputs[WRITE_INDEX].output(0).get_target_inputs()
        if all(reader.get_node().get_type_name() == _UNKNOWN for reader in readers):
            model.remove_parameter(inputs[WRITE_INDEX])
        for op in model.get_ordered_ops():
            if op.get_type_name() == "ScaledDotProductAttention":
                _repeat_heads(op)
        if has_plain_attention:
            _write_attention_out(model, inputs[MASK])
    try:
        model.validate_nodes_and_infer_types()
    except Exception as error:
        raise BadModel(f"{file}: OpenVINO finds it inconsistent ({_last_line(error)})") from error
    return model, new_rows


def _is_scatter(op: Any) -> bool:
    """OpenVINO does not say which operator it did not know; the names of inputs and outputs do."""
    if op.get_input_size() != 3 or op.get_output_size() != 1:
        return False
    names = [set(value.get_names()) for value in (op.input_value(0), op.input_value(2), op.output(0))]
    return WRITE_INDEX in names[1] and all(
        any(name.startswith(prefix) for name in found)
        for found, prefix in ((names[0], "past_"), (names[2], "present_"))
    )


def _append(scatter: Any) -> None:
    """Replace TensorScatter(past, new, index): consumers see past and new, the graph's output is new."""
    ops = openvino_module("opset13")

    past, new = scatter.input_value(0), scatter.input_value(1)
    whole = ops.concat([past, new], 2).output(0)
    for target in list(scatter.output(0).get_target_inputs()):
        target.replace_source_output(new if target.get_node().get_type_name() == "Result" else whole)


def _repeat_heads(attention: Any) -> None:
    """Grouped queries: the reader repeats keys and values only where it knows their number, here it did not."""
    ops = openvino_module("opset13")
    heads = attention.get_input_partial_shape(0)[1].get_length()
    for i in (1, 2):
        found = attention.input_value(i)
        kv_heads = found.get_partial_shape()[1].get_length()
        if kv_heads != heads:
            of_query = ops.constant(np.repeat(np.arange(kv_heads), heads // kv_heads))
            repeated = ops.gather(found, of_query, ops.constant(np.int64(1)))
            attention.input(i).replace_source_output(repeated.output(0))


def _write_attention_out(model: Any, mask: Any) -> None:
    """Two products and a softmax under one additive mask that all layers share.

    The reader guards every attention against rows that see nothing; here every row sees at least itself.
    """
    ops = openvino_module("opset13")

    zero, never = (ops.constant(np.float32(value)) for value in (0.0, -np.inf))
    bias = ops.select(mask, zero, never)
    for op in model.get_ordered_ops():
        if op.get_type_name() != "ScaledDotProductAttention":
            continue
        query, key, value = (op.input_value(i) for i in range(3))
        width = op.get_input_partial_shape(0)[3].get_length()
        scale = op.input_value(4) if op.get_input_size() > 4 else ops.constant(np.float32(width**-0.5)).output(0)
        scores = ops.add(ops.multiply(ops.matmul(query, key, False, True), scale), bias)
        mixed = ops.matmul(ops.softmax(scores, -1), value, False, False).output(0)
        for target in list(op.output(0).get_target_inputs()):
            guard = target.get_node()
            if guard.get_type_name() == "Select":
                for after in list(guard.output(0).get_target_inputs()):
                    after.replace_source_output(mixed)
            elif guard.get_type_name() not in ("IsNaN", "ConvertLike"):
                target.replace_source_output(mixed)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
