"""The command line, `vla-spec`. Thin: options in, one call, tables out. One handler turns every error into one line.

Heavy imports happen inside the commands, so that `--version` and `--help` are instant and need nothing but the core.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from vla_spec import __version__
from vla_spec.errors import Interrupted, VlaSpecError

#: Exit code of a fault of ours, as sysexits.h has it.
EXIT_BUG = 70
app = typer.Typer(
    name="vla-spec", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(show: bool) -> None:
    if show:
        typer.echo(f"vla-spec {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. Works anywhere on the line.")] = False,
) -> None:
    """Deadline-aware speculative decoding of robot policies."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _alone(command: Callable[..., None]) -> Callable[..., None]:
    """A command that stands for a group: it runs if none of the group's own commands is named."""
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command).parameters
    takes_context = "context" in signature

    def callback(context: typer.Context, **options: Any) -> None:
        if context.invoked_subcommand is None:
            command(**({"context": context} if takes_context else {}), **options)

    own = [p.replace(annotation=hints[name]) for name, p in signature.items() if name != "context"]
    first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    callback.__doc__ = command.__doc__
    callback.__annotations__ = {"context": typer.Context, **{p.name: p.annotation for p in own}}
    callback.__signature__ = inspect.Signature([first, *own])  # type: ignore[attr-defined]
    return callback


def _register(root: typer.Typer) -> None:
    """Each file of the folder `commands` is a command; `group_name.py` is the command `name` of the group `group`.

    Where there is a `group.py` as well, the group alone is that command.
    """
    groups: dict[str, typer.Typer] = {}
    folder = Path(__file__).parent / "commands"
    names = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    for name in names:
        module = importlib.import_module(f"vla_spec.commands.{name}")
        group, _, inner = name.partition("_")
        if not inner:
            if not any(other.startswith(f"{name}_") for other in names):
                root.command(name)(module.command)
                continue
            groups[name] = typer.Typer(invoke_without_command=True, callback=_alone(module.command))
            root.add_typer(groups[name], name=name)
            continue
        if group not in groups:
            groups[group] = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
            root.add_typer(groups[group], name=group, help=module.GROUP_HELP)
        groups[group].command(inner)(module.command)


_register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Errors of the user are one red line on stderr and the error's exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in given
    options = [item for item in given if item != "--debug"]
    try:
        code = app(args=options, prog_name="vla-spec", standalone_mode=False, obj=given)
    except (KeyboardInterrupt, Interrupted, typer.Abort):
        code = Interrupted.exit_code
    except VlaSpecError as error:
        code = _report_error(str(error), error.exit_code, is_debug)
    except typer.Exit as done:
        code = done.exit_code
    except typer.TyperException as error:
        code = _report_error(error.format_message(), error.exit_code, is_debug)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away, as `head` does: not worth a word
        code = 0
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {error} (see where with --debug)"
        code = _report_error(text, EXIT_BUG, is_debug)
    if code == Interrupted.exit_code:  # by whichever way: typer turns Ctrl-C into a plain exit code
        _report_error("stopped on request; what was written is whole", code, is_debug=False)
    sys.exit(code if isinstance(code, int) else 0)


def _report_error(message: str, code: int, is_debug: bool) -> int:
    console = Console(stderr=True)
    if is_debug:
        console.print_exception()
    one_line = " ".join(message.split())
    console.print(f"error: {one_line}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
