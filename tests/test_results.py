"""Results: intervals, the layout of results.json, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from fake_results import a_row, some_results
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vla_spec import results as results_module
from vla_spec.errors import BadConfig
from vla_spec.results import print_table, run_folder, save, wilson_interval, write_text

#: What readers of results.json rely on.
REQUIRED = {
    "mode", "engine", "drafter", "rule", "episodes", "success_rate", "success_ci95", "chunk_ms_p50", "chunk_ms_p90",
    "chunk_ms_p99", "chunk_ms_max", "decode_ms_p50", "tokens_per_forward", "acceptance_length", "forwards_per_chunk",
    "speedup_decode", "speedup_chunk", "limit_ratio", "host_overhead_ratio", "deadline_ms", "deadline_miss_rate",
    "token_agreement", "max_deviation",
}  # fmt: skip


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (92, 100, 0.8500, 0.9589)],
)
def test_wilson_interval_agrees_with_published_values(successes, trials, low, high):
    found = wilson_interval(successes, trials)
    assert found == pytest.approx((low, high), abs=2e-4)


def test_no_trials_have_no_interval():
    assert wilson_interval(0, 0) is None


@given(st.integers(1, 500), st.data())
def test_the_interval_holds_the_rate_and_stays_within_0_and_1(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    assert 0.0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1.0


def test_rows_have_the_keys_that_readers_rely_on(tmp_path):
    save(some_results(), tmp_path, "vla-spec run")
    tree = json.loads((tmp_path / "results.json").read_text())
    assert set(tree["rows"][0]) >= REQUIRED
    assert {"environment", "command", "seeds", "model_hash", "rows", "configs", "meaning"} <= set(tree)
    assert tree["command"] == "vla-spec run"
    assert tree["seeds"] == [10, 11]
    assert "films" not in tree


def test_what_was_not_measured_is_null_and_a_dash(tmp_path):
    nothing = a_row(success_rate=None, success_ci95=None, chunk_ms_p50=None, token_agreement=None)
    save(some_results(rows=(nothing,)), tmp_path, "x")
    row = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert row["success_rate"] is None
    assert row["chunk_ms_p50"] is None
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    print_table(some_results(rows=(nothing,)), console)
    console.file.close()
    assert " - " in console.export_text()


def test_nan_is_refused_and_nothing_is_left_behind(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save(some_results(rows=(a_row(chunk_ms_p50=float("nan")),)), tmp_path, "x")
    assert not (tmp_path / "results.json").exists()


def test_latest_points_to_the_newest_run(tmp_path):
    runs = tmp_path / "runs"
    for name in ("a", "b"):
        folder = run_folder(runs / name, "run")
        save(some_results(), folder, "x")
        assert (runs / "latest").is_symlink()
        assert os.readlink(runs / "latest") == name
    assert (runs / "latest" / "results.json").exists()


def test_somebodys_own_folder_called_latest_is_left_alone(tmp_path):
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    save(some_results(), run_folder(tmp_path / "runs" / "a", "run"), "x")
    assert not (tmp_path / "runs" / "latest").is_symlink()


def test_a_default_folder_says_when_and_what(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run_folder(None, "bench")
    assert folder.parent.name == "runs"
    assert folder.name.endswith("-bench")
    assert folder.is_dir()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match=r"--out .*file.*can't be made"):
        run_folder(tmp_path / "file", "run")


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from vla_spec import results, trace
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
Path.replace = die  # the last thing before the file is there
target = Path(sys.argv[1])
if target.suffix == ".json":
    trace.write_json(target, {"new": list(range(1000))})
else:
    results.write_text(target, "new" * 1000)
"""


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_a_process_killed_while_writing_leaves_the_old_file_whole(tmp_path, name):
    target = tmp_path / name
    target.write_text('{"old": 1}')
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(target)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == '{"old": 1}'


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_a_process_killed_while_writing_leaves_no_half_file(tmp_path, name):
    subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / name)], check=False, timeout=60)
    assert not (tmp_path / name).exists()


def test_a_failed_write_cleans_up(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(results_module.Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "a.txt", "x")
    assert list(tmp_path.iterdir()) == []


def test_the_table_fits_eighty_columns():
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    print_table(some_results(rows=(a_row(mode="autoregressive", token_agreement=1.0),)), console)
    console.file.close()
    text = console.export_text()
    assert "autoregressive" in text
    assert "100.0 %" in text
    assert max(map(len, text.splitlines())) <= 80
