"""Calibrating cost tables: what is timed, in which order, what is kept apart, and that loads end when they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vla_spec import cli
from vla_spec.assemble import Assembler
from vla_spec.calib import cost_measurement
from vla_spec.calib.background_load import BackgroundLoad, LoadFailed
from vla_spec.calib.cost_file import CostFile, Device, read_cost_file
from vla_spec.calib.cost_measurement import CalibrationOptions, Disturbed, calibrate, distribution, prepare
from vla_spec.calib.cost_report import print_costs
from vla_spec.calib.device import library_versions, this_device, this_device_now
from vla_spec.calib.identity import draft_shape, drafter_identity
from vla_spec.config import read_mode, resolve
from vla_spec.errors import BadConfig, UnknownOption
from vla_spec.evaluation import first_observation
from vla_spec.progress import Silent

TOY = {"engine": "toy", "robot": "toy"}


def config(mode, **changes):
    return resolve({**read_mode(mode)[1], **TOY, **changes}, mode)


class Ticking:
    """A clock that fakes move, and that moves by itself by one tick per look."""

    def __init__(self):
        self.now, self.log = 0, []

    def __call__(self):
        return self.now

    def spend(self, what, ns):
        self.log.append(what)
        self.now += ns


class SlowEngine:
    """Wraps the toy engine: a prefill costs 1000, a step 100 and 10 per token, the first of each ten times that."""

    def __init__(self, engine, clock, cost=lambda k: 100 + 10 * k):
        self.engine, self.clock, self.cost, self.seen = engine, clock, cost, set()

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def spend(self, what, ns):
        self.clock.spend(what, ns if what in self.seen else 10 * ns)
        self.seen.add(what)

    def prefill(self, inputs):
        self.spend("prefill", 1_000_000)
        return self.engine.prefill(inputs)

    def step(self, tokens, parents):
        is_chain = bool((np.diff(parents) == 1).all())
        self.spend(("chain" if is_chain else "tree", len(tokens)), 1000 * self.cost(len(tokens)))
        return self.engine.step(tokens, parents)


class SlowDrafter:
    def __init__(self, drafter, clock):
        self.drafter, self.clock = drafter, clock

    def begin(self, inputs, history):
        assert history is not None
        assert len(history.tokens) == 32
        self.clock.spend("begin", 7)
        self.drafter.begin(inputs, history)

    def propose(self, prefix, plan, features):
        self.clock.spend(("draft", plan.gamma, plan.depth, plan.top_k), 2000 * plan.gamma)
        return self.drafter.propose(prefix, plan, features)


def measure(options, mode="ngram", cost=lambda k: 100 + 10 * k, **changes):
    """Tables and the log of calls of one toy mode on a fake clock."""
    clock = Ticking()
    assembler = Assembler()
    configs = [config(mode, **changes)]
    observation = first_observation(assembler, configs[0].robot, None, 0)
    (bench,) = prepare(assembler, configs)
    name, candidate = next(iter(bench.candidates.items()))
    slow = candidate._replace(drafter=SlowDrafter(candidate.drafter, clock))
    bench = bench._replace(engine=SlowEngine(bench.engine, clock, cost), candidates={name: slow})
    return calibrate([bench], observation, options, clock, Silent()), clock.log


def test_every_kind_of_call_is_measured_and_warm_up_is_kept_apart():
    (table,), _ = measure(CalibrationOptions(num_calls=5, num_warmup=2, loads=("idle",)))
    assert table.prefill.median == table.prefill.max == 1_000_000
    assert table.prefill.first_call == 10_000_000
    assert (table.prefill.n, table.prefill.warm_up) == (5, 3)
    assert {k: cost.median for k, cost in table.step.items()} == {
        k: 1000 * (100 + 10 * k) for k in (1, 2, 4, 6, 8, 12, 16, 24, 32)
    }
    assert table.step[1].first_call == 1_100_000
    assert set(table.step_tree) == {4, 8, 16, 32}
    assert table.step_tree[8].first_call == 10 * table.step_tree[8].median == 10 * table.step[8].median
    (column,) = table.drafters
    assert {k: cost.median for k, cost in column.draft.items()} == {k: 2000 * k for k in (1, 2, 4, 8, 16, 31)}
    assert column.modes == ("ngram",)
    assert column.drafter.name == "ngram"
    assert (table.load.key, table.load.num_processes) == ("idle", 0)
    assert table.engine.name == "toy"


def test_levels_that_the_samples_can_not_tell_are_left_out():
    assert set(distribution(list(range(1000)), 0).quantiles) >= {0.01, 0.5, 0.99, 0.999}
    assert max(distribution(list(range(999)), 0).quantiles) == 0.99
    assert set(distribution([5, 1, 2], 1).quantiles) == {0.5}
    found = distribution([900, 5, 7, 6], 1)
    assert (found.n, found.warm_up, found.first_call, found.quantiles[0.5], found.max) == (3, 1, 900, 6, 7)


def test_steps_and_drafts_take_turns_in_another_order_each_time_and_a_draft_follows_a_step():
    _, log = measure(CalibrationOptions(num_calls=30, num_warmup=1, loads=("idle",)))
    starts = [i for i, what in enumerate(log) if what == "prefill"][1:]
    cycles = [log[a:b] for a, b in zip(starts, [*starts[1:], len(log)], strict=True)]
    assert len(cycles) == 31
    assert len({tuple(cycle) for cycle in cycles}) > 25
    assert all(sorted(map(str, cycle)) == sorted(map(str, cycles[0])) for cycle in cycles)
    drafts = [i for i, what in enumerate(log) if what[0] == "draft"]
    assert len(drafts) == 31 * 6
    assert all(log[i - 1] == ("chain", 1) and log[i - 2] == "begin" for i in drafts)


def test_drafts_have_the_shape_that_the_controller_asks_for():
    controller = {"name": "fixed", "gamma": 24, "depth": 6, "top_k": 4}
    _, log = measure(CalibrationOptions(num_calls=2, num_warmup=1, loads=("idle",)), controller=controller)
    shapes = {what[1:] for what in log if what[0] == "draft"}
    assert shapes == {(1, 1, 4), (2, 2, 4), (4, 4, 4), (8, 6, 4), (16, 6, 4), (31, 6, 4)}
    assert draft_shape(config("autoregressive", controller=controller))[1:3] == (6, 4)
    assert drafter_identity(config("ngram")).top_k == 1


def test_engines_are_shared_between_modes_and_equal_drafters_are_measured_once():
    configs = [config("ngram"), config("autoregressive"), config("ngram", controller={"name": "fixed", "gamma": 3})]
    (bench,) = prepare(Assembler(), configs)
    assert [len(candidate.configs) for candidate in bench.candidates.values()] == [2, 1]


def test_costs_that_fall_with_size_say_that_the_machine_was_disturbed():
    with pytest.raises(Disturbed, match=r"load idle: step: size 32 .*measure again"):
        measure(CalibrationOptions(num_calls=3, num_warmup=1, loads=("idle",)), cost=lambda k: 100 if k < 32 else 50)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_calls": 1}, "at least 2 calls"),
        ({"num_warmup": 0}, "1 warm-up"),
        ({"loads": ()}, "--load"),
        ({"loads": ("idle", "idle")}, "each once"),
        ({"loads": ("busy",), "num_load_processes": 0}, "--load-processes"),
    ],
)
def test_impossible_options_are_refused(changes, words):
    with pytest.raises(BadConfig, match=words):
        CalibrationOptions(**changes)


def test_an_unknown_load_is_refused_with_the_closest():
    with pytest.raises(UnknownOption, match="did you mean 'memory'"):
        CalibrationOptions(loads=("memry",))


def test_the_device_says_what_it_is():
    device = this_device_now()
    assert device.is_same_as(this_device())
    assert not device.is_same_as(Device(cpu="another", cores=device.cores))
    assert (device.cores or 0) >= 1
    assert library_versions()["numpy"] == np.__version__
    assert str(Device()) == "unknown device"


def is_running(pid):
    """Alive and not waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["busy", "memory"])
def test_a_load_runs_while_the_block_lasts(kind):
    with BackgroundLoad(kind, 2) as load:
        pids = load.pids
        assert len(pids) == 2
        assert all(map(is_running, pids))
        assert load.description.startswith("2 x ")
    assert not any(map(is_running, pids))


def test_idle_is_no_process():
    with BackgroundLoad("idle", 3) as load:
        assert load.pids == ()


def test_a_load_ends_when_the_block_is_left_by_an_error():
    def interrupted():
        with BackgroundLoad("busy", 1) as load:
            pids.extend(load.pids)
            raise KeyboardInterrupt

    pids = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not is_running(pids[0])


def test_a_load_that_ended_early_makes_the_measurement_void():
    def killed():
        with BackgroundLoad("busy", 1) as load:
            os.kill(load.pids[0], signal.SIGKILL)
            wait_until(lambda: not is_running(load.pids[0]))

    with pytest.raises(LoadFailed, match="ended too early"):
        killed()


CALIBRATE = ["calibrate", "costs", "--engine", "toy", "--robot", "toy", "--modes", "autoregressive,ngram"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_load_ends_with_the_program_however_it_is_ended(tmp_path, number, code):
    arguments = [*CALIBRATE, "--calls", "1000000", "--load", "busy", "--out", "new/x.costs.json"]
    program = [sys.executable, "-m", "vla_spec.cli", *arguments]
    process = subprocess.Popen(program, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text().split())
    pid = int(children.read_text().split()[0])
    wait_until(lambda: b"background_load" in Path(f"/proc/{pid}/cmdline").read_bytes())
    time.sleep(0.2)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    wait_until(lambda: not is_running(pid))
    assert not list(tmp_path.rglob("*.json"))
    if code == 130:
        assert "stopped on request" in err
        assert "Traceback" not in err
        assert not (tmp_path / "new").exists()


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


def test_the_command_writes_a_table_that_a_run_takes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, *CALIBRATE, "--calls", "100", "--load", "idle,busy", "--out", "mine/x.costs.json")
    assert code == 0
    for word in ("toy fp32", "idle", "busy", "p99.9", "prefill", "tree 32", "ngram 31", "decode", "mine/x.costs.json"):
        assert word in out
    file = read_cost_file(tmp_path / "mine" / "x.costs.json")
    assert file.origin == "measured"
    assert file.command.startswith("vla-spec calibrate costs")
    assert [table.load.key for table in file.tables] == ["idle", "busy"]
    assert file.tables[1].load.num_processes == 1

    run = ["run", "--engine", "toy", "--robot", "toy", "--episodes", "1", "--max-steps", "8", "--no-report"]
    stored = ["--set", "runtime.costs=mine/x.costs.json", "--modes", "ngram", "--out", "run"]
    code, _, err = call(capsys, *run, *stored, "--set", "runtime.costs_load=busy")
    assert (code, err) == (0, err)
    costs = json.loads((tmp_path / "run" / "costs.json").read_text())["ngram"]
    assert costs["prefill"]["0.5"] == round(file.tables[1].prefill.median)
    assert costs["draft"]["31"]["1.0"] == round(file.tables[1].drafters[1].draft[31].max)

    code, _, err = call(capsys, *run, *stored)
    assert code == 2
    assert "choose one with runtime.costs_load; have idle, busy" in err
    code, _, err = call(capsys, *run, *stored, "--set", "runtime.costs_load=idle", "--threads", "2")
    assert code == 2
    assert "another number of threads" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "x.json"], ["--out x.json", ".costs.json"]),
        (["--load", "bussy"], ["bussy", "did you mean 'busy'"]),
        (["--calls", "1"], ["--calls"]),
        (["--modes", "ngrm"], ["did you mean 'ngram'"]),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *CALIBRATE, *arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())


def test_a_disturbed_machine_is_noted(monkeypatch):
    class Usage:
        def __init__(self, now_ns, pids):
            pass

        def stop(self):
            return 1.5, 0.0

    monkeypatch.setattr(cost_measurement, "_CpuUsage", Usage)
    tables, _ = measure(CalibrationOptions(num_calls=2, num_warmup=1, loads=("idle",)))
    assert list(cost_measurement._disturbances(tables)) == [
        "while toy was measured under load 'idle', other processes used 1.5 cores"
    ]


def test_the_report_leaves_out_what_was_not_measured(capsys):
    tables, _ = measure(CalibrationOptions(num_calls=2, num_warmup=1, loads=("idle",)))
    file = CostFile(origin="measured", label="x", device=Device(cpu="c", cores=1), created="now", tables=tables)
    print_costs(file, Console(width=100))
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.strip().startswith("prefill"))
    assert row.split() == ["prefill", "1.00", "-", "-", "-", "1.00"]
    assert "draft 31" in out
    assert "n = 2 behind 2 of warm-up; first prefill 10.00 ms" in out


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processor affinity here")
def test_a_process_that_is_tied_to_one_core_is_on_the_same_device():
    allowed = os.sched_getaffinity(0)
    here = this_device()
    os.sched_setaffinity(0, {min(allowed)})
    try:
        this_device.cache_clear()
        assert this_device().is_same_as(here)
    finally:
        os.sched_setaffinity(0, allowed)
