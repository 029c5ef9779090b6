"""The fault-injection loop: it finds nothing wrong with the runtime, repeats exactly, and finds what is planted."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fake_policy import MS, FakeEngine, make_policy

from vla_spec import cli
from vla_spec.acceptance.greedy import GreedyRule
from vla_spec.acceptance.relaxed_physical import RelaxedPhysicalRule
from vla_spec.chunks import ChunkBuffer, ChunkOptions
from vla_spec.clock import VirtualClock
from vla_spec.config import merge, read_mode, resolve
from vla_spec.costs import Costs
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.engines.toy import ToyEngine
from vla_spec.errors import BadConfig, BadObservation, UnknownOption
from vla_spec.injection import Call, CallKind, Draws, Weather
from vla_spec.invariants import INVARIANTS
from vla_spec.ladder import Ladder
from vla_spec.policy import Policy
from vla_spec.progress import Silent
from vla_spec.robots.toy import ToyRobot
from vla_spec.runtime import Actor, Planner
from vla_spec.stress import StressPlan, default_costs, fault_options, stress, virtual
from vla_spec.types import Command, Provenance, Rung, Verdict

PERIOD = 12_500_000
MODES = {
    "deadline": read_mode("deadline")[1],
    "autoregressive": read_mode("autoregressive")[1],
    "relaxed": read_mode("relaxed")[1],
    "fixed-8": {"drafter": "block_head", "controller": {"name": "fixed", "gamma": 8}},
}
#: Faults that strike once in a hundred plans or less.
RARE = [name for name, options in fault_options("all").items() if options.get("probability", 1) <= 0.02]
#: What makes plans end on every rung within a few hundred control steps.
ROUGH = ("engine_exception.probability=0.1", "nan_state.probability=0.1", "contention.probability=0.05")


def run(ticks, faults="all", modes=("deadline",), settings=(), seed=1, rule=None, runtime=None, **more):
    base = {} if rule is None else {"rule": rule}
    base |= {"engine": "toy", "robot": "toy", "runtime": {"deadline_ms": 60, "execute_horizon": 3, **(runtime or {})}}
    configs = tuple(virtual(resolve(merge(MODES[mode], base), mode)) for mode in modes)
    return stress(StressPlan(configs, fault_options(faults, settings), ticks, seed, **more), Silent())


@pytest.fixture(scope="module")
def everything():
    often = [f"{name}.probability=0.03" for name in RARE]
    return run(2000, modes=("deadline", "autoregressive"), settings=often, oracle_every=4)


def test_with_every_fault_on_nothing_breaks_and_everything_strikes(everything):
    for row in everything.rows:
        details = everything.details[row.mode]
        assert details.violations == dict.fromkeys(INVARIANTS, 0), details.examples
        assert row.violations == 0
        assert row.never_fired == ()
        assert row.ticks == 2000 == sum(details.command_rungs.values())
        assert row.plans == sum(details.reasons.values()) == sum(details.plan_rungs.values())
        assert details.tokens_checked > 5 * row.plans
        assert row.late_feasible <= row.feasible_plans < row.plans
        assert 0 < row.oracle_ratio <= 1
    assert {"EXACT", "DRAFT_TAIL", "LAST_CHUNK", "HOLD"} <= set(everything.details["deadline"].command_rungs)


def test_speculation_with_a_deadline_beats_autoregression_in_the_same_weather():
    faults, modes = "lognormal_latency,slow_drift,thermal_step", ("deadline", "autoregressive")
    deadline, plain = run(800, faults, modes, oracle_every=4).rows
    assert deadline.violations == plain.violations == 0
    assert deadline.late_feasible_rate < 0.02 < 0.9 < plain.late_feasible_rate
    assert deadline.verified_tokens_per_chunk > 1.5 * plain.verified_tokens_per_chunk
    assert deadline.oracle_ratio > 0.9 > plain.oracle_ratio


def test_the_same_seed_repeats_bit_for_bit_and_another_one_does_not():
    def text(seed):
        results = run(150, modes=("deadline", "fixed-8"), seed=seed)
        return json.dumps(replace(results, environment={}).as_json(), sort_keys=True)

    first = text(3)
    assert text(3) == first
    assert text(4) != first


def test_without_faults_every_answer_is_exact_whole_and_in_time():
    results = run(300, "none")
    row, details = results.rows[0], results.details["deadline"]
    assert row.violations == row.deadline_miss_rate == 0
    assert row.complete_rate == row.oracle_ratio == 1
    assert row.feasible_plans == row.plans
    assert details.plan_rungs == {"EXACT": row.plans}
    assert details.fired == {}


def test_a_fault_that_does_not_strike_is_named():
    results = run(60, "spikes,constant_latency", settings=("spikes.probability=0",))
    assert results.rows[0].never_fired == ("spikes",)
    assert results.never_fired == ("deadline: spikes",)


# Each checker fails when its invariant is broken on purpose.


def every(n, change):
    """A method that is itself, except that each n-th call's result is changed."""
    count = 0

    def wrap(method):
        def changed(self, *args, **kwargs):
            nonlocal count
            count += 1
            result = method(self, *args, **kwargs)
            return change(self, result) if count % n == 0 else result

        return changed

    return wrap


def raise_(error):
    raise error


def as_hold(buffer, command):
    return Command(np.zeros(4, np.float32), Provenance.HOLD, -1, -1)


def moved_row(buffer, command):
    return command._replace(row=command.row + 1)


def backwards(clock, nothing):
    clock._now_ns -= 10 * MS


def accept_everything(rule, draft, scores, committed, rng, tolerance=1.0):
    """What a rule that does not look would say."""
    k = len(draft.tokens)
    none = np.zeros(k, np.float32)
    return Verdict(np.arange(k, dtype=np.int32), int(scores.logits[-1].argmax()), none > 0, none)


PLANTED = {
    "no command": ("answer", ChunkBuffer, "command", every(50, lambda self, c: None)),
    "NaN": ("answer", ChunkBuffer, "command", every(50, lambda self, c: c._replace(action=c.action * np.nan))),
    "too short": ("answer", ChunkBuffer, "command", every(50, lambda self, c: c._replace(action=c.action[:2]))),
    "no chunk": ("answer", Planner, "tick", every(50, lambda self, c: None)),
    "raise in looking": ("exception", Actor, "look", every(50, lambda self, c: raise_(KeyError("planted")))),
    "raise in planning": ("exception", Policy, "plan", every(20, lambda self, c: raise_(KeyError("planted")))),
    "raise in acting": ("exception", ChunkBuffer, "command", every(50, lambda self, c: raise_(KeyError("planted")))),
    "too far": ("limits", ChunkBuffer, "command", every(50, lambda self, c: c._replace(action=c.action + 2))),
    "a hold with a plan": ("provenance", ChunkBuffer, "command", every(50, as_hold)),
    "other numbers": ("provenance", ChunkBuffer, "command", every(50, lambda self, c: c._replace(action=c.action / 2))),
    "another row": ("provenance", ChunkBuffer, "command", every(50, moved_row)),
    "a nobody's chunk": ("provenance", ChunkBuffer, "command", every(50, lambda self, c: c._replace(chunk_id=9**9))),
    "a better label": (
        "provenance", Policy, "plan",
        every(1, lambda self, c: replace(c, provenance=np.zeros_like(c.provenance), rung=Rung.EXACT)),
    ),
    "a worse rung": ("provenance", Policy, "plan", every(20, lambda self, c: replace(c, rung=Rung.DRAFT_TAIL))),
    "a rule that does not look": ("provenance", GreedyRule, "judge", lambda method: accept_everything),
    "another order": ("instruction", Policy, "plan", every(20, lambda self, c: replace(c, instruction="stand still"))),
    "a clock that goes back": ("clock", VirtualClock, "sleep_until_ns", every(20, backwards)),
    "an earlier answer": ("clock", Policy, "plan", every(20, lambda self, c: replace(c, ready_ns=c.ready_ns - 1))),
    "a ladder that counts twice": (
        "counters", Ladder, "settle", every(20, lambda self, c: (self._rungs.__iadd__(1), c)[1]),
    ),
    "a command that is not counted": (
        "counters", ChunkBuffer, "command", every(50, lambda self, c: (self._commands_by_rung.__isub__(1), c)[1]),
    ),
    "tokens that are not counted": ("counters", SpeculativeDecoder, "_append", None),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_is_found(monkeypatch, planted):
    invariant, owner, name, wrap = PLANTED[planted]
    if wrap is None:
        original = SpeculativeDecoder._append

        def append(self, m, drafted, verdict):
            end = original(self, m, drafted, verdict)
            return end - 1 if end - m > 3 else end

        monkeypatch.setattr(owner, name, append)
    else:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    counts = run(150, "engine_exception,nan_state,instruction_change", settings=ROUGH[:2], oracle_every=0).details
    assert counts["deadline"].violations[invariant] > 0, counts["deadline"]


@pytest.mark.parametrize(("gap", "is_tie"), [(1e-6, True), (1e-2, False)])
def test_only_scores_that_are_equal_to_within_rounding_tie(monkeypatch, gap, is_tie):
    """The rule takes the second best, which the engine finds worse by so much."""

    def second_best(self, draft, scores, committed, rng, tolerance=1.0):
        none = np.zeros(0, np.float32)
        return Verdict(np.zeros(0, np.int32), int(np.argsort(scores.logits[0])[-2]), none > 0, none)

    original = ToyEngine._scores

    def nearly_equal(self, *args):
        scores = original(self, *args)
        rows = np.arange(len(scores.logits))
        best, second = np.argsort(scores.logits, axis=1)[:, :-3:-1].T
        scores.logits[rows, second] = scores.logits[rows, best] - np.float32(gap)
        return scores

    monkeypatch.setattr(ToyEngine, "_scores", nearly_equal)
    monkeypatch.setattr(GreedyRule, "judge", second_best)
    details = run(40, "none", modes=("autoregressive",), oracle_every=0).details["autoregressive"]
    assert (details.ties > 0) == is_tie
    assert (details.violations["provenance"] == 0) == is_tie


def test_a_jump_of_an_unverified_command_is_found(monkeypatch):
    from vla_spec.action_space import ActionSpace

    monkeypatch.setattr(ActionSpace, "limit_change", lambda self, action, before: action)
    settings = ("thermal_step.factor=4", "thermal_step.period=3", "thermal_step.hot=2")
    details = run(600, "thermal_step,nan_state", settings=settings, oracle_every=0).details["deadline"]
    assert details.violations["change"] > 0


def test_a_tail_of_another_step_is_found(monkeypatch):
    original = ChunkBuffer.history

    def shifted(self, *args, **kwargs):
        history = original(self, *args, **kwargs)
        return history and history._replace(consumed=max(0, history.consumed - 4))

    monkeypatch.setattr(ChunkBuffer, "history", shifted)
    details = run(200, "nan_state", settings=("nan_state.probability=0.2",), oracle_every=0).details["deadline"]
    assert details.violations["provenance"] > 0


def test_a_remainder_of_another_order_is_found(monkeypatch):
    original = ChunkBuffer.history
    monkeypatch.setattr(ChunkBuffer, "history", lambda self, step, instruction=None, *more: original(self, step))
    settings = ("nan_state.probability=0.4", "instruction_change.probability=0.1")
    details = run(300, "nan_state,instruction_change", settings=settings, oracle_every=0).details["deadline"]
    assert details.violations["instruction"] > 0


def test_a_relaxation_beyond_its_tolerance_is_found(monkeypatch):
    rule = {"name": "relaxed_physical", "cap": 0.02, "budget": 0.04}  # the toy's bins are wide
    sound = run(200, "none", modes=("relaxed",), rule=rule, oracle_every=0)
    assert sound.rows[0].violations == 0
    monkeypatch.setattr(RelaxedPhysicalRule, "_is_within", lambda self, *args: True)
    broken = run(200, "none", modes=("relaxed",), rule=rule, oracle_every=0)
    assert broken.details["relaxed"].violations["provenance"] > 0


@pytest.mark.parametrize("hand_over", ["temporal_ensemble", "frozen_prefix"])
@pytest.mark.parametrize("is_shifted", [True, False])
def test_every_hand_over_is_what_it_says(hand_over, is_shifted):
    more = {"hand_over": hand_over, "is_shifted_by_holds": is_shifted}
    often = [f"{name}.probability=0.03" for name in RARE]
    results = run(400, modes=("fixed-8",), settings=often, runtime=more, oracle_every=0)
    assert results.rows[0].violations == 0, results.details["fixed-8"].examples


# The weather.


def test_draws_are_looked_up_and_spread_evenly():
    draws = Draws(7, "name")
    numbers = [draws.uniform(i, 3) for i in range(4000)]
    assert numbers == [draws.uniform(i, 3) for i in range(4000)]
    assert min(numbers) >= 0
    assert max(numbers) < 1
    assert np.histogram(numbers, 10, (0, 1))[0].tolist() == pytest.approx([400] * 10, abs=80)
    assert abs(np.mean([draws.normal(i) for i in range(4000)])) < 0.06
    assert {Draws(7, "other").uniform(0), Draws(8, "name").uniform(0), draws.uniform(0)} > {draws.uniform(0)}


def test_a_call_costs_the_same_whatever_was_called_before_and_more_for_more_tokens():
    weather = Weather(default_costs(), [], 5, 32)
    calls = [Call(3, r, CallKind.STEP, n) for r in range(4) for n in (1, 4, 8, 31)]
    costs = [weather.call_ns(call, 1.0) for call in calls]
    assert [weather.call_ns(call, 1.0) for call in calls[::-1]] == costs[::-1]
    for of_round in np.array(costs).reshape(4, 4):
        assert (np.diff(of_round) > 0).all()
    assert weather.call_ns(calls[0], 2.0) == pytest.approx(2 * costs[0], abs=1)


def test_undisturbed_latencies_follow_the_stated_distribution():
    costs = Costs({0.0: 1e6, 0.5: 2e6, 1.0: 4e6}, {1: {0.5: 3e6}, 3: {0.5: 5e6}}, {})
    weather = Weather(costs, [], 0, 3)
    drawn = [weather.call_ns(Call(k, 0, CallKind.PREFILL, 0), 1.0) for k in range(4000)]
    assert np.median(drawn) == pytest.approx(2e6, rel=0.05)
    assert np.quantile(drawn, 0.25) == pytest.approx(1.5e6, rel=0.05)
    assert 1e6 <= min(drawn) <= max(drawn) <= 4e6
    assert weather.call_ns(Call(0, 1, CallKind.STEP, 2), 1.0) == 4e6
    assert weather.call_ns(Call(0, 1, CallKind.DRAFT, 2), 1.0) == 0


def test_a_stall_makes_a_plan_infeasible_and_a_late_answer_there_is_no_miss():
    settings = ("stalls.probability=1", "stalls.least_ms=200")
    row = run(400, "stalls", settings=settings).rows[0]
    assert row.feasible_plans == row.late_feasible == 0
    assert row.late_feasible_rate is None
    assert row.deadline_miss_rate > 0.5
    assert row.violations == 0


def test_stalls_that_nothing_could_have_avoided_do_not_make_the_controller_give_up():
    row = run(1200, "stalls,lognormal_latency", settings=("stalls.probability=0.02",)).rows[0]
    assert row.late_feasible == 0
    assert row.oracle_ratio > 0.95


def test_a_plan_without_room_for_a_prefill_and_a_step_is_infeasible():
    row = run(300, "constant_latency", settings=("constant_latency.factor=7",)).rows[0]
    assert row.feasible_plans == 0
    assert row.verified_tokens_per_chunk <= 1
    assert row.violations == 0


def test_a_change_of_regime_counts_for_as_many_plans_as_the_controller_may_take_to_notice():
    settings = ("thermal_step.period=40", "thermal_step.hot=20", "thermal_step.factor=1.5")
    none, one, three = (
        run(500, "thermal_step", settings=settings, reaction_plans=n, oracle_every=0).rows[0] for n in (0, 1, 3)
    )
    assert none.feasible_plans == none.plans
    num_changes = none.plans - one.feasible_plans
    assert num_changes == pytest.approx(none.plans / 40, abs=2)
    assert none.plans - three.feasible_plans == pytest.approx(3 * num_changes, abs=3)


def test_the_oracle_of_the_toy_drafter_is_what_trying_gives():
    from vla_spec.assemble import Assembler
    from vla_spec.stress import _accepted_by_trial

    base = {"engine": "toy", "robot": "toy", "drafter": {"name": "toy", "error": 0.2}, "runtime": {"clock": "virtual"}}
    assembler, config = Assembler(), resolve(base, "trial")
    given = ToyRobot().observe(0)
    assembly = assembler.assemble(config, given, default_costs())
    tried = _accepted_by_trial(assembly, given, None)
    np.testing.assert_array_equal(tried[1:], assembly.drafter.accepted()[1:])
    assert 0 < tried[1:].mean() < 16


# What the loop found, once each.


def actor_on(robot, clock):
    policy = make_policy(clock, FakeEngine(clock))
    return Actor(
        robot, Planner(policy), ChunkBuffer(policy.space, 4, ChunkOptions(is_shifted_by_holds=False)), 4, 60 * MS
    )


class Camera(ToyRobot):
    """Hands out what it is told to."""

    change = staticmethod(lambda seen: seen)

    def observe(self, now_ns):
        return self.change(super().observe(now_ns))


def test_a_stamp_from_the_future_does_not_stop_planning_for_good():
    robot, clock = Camera(), VirtualClock()
    actor = actor_on(robot, clock)
    actor.reset(0, 0)
    robot.change = lambda seen: replace(seen, stamp_ns=seen.stamp_ns + 10**12)
    assert actor.look(0)
    chunk = actor.planner.tick(0)
    assert chunk is not None
    assert chunk.observation_stamp_ns == 0
    assert actor.num_future_stamps == 1
    assert actor.tick(0).provenance is Provenance.EXACT


@pytest.mark.parametrize("stamp_ns", [0, 2 * PERIOD, 9 * PERIOD])
def test_an_observation_that_was_overtaken_is_planned_for_at_its_own_step(stamp_ns):
    robot, clock = Camera(), VirtualClock()
    actor = actor_on(robot, clock)
    actor.reset(0, 0)
    first = replace(robot.observe(0), stamp_ns=stamp_ns)
    for step in range(2):
        actor.tick(step * PERIOD)
    robot.change = lambda seen: first
    assert actor.look(2 * PERIOD)
    chunk = actor.planner.tick(2 * PERIOD)
    assert (chunk.observation_step, chunk.observation_stamp_ns) == (0, min(stamp_ns, 2 * PERIOD))
    assert actor.num_overtaken == 1
    assert actor.buffer.history(0) is None
    actor.tick(2 * PERIOD)
    assert actor.buffer.history(0).consumed == 0


def test_a_robot_that_counts_wrongly_is_refused():
    robot, clock = Camera(), VirtualClock()
    actor = actor_on(robot, clock)
    actor.reset(0, 0)
    robot.change = lambda seen: replace(seen, step=7)
    with pytest.raises(BadObservation, match="step is 7"):
        actor.look(0)


def test_an_observation_older_than_the_chunk_has_no_history():
    actor = actor_on(Camera(), VirtualClock())
    actor.reset(0, 0)
    for step in range(2):
        actor.tick(step * PERIOD)
    actor.look(2 * PERIOD)
    actor.planner.tick(2 * PERIOD)
    actor.tick(2 * PERIOD)
    buffer = actor.buffer
    newest = buffer.newest
    assert buffer.history(newest.observation_step).consumed == 0
    assert buffer.history(newest.observation_step - 1) is None


# The command line.


def call(*args):
    with pytest.raises(SystemExit) as done:
        cli.main(["stress", *args])
    return done.value.code


def test_the_command_writes_rows_with_the_common_keys(tmp_path, capsys):
    faults = "constant_latency,lognormal_latency"
    args = ("--ticks", "200", "--faults", faults, "--seed", "5", "--modes", "deadline", "--fixed", "4")
    assert call(*args, "--out", str(tmp_path)) == 0
    tree = json.loads((tmp_path / "results.json").read_text())
    assert [row["mode"] for row in tree["rows"]] == ["deadline", "fixed-4"]
    common = {"mode", "engine", "drafter", "rule", "deadline_ms", "deadline_miss_rate"}
    assert common | {"ticks", "plans", "feasible_plans", "late_feasible_rate", "oracle_ratio"} <= set(tree["rows"][0])
    assert tree["kind"] == "stress"
    assert tree["seed"] == 5
    assert set(tree["faults"]) == set(faults.split(","))
    assert tree["command"].startswith("vla-spec stress --ticks 200")
    assert {"costs.json", "configs.yaml", "report.html", "results.json"} <= {p.name for p in tmp_path.iterdir()}
    assert "constant_latency" in (tmp_path / "report.html").read_text()
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 or str(tmp_path) in shown


def test_the_command_fails_on_a_violation_and_on_a_fault_that_never_struck(tmp_path, capsys, monkeypatch):
    short = ("--modes", "deadline", "--fixed", "", "--no-report", "--out", str(tmp_path))
    assert call("--ticks", "50", "--faults", "stalls", "--fault", "stalls.probability=0", *short) == 1
    assert "never struck" in capsys.readouterr().err
    monkeypatch.setattr(ChunkBuffer, "command", every(20, lambda self, c: c._replace(row=0))(ChunkBuffer.command))
    assert call("--ticks", "50", "--faults", "none", *short) == 1
    assert "violations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--faults", "spike"), "did you mean 'spikes'?"),
        (("--fault", "spikes.factor=0.5"), "factor is 0.5"),
        (("--fault", "spikes.height=2"), "no option named 'height'"),
        (("--fixed", "four"), "'four' is no draft length"),
    ],
)
def test_the_command_names_what_is_wrong(args, said, capsys, tmp_path):
    assert call("--ticks", "10", *args, "--out", str(tmp_path)) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_faults_are_chosen_by_name_and_by_setting():
    assert set(fault_options("spikes, stalls")) == {"spikes", "stalls"}
    assert fault_options("none") == {}
    assert fault_options("none", ["spikes.factor=5"]) == {"spikes": {"probability": 0.002, "factor": 5.0}}
    with pytest.raises(UnknownOption, match="no fault named 'spike'"):
        fault_options("spike")


@pytest.mark.parametrize("key", ["num_ticks", "episode_ticks", "oracle_every", "reaction_plans"])
def test_a_plan_refuses_what_can_not_be(key):
    with pytest.raises(BadConfig, match=key):
        StressPlan((), {}, **{"num_ticks": 1, key: -1})
