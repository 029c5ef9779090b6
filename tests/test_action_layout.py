"""Actions as joints and back: to the last bit of float32, whatever the kind."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vla_spec.action_space import DofKind
from vla_spec.errors import BadConfig
from vla_spec.nodes._action_layout import ActionLayout

KINDS = (DofKind.DELTA, DofKind.POSITION, DofKind.VELOCITY, DofKind.SWITCH)
LAYOUT = ActionLayout(("a", "b", "c", "grip"), KINDS, (0.01, 0.7, 0.3, 1.0), 0.0125)
NUMBERS = st.floats(-3.0, 3.0, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
ACTIONS = arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(4)), elements=NUMBERS)


@given(ACTIONS, st.none() | st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_there_and_back_is_the_same_number(actions, start):
    positions, velocities = LAYOUT.to_joints(actions, start)
    np.testing.assert_array_equal(LAYOUT.to_actions(positions, velocities), actions)


def test_each_kind_by_hand():
    actions = np.array([[1, 0.5, 2, 1], [-1, 1.0, 2, 0]], np.float32)
    positions, velocities = LAYOUT.to_joints(actions, [0.1, 0.2, 0.3, 0.0])
    np.testing.assert_allclose(positions, [[0.11, 0.35, 0.3075, 1], [0.10, 0.7, 0.315, 0]])
    np.testing.assert_allclose(velocities, [[0.8, 12.0, 0.6, 0], [-0.8, 28.0, 0.6, 0]])
    np.testing.assert_allclose(LAYOUT.times_s(2), [0.0125, 0.025])


def test_without_a_start_a_position_has_no_first_speed():
    _, velocities = LAYOUT.to_joints(np.full((2, 4), 0.5, np.float32))
    assert velocities[0, 1] == velocities[1, 1] == 0


@pytest.mark.parametrize(
    ("joints", "units", "dt_s"),
    [
        ("a", (1.0,) * 4, 0.1),
        ("aabc", (1.0,) * 4, 0.1),
        ("abcd", (1.0, 0.0, 1.0, 1.0), 0.1),
        ("abcd", (1.0,) * 4, 0.0),
        (("a", "b", "c", ""), (1.0,) * 4, 0.1),
    ],
)
def test_what_can_not_be_is_refused(joints, units, dt_s):
    with pytest.raises(BadConfig, match=r"action layout: .* valid: "):
        ActionLayout(tuple(joints), KINDS, units, dt_s)
