"""`vla-spec doctor`: what this machine has."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vla_spec.commands._options import ModelDir


def command(
    model: ModelDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Try OpenGL by drawing a picture.")] = True,
) -> None:
    """What this machine has, and what is missing for what."""
    from vla_spec.config import DEFAULT_MODEL, find_model
    from vla_spec.doctor import LIBRARIES, diagnose

    found = diagnose(find_model(model or DEFAULT_MODEL), draw)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
        return
    console = Console()
    table = Table("machine", "", title="What is here", title_justify="left")
    for name, text in found.machine.items():
        table.add_row(name, text)
    table.add_row("OpenGL", ", ".join(f"{name}: {state}" for name, state in found.gl.items()))
    table.add_row("ONNX Runtime", ", ".join(found.providers) or "not installed")
    table.add_row("ROS 2", found.ros or "not found")
    table.add_row("TensorRT", found.tensorrt or "not found")
    installed = [f"{name} {version}" for name, version in found.libraries.items() if version]
    table.add_row("libraries", ", ".join(installed))
    absent = [f"{name} ({LIBRARIES[name]})" for name, version in found.libraries.items() if not version]
    table.add_row("not installed", ", ".join(absent) or "-")
    console.print(table)
    table = Table("for", "state", "to get it", title="What works here", title_justify="left")
    for purpose in found.purposes:
        state = "[green]ready[/]" if purpose.is_ready else f"[yellow]missing: {', '.join(purpose.missing)}[/]"
        table.add_row(purpose.what, state, purpose.fix)
    console.print(table)
