"""Episodes with the planner on a server, the commands of the command line, keys, and a client in another style."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("msgpack", reason="needs the extra [serve]")
pytest.importorskip("zmq", reason="needs the extra [serve]")

from fake_serving import ANYWHERE, PATIENCE_S, Gate, connected, gated_policy, serving

from vla_spec.assemble import Assembler
from vla_spec.chunks import Gap
from vla_spec.cli import main
from vla_spec.clock import MonotonicClock
from vla_spec.config import merge, read_mode, resolve
from vla_spec.errors import BadConfig
from vla_spec.progress import Silent
from vla_spec.robots import toy
from vla_spec.runtime import Mode, RuntimeOptions, run_episode
from vla_spec.serving.client import Link, PlannerGone
from vla_spec.serving.closed_loop import RemotePlan, evaluate_remote, hello_of, run_remote_episode
from vla_spec.serving.keys import make_keys, read_clients, read_pair, read_public
from vla_spec.serving.service import build_service
from vla_spec.types import Provenance, Rung

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/remote_client.py"
TOY = {"engine": "toy", "robot": "toy"}


def config(mode="ngram", **changes):
    return resolve(merge(read_mode(mode)[1], {**TOY, **changes}), mode)


@contextlib.contextmanager
def toy_server(mode="ngram", num_clients=1, **options):
    service = build_service(config(mode), num_clients, 0.0125)
    with serving(*service.policies, welcome=service.welcome, **options) as server:
        yield server


# --- the loop ---


@pytest.mark.parametrize("bind", [ANYWHERE, "ipc"])
def test_an_episode_with_a_server_is_the_one_without(tmp_path, bind):
    """Bit for bit: actions, provenance, chunks, rounds."""
    bind = f"ipc://{tmp_path}/planner" if bind == "ipc" else bind
    options = RuntimeOptions(max_steps=60, stop_on_success=False)
    assembler, robot = Assembler(), toy.ToyRobot()
    robot.reset(0)
    local = assembler.assemble(config(), robot.observe(0))
    with toy_server(bind=bind) as server, connected(server.address) as planner:
        for seed in (3, 4):
            here = run_episode(robot, local.policy, MonotonicClock(), options, seed)
            there = run_remote_episode(robot, planner, MonotonicClock(), options, seed)
            np.testing.assert_array_equal(there.actions, here.actions)
            np.testing.assert_array_equal(there.provenance, here.provenance)
            assert len(there.plans) == len(here.plans) == 15
            for plan, of_here in zip(there.plans, here.plans, strict=True):
                assert [r[:3] for r in plan.rounds] == [r[:3] for r in of_here.rounds]
                assert (plan.rung, plan.reason, plan.num_verified) == (
                    of_here.rung,
                    of_here.reason,
                    of_here.num_verified,
                )


class WatchedRobot(toy.ToyRobot):
    """Tells when a step was reached, and keeps what it was sent."""

    def __init__(self, events):
        self.events, self.sent, self.num_zeros = events, [], 0
        super().__init__(toy.Options(dt_s=0.01))

    def act(self, action, now_ns):
        self.sent.append(action.copy())
        self.num_zeros += not action[:3].any()
        if self.step in self.events:
            self.events[self.step]()
        return super().act(action, now_ns)


def test_when_the_server_dies_the_arm_holds_and_goes_on_when_it_is_back():
    """In real time. The actor is never told to wait: all its steps are played, none outside the limits."""
    is_back, is_over, events = threading.Event(), threading.Event(), {}
    robot = WatchedRobot(events)
    with contextlib.ExitStack() as first_server, contextlib.ExitStack() as outer:
        server = first_server.enter_context(toy_server())
        planner = outer.enter_context(connected(server.address, retry_ms=20))

        def another_server():
            assert planner.wait_for(Link.PLANNER_GONE, PATIENCE_S) is Link.PLANNER_GONE
            first_server.close()
            assert has_stopped.wait(PATIENCE_S)
            with toy_server(bind=server.address):
                assert planner.wait_for(Link.READY, PATIENCE_S) is Link.READY
                is_back.set()
                assert is_over.wait(PATIENCE_S)

        has_stopped, left = threading.Event(), iter(range(20))

        def look_around():
            if robot.num_zeros >= 3:  # after holds with its last command it came to rest
                has_stopped.set()
            if is_back.is_set() and next(left, None) is None:  # 20 steps with the new server
                robot.is_success = True

        events.update({10: server.stop} | dict.fromkeys(range(11, 3000), look_around))
        helper = threading.Thread(target=another_server)
        helper.start()
        result = run_remote_episode(
            robot, planner, MonotonicClock(), RuntimeOptions(mode=Mode.REAL_TIME, max_steps=3000), 0
        )
        num_gone = planner.num_gone
        is_over.set()
        helper.join(PATIENCE_S)
    assert (is_back.is_set(), num_gone) == (True, 1)
    assert np.abs(np.array(robot.sent)).max() <= 1
    is_hold = result.provenance == Provenance.HOLD
    assert is_hold.any()
    assert not is_hold[:10].any()
    assert not is_hold[-5:].any(), "it never moved again"
    assert result.gaps[Gap.RAN_OUT] == is_hold.sum()
    assert result.rungs[Rung.STOP] > 0
    assert (result.actions[is_hold][-1, :3] == 0).all()  # at rest


def test_lock_step_waits_for_the_server_and_says_when_it_is_gone():
    gate, options = Gate(), RuntimeOptions(max_steps=5)
    with contextlib.ExitStack() as stack:
        with serving(gated_policy(gate)) as server:
            planner = stack.enter_context(connected(server.address))
            with pytest.raises(PlannerGone, match="no answer in time"):
                run_remote_episode(toy.ToyRobot(), planner, MonotonicClock(), options, patience_s=0.1)
            gate.is_open.set()
        assert planner.wait_for(Link.PLANNER_GONE, PATIENCE_S) is Link.PLANNER_GONE
        with pytest.raises(PlannerGone, match="planner_gone"):
            run_remote_episode(toy.ToyRobot(), planner, MonotonicClock(), options, patience_s=0.0)
    with pytest.raises(PlannerGone, match="closed"):
        run_remote_episode(toy.ToyRobot(), planner, MonotonicClock(), options)


def test_what_can_not_be_played_is_refused():
    with toy_server() as server, connected(server.address) as planner:
        with pytest.raises(BadConfig, match="virtual"):
            run_remote_episode(toy.ToyRobot(), planner, MonotonicClock(), RuntimeOptions(mode=Mode.VIRTUAL))
        with pytest.raises(BadConfig, match="execute_horizon"):
            run_remote_episode(toy.ToyRobot(), planner, MonotonicClock(), RuntimeOptions(execute_horizon=99))
    with connected(server.address, is_connected=False) as planner, pytest.raises(PlannerGone, match="not connected"):
        run_remote_episode(toy.ToyRobot(), planner, MonotonicClock(), RuntimeOptions())


def test_results_name_the_server_and_count_the_way_there():
    with toy_server() as server:
        plan = RemotePlan(resolve({**TOY, "controller": "fixed"}, "remote"), (None,), range(2), 40, server.address)
        results = evaluate_remote(plan, Silent())
    (row,) = results.rows
    assert (row.mode, row.engine, row.drafter, row.episodes, row.chunks) == ("ngram (remote)", "toy", "ngram", 2, 20)
    assert row.is_exact
    assert row.chunk_ms_p50 > 0
    assert server.address in results.notes[0]
    assert "of 20 chunks; the server was lost 0 times" in results.notes[1]
    json.dumps(results.as_json(), allow_nan=False)


def test_a_robot_that_does_not_fit_the_server_is_said():
    robot = toy.ToyRobot(toy.Options(image_size=32))
    with toy_server() as server:
        with connected(server.address, hello=hello_of(robot, robot.observe(0)), is_connected=False) as planner:
            with pytest.raises(
                PlannerGone, match=r"images: the client has \[3, 32, 32, 3\], the server \[3, 16, 16, 3\]"
            ):
                planner.connect(PATIENCE_S)


@pytest.mark.parametrize(("changes", "arguments", "words"), [
    ({"runtime": {"clock": "virtual"}}, (1, 0.0125), "virtual"),
    ({}, (0, 0.0125), "--max-clients 0"),
])  # fmt: skip
def test_what_can_not_be_served_is_refused(changes, arguments, words):
    with pytest.raises(BadConfig, match=words):
        build_service(config(**changes), *arguments)


# --- keys ---


def test_a_secret_key_is_its_owners_alone(tmp_path):
    public, secret = make_keys(tmp_path / "new", "robot")
    assert [path.name for path in (public, secret)] == ["robot.key", "robot.key_secret"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["robot.key", "robot.key_secret"]
    if sys.platform != "win32":
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    pair = read_pair(secret)
    assert pair.public == read_public(public)
    assert len(pair.secret) == 40
    assert pair.secret.decode() not in repr(pair)
    assert pair.secret.decode() not in public.read_text()
    assert read_clients(tmp_path / "new") == {pair.public: "robot"}


def test_keys_that_can_not_be_used_are_refused(tmp_path):
    public, secret = make_keys(tmp_path, "robot")
    with pytest.raises(BadConfig, match="exists"):
        make_keys(tmp_path, "robot")
    for name in ("../robot", "", "a b", "x" * 65):
        with pytest.raises(BadConfig, match="letters, digits"):
            make_keys(tmp_path, name)
    with pytest.raises(BadConfig, match="holds no secret key"):
        read_pair(public)
    with pytest.raises(BadConfig, match="vla-spec keys NAME"):
        read_public(tmp_path / "nobody.key")
    with pytest.raises(BadConfig, match="no client's key"):
        read_clients(tmp_path / "nowhere")
    (tmp_path / "short.key").write_text('curve\n    public-key = "abc"\n')
    with pytest.raises(BadConfig, match="3 characters; valid: 40"):
        read_public(tmp_path / "short.key")
    if sys.platform != "win32":
        secret.chmod(0o640)
        with pytest.raises(BadConfig, match=r"others may read it \(mode -rw-r-----\); chmod 600"):
            read_pair(secret)


# --- the command line ---


class Serve:
    """`vla-spec serve` in a process of its own."""

    def __init__(self, folder, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vla_spec.cli", "serve", "--engine", "toy", "--mode", "ngram", *arguments],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"listening on (\S+)", line):
                self.address = found[1]
                return
        raise AssertionError(f"it did not start: {self.lines} {self.process.stderr.read()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def end(self, number):
        """Send a signal. Returns exit code and all that was printed."""
        self.process.send_signal(number)
        out, error = self.process.communicate(timeout=PATIENCE_S)
        assert error == ""
        return self.process.returncode, "".join(self.lines) + out


def vla_spec(*arguments):
    """The command line in this process. Returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


def test_a_robot_is_served_on_the_command_line_with_keys(tmp_path, monkeypatch, capsys):
    """keys, serve, run --planner, a port in use, SIGTERM."""
    monkeypatch.chdir(tmp_path)
    assert (vla_spec("keys", "server"), vla_spec("keys", "robot", "--out", "clients")) == (0, 0)
    secured = ("--key", "keys/server.key_secret", "--clients", "clients")
    with Serve(tmp_path, "--bind", ANYWHERE, "--out", "served", "--max-clients", "1", *secured) as serve:
        assert "encrypted, known keys only" in serve.lines[-1]
        code = vla_spec(
            "run", "--robot", "toy", "--planner", serve.address, "--planner-key", "clients/robot.key_secret",
            "--planner-server-key", "keys/server.key", "--episodes", "1", "--max-steps", "20", "--out", "ran",
            "--no-report",
        )  # fmt: skip
        assert code == 0
        assert "ngram (remote)" in capsys.readouterr().out
        assert vla_spec("serve", "--engine", "toy", "--mode", "ngram", "--bind", serve.address, "--out", "x") == 2
        assert "in use" in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
        code, out = serve.end(signal.SIGTERM)
    assert code == 0
    assert "5 requests of 1 clients: 5 chunks" in " ".join(out.split())
    assert json.loads((tmp_path / "served/results.json").read_text())["kind"] == "serve"
    tally = json.loads((tmp_path / "served/serving.json").read_text())
    assert (tally["num_answered"], tally["held_ms"]["n"]) == (5, 5)
    assert json.loads((tmp_path / "ran/results.json").read_text())["rows"][0]["chunks"] == 5


def test_a_killed_server_is_missed_and_its_successor_found_and_the_example_talks_to_it(tmp_path):
    bind = f"ipc://{tmp_path}/planner"
    with Serve(tmp_path, "--bind", bind, "--out", "one") as serve, connected(bind, gone_after_ms=200) as planner:
        serve.process.kill()  # no goodbye
        assert planner.wait_for(Link.PLANNER_GONE, PATIENCE_S) is Link.PLANNER_GONE
        with Serve(tmp_path, "--bind", bind, "--out", "two") as successor:
            assert planner.wait_for(Link.READY, PATIENCE_S) is Link.READY
            assert planner.num_gone == 1
            ran = subprocess.run([sys.executable, EXAMPLE, bind], capture_output=True, text=True, timeout=PATIENCE_S)
            assert ran.stdout.count("EXACT, 8 steps") == 5, ran.stderr
            assert successor.end(signal.SIGINT)[0] == 0


def test_without_its_libraries_the_command_says_which_extra_brings_them(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments in (["serve"], ["keys", "robot"], ["run", "--planner", "tcp://127.0.0.1:1"]):
        assert vla_spec(*arguments) == 2
        assert "pip install 'vla_spec[serve]'" in capsys.readouterr().err


def test_the_example_is_short_and_needs_nothing_of_ours():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 60
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) == {"sys", "time", "msgpack", "numpy", "zmq"}


@pytest.mark.parametrize(("arguments", "words"), [
    (["serve", "--bind", "tcp://0.0.0.0:5555"], "other machines can reach it"),
    (["serve", "--bind", "tcp://0.0.0.0:5555", "--public"], "without keys"),
    (["serve", "--key", "x"], "--key and --clients belong together"),
    (["serve", "--key", "x", "--clients", "y"], "x: can't be read as a key"),
    (["serve", "--mode", "exakt"], "did you mean 'exact'"),
    (["run", "--planner", "tcp://127.0.0.1:1", "--modes", "exact"], "--modes exact: the server at"),
    (["run", "--planner", "5555", "--robot", "toy"], "planner address '5555'"),
    (["run", "--planner-key", "x"], "valid with --planner only"),
    (["run", "--planner", "tcp://127.0.0.1:1", "--planner-key", "x"], "belong together"),
])  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert vla_spec(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
