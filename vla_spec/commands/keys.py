"""`vla-spec keys`: make a CurveZMQ key pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    name: Annotated[str, typer.Argument(help="Whose keys: of the server, or of one client.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("keys"),
) -> None:
    """Make a key pair for `vla-spec serve` or one of its clients: NAME.key for everyone, NAME.key_secret for nobody."""
    from vla_spec.commands._options import needs

    needs("zmq", "keys", "serve")
    from vla_spec.serving.keys import make_keys

    public, secret = make_keys(out, name)
    typer.echo(f"{public}  give it to the other side")
    typer.echo(f"{secret}  keep it, readable by its owner only")
