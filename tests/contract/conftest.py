"""Finds every plugin by its folder. A plugin that needs what this machine lacks is skipped, and the reason printed."""

from __future__ import annotations

from pathlib import Path

import pytest

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
            metafunc.parametrize(fixture, plugins.names(kind), scope="module")


def _model_parts():
    """Parts of the first model folder that is here, or the reason why there is none."""
    folders = sorted(path.parent for path in (ROOT / "models").glob("*/policy.json"))
    if not folders:
        raise BadModel("no folder under models/ has a policy.json")
    plugin = plugins.load("adapter", "vla")
    adapter = plugin.build(plugin.options(), Parts(None, None, model_dir=folders[0]))
    return Parts(adapter.domain, adapter.tokenizer, model_dir=folders[0]), adapter


class Built:
    """A plugin, the parts that it was built from, and inputs that its engine takes."""

    def __init__(self, thing, parts, inputs, target=None):
        self.thing, self.parts, self.inputs, self.target = thing, parts, inputs, target


def _build(kind, name):
    plugin = plugins.load(kind, name)
    if name in NEVER_SKIPPED[kind]:
        parts = fakes.toy_parts()
        target = None if kind == "engine" else fakes.toy_engine(parts)
        inputs = [fakes.toy_inputs(step, state=(0.1 * step, 0.2)) for step in range(3)]
        parts = fakes.toy_parts(target=target)
    else:
        parts, adapter = _model_parts()
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
    return Built(plugin.build(plugin.options(), parts), parts, inputs, target)


def _build_or_skip(kind, name):
    if name in NEVER_SKIPPED[kind]:
        return _build(kind, name)
    try:
        return _build(kind, name)
    except (MissingDependency, NoDevice, BadModel, BadConfig, ImportError) as error:
        reason = f"{kind} {name}: {type(error).__name__}: {error}"
        print(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def engine(engine_name):
    return _build_or_skip("engine", engine_name)


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
