"""`vla-spec profile` from end to end on the toy engine: files, exit codes, and one line for every mistake."""

from __future__ import annotations

import json

import pytest
from fake_profile import MS, a_mode, a_profile, some_extras
from test_cli import TOY, call, error_of
from test_profile_chrome_trace import validate

from vla_spec.profiling.profile import read, save

QUICK = [
    *TOY, "--modes", "autoregressive,jacobi", "--observations", "3", "--cold-plans", "2", "--tracing-pairs", "2",
    "--max-steps", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole run, loaded and in real time; (exit code, folder)."""
    from vla_spec import cli

    out = tmp_path_factory.mktemp("made") / "profile"
    limits = out.parent / "limits.txt"
    limits.write_text("chunk_max_ms <= 60000\njitter_max_ms <= 60000\nhold_rate <= 1\nstep_p50_ms > 0\n")
    arguments = ["profile", *QUICK, "--plans", "10", "--load", "both", "--real-time", "--slowest", "3"]
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--constraints", str(limits), "--out", str(out), "--deadline-ms", "60000"])
    return left.value.code or 0, out


def test_a_run_writes_everything(made):
    code, out = made
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "configs.yaml", "costs.json", "profile.html", "profile.json", "results.json", "slowest.trace.json"
    ]  # fmt: skip


def test_the_profile_says_what_was_asked_for(made):
    profile = read(made[1] / "profile.json", "test")
    assert list(profile.modes) == ["autoregressive", "jacobi"]
    assert set(profile.loads) == {"idle", "busy"}
    assert profile.command.startswith("vla-spec profile")
    assert profile.environment["libraries"]["hdrhistogram"]
    for mode in profile.modes.values():
        assert list(mode.conditions) == ["cold", "idle", "busy"]
        assert [mode.conditions[name].plans for name in mode.conditions] == [2, 10, 10]
        assert mode.conditions["idle"].stages["step"].n >= 10
        assert mode.conditions["idle"].incomplete == 0
        assert [loop.steps for loop in mode.loops.values()] == [8, 8]
        assert mode.loops["idle"].jitter.n == 7
        assert mode.tracing.pairs == 2
        assert mode.load_ms > 0
    assert len(profile.checks) == 4 * 2 * 2
    assert all(check["passed"] for check in profile.checks)


def test_other_tools_find_the_rows(made):
    tree = json.loads((made[1] / "results.json").read_text())
    assert tree["kind"] == "profile"
    assert [(row["mode"], row["chunks"], row["episodes"]) for row in tree["rows"]] == [
        ("autoregressive", 10, 1), ("jacobi", 10, 1)
    ]  # fmt: skip
    assert tree["rows"][0]["speedup_chunk"] == 1
    assert tree["rows"][1]["deadline_miss_rate"] == 0
    assert tree["created"]


def test_the_trace_is_one_for_perfetto(made):
    tree = json.loads((made[1] / "slowest.trace.json").read_text())
    tracks = validate(tree)
    names = [e["args"]["name"] for e in tree["traceEvents"] if e["name"] == "process_name"]
    assert names[:2] == ["autoregressive, recorded, idle", "autoregressive, recorded, busy"]
    assert "jacobi, real time, busy" in names
    assert all(len(events) <= 3 for (_, track), events in tracks.items() if track == 1)


def test_a_violated_constraint_is_exit_code_3_and_everything_is_written(capsys, made, tmp_path):
    limits = tmp_path / "limits.yaml"
    limits.write_text("chunk_p50_ms: {max: 60000}\njacobi.chunk_p50_ms: <= 1e-9\n")
    out = tmp_path / "judged"
    profile = str(made[1] / "profile.json")
    code, text, err = call(capsys, "profile", "--from", profile, "--constraints", str(limits), "--out", str(out))
    assert code == 3
    assert "FAIL" in text
    assert err.startswith("error: 2 of 6 checks failed: jacobi.chunk_p50_ms <= 1e-9 in jacobi.idle: found")
    assert sorted(path.name for path in out.iterdir()) == ["profile.html", "profile.json"]
    assert sum(not check["passed"] for check in json.loads((out / "profile.json").read_text())["checks"]) == 2


def test_a_regression_is_exit_code_4(capsys, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    save(a_profile({"exact": a_mode(some_extras(150), deadline_ms=1000)}), old)
    save(a_profile({"exact": a_mode(some_extras(150) + 8 * MS, deadline_ms=1000)}, model_hash="another"), new)
    code, text, err = call(capsys, "profile", "--from", str(new), "--compare", str(old))
    assert code == 4
    assert err.startswith("error: slower than the old profile: exact.idle.")
    assert "warning: model differs" in text
    assert "slower" in text
    assert call(capsys, "profile", "--from", str(old), "--compare", str(old))[0] == 0
    assert call(capsys, "profile", "--from", str(old), "--compare", str(new))[0] == 0  # faster is no error
    relaxed = ["--regression-percent", "500"]
    assert call(capsys, "profile", "--from", str(new), "--compare", str(old), *relaxed)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "old.json"]


def test_constraints_come_before_comparisons(capsys, tmp_path):
    old, new, limits = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "c.txt"
    save(a_profile({"exact": a_mode(some_extras(150))}), old)
    save(a_profile({"exact": a_mode(some_extras(150) + 8 * MS)}), new)
    limits.write_text("chunk_p50_ms <= 1\n")
    arguments = ["profile", "--from", str(new), "--compare", str(old), "--constraints", str(limits)]
    assert call(capsys, *arguments)[0] == 3


def test_several_profiles_are_judged_as_one(capsys, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        save(a_profile({"exact": a_mode(some_extras(60, seed))}), tmp_path / f"{name}.json")
    limits = tmp_path / "c.txt"
    limits.write_text("idle.chunk_p99_ms <= 60\n")  # 60 plans alone could not say
    files = ["--from", str(tmp_path / "a.json"), "--from", str(tmp_path / "b.json")]
    code, text, _ = call(capsys, "profile", *files, "--constraints", str(limits), "--out", str(tmp_path / "out"))
    assert code == 0
    assert "pass" in text
    assert read(tmp_path / "out" / "profile.json", "test").modes["exact"].conditions["idle"].plans == 120


def test_a_run_compares_itself(capsys, made, tmp_path):
    old = str(made[1] / "profile.json")
    out = tmp_path / "out"
    code, _, _ = call(
        capsys, "profile", *QUICK, "--plans", "10", "--compare", old, "--regression-percent", "1e9", "--out", str(out),
        "--no-report",
    )  # fmt: skip
    assert code == 0
    tree = json.loads((out / "profile.json").read_text())
    assert {change["mode"] for change in tree["comparison"]["changes"]} == {"autoregressive", "jacobi"}
    assert {change["condition"] for change in tree["comparison"]["changes"]} == {"idle"}
    assert not (out / "profile.html").exists()


def test_late_plans_can_be_cut(capsys, tmp_path):
    code, _, _ = call(
        capsys, "profile", *QUICK, "--seconds", "0.2", "--late", "cut", "--deadline-ms", "0.001", "--no-report",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0
    condition = read(tmp_path / "out" / "profile.json", "test").modes["jacobi"].conditions["idle"]
    assert condition.plans >= 1
    assert condition.incomplete == condition.misses == condition.plans
    assert condition.reasons == {"DEADLINE_PAST": condition.plans}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modes", "exat"], ["did you mean 'exact'"]),
        (["--plans", "0"], ["--plans"]),
        (["--plans", "5", "--seconds", "2"], ["--plans and --seconds", "not both"]),
        (["--seconds", "-2"], ["--seconds is -2"]),
        (["--seconds", "nan"], ["--seconds is nan"]),
        (["--load", "bussy"], ["did you mean 'busy'"]),
        (["--load", "idle,idle"], ["each only once"]),
        (["--load", ","], ["at least one load"]),
        (["--load", "busy", "--load-processes", "0"], ["--load-processes"]),
        (["--late", "maybe"], ["--late is 'maybe'", "count or cut"]),
        (["--deadline-ms", "-1"], ["runtime.deadline_ms", "-1"]),
        (["--set", "runtime.clock=virtual"], ["runtime.clock is virtual", "lockstep or real"]),
        (["--real-time", "--max-steps", "1"], ["--max-steps is 1", "2 or more"]),
        (["--tasks", "reach"], ["robot 'toy' has no tasks"]),
        (["--constraints", "/no/limits"], ["--constraints /no/limits", "can't be read"]),
        (["--compare", "/no/profile"], ["--compare /no/profile", "can't be read"]),
        (["--from", "/no/profile"], ["--from /no/profile", "can't be read"]),
        (["--out", "/proc/nothing"], ["--out /proc/nothing"]),
        (["--regression-percent", "-1"], ["--regression-percent"]),
        (["--execute-horizon", "99", "--real-time"], ["execute_horizon", "99", "1..8"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    line = error_of(capsys, "profile", *TOY, "--modes", "autoregressive", "--observations", "1", *arguments)
    for word in words:
        assert word in line
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("limit", "word"),
    [
        ("chunk_p99_ms <= 80", "needs 100 plans to say anything, --plans is 20"),
        ("jitter_p99_ms <= 1", "add --real-time"),
        ("busy.chunk_p50_ms <= 80", "'busy' is not measured in this run"),
        ("exact.chunk_p50_ms <= 80", "no mode named 'exact'"),
        ("chunk_p50_ms <= -3", "valid: 0 or more"),
    ],
)
def test_constraints_are_refused_before_anything_is_measured(capsys, tmp_path, monkeypatch, limit, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text(limit + "\n")
    line = error_of(capsys, "profile", *QUICK, "--plans", "20", "--constraints", "c.txt")
    assert word in line
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]


def test_an_old_profile_is_refused_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(a_profile({"exact": a_mode([0])}), tmp_path / "old.json")
    line = error_of(capsys, "profile", *QUICK, "--compare", "old.json")
    assert "none of these modes under these loads; it has exact (idle)" in line
    save(a_profile({"jacobi": a_mode([0])}, late="cut"), tmp_path / "old.json")
    assert "--late cut" in error_of(capsys, "profile", *QUICK, "--compare", "old.json")
    text = (tmp_path / "old.json").read_text()
    (tmp_path / "old.json").write_text(text[:1000])
    assert "the file was cut off" in error_of(capsys, "profile", *QUICK, "--compare", "old.json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
