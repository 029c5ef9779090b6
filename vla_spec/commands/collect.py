"""`vla-spec collect`: demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vla_spec.commands._options import SeedStart, Tasks, check_training_seeds, split


def command(
    out: Annotated[Path, typer.Option(help="Folder of demonstrations; what is there already is kept.")] = Path(
        "data/demonstrations"
    ),
    tasks: Tasks = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes per task.")] = 100,
    seed_start: SeedStart = 0,
    processes: Annotated[int, typer.Option(min=1, help="Simulators side by side.")] = 2,
    policy: Annotated[
        Path | None, typer.Option(help="Model folder that drives part of each episode; the expert labels (DAgger).")
    ] = None,
) -> None:
    """Record the scripted experts in the simulator: one file per task and seed. Goes on where it was stopped."""
    check_training_seeds(seed_start, episodes)

    from vla_spec.progress import LiveProgress
    from vla_spec.recipe import collect_demonstrations

    with LiveProgress() as progress:
        collect_demonstrations(out, split(tasks), range(seed_start, seed_start + episodes), processes, policy, progress)
