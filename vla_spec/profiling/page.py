"""A profile as one self-contained HTML file: tables and pictures. Nothing is loaded from anywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vla_spec.errors import MissingDependency
from vla_spec.profiling.comparison import ProfileComparison
from vla_spec.profiling.constraints import Check
from vla_spec.profiling.histograms import FIX
from vla_spec.profiling.plots import draw_plots, draw_waterfalls
from vla_spec.profiling.profile import MEANING, Profile
from vla_spec.profiling.tables import change_table, check_table, main_tables, stage_table
from vla_spec.report import TEMPLATES
from vla_spec.results import write_text


def check_libraries() -> None:
    """Raise MissingDependency for the first library that drawing a page will need and that is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"{error.name}, which the page of a profile needs,", FIX) from error


def write_page(profile: Profile, checks: tuple[Check, ...], compared: ProfileComparison | None, folder: Path) -> Path:
    """Write ``profile.html`` into a folder, atomically. Returns its path."""
    path = folder / "profile.html"
    write_text(path, render(profile, checks, compared))
    return path


def render(profile: Profile, checks: tuple[Check, ...] = (), compared: ProfileComparison | None = None) -> str:
    """The whole page as HTML.

    Raises:
        MissingDependency: a library that draws is not installed.
    """
    check_libraries()
    import jinja2
    import markupsafe

    def inline(plots: list[Any]) -> list[Any]:
        return [plot._replace(svg=markupsafe.Markup(plot.svg)) for plot in plots]

    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template("profile.html.j2")  # fmt: skip
    style = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "profile.css"))
    environment = profile.environment
    html: str = template.render(
        css=markupsafe.Markup(style),
        created=profile.created or "not saved",
        command=profile.command or "-",
        model=profile.model_hash[:16],
        machine=f"{environment.get('cpu', 'unknown CPU')}, {environment.get('cores', '?')} cores",
        observations=f"{profile.num_observations} recorded observations of {', '.join(profile.tasks)}",
        verdicts=[table for table in (check_table(checks), change_table(compared) if compared else None) if table],
        warnings=compared.warnings if compared else (),
        tables=[table for table in main_tables(profile) if table.rows],
        stages=[stage_table(profile, name) for name in profile.loads],
        notes=profile.notes,
        loads=profile.loads,
        plots=inline(draw_plots(profile)),
        waterfalls=inline(draw_waterfalls(profile)),
        meaning=list(MEANING.items()),
        environment=[(name, _flat(value)) for name, value in environment.items()],
        configs=[(mode, yaml.safe_dump(own.config, sort_keys=False)) for mode, own in profile.modes.items()],
    )
    return html


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
