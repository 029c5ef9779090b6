"""A model folder's manifest: a mixture of two exports, or a file that was cut off, is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vla_spec.cli import main
from vla_spec.engines._model_files import read_golden
from vla_spec.engines._model_manifest import check_manifest, write_manifest
from vla_spec.errors import BadModel

SMALL = Path(__file__).parents[1] / "models" / "metaworld" / "small"
WRITTEN = {
    "prompt.onnx", "decoder.onnx", "commit.onnx", "target.safetensors", "policy.json", "engine.json", "golden.npz",
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    folder = shutil.copytree(SMALL, tmp_path / "model")
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder, "vla-spec export")
    return folder


def test_it_lists_what_an_export_writes_and_nothing_else(model):
    (model / "notes.txt").write_text("mine")
    manifest = json.loads(write_manifest(model, "vla-spec export").read_text())
    assert set(manifest["files"]) == WRITTEN
    assert manifest["files"]["decoder.onnx"]["bytes"] == (model / "decoder.onnx").stat().st_size
    assert manifest["command"] == "vla-spec export"
    check_manifest(model)


def test_what_comes_later_is_no_fault_and_a_folder_without_one_is_taken_as_it_is(model):
    (model / "decoder.int8.onnx").write_bytes(b"later")
    check_manifest(model)
    (model / "manifest.json").unlink()
    (model / "decoder.onnx").unlink()
    check_manifest(model)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_changed_cut_or_missing_file_is_named(name, model):
    file = model / name
    content = file.read_bytes()
    for spoilt in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), content + b"\0"):
        file.write_bytes(spoilt)
        with pytest.raises(BadModel, match=rf"{name}: not the file that manifest\.json lists"):
            check_manifest(model)
    file.unlink()
    with pytest.raises(BadModel, match=rf"{name}: missing, manifest\.json lists it"):
        check_manifest(model)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1}', '{"format": 2, "files": {}}', '{"format": 1, "files": {"../x": {}}}',
                '{"format": 1, "files": {"../x": {"sha256": "", "bytes": 0}}}'],
)  # fmt: skip
def test_a_manifest_that_can_not_be_read_is_refused(content, model):
    (model / "manifest.json").write_text(content)
    with pytest.raises(BadModel, match="not a manifest, or cut off"):
        check_manifest(model)


@pytest.mark.parametrize("command", [("build", "--sm", "89"), ("verify", "--observations", "1")])
def test_the_commands_refuse_a_mixture_before_they_begin(command, model, tmp_path, capsys):
    (model / "commit.onnx").write_bytes((model / "commit.onnx").read_bytes()[:-1])
    place = "--cache" if command[0] == "build" else "--out"
    with pytest.raises(SystemExit) as done:
        main([command[0], str(model), *command[1:], place, str(tmp_path / "out")])
    assert done.value.code == 2
    assert "commit.onnx: not the file that manifest.json lists" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", ["cut", "empty", "no archive", "other arrays"])
def test_golden_inputs_that_can_not_be_read_are_one_error(spoil, model):
    file = model / "golden.npz"
    if spoil == "other arrays":
        np.savez(file, images=np.zeros(3))
    else:
        content = {"cut": file.read_bytes()[:-100], "empty": b"", "no archive": b"golden"}[spoil]
        file.write_bytes(content)
    with pytest.raises(
        BadModel, match=r"golden\.npz: no golden inputs, or cut off \(.*; `vla-spec export` writes them"
    ):
        read_golden(file)
