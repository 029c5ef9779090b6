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
        Path | None, typer.Option(help="File of `vla-spec calibrate quantization`. Default: the model folder's.")
    ] = None,
) -> None:
    """Write decoder.int8.onnx beside decoder.onnx; then `--set engine.precision=int8` runs it."""
    from vla_spec.calib.quantize import CALIBRATION, PRECISIONS, Calibration, write_quantized
    from vla_spec.config import find_model

    if precision not in PRECISIONS:
        raise BadConfig(f"--precision {precision}: valid: {', '.join(PRECISIONS)}")
    folder = find_model(model)
    file = folder / CALIBRATION if calibration is None else calibration
    fitted = Calibration.read(file)
    graph = write_quantized(folder, fitted, file)
    size = sum(graph.with_suffix(suffix).stat().st_size for suffix in (".onnx", ".safetensors"))
    typer.echo(f"{graph}, {size / 1e6:.1f} MB with its weights; ranges by {fitted.recipe.ranges}")
    if fitted.quality is not None:
        typer.echo(
            f"on {fitted.quality.num_rows} held-out tokens, {100 * fitted.quality.token_agreement:.2f} % "
            f"are those of the unquantised model"
        )
