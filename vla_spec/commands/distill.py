"""`vla-spec distill`: train the drafters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_spec.commands._options import Set, split


def command(
    data: Annotated[list[Path] | None, typer.Option(help="Folder of demonstrations; may be repeated.")] = None,
    checkpoint: Annotated[Path, typer.Option(help="The trained policy.")] = Path("data/policy.safetensors"),
    out: Annotated[Path, typer.Option(help="Folder of the drafters' checkpoints; resumes from them.")] = Path(
        "data/drafters"
    ),
    drafters: Annotated[str | None, typer.Option(help="Which, comma-separated. Default: all.")] = None,
    set_: Set = None,
) -> None:
    """Train the drafters on the policy's own outputs. Resumes."""
    from vla_spec.recipe import distill_drafters

    distill_drafters(data or [Path("data/demonstrations")], checkpoint, out, split(drafters), set_ or [], typer.echo)
