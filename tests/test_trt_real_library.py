"""The run side beside the real TensorRT-RTX: its names, its builder's output, and what it says without a GPU."""

import inspect
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import fake_tensorrt
import tensorrt_rtx as trt
from fake_cuda import FakeCuda

from vla_spec.engines import cache
from vla_spec.engines._trt.builder import BuilderOptions
from vla_spec.engines._trt.library import open_library
from vla_spec.engines._trt.loaded import REMEDIES, LoadedEngine
from vla_spec.engines._trt.runtime import TensorRTRuntime
from vla_spec.engines.build import BuildOptions, build_engine
from vla_spec.errors import BadModel
from vla_spec.progress import Silent

MODEL = Path(__file__).parents[1] / "models" / "metaworld" / "small"
pytestmark = pytest.mark.skipif(not (MODEL / "decoder.onnx").exists(), reason="no shipped model here")


def own_names(cls):
    """Public methods and attributes of a double."""
    names = {name for base in cls.__mro__[:-1] for name in vars(base) if not name.startswith("_")}
    source = "".join(inspect.getsource(base) for base in cls.__mro__[:-1])
    return {name for name in names if f"def {name}" in source}


@pytest.mark.parametrize(
    ("double", "real"),
    [
        ("FakeRtxRuntime", "Runtime"), ("FakeEngine", "ICudaEngine"), ("FakeRtxContext", "IExecutionContext"),
        ("FakeInspector", "EngineInspector"), ("FakeRuntimeConfig", "IRuntimeConfig"),
        ("FakeRuntimeCache", "IRuntimeCache"),
    ],
)  # fmt: skip
def test_the_double_has_no_name_that_the_library_lacks(double, real):
    names = own_names(getattr(fake_tensorrt, double)) - {"io"}
    assert names, double
    assert names <= set(dir(getattr(trt, real)))


@pytest.mark.parametrize(
    ("real", "names"),
    [
        (
            "ICudaEngine",
            "num_io_tensors num_optimization_profiles device_memory_size_v2 num_aux_streams get_aliased_input_tensor "
            "create_runtime_config",
        ),
        ("IRuntimeConfig", "cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy"),
        ("IExecutionContext", "is_stream_capturable execute_async_v3 set_device_memory set_aux_streams"),
    ],
)
def test_the_library_has_what_is_read_from_it(real, names):
    assert set(names.split()) <= set(dir(getattr(trt, real)))


@pytest.mark.parametrize("name", ["TensorIOMode", "EngineValidity", "EngineInvalidityDiagnostics", "CudaGraphStrategy",
                                  "DynamicShapesKernelSpecializationStrategy", "ExecutionContextAllocationStrategy",
                                  "LayerInformationFormat"])  # fmt: skip
def test_the_double_s_words_are_the_library_s(name):
    real = set(getattr(trt, name).__members__)
    assert {member.name for member in getattr(fake_tensorrt, name)} <= real


def test_every_reason_for_refusing_a_plan_has_a_remedy():
    assert set(trt.EngineInvalidityDiagnostics.__members__) == set(REMEDIES)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    options = BuildOptions("tensorrt-rtx", "fp16", (1, 8), BuilderOptions((89,)))
    return build_engine(MODEL, options, Silent(), tmp_path_factory.mktemp("cache"))


def test_sizes_come_from_the_built_engine_s_manifest(built):
    found = cache.read(built.folder)
    runtime = TensorRTRuntime(MODEL, lambda _: found, open_library("tensorrt-rtx"), FakeCuda())
    assert runtime.precision == "fp16"
    assert runtime.tiers == (1, 8)
    assert runtime.largest_step == 8
    assert not runtime.is_batch_invariant
    assert runtime.provider == f"tensorrt-rtx {trt.__version__} on Fake GPU (SM 89, CUDA 13.0)"
    runtime.close()


def test_a_file_that_is_no_plan_is_refused_by_the_library_itself(tmp_path):
    library = open_library("tensorrt-rtx")
    with pytest.raises(BadModel, match=r"x\.plan: tensorrt-rtx .* refuses it: the file is no plan"):
        LoadedEngine(library, trt.Runtime(library.log), b"not a plan " * 40, tmp_path / "x.plan")


def test_without_a_driver_a_real_plan_is_one_clear_error_and_nothing_stays(built):
    runtime_api = pytest.importorskip("cuda.bindings.runtime")
    if runtime_api.cudaGetDeviceCount()[0] == 0:
        pytest.skip("there is a GPU")
    cuda = FakeCuda()  # as if a GPU were there: it is TensorRT that finds none
    runtime = TensorRTRuntime(MODEL, lambda _: built, open_library("tensorrt-rtx"), cuda)
    with pytest.raises(BadModel, match=r"decoder\.plan: tensorrt-rtx .*(driver|CUDA)") as caught:
        runtime.open(MODEL / "decoder.onnx")
    assert "\n" not in str(caught.value)
    runtime.close()
    assert cuda.live == {}


def test_a_changed_plan_never_reaches_the_library(built):
    file = built.plan_file("decoder")
    content = file.read_bytes()
    runtime = TensorRTRuntime(MODEL, lambda _: built, open_library("tensorrt-rtx"), FakeCuda())
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BadModel, match="corrupt"):
            runtime.open(MODEL / "decoder.onnx")
    finally:
        file.write_bytes(content)
        runtime.close()
