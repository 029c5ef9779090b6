"""`vla-spec quantize`: the int8 graph of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_spec.errors import BadConfig


def command(
    model: Annotated[Path, typer.Argument(help="Model folder, as `vla-spec export` writes it.")] = Path(
        "models/metaworld"
    ),
    precision: Annotated[str, typer.Option(help="Precision of the graph: int8.")] = "int8",
    calibration: Annotated[
        Path | None, typer.Option(help="Folder with quantization.json. Default: the model folder.")
    ] = None,
) -> None:
    """Write decoder.int8.onnx beside decoder.onnx; then `--set engine.precision=int8` runs it."""
    from vla_spec.calib.quantize import CALIBRATION, PRECISIONS, Calibration, model_folders, write_quantized
    from vla_spec.config import find_model

    if precision not in PRECISIONS:
        raise BadConfig(f"--precision {precision}: valid: {', '.join(PRECISIONS)}")
    folder = find_model(model)
    if calibration is not None and calibration.is_file():
        raise BadConfig(f"--calibration {calibration}: valid: a folder with {CALIBRATION}, as --out of the calibration")
    for one in model_folders(folder):
        file = (folder if calibration is None else calibration) / one.relative_to(folder) / CALIBRATION
        if one != folder and not file.is_file():
            continue  # a drafter that was not calibrated stays as it is
        fitted = Calibration.read(file)
        graph = write_quantized(one, fitted, file)
        size = sum(graph.with_suffix(suffix).stat().st_size for suffix in (".onnx", ".safetensors"))
        same = ""
        if fitted.quality is not None:
            same = f"; {100 * fitted.quality.token_agreement:.2f} % of {fitted.quality.num_rows} held-out tokens equal"
        typer.echo(f"{graph}: {size / 1e6:.1f} MB with its weights, ranges by {fitted.recipe.ranges}{same}")
