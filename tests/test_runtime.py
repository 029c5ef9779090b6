import threading

import numpy as np
import pytest
from fake_policy import MS, SPACE, FakeController, FakeDrafter, FakeEngine, T, make_policy

from vla_spec.chunks import ChunkBuffer, ChunkOptions, Gap, HandOver
from vla_spec.clock import MonotonicClock, VirtualClock
from vla_spec.errors import BadConfig
from vla_spec.ladder import Reason
from vla_spec.robots.toy import ToyRobot
from vla_spec.runtime import Actor, Mode, Planner, RuntimeOptions, run_episode
from vla_spec.types import Observation, Provenance, Rung
from vla_spec.virtual_costs import ChargedDrafter, ChargedEngine, CostDistribution, CostTable

PERIOD = 12_500_000
PLANNED = np.arange(T, dtype=np.int32) + 100


class ClockedRobot(ToyRobot):
    """Remembers when it was asked and told."""

    def __init__(self):
        super().__init__()
        self.seen, self.acted, self.threads = [], [], set()

    def observe(self, now_ns):
        self.seen.append((self.step, now_ns))
        self.threads.add(threading.get_ident())
        return super().observe(now_ns)

    def act(self, action, now_ns):
        self.acted.append(now_ns)
        self.threads.add(threading.get_ident())
        return super().act(action, now_ns)


def episode(mode=Mode.VIRTUAL, prefill_ms=0, step_ms=0, engine=None, controller=None, robot=None, seed=1, **options):
    clock = VirtualClock(500)
    engine = engine or FakeEngine(clock, prefill_ns=round(prefill_ms * MS), step_ns=round(step_ms * MS))
    engine.clock = clock
    policy = make_policy(clock, engine, FakeDrafter(PLANNED), controller or FakeController(gamma=7))
    values = {"max_steps": 20, "stop_on_success": False} | options
    return run_episode(robot or ToyRobot(), policy, clock, RuntimeOptions(mode=mode, **values), seed)


def test_lock_step_plays_execute_horizon_steps_of_each_chunk():
    robot = ClockedRobot()
    result = episode(Mode.LOCK_STEP, 20, 3, robot=robot, execute_horizon=3)
    assert [step for step, _ in robot.seen] == [0, 3, 6, 9, 12, 15, 18]
    assert result.chunk_ids.tolist() == [i // 3 for i in range(20)]
    assert result.counts[Provenance.EXACT] == result.num_steps == 20
    assert result.delay_steps.tolist() == [0] * 7
    assert result.num_misses == 0
    assert [plan.plan_ns for plan in result.plans] == [32 * MS] * 7
    assert [plan.observation_step for plan in result.plans] == [0, 3, 6, 9, 12, 15, 18]


def test_virtual_time_without_latency_is_lock_step():
    one, other = episode(Mode.LOCK_STEP), episode(Mode.VIRTUAL)
    np.testing.assert_array_equal(one.actions, other.actions)
    assert one.chunk_ids.tolist() == other.chunk_ids.tolist()


def test_a_plan_comes_into_use_when_its_time_has_passed():
    """32 ms a plan at 12.5 ms a step: asked at step 4, ready within step 6, used from step 7 on."""
    robot = ClockedRobot()
    result = episode(prefill_ms=20, step_ms=3, robot=robot)
    assert result.delay_steps.tolist() == [0, 3, 3, 3, 3]
    assert result.chunk_ids.tolist() == [0] * 7 + [1] * 4 + [2] * 4 + [3] * 4 + [4]
    assert [step for step, _ in robot.seen] == [0, 4, 8, 12, 16]
    assert result.num_holds == result.num_misses == 0
    assert result.plans[1].slack_ns == 50 * MS - 32 * MS  # until the old chunk has run out: 4 periods
    start = 500 + 32 * MS  # the first plan is free
    assert robot.acted == [start + i * PERIOD for i in range(20)]
    assert robot.seen[1][1] == start + 4 * PERIOD


def test_the_arm_plays_on_and_then_holds_when_the_planner_is_late():
    """110 ms a plan are 9 steps; a chunk has 8."""
    chunks = ChunkOptions(is_shifted_by_holds=False)  # the world does not wait: steps count even if the arm stands
    result = episode(prefill_ms=98, step_ms=3, max_steps=24, controller=Never(), budget_ns=60 * MS, chunks=chunks)
    assert result.delay_steps.tolist() == [0, 9, 9]
    # Chunk 1 is of step 4 and comes at step 13, too late for its 8 steps; the next one is asked for at once.
    assert result.num_misses == len(result.plans) == 4  # the last one is still under way
    assert result.counts[Provenance.EXACT] == 8
    assert result.num_holds == 16
    assert (result.rungs[Rung.HOLD], result.rungs[Rung.STOP]) == (8, 8)


def test_a_planner_slower_than_a_chunk_can_stop_and_go():
    result = episode(prefill_ms=98, step_ms=3, max_steps=30, controller=Never())
    assert result.delay_steps.tolist() == [0, 9, 9]
    # Chunk 1 was seen at step 4; four actions and five holds later it is entered at its fifth action, and so on.
    assert result.chunk_ids.tolist() == [0] * 8 + [-1] * 5 + [1] * 4 + [-1] * 5 + [2] * 4 + [-1] * 4


class Never(FakeController):
    """Never stops for time."""

    def __init__(self):
        super().__init__(gamma=7)

    def plan(self, remaining_ns, tokens_left):
        return super().plan(1, tokens_left)


def test_a_late_chunk_serves_with_its_remaining_steps():
    """72 ms a plan: 6 steps, so that of each chunk two steps are left."""
    chunks = ChunkOptions(is_shifted_by_holds=False)
    result = episode(prefill_ms=60, step_ms=3, controller=Never(), max_steps=20, chunks=chunks)
    assert result.delay_steps.tolist()[:3] == [0, 6, 6]
    assert result.chunk_ids.tolist()[:12] == [0] * 8 + [-1] * 2 + [1] * 2
    assert result.num_misses >= 2


def test_a_deadline_cuts_the_decode_and_the_tail_takes_over():
    result = episode(prefill_ms=20, step_ms=3, controller=FakeController(gamma=0), budget_ns=40 * MS)
    assert {plan.reason for plan in result.plans} == {Reason.DEADLINE}
    assert {plan.rung for plan in result.plans} == {Rung.DRAFT_TAIL}
    # 20 ms for the prefill, then 3 ms a token until less than nothing is left: 1 + 7 tokens, two whole steps.
    assert {plan.num_verified for plan in result.plans} == {8}
    assert result.counts[Provenance.DRAFTED] > 0
    assert result.num_holds == 0


def test_a_deadline_shorter_than_a_control_period_is_answered_from_the_ladder():
    """5 ms for a plan at 12.5 ms a step: the prefill alone is late, every plan has a reason, every step an answer."""
    result = episode(prefill_ms=20, step_ms=3, budget_ns=5 * MS)
    assert {plan.reason for plan in result.plans} == {Reason.DEADLINE}
    assert result.num_misses == len(result.plans) > 3
    assert result.num_holds == 20
    assert result.rungs[Rung.HOLD] + result.rungs[Rung.STOP] == sum(result.gaps.values()) == 20
    assert result.gaps[Gap.PLANNED] > 0
    assert np.isfinite(result.actions).all()
    # And one that fits into it is in time for the same step.
    fits = episode(prefill_ms=1, step_ms=0.5, budget_ns=5 * MS, controller=FakeController(gamma=7))
    assert fits.num_misses == fits.num_holds == 0
    assert set(fits.delay_steps.tolist()) == {0, 1}


def test_without_a_free_first_plan_the_robot_holds_until_it_is_there():
    result = episode(prefill_ms=20, step_ms=3, is_first_plan_free=False)
    assert result.chunk_ids.tolist()[:4] == [-1, -1, -1, 0]
    assert result.num_holds == 3


def test_a_plan_that_is_none_is_made_again_at_once():
    """NaN from the engine: holds, then stops, with one plan for each step."""
    clock = VirtualClock()
    result = episode(Mode.LOCK_STEP, engine=FakeEngine(clock, nan_at=0), max_steps=6)
    assert [plan.rung for plan in result.plans] == [Rung.HOLD] * 3 + [Rung.STOP] * 3
    assert result.num_holds == 6
    assert (result.actions == 0).all()


def test_a_fault_in_mid_episode_is_bridged_by_the_last_chunk():
    class Hiccup(FakeEngine):
        def prefill(self, inputs):
            scores = super().prefill(inputs)
            if self.num_prefills == 2:
                raise RuntimeError("once")
            return scores

    result = episode(prefill_ms=20, step_ms=3, engine=Hiccup(VirtualClock(), prefill_ns=20 * MS, step_ns=3 * MS))
    assert [plan.rung for plan in result.plans][:3] == [Rung.EXACT, Rung.LAST_CHUNK, Rung.EXACT]
    assert result.plans[1].reason is Reason.ENGINE_ERROR
    assert result.counts[Provenance.TAIL] > 0
    assert result.num_holds < 4


def test_it_stops_at_the_first_success():
    robot = ToyRobot()
    clock = VirtualClock()
    policy = make_policy(clock, adapter=Expert(robot))
    result = run_episode(robot, policy, clock, RuntimeOptions(max_steps=200), seed=3)
    assert result.success
    assert result.num_steps == robot.step < 60


class Expert:
    """Decodes anything to the toy robot's expert action."""

    def __init__(self, robot):
        self.robot = robot
        self.domain, self.tokenizer = make_policy(VirtualClock()).adapter.domain, None

    def encode(self, observation):
        return {}

    def decode(self, tokens):
        return np.tile(self.robot.expert_action(), (len(tokens) // 4, 1))


def charged(seed):
    clock = VirtualClock()
    rng = np.random.default_rng(seed)
    costs = CostTable({0.1: 15 * MS, 0.9: 40 * MS}, {1: 2 * MS, 8: {0.5: 3 * MS, 0.99: 9 * MS}}, {7: 0.1 * MS})
    engine = ChargedEngine(FakeEngine(clock), costs, clock, rng)
    drafter = ChargedDrafter(FakeDrafter(PLANNED), costs, clock, rng)
    policy = make_policy(clock, engine, drafter, FakeController(gamma=7))
    options = RuntimeOptions(mode=Mode.VIRTUAL, max_steps=80, stop_on_success=False)
    return run_episode(ToyRobot(), policy, clock, options, seed)


def test_virtual_episodes_repeat_bit_for_bit_from_a_seed():
    one, again, other = charged(5), charged(5), charged(6)
    assert one.plans == again.plans
    assert one.actions.tobytes() == again.actions.tobytes()
    assert one.chunk_ids.tolist() == again.chunk_ids.tolist()
    assert one.plans != other.plans
    assert len({plan.plan_ns for plan in one.plans}) > 5


def test_costs_are_drawn_between_their_quantiles():
    rng = np.random.default_rng(0)
    draws = [CostDistribution({0.5: 100, 0.9: 200}).draw_ns(rng) for _ in range(4000)]
    assert (min(draws), max(draws)) == (100, 200)
    assert np.mean(np.array(draws) == 100) == pytest.approx(0.5, abs=0.03)
    assert np.median([d for d in draws if 100 < d < 200]) == pytest.approx(150, abs=5)
    assert CostDistribution(7).draw_ns(rng) == 7
    table = CostTable(1, {1: 10, 4: 40}, {2: 5})
    assert [table.step_ns(n, rng) for n in (1, 2, 4, 9)] == [10, 20, 40, 40]
    assert (table.draft_ns(1, rng), CostTable(1, {}).draft_ns(3, rng)) == (5, 0)
    for bad in ({0.5: 2, 0.9: 1}, {1.5: 2}, -1, {}):
        with pytest.raises(BadConfig):
            CostDistribution(bad)


def test_frozen_prefix_hands_over_no_earlier_than_the_measured_delay():
    options = ChunkOptions(hand_over=HandOver.FROZEN_PREFIX)
    result = episode(prefill_ms=20, step_ms=3, max_steps=40, chunks=options)
    assert result.num_holds == 0
    assert result.delay_steps.tolist()[1:] == [3] * (len(result.delay_steps) - 1)


def test_real_time_keeps_rendering_and_acting_in_the_thread_of_the_caller():
    clock = MonotonicClock()
    engine = FakeEngine(clock)
    clock.advance = lambda ns: clock.sleep_until_ns(clock.now_ns() + ns)
    engine.prefill_ns, engine.step_ns = 2 * MS, MS // 2
    policy = make_policy(clock, engine, FakeDrafter(PLANNED), FakeController(gamma=7))
    robot = ClockedRobot()
    options = RuntimeOptions(mode=Mode.REAL_TIME, max_steps=30, stop_on_success=False, time_scale=2)
    result = run_episode(robot, policy, clock, options, 1)
    assert result.num_steps == robot.step == 30
    assert robot.threads == {threading.get_ident()}
    assert np.diff(robot.acted).tolist() == [PERIOD // 2] * 29  # on the schedule, whatever the machine did
    assert result.period_ns == PERIOD // 2
    assert len(result.plans) >= 2
    assert sum(result.counts.values()) == 30
    assert all(before < after for before, after in zip(robot.seen, robot.seen[1:], strict=False))


def test_the_simulated_world_can_stand_still_while_it_is_drawn():
    class SlowPictures(ClockedRobot):
        def observe(self, now_ns):
            clock.sleep_until_ns(clock.now_ns() + 8 * MS)
            return super().observe(now_ns)

    clock = MonotonicClock()
    clock.advance = lambda ns: clock.sleep_until_ns(clock.now_ns() + ns)
    policy = make_policy(clock, FakeEngine(clock), FakeDrafter(PLANNED), FakeController(gamma=7))
    robot = SlowPictures()
    options = RuntimeOptions(
        mode=Mode.REAL_TIME, max_steps=12, stop_on_success=False, time_scale=2, is_observing_free=True
    )
    result = run_episode(robot, policy, clock, options, 1)
    assert len(result.observe_ns) == len(robot.seen) >= 2
    assert (result.observe_ns >= 8 * MS).all()
    paused = {step: ns for (step, _), ns in zip(robot.seen[1:], result.observe_ns[1:].tolist(), strict=True)}
    steps = np.diff(robot.acted).tolist()
    assert steps == [PERIOD // 2 + paused.get(step, 0) for step in range(11)]
    for plan, ns in zip(result.plans, result.observe_ns.tolist(), strict=True):
        assert plan.deadline_ns - plan.observation_stamp_ns == 4 * PERIOD // 2 + ns


class Faulty(FakeEngine):
    """Stalls, raises and answers NaN now and then, from a seed."""

    def __init__(self, clock, seed):
        super().__init__(clock)
        self.rng = np.random.default_rng(seed)

    def _disturb(self, scores):
        self.clock.advance(int(self.rng.lognormal(0, 1.5) * 3 * MS))
        fault = self.rng.random()
        if fault < 0.05:
            raise RuntimeError("driver reset")
        if fault < 0.1:
            scores.logits[:] = np.nan
        return scores

    def prefill(self, inputs):
        return self._disturb(super().prefill(inputs))

    def step(self, tokens, parents):
        return self._disturb(super().step(tokens, parents))


class FaultyDrafter(FakeDrafter):
    def __init__(self, seed):
        super().__init__(PLANNED)
        self.rng = np.random.default_rng(seed)

    def propose(self, prefix, plan, features):
        if self.rng.random() < 0.1:
            raise ValueError("no idea")
        draft = super().propose(prefix, plan, features)
        return draft._replace(tokens=draft.tokens + 1000) if self.rng.random() < 0.1 else draft


class FaultyRobot(ToyRobot):
    """Sees NaN now and then."""

    def observe(self, now_ns):
        seen = super().observe(now_ns)
        if self.step % 7 == 3:
            seen.state[0] = np.nan
        return seen


@pytest.mark.parametrize("hand_over", list(HandOver))
@pytest.mark.parametrize("seed", range(6))
def test_whatever_goes_wrong_every_control_step_gets_a_command(hand_over, seed):
    clock = VirtualClock()
    policy = make_policy(clock, Faulty(clock, seed), FaultyDrafter(seed), FakeController(gamma=5))
    options = RuntimeOptions(
        mode=Mode.VIRTUAL, max_steps=300, stop_on_success=False, chunks=ChunkOptions(hand_over=hand_over)
    )
    result = run_episode(FaultyRobot(), policy, clock, options, seed)
    assert result.num_steps == 300 == sum(result.counts.values()) == sum(result.rungs.values())
    assert np.isfinite(result.actions).all()
    assert len(result.plans) == sum(policy.ladder.counts.values())
    assert {Reason.ENGINE_ERROR, Reason.DRAFTER_ERROR} < {plan.reason for plan in result.plans}
    assert (result.counts[Provenance.HOLD] < 300) == (result.counts[Provenance.EXACT] > 0)


def test_what_the_planner_raises_is_raised_in_the_callers_thread():
    clock = MonotonicClock()
    clock.advance = lambda ns: None
    policy = make_policy(clock, FakeEngine(clock))
    policy.trace.record = None  # a bug, no expected trouble
    with pytest.raises(TypeError):
        run_episode(ToyRobot(), policy, clock, RuntimeOptions(mode=Mode.REAL_TIME, max_steps=5))
    assert "vla_spec planner" not in {thread.name for thread in threading.enumerate()}


def test_modes_and_clocks_must_fit():
    clock = VirtualClock()
    policy = make_policy(clock)
    with pytest.raises(BadConfig, match="runs by itself"):
        run_episode(ToyRobot(), policy, clock, RuntimeOptions(mode=Mode.REAL_TIME))
    with pytest.raises(BadConfig, match="needs a VirtualClock"):
        run_episode(ToyRobot(), policy, MonotonicClock(), RuntimeOptions(mode=Mode.VIRTUAL))
    with pytest.raises(BadConfig, match=r"execute_horizon is 9; valid: 1\.\.8"):
        run_episode(ToyRobot(), policy, clock, RuntimeOptions(execute_horizon=9))
    with pytest.raises(BadConfig, match=r"runtime\.time_scale is 0"):
        RuntimeOptions(time_scale=0)


def test_actor_and_planner_are_step_functions():
    clock = VirtualClock()
    planner = Planner(make_policy(clock, FakeEngine(clock, prefill_ns=10, step_ns=1), FakeDrafter(PLANNED)))
    actor = Actor(ToyRobot(), planner, ChunkBuffer(SPACE, 4), execute_horizon=4, budget_ns=1000)
    actor.reset(0, 0)
    assert planner.tick(0) is None  # nothing to do
    assert actor.look(0)
    assert not actor.look(0)  # busy: one observation at a time
    assert actor.tick(0).provenance is Provenance.HOLD  # never blocks, never None
    chunk = planner.tick(5)
    assert chunk is not None
    assert (chunk.observation_step, chunk.ready_ns) == (0, 41)
    assert actor.tick(40).provenance is Provenance.HOLD  # not ready yet
    command = actor.tick(41)
    # Two steps went by, in which nothing was consumed: the chunk is entered where the arm is.
    assert (command.provenance, command.row, actor.delays) == (Provenance.EXACT, 0, [2])
    for now_ns in (50, 60, 70):
        assert not actor.look(now_ns)
        actor.tick(now_ns)
    assert actor.look(80)  # four actions of the chunk lie behind


def test_a_planner_answers_no_observation_of_the_future():
    planner = Planner(make_policy(VirtualClock()))
    actor = Actor(ToyRobot(), planner, ChunkBuffer(SPACE, 4), 4, 1000)
    actor.reset(0, 0)
    actor.look(100)
    assert planner.tick(99) is None
    assert planner.tick(100) is not None


def test_a_robot_that_counts_its_steps_otherwise_is_refused():
    class Off(ToyRobot):
        def observe(self, now_ns):
            seen = super().observe(now_ns)
            return Observation(seen.images, seen.state, seen.instruction, now_ns, seen.step + 1)

    with pytest.raises(Exception, match="control steps since the reset"):
        episode(robot=Off())
