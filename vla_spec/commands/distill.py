"""`vla-spec distill`: train the drafters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_spec.commands._options import split


def command(
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of demonstrations; may be repeated. Default: data/demonstrations."),
    ] = None,
    checkpoint: Annotated[Path, typer.Option(help="The trained policy.")] = Path("data/policy.safetensors"),
    out: Annotated[Path, typer.Option(help="Folder of the drafters' checkpoints; goes on from them.")] = Path(
        "data/drafters"
    ),
    drafters: Annotated[str | None, typer.Option(help="Which, comma-separated. Default: all.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE of the schedule, as in steps=4000; may be repeated. An unknown KEY lists all."
        ),
    ] = None,
) -> None:
    """Train the drafters on the policy's own outputs. Stop it with Ctrl-C; the same command goes on."""
    from vla_spec.recipe import distill_drafters

    distill_drafters(data or [Path("data/demonstrations")], checkpoint, out, split(drafters), set_ or [], typer.echo)
