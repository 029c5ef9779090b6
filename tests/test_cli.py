"""The command line: what works, and that every mistake is one line, a non-zero exit and no traceback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from vla_spec import __version__, cli
from vla_spec.errors import BadModel, Interrupted

TOY = ["--engine", "toy", "--robot", "toy"]


def call(capsys, *arguments):
    """Exit code, stdout, stderr of one call in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


def error_of(capsys, *arguments):
    """The one line that a mistake gives; before it there may be progress, as in a log."""
    code, _, err = call(capsys, *arguments)
    assert code != 0
    assert "Traceback" not in err
    *before, last = [line for line in err.splitlines() if line.strip()]
    assert last.startswith("error: ")
    assert all(re.match(r"[a-z ]+: \d+ of \d+", line) for line in before), before
    return last


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"vla-spec {__version__}\n", "")


def test_help_lists_all_commands(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for command in ("run", "bench", "collect", "train", "distill", "export", "doctor"):
        assert command in out
    assert call(capsys)[1] == out


@pytest.mark.parametrize("command", ["run", "bench"])
def test_run_and_bench_take_the_same_options(capsys, command):
    _, out, _ = call(capsys, command, "--help")
    for option in (
        "--seed-start",
        "--episodes",
        "--tasks",
        "--modes",
        "--out",
        "--model",
        "--threads",
        "--deadline-ms",
    ):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runn"], ["runn", "run"]),
        (["run", "--episods", "3"], ["--episods", "--episodes"]),
        (["run", "--episodes", "many"], ["--episodes", "integer"]),
        (["run", "--episodes", "0"], ["--episodes", "greater than or equal to 1"]),
        (["run", *TOY, "--modes", "exat"], ["exat", "did you mean 'exact'"]),
        (["run", *TOY, "--modes", "exact,exact"], ["twice"]),
        (["run", *TOY, "--tasks", "reach"], ["robot 'toy' has no tasks"]),
        (["run", "--robot", "metaworl"], ["robot", "did you mean 'metaworld'"]),
        (["run", *TOY, "--deadline-ms", "-1"], ["runtime.deadline_ms", "-1"]),
        (["run", *TOY, "--modes", "autoregressive", "--execute-horizon", "99"], ["execute_horizon", "99", "1..8"]),
        (["run", *TOY, "--set", "drafter.nothing=1"], ["mode autoregressive: drafter.nothing:"]),
        (["run", *TOY, "--modes", "ngram", "--set", "drafter.max_nn=1"], ["mode ngram: drafter.max_nn:", "'max_n'"]),
        (["run", *TOY, "--set", "nonsense"], ["KEY=VALUE"]),
        (["run", *TOY, "--config", "/no/such/file.yaml"], ["/no/such/file.yaml", "can't be read"]),
        (["run", *TOY, "--modes", "autoregressive", "--out", "/proc/nothing"], ["--out /proc/nothing"]),
        (["run", "--robot", "toy", "--model", "/no/such/model"], ["no weights in /no/such/model", "vla-spec export"]),
        (["bench", *TOY, "--modes", "ngram", "--closed-loop", "x", "--observations", "1"], ["--closed-loop", "'x'"]),
        (["collect", "--seed-start", "9990"], ["10000", "kept for evaluation"]),
        (["collect", "--tasks", "drawer-opn", "--out", "x"], ["did you mean 'drawer-open'"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    line = error_of(capsys, *arguments)
    for word in words:
        assert word in line
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra [train]")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--data", "/no/data", "--checkpoint", "c.safetensors"], ["--data /no/data", "vla-spec collect"]),
        (["train", "--set", "stepps=3"], ["train.stepps", "did you mean 'steps'"]),
        (["distill", "--checkpoint", "/no/policy"], ["/no/policy", "vla-spec train"]),
        (["distill", "--drafters", "blok_head"], ["did you mean 'block_head'"]),
        (["export", "--checkpoint", "/no/policy"], ["/no/policy", "vla-spec train"]),
    ],
)
def test_a_mistake_in_the_recipe_is_one_line_that_names_it(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    line = error_of(capsys, *arguments)
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir())


def test_corrupt_weights_are_one_line(capsys, tmp_path):
    (tmp_path / "policy.json").write_text("{")
    (tmp_path / "target.safetensors").write_bytes(b"nothing")
    line = error_of(capsys, "run", "--robot", "toy", "--model", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "policy.json" in line


def test_a_failed_run_leaves_no_empty_folder(capsys, tmp_path):
    error_of(capsys, "run", *TOY, "--tasks", "reach", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_exit_code_is_the_errors_own(capsys, monkeypatch):
    def fail(**options):
        raise BadModel("no weights")

    monkeypatch.setattr(cli, "app", fail)
    assert call(capsys, "run")[0] == BadModel.exit_code == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped")])
def test_ctrl_c_exits_with_130(capsys, monkeypatch, error):
    def stop(**options):
        raise error

    monkeypatch.setattr(cli, "app", stop)
    code, _, err = call(capsys, "run")
    assert code == 130
    assert "Traceback" not in err


def test_a_bug_is_one_line_unless_debug_is_asked_for(capsys, monkeypatch):
    def fail(**options):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(cli, "app", fail)
    code, _, err = call(capsys, "run")
    assert code == cli.EXIT_BUG
    assert "internal error: ZeroDivisionError: oh" in err
    assert "Traceback" not in err
    assert "Traceback" in call(capsys, "run", "--debug")[2]


def test_a_run_writes_results_and_report(capsys, tmp_path):
    out = tmp_path / "runs" / "one"
    code, text, _ = call(
        capsys, "run", *TOY, "--modes", "autoregressive,jacobi", "--episodes", "2", "--seed-start", "5",
        "--max-steps", "12", "--deadline-ms", "30", "--threads", "2", "--out", str(out),
    )  # fmt: skip
    assert code == 0
    assert "autoregressive" in text
    assert str(out / "report.html") in text
    tree = json.loads((out / "results.json").read_text())
    assert [row["mode"] for row in tree["rows"]] == ["autoregressive", "jacobi"]
    assert tree["seeds"] == [5, 6]
    assert tree["rows"][0]["deadline_ms"] == 30
    assert tree["environment"]["num_threads"] == 2
    assert tree["command"].startswith("vla-spec run")
    assert tree["model_hash"]
    assert (out.parent / "latest" / "report.html").exists()


def test_a_configuration_file_is_the_mode_if_no_modes_are_named(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("engine: toy\nrobot: toy\ndrafter: {name: ngram, max_n: 3}\nruntime: {deadline_ms: 9}\n")
    out = tmp_path / "out"
    code, _, _ = call(capsys, "run", "--config", str(file), "--max-steps", "8", "--out", str(out), "--no-report")
    assert code == 0
    tree = json.loads((out / "results.json").read_text())
    assert [row["mode"] for row in tree["rows"]] == ["mine"]
    assert tree["configs"]["mine"]["drafter"]["max_n"] == 3
    assert not (out / "report.html").exists()


def test_a_benchmark_writes_results(capsys, tmp_path):
    code, _, _ = call(
        capsys, "bench", *TOY, "--modes", "autoregressive,ngram", "--observations", "3", "--repeats", "1",
        "--closed-loop", "none", "--out", str(tmp_path / "b"),
    )  # fmt: skip
    assert code == 0
    tree = json.loads((tmp_path / "b" / "results.json").read_text())
    assert tree["kind"] == "bench"
    assert {row["chunks"] for row in tree["rows"]} == {3}


def test_doctor_prints_tables_and_json(capsys):
    code, out, _ = call(capsys, "doctor", "--no-draw")
    assert code == 0
    assert "ONNX Runtime" in out
    code, out, _ = call(capsys, "doctor", "--no-draw", "--json")
    assert code == 0
    assert json.loads(out)["libraries"]["numpy"]


def test_version_and_help_need_no_heavy_library():
    script = (
        "import sys\nfrom vla_spec import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'onnxruntime', 'mujoco', 'matplotlib', 'rclpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_in_the_middle_of_a_run(tmp_path):
    """A real process and a real signal: exit 130, one line, nothing half-written."""
    out = tmp_path / "runs" / "stopped"
    command = [sys.executable, "-m", "vla_spec.cli", "run", *TOY, "--modes", "autoregressive"]
    process = subprocess.Popen(
        [*command, "--episodes", "100000", "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not out.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(1.0)  # into the loop
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: stopped on request")
    assert not list(tmp_path.rglob("*.json"))
    assert not out.exists()


def test_the_installed_command_is_this_one():
    command = shutil.which("vla-spec", path=os.path.dirname(sys.executable))
    if command is None:
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([command, "run", "--nothing"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
