"""The actor in a process of its own: what crosses the boundary, and what happens when one side dies."""

import dataclasses
import json
import os
import socket
import sys

import numpy as np
import pytest
from fake_policy import DOMAIN, MS, SPACE, A, FakeController, FakeDrafter, FakeEngine, H, T, make_policy

from vla_spec import actor_process
from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.actor_process import MAX_INSTRUCTION_BYTES, ActorLost, ActorProcess, Sizes
from vla_spec.chunks import ChunkOptions, Gap, HandOver
from vla_spec.clock import MonotonicClock, VirtualClock
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.realtime import RealtimeOptions
from vla_spec.runtime import Mode, PlanRequest, RuntimeOptions
from vla_spec.shared_slot import open_memory, size_of, slots_in
from vla_spec.types import ActionChunk, Observation, Provenance, Rung

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="passes descriptors to a child, as POSIX does")

LAYOUT = np.dtype([("number", "<i8"), ("row", "<f4", (3,))])
SIZES = Sizes(T, H, A, A, (3, 16, 16, 3), 4)
RNG = np.random.default_rng(0)


def pair(*layouts):
    """Both ends of shared slots: the writer's and the reader's, each with its own mapping, as in two processes."""
    descriptor = open_memory(size_of(*layouts))
    ends = slots_in(descriptor, *layouts), slots_in(descriptor, *layouts)
    os.close(descriptor)
    return ends


# --- the slot ---


def test_a_record_is_seen_once_and_whole():
    (writer,), (reader,) = pair(LAYOUT)
    assert not reader.poll()
    writer.fields["number"][...], writer.fields["row"][...] = 7, [1, 2, 3]
    assert not reader.poll()  # not published
    writer.publish()
    assert reader.poll()
    assert (int(reader.fields["number"]), reader.fields["row"].tolist()) == (7, [1, 2, 3])
    assert not reader.poll()


def test_the_newest_record_replaces_the_one_before():
    (writer,), (reader,) = pair(LAYOUT)
    for number in (1, 2):
        writer.fields["number"][...] = number
        writer.publish()
    assert reader.poll()
    assert int(reader.fields["number"]) == 2
    writer.publish()
    reader.forget()
    assert not reader.poll()


def test_a_record_in_the_making_is_never_taken():
    """The counter is odd; and where another core shows the counter before the record, the checksum is wrong."""
    (writer,), (reader,) = pair(LAYOUT)
    writer.publish()
    assert reader.poll()
    writer._sequence[...] += 1
    assert not reader.poll()
    writer._shared[:4] = 255
    writer._sequence[...] += 1
    assert not reader.poll()
    writer.fields["number"][...] = 9
    writer.publish()  # the next one is whole
    assert reader.poll()
    assert int(reader.fields["number"]) == 9


def test_slots_of_one_file_do_not_touch():
    (first, second), (_, reader) = pair(LAYOUT, LAYOUT)
    second.fields["number"][...] = 5
    second.publish()
    first.fields["number"][...] = 6
    first.publish()
    assert reader.poll()
    assert int(reader.fields["number"]) == 5


# --- what crosses ---


def observation(instruction="go", shape=(3, 16, 16, 3)):
    return Observation(RNG.integers(0, 255, shape).astype(np.uint8), RNG.random(4, np.float32), instruction, 12345, 17)


@pytest.mark.parametrize("history", [
    None,
    ChunkHistory(np.arange(T, dtype=np.int32), 8, 12, RNG.random((H, A), np.float32)),
    ChunkHistory(np.arange(8, dtype=np.int32), 8),
])  # fmt: skip
def test_a_request_arrives_as_it_was_sent(history):
    (writer, _), (reader, _) = pair(*SIZES.layouts)
    sent = PlanRequest(observation("öffne die Schublade"), 99, history)
    actor_process._write_request(writer, PlanRequest(observation("x"), 1, ChunkHistory(np.ones(T, np.int32), 1)))
    actor_process._write_request(writer, sent)
    assert reader.poll()
    got = actor_process._read_request(reader)
    np.testing.assert_array_equal(got.observation.images, sent.observation.images)
    np.testing.assert_array_equal(got.observation.state, sent.observation.state)
    assert (got.observation.instruction, got.observation.stamp_ns, got.observation.step) == (
        "öffne die Schublade", 12345, 17,
    )  # fmt: skip
    assert got.deadline_ns == 99
    if history is None:
        assert got.history is None
        return
    assert got.history[1:3] == history[1:3]
    np.testing.assert_array_equal(got.history.tokens, history.tokens)
    assert (got.history.actions is None) == (history.actions is None)
    if history.actions is not None:
        np.testing.assert_array_equal(got.history.actions, history.actions)


@pytest.mark.parametrize("seen", [observation("x" * (MAX_INSTRUCTION_BYTES + 1)), observation(shape=(2, 16, 16, 3))])
def test_an_observation_that_does_not_fit_is_a_bad_one_and_no_exception(seen):
    (writer, _), (reader, _) = pair(*SIZES.layouts)
    actor_process._write_request(writer, PlanRequest(seen, 99, None))
    assert reader.poll()
    got = actor_process._read_request(reader).observation
    assert (got.images.size, got.state.size, got.instruction, got.step) == (0, 0, "", 17)


def test_a_chunk_arrives_as_it_was_sent():
    (_, writer), (_, reader) = pair(*SIZES.layouts)
    sent = ActionChunk(
        RNG.random((5, A), np.float32), RNG.integers(0, 4, (5, A)).astype(np.uint8), Rung.DRAFT_TAIL, 3, "go", 1, 2, 3,
        4, 5, np.arange(20, dtype=np.int32), 0.25,
    )  # fmt: skip
    actor_process._write_chunk(writer, sent)
    assert reader.poll()
    got = actor_process._read_chunk(reader)
    for item in dataclasses.fields(ActionChunk):
        np.testing.assert_array_equal(getattr(got, item.name), getattr(sent, item.name))
    assert isinstance(got.rung, Rung)


def test_options_and_space_survive_the_way_there():
    options = RuntimeOptions(
        mode=Mode.REAL_TIME, budget_ns=5, chunks=ChunkOptions(hand_over=HandOver.FROZEN_PREFIX, max_holds=3),
        realtime=RealtimeOptions(actor_cpus=(0, 2)),
    )  # fmt: skip
    ours, theirs = socket.socketpair()
    tree, arrays = {"options": actor_process._options_tree(options)}, {"a": np.arange(6.0).reshape(2, 3)}
    arrays["none"] = np.empty((0, 4), np.int64)
    actor_process._send(ours, tree, arrays)
    got, there = actor_process._receive(theirs)
    assert actor_process._options_of(got["options"]) == options
    np.testing.assert_array_equal(there["a"], arrays["a"])
    assert there["none"].shape == (0, 4)
    space = ActionSpace.from_limits(np.full(3, -0.1), np.full(3, 0.7), [2], DofKind.POSITION, 0.03, 5)
    back = actor_process._space_of(json.loads(json.dumps(actor_process._space_tree(space))))
    for item in dataclasses.fields(ActionSpace):
        np.testing.assert_array_equal(getattr(back, item.name), getattr(space, item.name))
    ours.close()
    with pytest.raises(EOFError):
        actor_process._receive(theirs)
    theirs.close()


# --- the child ---


@pytest.fixture(scope="module")
def actor():
    process = ActorProcess("toy", {}, DOMAIN, SPACE)
    yield process
    process.close()


def planning(prefill_ms=0.0):
    clock = MonotonicClock()
    engine = FakeEngine(clock, prefill_ns=round(prefill_ms * MS))
    clock.advance = lambda ns: clock.sleep_until_ns(clock.now_ns() + ns)
    drafter = FakeDrafter(np.arange(T, dtype=np.int32) + 100)
    return make_policy(clock, engine, drafter, FakeController(gamma=7)), clock


def options(**changes):
    values = dict(mode=Mode.REAL_TIME, max_steps=40, stop_on_success=False, time_scale=4, budget_ns=500 * MS)
    return RuntimeOptions(**{**values, **changes})


def test_an_episode_is_played_from_what_this_process_plans(actor):
    policy, clock = planning(1.0)
    result = actor.run_episode(policy, clock, options(), 3)
    assert result.num_steps == 40
    assert result.counts[Provenance.EXACT] + result.counts[Provenance.HOLD] == 40
    assert result.counts[Provenance.EXACT] > 0
    assert len(result.plans) >= 2
    assert [seen.step for seen in actor.observations] == [plan.observation_step for plan in result.plans]
    played = set(result.chunk_ids[result.chunk_ids >= 0].tolist())
    assert played <= {plan.chunk_id for plan in result.plans}
    assert result.realtime.is_own_process
    assert result.realtime.grants == ()
    assert len(result.realtime.lateness_ns) == 40
    if sys.platform == "linux":
        assert len(result.realtime.actor_usage) == 40
        assert len(result.realtime.planner_usage) == len(result.plans) - 1  # the first plan warms up
    again = actor.run_episode(policy, clock, options(), 3)
    np.testing.assert_array_equal(again.actions[0], result.actions[0])
    assert again.plans[0].chunk_id == result.plans[-1].chunk_id + 1


def test_what_the_child_asked_for_is_in_the_result(actor):
    policy, clock = planning()
    asked = RealtimeOptions(fifo_priority=2, planner_priority=1, lock_memory=False)
    result = actor.run_episode(policy, clock, options(realtime=asked), 3)
    said = {(grant.role, grant.what) for grant in result.realtime.grants}
    assert said >= {
        ("actor", "SCHED_FIFO"),
        ("planner", "SCHED_FIFO"),
        ("actor's process", "frozen garbage collection"),
    }
    assert all(grant.is_granted or grant.reason for grant in result.realtime.grants)


def test_without_a_planner_the_arm_holds(actor):
    result = actor.run_episode(None, MonotonicClock(), options(max_steps=12), 3)
    assert result.num_holds == 12
    assert result.plans == ()
    assert (result.rungs[Rung.HOLD], result.rungs[Rung.STOP]) == (8, 4)
    assert result.gaps[Gap.STARTING] == 12


def test_it_runs_in_real_time_only(actor):
    policy, clock = planning()
    with pytest.raises(BadConfig, match="valid for an actor in its own process: real_time"):
        actor.run_episode(policy, clock, RuntimeOptions(), 3)
    with pytest.raises(BadConfig, match="needs a clock that runs by itself"):
        actor.run_episode(policy, VirtualClock(), options(), 3)


def test_a_robot_that_can_not_be_built_says_so():
    with pytest.raises(ActorLost, match="no robot named 'toi'"):
        ActorProcess("toi", {}, DOMAIN, SPACE)


def test_a_child_that_dies_ends_the_run_with_one_sentence():
    policy, clock = planning()
    process = ActorProcess("toy", {}, DOMAIN, SPACE)
    plan = policy.plan

    def kill(*request):
        os.kill(process.pid, 9)
        return plan(*request)

    policy.plan = kill
    try:
        with pytest.raises(ActorLost, match="the actor's process ended"):
            process.run_episode(policy, clock, options(), 3)
    finally:
        process.close()


def test_closing_in_mid_episode_brings_the_arm_to_rest_before_the_child_ends():
    process = ActorProcess("toy", {}, DOMAIN, SPACE)
    tree = actor_process._options_tree(options(max_steps=100_000, is_first_plan_free=False))
    actor_process._send(process._control, {"do": "episode", "seed": 1, "options": tree})
    process.close()
    assert process._process.returncode == 1  # by itself; a kill would be -9


def test_when_the_planner_dies_the_arm_comes_to_rest():
    """Its end of the wake-up pipe is gone: the child holds, stops, and then says that it did."""
    process = ActorProcess("toy", {}, DOMAIN, SPACE)
    try:
        process._selector.unregister(process._wake)
        os.close(process._wake)
        tree = actor_process._options_tree(options(max_steps=10_000, is_first_plan_free=False))
        actor_process._send(process._control, {"do": "episode", "seed": 1, "options": tree})
        with pytest.raises(ActorLost, match="the arm was brought to rest"):
            process._receive()
    finally:
        process.close()
