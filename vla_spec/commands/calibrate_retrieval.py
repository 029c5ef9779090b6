"""`vla-spec calibrate retrieval`: the index that the drafter `retrieval` looks things up in."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vla_spec.commands._options import (
    ConfigFile,
    Engine,
    ModelDir,
    SeedStart,
    Set,
    Tasks,
    Threads,
    check_training_seeds,
    override_tree,
    resolve_modes,
    split,
)
from vla_spec.errors import BadConfig

GROUP_HELP = "Fit what depends on this machine or this policy, and write it down."


def command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="File to write, *.npz; in the model folder as retrieval.npz, it is found.")],
    data: Annotated[Path, typer.Option(help="Folder of demonstrations, as `vla-spec collect` writes it.")] = Path(
        "data/demonstrations"
    ),
    tasks: Tasks = None,
    episodes: Annotated[int, typer.Option(min=1, help="Seeds per task; those that are not there are left out.")] = 4,
    seed_start: SeedStart = 0,
    every: Annotated[int, typer.Option(min=1, help="Keep each so-many-th picture of an episode.")] = 2,
    key_size: Annotated[int, typer.Option(min=1, help="Numbers in a key: principal components of the features.")] = 64,
    chunks: Annotated[
        str, typer.Option(help="Whose chunks are drafted: target (its own, decoded exactly) or demonstration.")
    ] = "target",
    modes: Annotated[
        str, typer.Option("--mode", help="Exact decoding mode that writes the target's chunks.")
    ] = "exact",
    model: ModelDir = None,
    engine: Engine = None,
    threads: Threads = None,
    config: ConfigFile = None,
    set_: Set = None,
) -> None:
    """An index of what the target sees in demonstrations and what it does then, for `drafter: retrieval`."""
    check_training_seeds(seed_start, episodes)
    if chunks not in ("target", "demonstration"):
        raise BadConfig(f"--chunks {chunks}: valid: target, demonstration")
    if out.suffix != ".npz":
        raise BadConfig(f"--out {out}: valid: a file name that ends in .npz")
    configs = resolve_modes(modes, config, override_tree(model, engine, None, threads, None, None, None), set_)
    if len(configs) != 1:
        raise BadConfig(f"--mode {modes}: valid: one mode")

    import datetime
    from dataclasses import replace

    from vla_spec.calib.retrieval import IndexPlan, build_index
    from vla_spec.progress import LiveProgress

    seeds = range(seed_start, seed_start + episodes)
    plan = IndexPlan(data, split(tasks), seeds, every, key_size, chunks)  # type: ignore[arg-type]  # checked above
    with LiveProgress() as progress:
        index = build_index(configs[0], plan, progress)
    created = datetime.datetime.now().astimezone().isoformat("T", "seconds")
    about = {**index.about, "command": shlex.join(["vla-spec", *context.obj]), "created": created}
    replace(index, about=about).save(out)
    typer.echo(f"{len(index.keys)} entries of {index.keys.shape[1]} numbers, {out.stat().st_size / 1e6:.2f} MB: {out}")
