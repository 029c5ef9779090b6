"""The layer over cuda-bindings: each method calls the right function with the right arguments; errors are one sentence.

The real package is there in the tests (it needs no GPU to be imported); where there is no driver its answers are real.
"""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("cuda.bindings.runtime")

from cuda.bindings import runtime
from fake_cuda import FakeCuda

from vla_spec import plugins
from vla_spec.engines._trt.cuda import CopyKind, Cuda, CudaBindings, CudaError, Device, cuda_version
from vla_spec.errors import MissingDependency, NoDevice
from vla_spec.plugins import Parts

HAS_GPU = runtime.cudaGetDeviceCount()[0] == 0
no_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
METHODS = [name for name in vars(Cuda) if not name.startswith("_")]
SMALL = Path(__file__).parents[1] / "models" / "metaworld" / "small"


class Recorder:
    """cuda.bindings.runtime with calls recorded instead of made; types and constants are the real ones."""

    def __init__(self, results):
        self.calls, self._results = [], results

    def __getattr__(self, name):
        real = getattr(runtime, name)
        if not name.startswith("cuda") or not callable(real) or isinstance(real, type):
            return real

        def call(*arguments):
            self.calls.append((name, *arguments))
            return self._results.get(name, (runtime.cudaError_t.cudaSuccess, 7))

        return call


def recorded(**results):
    cuda = CudaBindings()
    recorder = Recorder(results)
    cuda._cuda = recorder
    return cuda, recorder.calls


OK = runtime.cudaError_t.cudaSuccess
TO_DEVICE = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
INSIDE = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
THREAD = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal


@pytest.mark.parametrize(
    ("method", "arguments", "wanted"),
    [
        ("allocate", (512,), ("cudaMalloc", 512)),
        ("free", (99,), ("cudaFree", 99)),
        ("allocate_pinned", (512,), ("cudaHostAlloc", 512, runtime.cudaHostAllocDefault)),
        ("free_pinned", (99,), ("cudaFreeHost", 99)),
        ("stream", (-3,), ("cudaStreamCreateWithPriority", runtime.cudaStreamNonBlocking, -3)),
        ("destroy_stream", (1,), ("cudaStreamDestroy", 1)),
        ("synchronize", (1,), ("cudaStreamSynchronize", 1)),
        ("event", (False,), ("cudaEventCreateWithFlags", runtime.cudaEventDisableTiming)),
        ("event", (False, True), ("cudaEventCreateWithFlags", runtime.cudaEventDefault)),
        ("event", (True, True), ("cudaEventCreateWithFlags", runtime.cudaEventBlockingSync)),
        ("destroy_event", (1,), ("cudaEventDestroy", 1)),
        ("record", (2, 1), ("cudaEventRecord", 2, 1)),
        ("wait", (2,), ("cudaEventSynchronize", 2)),
        ("elapsed_ms", (1, 2), ("cudaEventElapsedTime", 1, 2)),
        ("copy", (10, 20, 5, CopyKind.HOST_TO_DEVICE, 1), ("cudaMemcpyAsync", 10, 20, 5, TO_DEVICE, 1)),
        (
            "copy_2d", (10, 64, 20, 32, 5, 3, CopyKind.DEVICE_TO_DEVICE, 1),
            ("cudaMemcpy2DAsync", 10, 64, 20, 32, 5, 3, INSIDE, 1),
        ),
        ("fill", (10, 0, 5, 1), ("cudaMemsetAsync", 10, 0, 5, 1)),
        ("begin_capture", (1,), ("cudaStreamBeginCapture", 1, THREAD)),
        ("end_capture", (1,), ("cudaStreamEndCapture", 1)),
        ("instantiate", (1,), ("cudaGraphInstantiate", 1, 0)),
        ("destroy_graph", (1,), ("cudaGraphDestroy", 1)),
        ("destroy_exec", (1,), ("cudaGraphExecDestroy", 1)),
        ("launch", (2, 1), ("cudaGraphLaunch", 2, 1)),
    ],
)  # fmt: skip
def test_calls_the_function_of_the_name(method, arguments, wanted):
    cuda, calls = recorded()
    getattr(cuda, method)(*arguments)
    assert calls == [wanted]
    real = getattr(runtime, wanted[0])
    first_line = (real.__doc__ or "").split("\n")[0]
    assert first_line.count(",") + (not first_line.endswith("()")) == len(wanted) - 1, first_line


def test_reads_a_device():
    properties = SimpleNamespace(
        name=b"Orin\0\0", major=8, minor=7, totalGlobalMem=1 << 33, multiProcessorCount=16, l2CacheSize=1 << 22,
        memoryBusWidth=128, ECCEnabled=0, integrated=1,
    )  # fmt: skip
    cuda, _ = recorded(
        cudaGetDeviceProperties=(OK, properties), cudaDriverGetVersion=(OK, 12060), cudaRuntimeGetVersion=(OK, 12040)
    )
    found = cuda.device(0)
    assert found == Device(0, "Orin", (8, 7), 1 << 33, 16, 1 << 22, 128, False, True, 12060, 12040)
    assert found.sm == 87
    assert cuda_version(found.driver) == "12.6"
    real = runtime.cudaDeviceProp()
    assert all(hasattr(real, name) for name in vars(properties)), "names of the real structure"


def test_reads_pairs():
    cuda, _ = recorded(
        cudaMemGetInfo=(OK, 5, 9), cudaDeviceGetStreamPriorityRange=(OK, 0, -5), cudaGraphGetNodes=(OK, None, 12)
    )
    assert cuda.memory() == (5, 9)
    assert cuda.priorities() == (0, -5)
    assert cuda.num_nodes(1) == 12


def test_out_of_memory_says_how_full_the_device_is():
    full = runtime.cudaError_t.cudaErrorMemoryAllocation
    cuda, calls = recorded(
        cudaMalloc=(full, None), cudaMemGetInfo=(OK, 1 << 20, 8 << 20), cudaGetErrorString=(OK, b"out of memory")
    )
    with pytest.raises(CudaError) as caught:
        cuda.allocate(3 << 20)
    assert caught.value.is_out_of_memory
    assert "cudaMalloc for 3.0 MiB of device memory failed: out of memory" in str(caught.value)
    assert "1 of 8 MiB are free" in str(caught.value)
    assert ("cudaGetLastError",) in calls, "it is reported once"


def test_a_failed_call_names_function_and_code():
    cuda, _ = recorded(
        cudaGraphLaunch=(runtime.cudaError_t.cudaErrorIllegalAddress, None),
        cudaGetErrorString=(OK, b"an illegal memory access was encountered"),
    )
    with pytest.raises(CudaError, match="cudaGraphLaunch failed: an illegal memory access") as caught:
        cuda.launch(1, 2)
    assert caught.value.code == "cudaErrorIllegalAddress"
    assert not caught.value.is_out_of_memory


@pytest.mark.parametrize(
    ("code", "words"),
    [("cudaErrorNoDevice", "no NVIDIA GPU"), ("cudaErrorInsufficientDriver", r"missing or older than CUDA 12\.4")],
)
def test_no_gpu_and_no_driver_are_told_apart(code, words):
    cuda, _ = recorded(cudaGetDeviceCount=(getattr(runtime.cudaError_t, code), None), cudaRuntimeGetVersion=(OK, 12040))
    with pytest.raises(NoDevice, match=words):
        cuda.num_devices()


def test_zero_devices_are_none():
    cuda, _ = recorded(cudaGetDeviceCount=(OK, 0))
    with pytest.raises(NoDevice, match="no NVIDIA GPU"):
        cuda.use(0)


def test_a_number_beyond_the_last_device_is_refused():
    cuda, calls = recorded(cudaGetDeviceCount=(OK, 2))
    with pytest.raises(NoDevice, match="no device 2; valid: 0 to 1"):
        cuda.use(2)
    cuda.use(1)
    assert calls[-1] == ("cudaSetDevice", 1)


@no_gpu
@pytest.mark.parametrize(
    ("method", "arguments"), [("num_devices", ()), ("use", (0,)), ("allocate", (16,)), ("stream", (0,)), ("memory", ())]
)
def test_without_a_driver_every_call_says_so(method, arguments):
    with pytest.raises(NoDevice, match=r"driver|no NVIDIA GPU") as caught:
        getattr(CudaBindings(), method)(*arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 69


@no_gpu
@pytest.mark.skipif(not (SMALL / "decoder.onnx").exists(), reason="no shipped model here")
def test_without_a_gpu_the_engine_is_one_error():
    pytest.importorskip("tensorrt_rtx")
    plugin = plugins.load("engine", "tensorrt")
    with pytest.raises(NoDevice, match=r"driver|no NVIDIA GPU"):
        plugin.build(plugin.options(), Parts(None, None, model_dir=SMALL))


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingDependency, match=r"cuda-bindings is missing; to install: pip install"):
        CudaBindings()


@pytest.mark.parametrize("method", METHODS)
def test_the_double_has_every_method_with_the_same_parameters(method):
    wanted = list(inspect.signature(getattr(Cuda, method)).parameters)
    assert list(inspect.signature(getattr(CudaBindings, method)).parameters) == wanted
    assert list(inspect.signature(getattr(FakeCuda, method)).parameters) == wanted


@no_gpu
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("free", (4096,)), ("allocate_pinned", (16,)), ("free_pinned", (4096,)), ("priorities", ()),
        ("destroy_stream", (STREAM := runtime.cudaStream_t(0),)), ("synchronize", (STREAM,)), ("event", (True,)),
        ("destroy_event", (EVENT := runtime.cudaEvent_t(0),)), ("record", (EVENT, STREAM)), ("wait", (EVENT,)),
        ("copy", (4096, 8192, 5, CopyKind.DEVICE_TO_HOST, STREAM)),
        ("copy_2d", (4096, 64, 8192, 64, 5, 3, CopyKind.DEVICE_TO_DEVICE, STREAM)), ("fill", (4096, 0, 5, STREAM)),
        ("begin_capture", (STREAM,)), ("end_capture", (STREAM,)),
        ("launch", (runtime.cudaGraphExec_t(0), STREAM)), ("device", (0,)),
    ],
)  # fmt: skip
def test_the_real_functions_take_these_arguments(method, arguments):
    """Without a driver each of them fails, but only after its arguments were understood."""
    with pytest.raises((NoDevice, CudaError)):
        getattr(CudaBindings(), method)(*arguments)


def test_handles_have_numbers_for_tensorrt():
    assert int(runtime.cudaStream_t(77)) == 77
