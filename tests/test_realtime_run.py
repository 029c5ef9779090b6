"""`vla-spec run --realtime` from the command line to results.json and the printed table."""

import io
import json
import sys

import pytest
from rich.console import Console

from vla_spec import cli
from vla_spec.realtime_table import print_realtime

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="passes descriptors to a child, as POSIX does")
TOY = ["run", "--engine", "toy", "--robot", "toy", "--modes", "exact", "--set", "drafter=ngram", "--set",
       "runtime.time_scale=4", "--episodes", "1", "--max-steps", "40", "--no-report"]  # fmt: skip


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


@pytest.mark.parametrize("where", ["--actor-process", "--actor-thread"])
def test_what_was_asked_for_and_granted_is_in_results_and_printed(capsys, tmp_path, where):
    code, out, err = call(
        capsys, *TOY, "--realtime", where, "--fifo-priority", "2", "--planner-priority", "1", "--actor-cpus", "0",
        "--no-lock-memory", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    block = results["realtime"]["exact"]
    assert results["configs"]["exact"]["runtime"]["clock"] == "real"
    assert results["configs"]["exact"]["runtime"]["realtime"]["fifo_priority"] == 2
    assert block["is_own_process"] == (where == "--actor-process")
    grants = {(grant["role"], grant["what"]): grant for grant in block["grants"]}
    assert grants[("actor", "SCHED_FIFO")]["asked"] == "priority 2"
    assert grants[("planner", "SCHED_FIFO")]["asked"] == "priority 1"
    assert ("actor", "cores") in grants
    assert not any(what == "locked memory" for _, what in grants)
    assert all(grant["granted"] or grant["reason"] for grant in grants.values())
    assert block["cadence"]["num_ticks"] == 40
    for role in ("actor", "planner"):
        assert not block[role] or set(block[role]) >= {"minor_faults", "involuntary_switches"}
    assert "What was asked for in real time" in out
    assert "SCHED_FIFO" in out
    assert "How regular control steps were" in out


def test_without_it_nothing_is_asked_and_that_is_said(capsys, tmp_path):
    code, out, err = call(capsys, *TOY, "--real-time", "--out", str(tmp_path))
    assert code == 0, err
    block = json.loads((tmp_path / "results.json").read_text())["realtime"]["exact"]
    assert block["grants"] == []
    assert block["cadence"]["num_ticks"] == 40
    assert "nothing was asked of the operating system" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--actor-cpus", "0"], "--actor-cpus: valid with --realtime only"),
        (["--realtime", "--lockstep"], "exclude each other"),
        (["--realtime", "--actor-cpus", "a"], "expected numbers of cores"),
        (["--realtime", "--fifo-priority", "100"], "runtime.realtime.fifo_priority is 100"),
        (["--load-cpus", "0"], "valid with --load only"),
        (["--load", "1", "--load-cpus", "4095"], "valid: cores of this machine"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, arguments, message):
    code, _, err = call(capsys, *TOY, "--out", str(tmp_path / "new"), *arguments)
    assert code != 0
    assert message in " ".join(err.split())
    assert not (tmp_path / "new").exists()


def test_a_refusal_is_printed_with_its_reason():
    names = ("minor_faults", "major_faults", "voluntary_switches", "involuntary_switches")
    usage = {name: {"total": 5} for name in names}
    grant = {"role": "actor", "what": "SCHED_FIFO", "asked": "priority 50", "granted": False, "reason": "EPERM: no"}
    block = {
        "is_own_process": True, "grants": [grant], "actor": {"num_ticks": 10, **usage}, "planner": {},
        "cadence": {"lateness_us": {"p99": 5.0}, "jitter_us": {"p50": 1.0, "p99": 2.0, "p99_9": 3.0, "max": 4.0}},
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    print_realtime({"exact": block}, console)
    text = console.file.getvalue()
    assert "no: EPERM: no" in text
    assert "0.50" in text
    empty = Console(file=io.StringIO())
    print_realtime({}, empty)
    assert empty.file.getvalue() == ""
