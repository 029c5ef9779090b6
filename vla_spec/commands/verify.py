"""`vla-spec verify`: is this engine the model?"""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.commands._options import Out, Set, Threads, override_tree, resolve_modes, writable
from vla_spec.errors import BadConfig, VlaSpecError

if TYPE_CHECKING:
    from vla_spec.engines.verify import Verification
    from vla_spec.interfaces import Adapter
    from vla_spec.types import Observation

#: Engines that can be the reference, the most independent first.
REFERENCES = ("pytorch", "onnxruntime")
#: Exit code if a gate fails; 2 is for what could not be compared at all.
FAILED = 1
EngineName = Annotated[str, typer.Option(help="Engine plugin under test; its options by --set engine.NAME=VALUE.")]
Reference = Annotated[
    str | None, typer.Option(help=f"Engine plugin that is trusted. Default: the first of {', '.join(REFERENCES)}.")
]


def command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Model folder, as `vla-spec export` writes it.")] = Path(
        "models/metaworld"
    ),
    engine: EngineName = "onnxruntime",
    reference: Reference = None,
    observations: Annotated[int, typer.Option(min=1, help="Observations to compare on.")] = 16,
    recording: Annotated[
        Path | None, typer.Option(help="Take them from this recording (.npz, see robot replay). Default: seeded.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="For observations and trees.")] = 0,
    thresholds: Annotated[
        Path | None, typer.Option(help="JSON with gates. Default: calib/verify_thresholds.json.")
    ] = None,
    threads: Threads = None,
    set_: Set = None,
    out: Out = None,
) -> None:
    """Logits and tokens of an engine beside a reference's, against gates; exit code 1 if one fails."""
    import numpy as np

    from vla_spec.assemble import Assembler
    from vla_spec.engines import verify as verifying
    from vla_spec.engines._model_files import GOLDEN
    from vla_spec.engines._model_manifest import check_manifest
    from vla_spec.plugins import Parts
    from vla_spec.progress import LiveProgress
    from vla_spec.results import environment
    from vla_spec.trace import write_json

    if reference == engine:
        raise BadConfig(f"--reference {reference}: is the engine under test itself; valid: another one")
    assembler = Assembler()

    def open_engine(name: str, sets: list[str] | None) -> Any:
        (config,) = resolve_modes(
            "autoregressive", None, override_tree(model, name, None, threads, None, None, None), sets
        )
        adapter = assembler.adapter(config)
        parts = Parts(
            adapter.domain, adapter.tokenizer, assembler.model_dir(config), None, None, config.num_threads, config.seed
        )
        return config, adapter, assembler.engine(config, parts)

    config, adapter, tested = open_engine(engine, set_)
    trusted = _first_that_opens([reference] if reference else [n for n in REFERENCES if n != engine], open_engine)
    rng = np.random.default_rng(seed)
    seen = _observations(adapter, observations, recording, rng)
    source = f"seed {seed}" if recording is None else f"{recording.name}, evenly spaced"
    gates = verifying.read_thresholds(thresholds or verifying.THRESHOLDS, tested.info.precision)
    model_dir = assembler.model_dir(config)
    assert model_dir is not None
    check_manifest(model_dir)
    with writable(out, "verify") as folder, LiveProgress() as progress:
        result = verifying.verify(
            tested, trusted, [adapter.encode(one) for one in seen], adapter.domain.num_tokens, gates,
            model_dir / GOLDEN, rng, progress,
        )  # fmt: skip
        tree = verifying.results_tree(result, tested, trusted, model, source, environment(config.num_threads))
        tree["command"] = shlex.join(["vla-spec", *context.obj])
        tree["created"] = datetime.datetime.now().astimezone().isoformat("T", "seconds")
        write_json(folder / "results.json", tree)
    _print(result, tested.info, trusted.info)
    typer.echo(folder / "results.json")
    if result.outcome == "fail":
        raise typer.Exit(FAILED)


def _first_that_opens(names: list[str], open_engine: Any) -> Any:
    """The first of these engines that this model and this machine have.

    Raises:
        VlaSpecError: why the last one can't be opened.
    """
    for name in names[:-1]:
        try:
            return open_engine(name, None)[2]
        except VlaSpecError:
            continue
    return open_engine(names[-1], None)[2]


def _observations(adapter: Adapter, count: int, recording: Path | None, rng: Any) -> list[Observation]:
    from vla_spec.engines.verify import recorded_observations, seeded_observations

    if recording is not None:
        return recorded_observations(recording, count)
    example = getattr(adapter, "example", None)
    if example is None:
        raise BadConfig("--recording is needed: this model's adapter has no example observation")
    return seeded_observations(example(), count, rng)


def _print(result: Verification, tested: Any, trusted: Any) -> None:
    title = f"{tested.name} ({tested.precision}, {tested.provider}) beside {trusted.name} ({trusted.precision})"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("metric", "value", "passes", "warns", "outcome"):
        table.add_column(name, justify="left" if name in ("metric", "outcome") else "right")
    for name, value in result.metrics.items():
        gate = result.gates.get(name)
        text = "-" if value is None else f"{value:.6g}"
        if gate is None:
            table.add_row(name, text, "", "", "")
            continue
        sign = "≤" if gate.is_at_most else "≥"
        table.add_row(name, text, f"{sign} {gate.good:g}", f"{sign} {gate.poor:g}", result.outcomes[name])
    console = Console()
    console.print(table)
    claim = "" if result.is_batch_invariant else "; not batch-invariant, so exactness is not claimed"
    console.print(
        f"{result.outcome}: {result.num_observations} observations, {result.num_rows} rows of logits{claim}",
        highlight=False,
    )
