"""Latest-only slots: what is used, what is skipped and counted, and that a reader wakes up."""

import threading

import numpy as np
import pytest

from vla_spec.errors import BadConfig
from vla_spec.nodes._observation_slots import ObservationSlots

MS = 1_000_000


def picture(value):
    return np.full((2, 2, 3), value, np.uint8)


def filled(stamps=(100, 104), state=102):
    slots = ObservationSlots(len(stamps), max_age_ns=50 * MS, max_skew_ns=10 * MS)
    for camera, stamp in enumerate(stamps):
        slots.put_image(camera, picture(camera), stamp * MS)
    slots.put_state(np.ones(3, np.float32), state * MS)
    slots.put_instruction("open")
    return slots


def test_an_observation_has_the_stamp_of_its_oldest_picture():
    seen = filled().look(120 * MS, 0, step=7)
    assert (seen.stamp_ns, seen.step, seen.instruction) == (100 * MS, 7, "open")
    assert seen.images.shape == (2, 2, 2, 3)
    assert seen.images[1].max() == 1


@pytest.mark.parametrize("missing", ["image", "state", "instruction"])
def test_nothing_is_made_up(missing):
    slots = ObservationSlots(1, 50 * MS, 10 * MS)
    if missing != "image":
        slots.put_image(0, picture(0), 100 * MS)
    if missing != "state":
        slots.put_state(np.ones(3, np.float32), 100 * MS)
    if missing != "instruction":
        slots.put_instruction("open")
    assert slots.look(110 * MS, 0, 0) is None
    assert slots.counts.num_stale == slots.counts.num_skewed == 0


def test_old_and_far_apart_are_counted():
    slots = filled()
    assert slots.look(150 * MS, 0, 0) is not None
    assert slots.look(150 * MS + 1, 0, 0) is None
    assert slots.counts.num_stale == 1
    slots = filled(stamps=(100, 111))
    assert slots.look(112 * MS, 0, 0) is None
    assert slots.counts.num_skewed == 1
    slots = filled(state=60)
    assert slots.look(109 * MS, 0, 0) is None
    assert slots.counts.num_skewed == 1
    assert slots.look(111 * MS, 0, 0) is None
    assert slots.counts.num_stale == 1


def test_the_state_is_the_one_of_the_pictures_moment():
    slots = filled(state=92)
    for stamp in (98, 105, 112):
        slots.put_state(np.full(3, stamp, np.float32), stamp * MS)
    assert slots.look(120 * MS, 0, 0).state.tolist() == [98, 98, 98]


def test_not_yet_due_is_not_counted():
    slots = filled()
    assert slots.look(120 * MS, 101 * MS, 0) is None
    assert slots.counts.num_stale == slots.counts.num_skewed == 0


def test_messages_that_come_out_of_order_replace_nothing():
    slots = filled()
    slots.put_image(0, picture(9), 90 * MS)
    slots.put_state(np.zeros(3, np.float32), 90 * MS)
    seen = slots.look(120 * MS, 0, 0)
    assert seen.images[0].max() == 0
    assert seen.state.tolist() == [1, 1, 1]
    assert slots.counts.num_backwards == 2


def test_clear_forgets_pictures_and_keeps_the_words():
    slots = filled()
    slots.clear()
    assert slots.look(120 * MS, 0, 0) is None
    assert slots.instruction == "open"
    slots.put_image(0, picture(0), 5 * MS)  # time jumped back: older stamps are new
    slots.put_image(1, picture(0), 5 * MS)
    slots.put_state(np.ones(3, np.float32), 5 * MS)
    assert slots.look(6 * MS, 0, 0) is not None


def test_a_waiting_thread_wakes_up_for_each_kind_of_message():
    slots = filled()
    for put in (
        lambda: slots.put_image(0, picture(1), 200 * MS), lambda: slots.put_state(np.ones(3, np.float32), 200 * MS),
        lambda: slots.put_instruction("close"), slots.wake,
    ):  # fmt: skip
        version, woken = slots.wait(-1, 5.0), []
        thread = threading.Thread(target=lambda v=version, w=woken: w.append(slots.wait(v, 5.0)))
        thread.start()
        put()
        thread.join(5.0)
        assert woken == [version + 1]
    assert slots.wait(slots.wait(-1, 0.0), 0.0) == slots.wait(-1, 0.0)  # nothing came: time is up


def test_the_same_words_again_are_no_news():
    slots = filled()
    assert not slots.put_instruction("open")
    assert slots.put_instruction("close")


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_sizes_that_mean_nothing_are_refused(wrong):
    with pytest.raises(BadConfig, match="observation slots"):
        ObservationSlots(*wrong)
