"""`vla-spec train`: train the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of demonstrations; may be repeated. Default: data/demonstrations."),
    ] = None,
    checkpoint: Annotated[Path, typer.Option(help="Written often; training goes on from it if it is there.")] = Path(
        "data/policy.safetensors"
    ),
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of an earlier, smaller policy, grown without changing its output; needs a new "
            "--checkpoint."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE of network or schedule, as in steps=20000; may be repeated. An unknown KEY lists all.",
        ),
    ] = None,
) -> None:
    """Train the policy on demonstrations. Stop it with Ctrl-C; the same command goes on from the checkpoint."""
    from vla_spec.recipe import train_policy

    train_policy(data or [Path("data/demonstrations")], checkpoint, set_ or [], typer.echo, start_from)
