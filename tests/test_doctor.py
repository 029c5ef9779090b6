"""The doctor reads the machine and says what is missing for what."""

from __future__ import annotations

import importlib.util
import json
import types

import pytest

from vla_spec import doctor


def purposes(found):
    return {purpose.what: purpose for purpose in found.purposes}


def test_missing_weights_are_what_run_lacks(tmp_path):
    found = doctor.diagnose(tmp_path, draw=False)
    assert f"weights in {tmp_path}" in purposes(found)["run, bench"].missing
    assert "export" in purposes(found)["run, bench"].fix


def test_present_weights_are_not_missing(tmp_path):
    for name in ("policy.json", "target.safetensors"):
        (tmp_path / name).write_text("x")
    assert doctor.has_weights(tmp_path)
    assert not any("weights" in name for name in purposes(doctor.diagnose(tmp_path, draw=False))["run, bench"].missing)


def test_a_missing_library_names_its_extra(monkeypatch, tmp_path):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "torch" else real(name))
    train = purposes(doctor.diagnose(tmp_path, draw=False))["train, distill, export"]
    assert "torch" in train.missing
    assert not train.is_ready
    assert train.fix == "pip install 'vla_spec[train]'"


def test_without_opengl_the_system_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    found = doctor.diagnose(tmp_path)
    assert found.gl == {"egl": "no libEGL", "osmesa": "no libOSMesa"}
    assert "libosmesa6" in purposes(found)["collect"].fix


def test_an_empty_tensorrt_stub_does_not_count(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: types.ModuleType(name))
    assert doctor.find_tensorrt() is None

    def with_builder(name):
        module = types.ModuleType(name)
        module.Builder, module.__version__ = object, "10.1"
        return module

    monkeypatch.setattr(importlib, "import_module", with_builder)
    assert doctor.find_tensorrt() == "tensorrt 10.1"


def test_a_broken_driver_is_reported_and_does_not_crash():
    answer = doctor._draw_with("no-such-backend")
    assert answer.startswith("fails: ")


def test_everything_fits_into_json(tmp_path):
    tree = json.loads(json.dumps(doctor.diagnose(tmp_path, draw=False).as_json()))
    assert tree["machine"]["cores"].isdigit()
    assert {purpose["what"] for purpose in tree["purposes"]} >= {"run, bench", "collect", "ROS 2 nodes"}


@pytest.mark.parametrize("name", ["numpy", "pydantic"])
def test_installed_libraries_have_versions(name):
    assert doctor.version_of(name)
    assert doctor.version_of("no-such-distribution-at-all") is None
