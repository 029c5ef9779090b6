"""`vla-spec export openvla`: from a published checkpoint to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_spec.errors import MissingDependency

GROUP_HELP = "Write the model folder that engines load."


def command(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint, as it is published on Hugging Face.")],
    out: Annotated[Path, typer.Option(help="Model folder; files in it are replaced.")],
    drafter: Annotated[
        Path | None, typer.Option(help="Folder of a Spec-VLA drafter that was trained for it: config.json and weights.")
    ] = None,
    unnorm_key: Annotated[
        str, typer.Option(help="Data set whose statistics un-normalise actions. Default: the only one, or named later.")
    ] = "",
    center_crop: Annotated[
        bool, typer.Option(help="See the middle 90 % of pictures: for checkpoints tuned with augmented ones (LIBERO).")
    ] = False,
    max_words: Annotated[int, typer.Option(min=24, max=2048, help="Most tokens of a prompt.")] = 64,
    max_step: Annotated[int, typer.Option(min=8, max=2048, help="Most tokens of one step, trees included.")] = 64,
) -> None:
    """Write a model folder from an OpenVLA checkpoint: openvla-7b and what was fine-tuned from it.

    Nothing in the checkpoint is executed. Try it with `vla-spec run --model FOLDER --robot libero`.
    """
    try:
        from vla_spec.engines.nets.openvla.export import ExportOptions, export_checkpoint
        from vla_spec.engines.nets.openvla.spec_vla import export_drafter
    except ModuleNotFoundError as error:
        raise MissingDependency(str(error.name), "pip install 'vla_spec[openvla]'") from error
    options = ExportOptions(unnorm_key, center_crop, max_words, max_step)
    export_checkpoint(checkpoint, out, options, typer.echo)
    if drafter is not None:
        export_drafter(drafter, out, typer.echo)
    typer.echo(out)
