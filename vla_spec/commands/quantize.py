"""`vla-spec quantize`: the graph of a model folder in eight bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_spec.errors import BadConfig


def command(
    model: Annotated[Path, typer.Argument(help="Model folder, as `vla-spec export` writes it.")] = Path(
        "models/metaworld"
    ),
    precision: Annotated[str, typer.Option(help="int8, or fp8 (for TensorRT).")] = "int8",
    calibration: Annotated[
        Path | None, typer.Option(help="Folder with the calibration. Default: the model folder.")
    ] = None,
) -> None:
    """Write decoder.int8.onnx beside decoder.onnx, as calibrated; then `--set engine.precision=int8` runs it."""
    from vla_spec.calib.quantize import Calibration, calibration_file, check_precision, model_folders, write_quantized
    from vla_spec.config import find_model

    check_precision(precision)
    folder = find_model(model)
    if calibration is not None and calibration.is_file():
        raise BadConfig(f"--calibration {calibration}: valid: a folder, as --out of `vla-spec calibrate quantization`")
    for one in model_folders(folder):
        file = calibration_file((folder if calibration is None else calibration) / one.relative_to(folder), precision)
        if one != folder and not file.is_file():
            continue  # a drafter that was not calibrated stays as it is
        fitted = Calibration.read(file)
        graph = write_quantized(one, fitted, file)
        size = sum(graph.with_suffix(suffix).stat().st_size for suffix in (".onnx", ".safetensors"))
        same = ""
        if fitted.quality is not None:
            same = f"; {100 * fitted.quality.token_agreement:.2f} % of {fitted.quality.num_rows} held-out tokens equal"
        typer.echo(f"{graph}: {size / 1e6:.1f} MB with its weights, ranges by {fitted.recipe.ranges}{same}")
