"""The report is one file that needs nothing else, and says what results.json says."""

from __future__ import annotations

import base64
import builtins
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_results import a_row, some_results
from PIL import Image

from vla_spec.errors import MissingDependency
from vla_spec.report import MAX_FRAMES, MAX_MODES, draw_plots, film_data, render, write_report
from vla_spec.results import Film, Series, TaskScore

RNG = np.random.default_rng(0)


def a_film(num_frames=5, success=True):
    return Film("exact", "reach", 3, success, RNG.integers(0, 255, (num_frames, 24, 48, 3), dtype=np.uint8), 0.05)


def full_results(**changes):
    series = Series(
        tuple(np.linspace(1, 2, 101)), tuple(np.linspace(1, 2, 101)), tuple(np.linspace(-1, 2, 101)), (3, 1, 4)
    )
    values = {
        "rows": (a_row(mode="autoregressive"), a_row()),
        "series": {"autoregressive": series, "exact": series},
        "films": (a_film(), a_film(success=False)),
        "scores": (TaskScore("exact", "reach", 4, 3), TaskScore("autoregressive", "reach", 4, 2)),
        "environment": {"cpu": "A <fast> one", "libraries": {"numpy": "2"}, "providers": ["CPU"], "gl": None},
        "notes": ("a note",),
        "command": "vla-spec run --tasks 'a & b'",
    }
    return some_results(**(values | changes))


@pytest.fixture(scope="module")
def html():
    return render(full_results())


class References(HTMLParser):
    """Collects everything that a browser might load or run."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]


def test_nothing_is_loaded_from_anywhere(html):
    parser = References()
    parser.feed(html)
    assert parser.found
    assert all(reference.startswith(("data:image/", "#")) for reference in parser.found)
    assert not {"script", "link", "iframe", "object", "embed"} & set(parser.tags)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", html))
    # Names of XML vocabularies are the only addresses, and nobody fetches them.
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
    }  # fmt: skip


def test_every_mode_note_task_and_machine_is_in_it(html):
    for text in ("autoregressive", "a note", "reach", "3 / 4", "75 %", "30-95"):
        assert text in html


def test_text_is_escaped(html):
    assert "A &lt;fast&gt; one" in html
    assert "a &amp; b" in html
    assert "<fast>" not in html


def test_there_is_a_plot_per_kind_of_number(html):
    captions = " ".join(plot.caption for plot in draw_plots(full_results()))
    for word in ("latency", "percentiles", "Acceptance", "Success", "slack", "accepts"):
        assert word in captions
    assert html.count("<svg") == 6


def test_plots_are_left_out_where_nothing_was_measured():
    row = a_row(success_rate=None, success_ci95=None, acceptance_length=None)
    assert draw_plots(some_results(rows=(row,), series={"exact": Series()})) == []
    assert "<table>" in render(some_results(rows=(row,), series={"exact": Series()}))


def test_the_same_results_give_the_same_report():
    results = full_results()
    assert render(results) == render(results)


def test_many_modes_are_all_in_the_table_and_the_fastest_in_the_plots():
    rows = tuple(a_row(mode=f"mode{i:02d}", speedup_decode=float(i)) for i in range(20))
    results = some_results(rows=rows, series={row.mode: Series(tuple(range(101))) for row in rows})
    text = render(results)
    assert all(row.mode in text for row in rows)
    latency = draw_plots(results)[0]
    assert "mode19" in latency.svg
    assert "mode00" in latency.svg
    assert "mode05" not in latency.svg
    assert f"fastest {MAX_MODES} of 20" in latency.caption


def test_films_move_at_the_robots_speed():
    uri = film_data(a_film(5))
    kind, _, data = uri.partition(";base64,")
    assert kind in ("data:image/webp", "data:image/gif")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.n_frames == 5
    picture.seek(1)
    picture.load()
    assert picture.info["duration"] == pytest.approx(50, abs=1)
    assert picture.size == (288, 144)


def test_long_films_are_thinned_out():
    data = base64.b64decode(film_data(a_film(150)).partition(";base64,")[2])
    assert 1 < Image.open(io.BytesIO(data)).n_frames <= MAX_FRAMES


def test_the_file_is_written_into_the_folder(tmp_path):
    path = write_report(full_results(), tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("library", ["jinja2", "matplotlib", "PIL"])
def test_a_missing_library_says_how_to_get_it(library, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == library:
            raise ImportError(f"No module named {name!r}", name=library)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=r"pip install 'vla_spec\[report\]'"):
        write_report(full_results(), tmp_path)
    assert not list(tmp_path.iterdir())
