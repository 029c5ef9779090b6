"""The planning thread's looks, on clocks that a test sets: when a plan is due, its deadline, what begins anew."""

import json

import numpy as np
import pytest

from vla_spec.assemble import Assembler
from vla_spec.config import resolve
from vla_spec.errors import BadObservation
from vla_spec.nodes._clock_watch import ClockWatch
from vla_spec.nodes._follow import Follow, read_goal
from vla_spec.nodes._observation_slots import ObservationSlots
from vla_spec.nodes._plan_loop import PlanLoop
from vla_spec.robots.toy import ToyRobot
from vla_spec.types import Provenance, Rung

MS = 1_000_000
DT_NS = 12_500_000
TREE = {"engine": "toy", "rule": "greedy", "drafter": "none", "controller": "fixed"}


class World:
    """A toy policy behind a `PlanLoop`, with a date and a steady clock to set, and what each plan was asked."""

    def __init__(self, execute_horizon=4):
        self.date_ns, self.steady_ns = 10**18, 5 * 10**9
        self.slots = ObservationSlots(3, 200 * MS, 20 * MS)
        self.loop = PlanLoop(self.slots, lambda: self.date_ns, lambda: self.steady_ns, 0.0125, execute_horizon)
        assembler = Assembler()
        config = resolve(TREE, "toy")
        self.assembly = assembler.assemble(config, assembler.adapter(config).example())
        self.robot = ToyRobot()
        self.asked = []
        plan = self.assembly.policy.plan

        def recorded(observation, deadline_ns, history):
            self.asked.append((observation, deadline_ns, history))
            self.during()
            # The policy's own clock is real: what it makes of the deadline is not the matter here.
            return plan(observation, 2**62, history)

        self.assembly.policy.plan = recorded

    def during(self):
        """What happens while a plan is made."""

    def go_on(self, ns):
        self.date_ns += ns
        self.steady_ns += ns

    def show(self, age_ns=0):
        stamp = self.date_ns - age_ns
        for camera, pixels in enumerate(self.robot.render()):
            self.slots.put_image(camera, pixels, stamp)
        self.slots.put_state(self.robot.state, stamp)
        return stamp

    def look(self, is_simulated=False):
        return self.loop.look(self.assembly, 60 * MS, is_simulated)


@pytest.fixture
def world():
    made = World()
    made.slots.put_instruction("go")
    return made


def test_a_deadline_counts_from_the_picture(world):
    world.show(age_ns=25 * MS)
    planned = world.look()
    assert planned.chunk.rung is Rung.EXACT
    observation, deadline_ns, history = world.asked[0]
    assert deadline_ns == world.steady_ns + 60 * MS - 25 * MS
    assert (observation.step, history) == (0, None)
    np.testing.assert_array_equal(planned.state, world.robot.state)
    world.go_on(DT_NS * 4)
    world.show(age_ns=-3 * MS)  # a camera whose clock is a little ahead: not more time than there is
    world.look()
    assert world.asked[1][1] == world.steady_ns + 60 * MS


def test_the_next_plan_is_due_after_the_horizon_and_knows_how_much_was_played(world):
    world.show()
    first = world.look().chunk
    for _ in range(3):
        world.go_on(DT_NS)
        world.show()
        assert world.look() is None
    world.go_on(DT_NS)
    world.show()
    second = world.look().chunk
    observation, _, history = world.asked[1]
    assert observation.step == 4
    assert history.consumed == 4 * 4
    np.testing.assert_array_equal(history.tokens, first.tokens)
    assert second.observation_stamp_ns - first.observation_stamp_ns == 4 * DT_NS
    assert world.loop.counts["plans"] == 2


def test_other_words_are_planned_for_with_the_next_picture_without_a_past(world):
    world.show()
    world.look()
    world.slots.put_instruction("goal")
    assert world.look() is None  # the same picture: two chunks of one stamp would share their provenance
    world.go_on(DT_NS)
    world.show()
    assert world.look().chunk.instruction == "goal"
    assert world.asked[1][2] is None


def test_a_plan_that_is_none_is_made_anew_with_the_next_picture(world):
    world.slots.put_instruction("wonderful")  # no word of it is known
    world.show()
    assert world.look().chunk.rung is Rung.HOLD
    world.go_on(DT_NS)
    world.show()
    assert world.look().chunk.rung is Rung.HOLD


def test_no_words_are_one_stop_from_what_is_played(world):
    world.show()
    played = world.look().chunk
    world.go_on(2 * DT_NS)
    world.slots.put_instruction("")
    stop = world.look().chunk
    space = world.assembly.policy.space
    assert stop.rung is Rung.STOP
    assert (stop.provenance == Provenance.HOLD).all()
    assert stop.observation_stamp_ns == world.date_ns
    np.testing.assert_array_equal(stop.actions[0], space.stop(played.actions[2], 0, played.actions[1]))
    np.testing.assert_array_equal(stop.actions[-1][:3], 0)
    world.go_on(DT_NS)
    world.show()
    assert world.look() is None
    assert world.loop.counts["stops"] == 1
    world.slots.put_instruction("go")
    assert world.look() is not None


@pytest.mark.parametrize("change_ns", [-3600 * 10**9, 3600 * 10**9, -300 * MS])
def test_a_date_that_is_set_begins_a_new_time(world, change_ns):
    world.show()
    world.look()
    world.go_on(DT_NS * 4)
    world.date_ns += change_ns
    assert world.look() is None
    assert world.loop.counts["clock_jumps"] == 1
    world.show()
    planned = world.look()
    assert planned.chunk.observation_stamp_ns == world.date_ns
    assert world.asked[-1][0].step == 0
    assert world.asked[-1][2] is None


def test_simulated_time_may_run_at_any_speed(world):
    """A deadline is in the world's time: in slow motion the planner has more of ours."""
    world.show()
    world.look(is_simulated=True)
    assert world.asked[-1][1] == world.steady_ns + 60 * MS  # nothing is known of the speed yet
    for rate in (0.5, 4.0):
        world.date_ns += round(rate * 10**9)
        world.steady_ns += 10**9
        world.show(age_ns=20 * MS)
        assert world.look(is_simulated=True) is not None
        assert world.asked[-1][1] == world.steady_ns + round(40 * MS / rate)
    world.steady_ns += 10**9  # paused: the speed before counts
    world.slots.clear()
    assert world.look(is_simulated=True) is None
    world.date_ns += 100 * MS
    world.show()
    world.look(is_simulated=True)
    assert world.asked[-1][1] == world.steady_ns + 15 * MS
    assert world.loop.counts["clock_jumps"] == 0


def test_a_plan_whose_time_is_over_when_it_is_ready_is_discarded(world):
    world.show()
    world.during = world.loop.forget
    assert world.look() is None
    assert world.loop.counts["discarded"] == 1
    assert world.loop.previous is None
    world.during = lambda: None
    assert world.look() is None  # its picture was forgotten, too
    world.show()
    assert world.look().chunk.rung is Rung.EXACT


def test_observations_from_the_future_are_counted_and_not_used(world):
    world.show(age_ns=-(10**9))
    assert world.look() is None
    assert world.slots.counts.num_future == 1
    world.show()  # a second back: the sender's clock was set, and is believed
    assert world.look() is not None
    assert world.slots.counts.num_backwards == 4


def test_pictures_of_different_sizes_are_no_observation(world):
    world.show()
    world.slots.put_image(1, np.zeros((4, 4, 3), np.uint8), world.date_ns)
    assert world.look() is None
    assert world.slots.counts.num_unequal == 1


def test_what_is_missing_is_said_in_words():
    slots = ObservationSlots(2, 200 * MS, 20 * MS)
    assert slots.missing() == ["no picture of camera 0", "no picture of camera 1", "no joint states", "no instruction"]
    assert slots.newest_state is None


def test_a_clock_watch_sees_jumps_and_no_drift():
    watch = ClockWatch()
    date = steady = 0
    for _ in range(100):  # 500 parts per million is as fast as a date is ever slewed
        date, steady = date + 1_000_500 * 100, steady + 1_000_000 * 100
        assert not watch.has_jumped(date, steady)
    assert watch.has_jumped(date + 200 * MS, steady)
    assert not watch.has_jumped(date + 200 * MS, steady)
    assert watch.has_jumped(date, steady)
    watch.forget()
    assert not watch.has_jumped(0, steady)


def test_a_goal_has_its_time():
    follow = Follow()
    assert not follow.is_timeout(10**12)
    follow.start(read_goal('{"goal_id": "g", "instruction": "go", "timeout_s": 2}'), 10**9)
    assert not follow.is_timeout(3 * 10**9 - 1)
    assert follow.is_timeout(3 * 10**9)
    said = json.loads(follow.feedback(2 * 10**9, "EXECUTING", "accepted", rung="EXACT"))
    assert said == {
        "goal_id": "g", "instruction": "go", "status": "EXECUTING", "says": "accepted", "elapsed_s": 1.0,
        "timeout_s": 2.0, "rung": "EXACT",
    }  # fmt: skip
    assert json.loads(follow.end(4 * 10**9, "ABORTED", "timeout"))["elapsed_s"] == 3.0
    assert follow.goal is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "go", "null", "{}", '{"goal_id": "g"}', '{"goal_id": "", "instruction": "go"}',
     '{"goal_id": 1, "instruction": "go"}', '{"goal_id": "g", "instruction": "go", "timeout_s": 0}',
     '{"goal_id": "g", "instruction": "go", "timeout_s": NaN}',
     '{"goal_id": "g", "instruction": "go", "timeout_s": true}',
     "[" * 5000, '{"goal_id": "g", "instruction": "' + "x" * 20000 + '"}'],
)  # fmt: skip
def test_what_is_no_goal_is_refused(text):
    with pytest.raises(BadObservation, match="goal_id"):
        read_goal(text)
