"""Finds every plugin by its folder. A plugin that needs what this machine lacks is skipped, and the reason printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from int8_model import write_int8_model

from contract import fakes
from vla_spec import plugins
from vla_spec.errors import BadConfig, BadModel, MissingDependency, NoDevice
from vla_spec.plugins import Parts

ROOT = Path(__file__).parents[2]
#: Fixture -> kind of plugin whose names it runs through.
RUN_THROUGH = {
    "engine_name": "engine",
    "drafter_name": "drafter",
    "rule_name": "rule",
    "controller_name": "controller",
    "tokenizer_name": "tokenizer",
}
#: Engines with other options than their own, on a smaller model: name of the test -> plugin, options.
ENGINE_VARIANTS = {
    "onnxruntime-int8": ("onnxruntime", {"precision": "int8"}),
    # Caches in the library's own values, moved by commit.onnx: what runs on a GPU, here on the CPU.
    "onnxruntime-device": ("onnxruntime", {"provider": "CUDAExecutionProvider", "allow_slow": True}),
    "openvino-dynamic": ("openvino", {"sizes": ()}),
    "openvino-bf16": ("openvino", {"precision": "bf16", "sizes": (1, 8, 32)}),
    "openvino-int8": ("openvino", {"precision": "int8", "sizes": (1, 8, 32)}),
}
#: Options that make the default ones quicker to load.
ENGINE_OPTIONS = {"openvino": {"sizes": (8, 32)}}
#: These need nothing, so that skipping one would hide a fault.
NEVER_SKIPPED = {
    "engine": {"toy"},
    "drafter": {"none", "ngram", "previous_chunk", "jacobi", "kalman", "hybrid", "toy"},
    "rule": {"greedy", "rejection", "typical", "relaxed_bins", "relaxed_physical"},
    "controller": {"fixed", "adaptive", "deadline", "kinematic"},
    "tokenizer": {"uniform_bins"},
}


def pytest_generate_tests(metafunc):
    for fixture, kind in RUN_THROUGH.items():
        if fixture in metafunc.fixturenames:
            variants = ENGINE_VARIANTS if kind == "engine" else ()
            metafunc.parametrize(fixture, [*plugins.names(kind), *variants], scope="module")


def _model_parts(folder=None):
    """Parts of a model folder; None = of the first that is here, or the reason why there is none."""
    folders = [folder] if folder else sorted(path.parent for path in (ROOT / "models").glob("*/policy.json"))
    if not folders:
        raise BadModel("no folder under models/ has a policy.json")
    plugin = plugins.load("adapter", "vla")
    adapter = plugin.build(plugin.options(), Parts(None, None, model_dir=folders[0]))
    return Parts(adapter.domain, adapter.tokenizer, model_dir=folders[0]), adapter


class Built:
    """A plugin, the parts that it was built from, and inputs that its engine takes."""

    def __init__(self, thing, parts, inputs, target=None):
        self.thing, self.parts, self.inputs, self.target = thing, parts, inputs, target


def _build(kind, name, folder=None):
    name, options = ENGINE_VARIANTS.get(name, (name, ENGINE_OPTIONS.get(name, {}))) if kind == "engine" else (name, {})
    plugin = plugins.load(kind, name)
    if name in NEVER_SKIPPED[kind]:
        parts = fakes.toy_parts()
        target = None if kind == "engine" else fakes.toy_engine(parts)
        inputs = [fakes.toy_inputs(step, state=(0.1 * step, 0.2)) for step in range(3)]
        parts = fakes.toy_parts(target=target)
    else:
        parts, adapter = _model_parts(folder)
        target = None
        if kind != "engine":
            loader = plugins.load("engine", "onnxruntime")
            target = loader.build(loader.options(), parts)
            parts = Parts(parts.domain, parts.tokenizer, model_dir=parts.model_dir, target=target)
        example = adapter.example()
        inputs = []
        for step in range(3):
            varied = adapter.encode(example)
            varied["state"] = varied["state"] + 0.01 * step
            inputs.append(varied)
    return Built(plugin.build(plugin.options(**options), parts), parts, inputs, target)


def _build_or_skip(kind, name, folder=None):
    if name in NEVER_SKIPPED[kind]:
        return _build(kind, name)
    try:
        return _build(kind, name, folder)
    except (MissingDependency, NoDevice, BadModel, BadConfig, ImportError) as error:
        reason = f"{kind} {name}: {type(error).__name__}: {error}"
        print(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def int8_model(tmp_path_factory):
    return write_int8_model(tmp_path_factory.mktemp("int8") / "small")


@pytest.fixture(scope="module")
def engine(engine_name, request):
    is_variant = engine_name in ENGINE_VARIANTS
    return _build_or_skip("engine", engine_name, request.getfixturevalue("int8_model") if is_variant else None)


@pytest.fixture(scope="module")
def drafter(drafter_name):
    return _build_or_skip("drafter", drafter_name)


@pytest.fixture(scope="module")
def rule(rule_name):
    return _build_or_skip("rule", rule_name)


@pytest.fixture
def controller(controller_name):
    return _build_or_skip("controller", controller_name)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_name):
    return _build_or_skip("tokenizer", tokenizer_name)
