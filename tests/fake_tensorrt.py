"""TensorRT on a machine without a GPU: a double of the API names that ``tensorrt`` and ``tensorrt_rtx`` share.

A plan is a line of JSON that names an ONNX graph and profiles. Running it runs that graph with ONNX Runtime on the
fake device's memory, when the fake device gets to it. It is as strict about order as the documentation is.
"""

from __future__ import annotations

import json
from enum import Enum, IntEnum
from pathlib import Path

import numpy as np
import onnxruntime as ort

from vla_spec.engines._trt.library import Library
from vla_spec.errors import BadEngine

HEADER = b"fake plan\n"
TYPES = {
    "tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(int32)": "INT32",
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8",
}  # fmt: skip
NUMPY = {
    "FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_, "UINT8": np.uint8,
}  # fmt: skip
DataType = Enum("DataType", [*NUMPY, "BF16"])


class TensorIOMode(Enum):
    INPUT, OUTPUT = range(2)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class EngineValidity(Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER = 1, 2, 4
    OLD_CUDA_RUNTIME, INSUFFICIENT_GPU_MEMORY, MALFORMED_ENGINE, CUDA_ERROR = 8, 16, 32, 64


class LayerInformationFormat(Enum):
    ONELINE, JSON = range(2)


class CudaGraphStrategy(Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


def fake_plan(onnx_file, profiles, **more):
    """profiles: one dictionary per profile, input -> shape or (smallest, best, largest)."""
    wide = [{n: s if isinstance(s[0], tuple) else (s, s, s) for n, s in p.items()} for p in profiles]
    return HEADER + json.dumps({"onnx": str(onnx_file), "profiles": wide, **more}).encode()


class Log:
    """As the library's logger: keeps complaints until they are taken."""

    def __init__(self):
        self.kept = []

    def take(self):
        kept, self.kept = self.kept, []
        return " | ".join(kept)


class FakeTensorRT:
    """The module. ``is_rtx``: has what only TensorRT-RTX has."""

    __version__ = "1.7.1"

    def __init__(self, cuda, is_rtx=True, scratch=4096, num_aux_streams=0, sm=89, in_place=True, capturable=True):
        self.cuda, self.log = cuda, Log()
        self.scratch, self.num_aux_streams, self.sm = scratch, num_aux_streams, sm
        self.in_place, self.capturable = in_place, capturable
        self.refuse = set()  # names of calls that fail: "deserialize", "context", "enqueue", "enqueue while capturing"
        self.contexts, self.kernels = [], b"compiled"
        self.loaded_kernels = []
        self.inspected = "Half"  # what the inspector calls the type of every tensor; None = built without details
        self.LayerInformationFormat = LayerInformationFormat
        self.DataType, self.TensorIOMode = DataType, TensorIOMode
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
        self.is_rtx = is_rtx
        if is_rtx:
            self.EngineValidity, self.EngineInvalidityDiagnostics = EngineValidity, EngineInvalidityDiagnostics
            self.CudaGraphStrategy = CudaGraphStrategy
            self.ComputeCapability = Enum("ComputeCapability", ["SM86", "SM89", "SM120"])
            self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def library(self):
        return Library("tensorrt-rtx" if self.is_rtx else "tensorrt", self.__version__, self, self.log)

    def nptype(self, kind):
        return NUMPY[kind.name]

    def Runtime(self, log):
        assert log is self.log
        return FakeRtxRuntime(self) if self.is_rtx else FakeRuntime(self)


class FakeRuntime:
    def __init__(self, trt):
        self.trt = trt

    def deserialize_cuda_engine(self, plan):
        found = read_plan(plan)
        if found is None or found.get("sm", self.trt.sm) != self.trt.sm or "deserialize" in self.trt.refuse:
            self.trt.log.kept.append("IRuntime::deserializeCudaEngine: Error Code 1")
            return None
        return FakeEngine(self.trt, found)


class FakeRtxRuntime(FakeRuntime):
    def get_engine_validity(self, plan):
        found = read_plan(plan)
        if found is None:
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        if found.get("sm", self.trt.sm) != self.trt.sm:
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.UNSUPPORTED_CC)
        return EngineValidity.VALID, 0


def read_plan(plan):
    try:
        return json.loads(plan.removeprefix(HEADER)) if plan.startswith(HEADER) else None
    except ValueError:
        return None


_sessions = {}


def session_of(path):
    """One session per graph for all tests: reading one takes longer than running it."""
    if path not in _sessions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        _sessions[path] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return _sessions[path]


class FakeEngine:
    def __init__(self, trt, plan):
        self.trt, self.profiles = trt, plan["profiles"]
        assert Path(plan["onnx"]).is_file(), plan
        self.session = session_of(plan["onnx"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(self.profiles)
        self.device_memory_size_v2, self.num_aux_streams = trt.scratch, trt.num_aux_streams
        if trt.is_rtx:
            self.get_aliased_input_tensor = self._alias
            self.create_runtime_config = lambda: FakeRuntimeConfig(trt)

    def _alias(self, name):
        past = name.replace("present", "past")
        return past if name.startswith("present") and self.trt.in_place and past in self.inputs else None

    def io(self, name):
        return self.inputs.get(name) or self.outputs[name]

    def get_tensor_name(self, i):
        return self.names[i]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        return [n if isinstance(n, int) else -1 for n in self.io(name).shape]

    def get_tensor_dtype(self, name):
        return DataType[TYPES[self.io(name).type]]

    def get_tensor_profile_shape(self, name, number):
        assert -1 in self.get_tensor_shape(name), f"{name}: fixed, so that it need not be in a profile"
        return [tuple(shape) for shape in self.profiles[number][name]]

    def create_engine_inspector(self):
        return FakeInspector(self.trt.inspected)

    def create_execution_context(self, wanted):
        strategy = wanted.strategy if self.trt.is_rtx else wanted
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if "context" in self.trt.refuse:
            self.trt.log.kept.append("createExecutionContext: out of memory")
            return None
        context = FakeRtxContext(self) if self.trt.is_rtx else FakeContext(self)
        self.trt.contexts.append(context)
        return context


class FakeInspector:
    """Two layers, as the real one tells of them, or their bare names."""

    def __init__(self, kind):
        self.kind = kind

    def get_engine_information(self, wanted):
        assert wanted is LayerInformationFormat.JSON
        tensors = [{"Name": "x", "Format/Datatype": f"Row major linear {self.kind} format"}]
        detailed = [{"Name": name, "Inputs": tensors, "Outputs": tensors} for name in ("a", "b")]
        return json.dumps({"Layers": detailed if self.kind else ["a", "b"]})


class FakeRuntimeConfig:
    def __init__(self, trt):
        self.trt, self.strategy, self.cache = trt, None, None
        self.cuda_graph_strategy = self.dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return FakeRuntimeCache(self.trt)

    def set_runtime_cache(self, cache):
        assert self.dynamic_shapes_kernel_specialization_strategy is DynamicShapesKernelSpecializationStrategy.EAGER
        assert self.cuda_graph_strategy is CudaGraphStrategy.DISABLED
        self.cache = cache


class FakeRuntimeCache:
    def __init__(self, trt):
        self.trt = trt

    def deserialize(self, blob):
        self.trt.loaded_kernels.append(blob)
        return blob == self.trt.kernels

    def serialize(self):
        return self.trt.kernels


class FakeContext:
    def __init__(self, engine):
        self.engine, self.trt, self.cuda = engine, engine.trt, engine.trt.cuda
        is_dynamic = any(-1 in engine.get_tensor_shape(name) for name in engine.inputs)
        self.profile, self.shapes, self.addresses = None if is_dynamic else 0, {}, {}
        self.scratch, self.aux_streams = None, []
        self.is_settled = False  # one plain run with these shapes
        self.version = 0  # counts changes: a captured graph is good for one state of its context
        self.num_runs = 0

    def set_optimization_profile_async(self, number, stream):
        assert stream in self.cuda.streams
        self._change()
        self.profile = number
        return True

    def set_input_shape(self, name, shape):
        assert self.profile is not None, "shapes before a profile"
        fixed = tuple(self.engine.get_tensor_shape(name))
        is_fixed = -1 not in fixed
        smallest, _, largest = [fixed] * 3 if is_fixed else self.engine.get_tensor_profile_shape(name, self.profile)
        if not all(a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True)):
            self.trt.log.kept.append(f"setInputShape: {name} {shape} out of profile")
            return False
        self._change()
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self):
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name):
        known = {
            letter: size
            for given, shape in self.shapes.items()
            for letter, size in zip(self.engine.io(given).shape, shape, strict=True)
        }
        return [n if isinstance(n, int) else known.get(n, 1) for n in self.engine.io(name).shape]

    def set_tensor_address(self, name, address):
        assert address % 256 == 0, f"{name}: not aligned"
        assert name in self.engine.names
        self._change(is_shape=False)
        self.addresses[name] = address
        return True

    def set_device_memory(self, address, size):
        assert address % 256 == 0
        assert size >= self.engine.device_memory_size_v2
        self.cuda.view(address, size)
        self._change(is_shape=False)
        self.scratch = address, size

    def set_aux_streams(self, streams):
        assert all(stream in self.cuda.streams for stream in streams)
        self.aux_streams = list(streams)

    def _change(self, is_shape=True):
        self.version += 1
        self.is_settled = self.is_settled and not is_shape

    def execute_async_v3(self, stream):
        refuse, capturing = self.trt.refuse, self.cuda.is_capturing(stream)
        if "enqueue" in refuse or (capturing and "enqueue while capturing" in refuse):
            self.trt.log.kept.append("enqueueV3: made to fail")
            return False
        missing = set(self.engine.names) - self.addresses.keys()
        assert not missing, f"no address for {missing}"
        assert not self.infer_shapes(), "no shapes"
        assert self.scratch or not self.engine.device_memory_size_v2, "no scratch memory"
        assert len(self.aux_streams) == self.engine.num_aux_streams
        assert self.is_settled or not capturing, "captured before a plain run has settled its shapes"
        for name in self.engine.outputs:
            past = name.replace("present", "past")
            assert not name.startswith("present") or self.addresses[name] == self.addresses[past], "not in place"
        self.is_settled = True
        version = self.version

        def work():
            assert version == self.version, "the context was changed after it was captured: undefined"
            self._run()

        self.cuda.enqueue(stream, "engine", work)
        return True

    def _run(self):
        if self.scratch:
            self.cuda.view(*self.scratch).fill(0xAB)  # whoever else uses it meanwhile notices
        binding = self.engine.session.io_binding()
        for names, bind in ((self.engine.inputs, binding.bind_input), (self.engine.outputs, binding.bind_output)):
            for name in names:
                shape = self.shapes.get(name) or tuple(self.get_tensor_shape(name))
                kind = NUMPY[TYPES[self.engine.io(name).type]]
                size = int(np.prod(shape)) * np.dtype(kind).itemsize
                self.cuda.view(self.addresses[name], size)  # it is there
                bind(name, "cpu", 0, kind, shape, self.addresses[name])
        self.engine.session.run_with_iobinding(binding)
        self.num_runs += 1


class FakeRtxContext(FakeContext):
    def is_stream_capturable(self, stream):
        assert stream in self.cuda.streams
        return self.trt.capturable


class FakePlans:
    """A folder of plans, as the engine cache gives them."""

    def __init__(self, folder, precision="fp32", tiers=(1, 2, 4, 8, 16, 32)):
        self.folder, self.precision, self.tiers = folder, precision, tiers

    def plan_file(self, graph):
        return self.folder / f"{graph}.plan"

    def read_plan(self, graph):
        path = self.plan_file(graph)
        if not path.is_file():
            raise BadEngine(f"{path}: can't be read (No such file or directory)")
        return path.read_bytes()


def build_fake(model_dir, folder, spec, tiers, precision="fp32", **more):
    """Plans of a model folder's graphs, one profile per tier; prompt and drafters have static shapes or any."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(model_dir.glob("*.onnx")):
        inputs = session_of(str(file)).get_inputs()
        dynamic = any(not isinstance(n, int) for i in inputs for n in i.shape)
        profiles = [
            {i.name: tuple(n if isinstance(n, int) else rows for n in i.shape) for i in inputs}
            for rows in (tiers if dynamic else (1,))
        ]
        (folder / f"{file.stem}.plan").write_bytes(fake_plan(file, profiles, **more))
    return FakePlans(folder, precision, tuple(tiers))


def double_builds(monkeypatch, trt, workspace):
    """From here on `vla_spec.engines.build` builds plans for the double: everything but the compiler is real.

    Args:
        monkeypatch: pytest's.
        trt: a `FakeTensorRT`.
        workspace: where prepared graphs go; the double runs exactly those, in half precision.
    """
    from vla_spec.engines import build, cache

    def build_graph(library, name, graph, sizes, options):
        folder = workspace / graph.source.parent.name / options.precision
        profiles = [
            {
                tensor: tuple(tuple(profile[d][i] if isinstance(d, str) else d for d in shape) for i in range(3))
                for tensor, shape in graph.shapes.items()
            }
            for profile in sizes
        ]
        plan = fake_plan(runnable(graph, folder), profiles, sm=options.builder.capabilities[0])
        return cache.Plan(plan, 0.5, False, {"kernels": {options.precision: 1}})

    monkeypatch.setattr(build, "open_library", lambda backend: trt.library())
    monkeypatch.setattr(build, "build_graph", build_graph)


def runnable(graph, folder):
    """A prepared graph as a file that ONNX Runtime takes: weights beside it, node names unique."""
    import shutil

    import onnx

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("target.safetensors", f"{graph.name}.safetensors"):  # a drafter's lie beside it
        weights = graph.source.parent / name
        if weights.exists() and not (folder / name).exists():
            shutil.copy(weights, folder / name)  # onnx takes no links
    model = onnx.load_model_from_string(graph.model)
    for i, node in enumerate(model.graph.node):
        node.name = f"{i}.{node.name}"
    file = folder / f"{graph.name}.onnx"
    file.write_bytes(model.SerializeToString())
    return file


class Place:
    """A machine with doubles and a cache folder; from here on the engine `tensorrt` runs and is built on it."""

    def __init__(self, folder, patch, model_dir, **trt):
        from fake_cuda import FakeCuda

        from vla_spec.engines import tensorrt

        self.cuda, self.model_dir = FakeCuda(), model_dir
        self.trt = FakeTensorRT(self.cuda, **trt)
        self.folder = folder / "cache"
        double_builds(patch, self.trt, folder / "graphs")
        patch.setattr(tensorrt, "this_machine", lambda library="auto": self.machine)

    @property
    def machine(self):
        from vla_spec.engines.tensorrt import Machine

        return Machine(self.cuda, self.trt.library())

    def options(self, **more):
        from vla_spec.engines.tensorrt import Options

        return Options(**{"cache": str(self.folder), "allow_build": True, **more})

    def load(self, **more):
        from vla_spec.engines import tensorrt

        return tensorrt.load(self.model_dir, self.options(**more))
