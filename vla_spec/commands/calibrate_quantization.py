"""`vla-spec calibrate quantization`: how far the activations of a policy reach, for its graph in eight bits."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vla_spec.commands._options import (
    ConfigFile,
    Robot,
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
    model: Annotated[Path, typer.Argument(help="Model folder, as `vla-spec export` writes it.")] = Path(
        "models/metaworld"
    ),
    out: Annotated[Path | None, typer.Option(help="Folder to write to. Default: the model folder.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Demonstrations to calibrate on. Default: episodes that the policy plays.")
    ] = None,
    tasks: Tasks = None,
    observations: Annotated[int, typer.Option(min=1, help="Observations to calibrate on, of all tasks alike.")] = 120,
    held_out: Annotated[int, typer.Option(min=1, help="Observations to compare on, of other episodes.")] = 60,
    episodes: Annotated[
        int, typer.Option(min=1, help="Episodes per task to calibrate on; half as many to compare.")
    ] = 4,
    seed_start: SeedStart = 8000,
    precision: Annotated[str, typer.Option(help="int8, or fp8 (for TensorRT).")] = "int8",
    ranges: Annotated[
        str, typer.Option(help="Ways to choose ranges, comma-separated: percentiles, max, mse; the best one is taken.")
    ] = "99.9,99.99,99.999,max,mse",
    migration: Annotated[
        float, typer.Option(help="Strength with which outliers are moved into weights (SmoothQuant); 0 = not. [0..1)")
    ] = 0.0,
    keep: Annotated[str, typer.Option(help="Patterns of weights that stay as they are, as in 'head.*'.")] = "",
    max_steps: Annotated[int, typer.Option(min=1, help="Control steps of an episode at most.")] = 200,
    mode: Annotated[str, typer.Option(help="Decoding mode that plays the episodes.")] = "exact",
    robot: Robot = None,
    threads: Threads = None,
    config: ConfigFile = None,
    set_: Set = None,
) -> None:
    """Ranges of activations for eight bits, by their effect on tokens of episodes that were not calibrated on.

    Writes quantization-PRECISION.json into the model folder, and one for the small drafter inside it.

    `vla-spec quantize` then writes the graph; without --data it needs the simulator.
    """
    half = max(1, episodes // 2)
    check_training_seeds(seed_start, episodes + half)
    configs = resolve_modes(mode, config, override_tree(model, None, robot, threads, None, None, None), set_)
    if len(configs) != 1:
        raise BadConfig(f"--mode {mode}: valid: one mode")

    import datetime
    import platform
    from dataclasses import replace

    from rich.console import Console

    from vla_spec.assemble import Assembler
    from vla_spec.calib.observations import closed_loop_observations, demonstrated_observations
    from vla_spec.calib.quantize import (
        Recipe,
        Study,
        calibration_file,
        choose,
        model_folders,
        print_tried,
        write_calibration,
    )
    from vla_spec.progress import LiveProgress
    from vla_spec.results import environment

    recipes = [Recipe(precision, name, migration, split(keep) or ()) for name in split(ranges) or ()]
    if not recipes:
        raise BadConfig("--ranges is empty; valid: percentiles, max, mse")
    first, rest = range(seed_start, seed_start + episodes), range(seed_start + episodes, seed_start + episodes + half)
    assembler = Assembler()
    model_dir = assembler.model_dir(configs[0])
    if model_dir is None:
        raise BadConfig(f"engine {configs[0].engine.name!r} has no model folder; nothing to quantise")
    adapter = assembler.adapter(configs[0])
    with LiveProgress() as progress:
        if data is not None:
            seen, other = (
                demonstrated_observations(data, split(tasks), seeds, n)
                for seeds, n in ((first, observations), (rest, held_out))
            )
        else:
            seen, other = closed_loop_observations(
                assembler, configs[0], split(tasks), ((first, observations), (rest, held_out)), max_steps, progress
            )
        inputs, rest_inputs = ([adapter.encode(one.observation) for one in part.items] for part in (seen, other))
        chosen = {}
        for folder in model_folders(model_dir):
            study = Study(folder, adapter.domain.num_tokens, configs[0].num_threads)
            chosen[folder] = choose(study, inputs, rest_inputs, recipes, progress)
    evidence = {
        "command": shlex.join(["vla-spec", *context.obj]),
        "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
        "source": "closed loop" if data is None else "demonstrations",
        "observations": seen.provenance(),
        "held_out": other.provenance(),
        # Without where Python lies: the file is shipped.
        "environment": {**environment(configs[0].num_threads), "python": platform.python_version()},
    }
    for folder, (best, tried) in chosen.items():
        path = calibration_file((model_dir if out is None else out) / folder.relative_to(model_dir), precision)
        write_calibration(path, replace(best, evidence={**evidence, **best.evidence}))
        print_tried(tried, best, Console())
        typer.echo(path)
