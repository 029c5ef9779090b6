"""A copy of the shipped small model with a quantised decoder, calibrated on seeded observations: good enough to run."""

import shutil
from pathlib import Path

import numpy as np
import pytest

SMALL = Path(__file__).parents[1] / "models" / "metaworld" / "small"


def write_plain_model(folder):
    """Copy without what was quantised beside it."""
    if not (SMALL / "decoder.onnx").is_file():
        pytest.skip("no shipped model here")
    folder.mkdir()
    for file in SMALL.iterdir():
        if file.is_file() and ".int8." not in file.name and not file.name.startswith("quantization"):
            shutil.copyfile(file, folder / file.name)
    return folder


def write_int8_model(folder):
    """Copy and quantise; skips the test if the model or the library that writes graphs is not here."""
    write_plain_model(folder)
    pytest.importorskip("onnx")
    from vla_spec.adapters.vla import load as load_adapter
    from vla_spec.calib.quantize import Recipe, Study, calibration_file, write_calibration, write_quantized
    from vla_spec.engines.verify import seeded_observations
    from vla_spec.progress import Silent

    adapter = load_adapter(folder)
    inputs = [adapter.encode(one) for one in seeded_observations(adapter.example(), 3, np.random.default_rng(0))]
    study = Study(folder, adapter.domain.num_tokens)
    tokens = study.tokens_of(inputs, Silent())
    calibration = study.calibrate(study.observe(inputs, tokens, Silent()), Recipe(ranges="99.99"))
    write_calibration(calibration_file(folder, "int8"), calibration)
    write_quantized(folder, calibration, calibration_file(folder, "int8"))
    return folder
