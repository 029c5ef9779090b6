"""From single to half precision: the same numbers to rounding, the same outside, and nothing half that must not be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", reason="needs the extra [train]")
ort = pytest.importorskip("onnxruntime", reason="needs the extra [run]")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from vla_spec.engines._trt.half_precision import _half_tensor, to_half  # noqa: E402
from vla_spec.errors import BadModel  # noqa: E402

MODEL = Path(__file__).parents[1] / "models" / "metaworld"
F32, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def load(name):
    return onnx.load(str(MODEL / f"{name}.onnx"), load_external_data=False)


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def graph(nodes, inputs, outputs, initializers=(), opset=18):
    made = helper.make_graph(list(nodes), "g", inputs, outputs, list(initializers))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(model, inputs, near=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if near is None:
        session = ort.InferenceSession(model.SerializeToString(), options)
    else:  # external weights are looked for beside the file
        near.write_bytes(model.SerializeToString())
        session = ort.InferenceSession(str(near), options)
    return session.run(None, inputs)


def kinds(values):
    return {v.name: v.type.tensor_type.elem_type for v in values}


@pytest.fixture
def beside_weights(tmp_path):
    """A place for a graph that points into the shipped model's weights."""
    for file in MODEL.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "half.onnx"


def test_the_prompt_in_half_precision_is_the_prompt_to_rounding(beside_weights):
    with np.load(MODEL / "golden.npz") as golden:
        inputs = {name: golden[name] for name in ("images", "words", "state")}
    (wanted,) = run(load("prompt"), inputs, beside_weights)
    (got,) = run(to_half(load("prompt"), "fp16", "prompt"), inputs, beside_weights)
    assert got.dtype == np.float32
    assert 0 < np.abs(got - wanted).max() < 5e-3 * wanted.std()


def test_the_decoder_in_half_precision_is_the_decoder_to_rounding(beside_weights):
    rng = np.random.default_rng(0)
    model = load("decoder")
    inputs = {}
    for v in model.graph.input:
        shape = [d.dim_value or 5 for d in v.type.tensor_type.shape.dim]
        inputs[v.name] = (0.5 * rng.normal(size=shape)).astype(np.float32)
    inputs["mask"] = np.broadcast_to(np.arange(77) < 40, (1, 1, 5, 77)).copy()
    inputs["write_index"] = np.array([35])
    wanted = run(model, inputs, beside_weights)
    half = {name: v.astype(np.float16) if name.startswith("past_") else v for name, v in inputs.items()}
    got = run(to_half(model, "fp16", "decoder"), half, beside_weights)
    for name, a, b in zip([o.name for o in model.graph.output], wanted, got, strict=True):
        assert b.dtype == (np.float16 if name.startswith("present_") else np.float32)
        assert np.abs(a - b).max() < 2e-2 * a.std(), name


@pytest.mark.parametrize("name", ["prompt", "decoder", "commit", "block_head", "feature_head"])
@pytest.mark.parametrize(("precision", "kind"), [("fp16", F16), ("bf16", BF16)])
def test_the_outside_stays_as_it_was_but_for_caches(name, precision, kind):
    before, after = load(name), to_half(load(name), precision, name)
    for old, new in ((before.graph.input, after.graph.input), (before.graph.output, after.graph.output)):
        assert [v.name for v in old] == [v.name for v in new]
        for key, elem in kinds(old).items():
            is_state = key.startswith(("past_", "present_")) and elem == F32
            assert kinds(new)[key] == (kind if is_state else elem), key


@pytest.mark.parametrize("name", ["prompt", "decoder", "block_head", "feature_head"])
def test_nothing_inside_is_left_in_single_precision(name):
    half = to_half(load(name), "fp16", name).graph
    outputs = {v.name for v in half.output}
    assert not any(t.data_type == F32 for t in half.initializer)
    for node in half.node:
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        assert to != F32 or node.output[0] in outputs, node.name
        assert not any(a.type == onnx.AttributeProto.TENSOR and a.t.data_type == F32 for a in node.attribute)
    uint8 = [v.name for v in half.input if v.type.tensor_type.elem_type == TensorProto.UINT8]
    for name_ in uint8:  # TensorRT takes bytes into a cast and nothing else
        assert {n.op_type for n in half.node if name_ in n.input} == {"Cast"}


def test_the_graph_that_was_given_is_not_touched():
    model = load("block_head")
    before = model.SerializeToString()
    to_half(model, "fp16", "block_head")
    assert model.SerializeToString() == before


def test_sizes_of_a_resize_stay_in_single_precision():
    """A scale of 1/3 in half precision gives another number of pixels."""
    scales = numpy_helper.from_array(np.array([1, 1, 30.1, 30.1], np.float32), "scales")
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["big"], mode="nearest"),
        helper.make_node("Mul", ["big", "scale"], ["y"]),
    ]
    scale = numpy_helper.from_array(np.float32(0.5), "scale")
    model = graph(nodes, [value("x", F32, [1, 1, 10, 10])], [value("y", F32, [1, 1, 301, 301])], [scales, scale])
    half = to_half(model, "fp16", "g")
    onnx.checker.check_model(half, full_check=True)
    x = np.arange(100, dtype=np.float32).reshape(1, 1, 10, 10)
    np.testing.assert_array_equal(run(half, {"x": x})[0], run(model, {"x": x})[0])
    by_name = {t.name: t.data_type for t in half.graph.initializer}
    assert by_name["scales"] == F32
    assert by_name["scale.half"] == F16


def test_a_computed_size_is_cast_back():
    nodes = [
        helper.make_node("Mul", ["s", "two"], ["scales"]),
        helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest"),
    ]
    two = numpy_helper.from_array(np.float32([1, 1, 2, 2]), "two")
    inputs = [value("x", F32, [1, 1, 2, 2]), value("s", F32, [4])]
    model = graph(nodes, inputs, [value("y", F32, [1, 1, "h", "w"])], [two])
    half = to_half(model, "fp16", "g")
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    feed = {"x": x, "s": np.ones(4, np.float32)}
    np.testing.assert_array_equal(run(half, feed)[0], run(model, feed)[0])


def test_constants_of_every_kind_become_half_and_stay_finite():
    nodes = [
        helper.make_node("Constant", [], ["a"], value=numpy_helper.from_array(np.float32([-1e9, 1]), "")),
        helper.make_node("Constant", [], ["b"], value_float=0.25),
        helper.make_node("Constant", [], ["c"], value_floats=[1e-9, 3e38]),
        helper.make_node("Constant", [], ["n"], value=numpy_helper.from_array(np.int64([2]), "")),
        helper.make_node("ConstantOfShape", ["n"], ["d"], value=numpy_helper.from_array(np.float32([7]), "")),
        helper.make_node("Max", ["a", "b", "c", "d", "x"], ["y"]),
    ]
    model = graph(nodes, [value("x", F32, [2])], [value("y", F32, [2])])
    half = to_half(model, "fp16", "g")
    onnx.checker.check_model(half, full_check=True)
    np.testing.assert_array_equal(run(half, {"x": np.float32([1, 2])})[0], np.float32([7, 65504]))


def test_an_output_that_is_used_inside_as_well_stays_an_output():
    nodes = [helper.make_node("Exp", ["x"], ["e"]), helper.make_node("Neg", ["e"], ["y"])]
    model = graph(nodes, [value("x", F32, [1])], [value("e", F32, [1]), value("y", F32, [1])])
    half = to_half(model, "fp16", "g")
    onnx.checker.check_model(half, full_check=True)
    e, y = run(half, {"x": np.zeros(1, np.float32)})
    assert (e, y) == (1, -1)
    assert e.dtype == y.dtype == np.float32


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (helper.make_node("Cast", ["x"], ["y"], name="wide", to=TensorProto.DOUBLE), "node wide computes in double"),
        (
            helper.make_node(
                "If", ["x"], ["y"], name="fork",
                then_branch=helper.make_graph([], "t", [], []), else_branch=helper.make_graph([], "e", [], []),
            ),
            "node fork branches",
        ),
    ],
)  # fmt: skip
def test_graphs_that_have_no_half_are_refused(node, says):
    model = graph([node], [value("x", F32, [1])], [value("y", F32, [1])])
    with pytest.raises(BadModel, match=says):
        to_half(model, "fp16", "file")


def test_inputs_in_double_precision_are_refused():
    model = graph([helper.make_node("Neg", ["x"], ["y"])], [value("x", TensorProto.DOUBLE, [1])], [])
    with pytest.raises(BadModel, match="file: x is in double precision"):
        to_half(model, "fp16", "file")


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_bfloat16_is_rounded_to_nearest_even(numbers):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with onnx")
    array = np.array(numbers, np.float32)
    got = numpy_helper.to_array(_half_tensor(array, "x", "bf16"))
    largest = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    finite = np.isfinite(array)
    clipped = np.where(finite, np.clip(array, -largest, largest), array)
    with np.errstate(over="ignore"):
        wanted = clipped.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))
    assert np.isfinite(got.astype(np.float32)[finite]).all()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_finite_numbers_stay_finite_in_fp16(numbers):
    array = np.array(numbers, np.float32)
    got = numpy_helper.to_array(_half_tensor(array, "x", "fp16"))
    assert got.dtype == np.float16
    assert (np.isfinite(got) == np.isfinite(array)).all()
