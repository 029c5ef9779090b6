"""A checkpoint in OpenVLA's published layout, exported and built by the real builder: vision, decoder, commit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

for module, extra in (
    ("onnx", "train"), ("torch", "train"), ("timm", "openvla"), ("tokenizers", "openvla"),
    ("tensorrt_rtx", "tensorrt-rtx"), ("filelock", "tensorrt-rtx"),
):  # fmt: skip
    if importlib.util.find_spec(module) is None:  # not imported: timm is, by the code under test, in its own way
        pytest.skip(f"needs the extra [{extra}]", allow_module_level=True)

from quantised_decoder import quantise  # noqa: E402

from vla_spec.engines._model_files import ModelFiles  # noqa: E402
from vla_spec.engines._trt.builder import BuilderOptions  # noqa: E402
from vla_spec.engines._trt.profiles import default_tiers  # noqa: E402
from vla_spec.engines.build import BuildOptions, build_engine  # noqa: E402
from vla_spec.engines.nets.openvla import export, miniature  # noqa: E402
from vla_spec.progress import Silent  # noqa: E402

pytestmark = pytest.mark.slow
DEVICES = BuilderOptions((86, 89, 120))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("openvla")
    miniature.write_checkpoint(folder / "checkpoint", miniature.MiniatureOptions())
    options = export.ExportOptions(unnorm_key="bridge_orig")
    export.export_checkpoint(folder / "checkpoint", folder / "model", options, lambda text: None)
    return folder / "model"


def test_a_miniature_openvla_builds_for_three_generations(model, tmp_path):
    files = ModelFiles.describe(model)
    spec, layers = files.decoder, files.decoder.num_layers
    tiers = (2, spec.max_step, spec.capacity)
    for precision in ("fp16", "bf16"):
        engine = build_engine(
            model, BuildOptions(precision=precision, tiers=tiers, builder=DEVICES), Silent(), tmp_path
        )
        decoder, prompt = engine.graphs["decoder"].summary, engine.graphs["prompt"].summary
        assert decoder["kv_updates"] == 2 * layers
        assert decoder["attentions"] == layers
        assert decoder["precisions"]["MATRIX_MULTIPLY"] == {precision: 5 * layers + 1}
        # Two vision transformers, each a convolution into patches; attention is the library's own there too.
        assert prompt["precisions"]["CONVOLUTION"] == {precision: 2}
        assert set(prompt["precisions"]["ATTENTION_INPUT"]) == {precision}
        # The instruction's length is free: a range, up to what the cache has room for behind the patches.
        (profile,) = engine.identity.profiles["prompt"]
        ((low, _, high),) = profile.values()
        assert (low, high) == (1, spec.capacity - files.base_rows)


def test_its_decoder_builds_in_int8(model, tmp_path):
    quantise(model)
    layers = ModelFiles.describe(model).decoder.num_layers
    engine = build_engine(model, BuildOptions(precision="int8", tiers=(2, 87), builder=DEVICES), Silent(), tmp_path)
    assert engine.graphs["decoder"].summary["precisions"]["MATRIX_MULTIPLY"] == {"int8": 5 * layers + 1}
    assert engine.graphs["decoder"].summary["kv_updates"] == 2 * layers


def test_default_tiers_hold_every_prompt(model):
    files = ModelFiles.describe(model)
    tiers = default_tiers(files)
    assert tiers[-1] == files.decoder.capacity
    assert files.decoder.max_step in tiers
