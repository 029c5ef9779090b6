"""`vla-spec train`: train the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_spec.commands._options import Set


def command(
    data: Annotated[list[Path] | None, typer.Option(help="Folder of demonstrations; may be repeated.")] = None,
    checkpoint: Annotated[Path, typer.Option(help="Written often; training resumes from it.")] = Path(
        "data/policy.safetensors"
    ),
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint of an earlier, smaller policy, grown without changing its output.")
    ] = None,
    set_: Set = None,
) -> None:
    """Train the policy on demonstrations. Resumes from the checkpoint."""
    from vla_spec.recipe import train_policy

    train_policy(data or [Path("data/demonstrations")], checkpoint, set_ or [], typer.echo, start_from)
