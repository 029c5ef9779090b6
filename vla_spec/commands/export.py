"""`vla-spec export`: write the model folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[Path, typer.Option(help="The trained policy.")] = Path("data/policy.safetensors"),
    drafters: Annotated[Path, typer.Option(help="Folder of the drafters' checkpoints.")] = Path("data/drafters"),
    out: Annotated[Path, typer.Option(help="Model folder; files in it are replaced.")] = Path("models/metaworld"),
) -> None:
    """Write the model folder that engines load: safetensors, ONNX, policy.json, golden inputs and a manifest.json.

    Try it with `vla-spec run --model FOLDER`.
    """
    from vla_spec.engines._model_manifest import write_manifest
    from vla_spec.recipe import export_model

    export_model(checkpoint, drafters, out, typer.echo)
    options = {"--checkpoint": checkpoint, "--drafters": drafters, "--out": out}
    typer.echo(write_manifest(out, shlex.join(["vla-spec", "export", *(f"{k}={v}" for k, v in options.items())])))
