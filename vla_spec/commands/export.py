"""`vla-spec export`: write the model folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[Path, typer.Option(help="The trained policy.")] = Path("data/policy.safetensors"),
    drafters: Annotated[Path, typer.Option(help="Folder of the drafters' checkpoints.")] = Path("data/drafters"),
    out: Annotated[Path, typer.Option(help="Model folder to write.")] = Path("models/metaworld"),
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is in it.")] = False,
) -> None:
    """Write the model folder that engines load: safetensors, ONNX, policy.json, golden inputs and a manifest.json.

    Try it with `vla-spec run --model FOLDER`.
    """
    from vla_spec.recipe import export_model

    options = {"--checkpoint": checkpoint, "--drafters": drafters, "--out": out}
    typed = shlex.join(["vla-spec", "export", *(f"{k}={v}" for k, v in options.items())])
    export_model(checkpoint, drafters, out, typer.echo, force, typed)
