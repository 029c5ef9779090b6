"""The page is one file that needs nothing else, and says what profile.json says."""

from __future__ import annotations

import builtins
import re

import pytest
from fake_profile import MS, a_mode, a_profile, some_extras
from test_report import References

from vla_spec.errors import MissingDependency
from vla_spec.profiling import page
from vla_spec.profiling.comparison import compare
from vla_spec.profiling.constraints import check_all, parse
from vla_spec.profiling.page import render, write_page
from vla_spec.profiling.plots import MAX_POINTS, _thinned, draw_plots, draw_waterfalls


@pytest.fixture(scope="module")
def profile():
    return a_profile({
        "autoregressive": a_mode(some_extras(120) + 9 * MS, loads=("idle", "busy")),
        "exact": a_mode(some_extras(120), loads=("idle", "busy")),
    })  # fmt: skip


def full_page(profile):
    checks = check_all((parse("chunk_p50_ms <= 20", "x"), parse("exact.chunk_p999_ms <= 80", "x")), profile)
    old = a_profile({"exact": a_mode(some_extras(120), loads=("idle",))}, model_hash="another")
    return render(profile, checks, compare(old, profile, 10))


@pytest.fixture(scope="module")
def html(profile):
    return full_page(profile)


def test_nothing_is_loaded_from_anywhere(html):
    parser = References()
    parser.feed(html)
    assert all(reference.startswith("#") for reference in parser.found)
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(parser.tags)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", html))
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
    }  # fmt: skip


def test_everything_that_was_found_is_in_it(html):
    for text in (
        "autoregressive", "cold", "busy", "a note", "what idle is", "Chunk latency", "Deadlines", "Cold start",
        "Real-time loop", "What tracing costs", "Stages, idle", "Stages, busy", "hand_over", "pass", "FAIL",
        "needs 1000 values", "Compared with the old profile", "model differs", "A &lt;fast&gt; one", "a &amp; b",
        "drafter: ngram", "no: EPERM",
    ):  # fmt: skip
        assert text in html, text
    assert "<fast>" not in html


def test_there_is_a_picture_per_kind_of_number(profile):
    captions = " ".join(plot.caption for plot in draw_plots(profile))
    for word in ("percentile", "slack", "order of time", "mean chunk", "new session", "period", "first command"):
        assert word in captions
    assert [plot.caption.split(":")[0] for plot in draw_waterfalls(profile)] == ["autoregressive", "exact"]


def test_pictures_without_numbers_are_left_out():
    mode = a_mode([0], has_loop=False)  # and one plan is enough
    shown = render(a_profile({"exact": mode})).split("What the numbers mean")[0]
    assert "Real-time loop" not in shown
    assert shown.count("<svg") == 6


def test_the_same_profile_gives_the_same_page(profile, html):
    assert full_page(profile) == html


def test_a_long_series_keeps_its_slow_plans():
    import numpy as np

    values = np.zeros(50 * MAX_POINTS)
    values[[17, 31_000]] = 99
    at, kept = _thinned(np.arange(len(values), dtype=float), values)
    assert len(kept) == MAX_POINTS
    assert at[kept == 99].tolist() == [17, 31_000]


def test_the_file_is_written_whole(profile, html, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "render", lambda *arguments: html)
    path = write_page(profile, (), None, tmp_path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["profile.html"]


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_says_how_to_get_it(library, monkeypatch, tmp_path, profile):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == library:
            raise ImportError(f"No module named {name!r}", name=library)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=r"pip install 'vla_spec\[profile\]'"):
        write_page(profile, (), None, tmp_path)
    assert not list(tmp_path.iterdir())
