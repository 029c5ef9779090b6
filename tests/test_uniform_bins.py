import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vla_spec.errors import BadConfig, BadObservation
from vla_spec.tokenizers.uniform_bins import Options, UniformBins

bound = st.floats(-1000, 1000, width=32)


@st.composite
def cases(draw):
    num_dofs = draw(st.integers(1, 7))
    low = np.array(draw(st.lists(bound, min_size=num_dofs, max_size=num_dofs)))
    high = low + np.array(draw(st.lists(st.floats(0.01, 100), min_size=num_dofs, max_size=num_dofs)))
    options = Options(draw(st.integers(2, 300)), tuple(low.tolist()), tuple(high.tolist()))
    values = st.floats(-2000, 2000, width=32)
    actions = draw(arrays(np.float32, (draw(st.integers(0, 4)), num_dofs), elements=values))
    return options, actions


@given(cases())
def test_round_trip_is_within_half_a_bin_of_the_clipped_action(case):
    options, actions = case
    tokenizer, low, high = UniformBins(options), np.array(options.low), np.array(options.high)
    tokens = tokenizer.encode(actions)
    assert tokens.dtype == np.int32
    assert ((tokens >= 0) & (tokens < options.vocab_size)).all()
    back = tokenizer.decode(tokens)
    assert back.dtype == np.float32
    half = (high - low) / options.vocab_size / 2
    rounding = np.spacing(np.abs(back)) if back.size else 0.0
    assert (np.abs(back - np.clip(actions, low, high)) <= half * (1 + 1e-6) + rounding).all()


@given(cases())
def test_clipping_is_idempotent(case):
    options, actions = case
    tokenizer = UniformBins(options)
    clipped = np.clip(actions.astype(np.float64), options.low, options.high)
    np.testing.assert_array_equal(tokenizer.encode(clipped), tokenizer.encode(actions))


@given(cases(), st.integers(0, 40))
def test_a_started_step_is_left_out(case, m):
    options, actions = case
    tokenizer = UniformBins(options)
    tokens, num_dofs = tokenizer.encode(actions), len(options.low)
    part = tokenizer.decode(tokens[:m])
    assert part.shape == (min(m, len(tokens)) // num_dofs, num_dofs)
    np.testing.assert_array_equal(part, tokenizer.decode(tokens)[: len(part)])


def test_values_are_the_bins_centres_time_major():
    tokenizer = UniformBins(Options(4, (0.0, -8.0), (4.0, 8.0)))
    actions = np.array([[0.0, -8.0], [1.9, 8.0], [4.0, 0.1]], np.float32)
    tokens = tokenizer.encode(actions)
    assert tokens.tolist() == [0, 0, 1, 3, 3, 2]
    np.testing.assert_array_equal(tokenizer.decode(tokens), np.array([[0.5, -6.0], [1.5, 6.0], [3.5, 2.0]], np.float32))


def test_distance_is_in_the_physical_unit_of_the_positions_degree_of_freedom():
    tokenizer = UniformBins(Options(4, (0.0, -8.0), (4.0, 8.0), unit=(0.5, 0.1)))
    token, other = np.array([3, 3, 0]), np.array([1, 1, 0])
    np.testing.assert_allclose(tokenizer.distance(token, other, np.array([0, 1, 2])), [1.0, 0.8, 0.0], rtol=1e-6)
    np.testing.assert_allclose(tokenizer.distance(np.int32(0), np.int32(1), np.array([4, 5])), [0.5, 0.4], rtol=1e-6)


def test_infinite_actions_are_clipped_and_nan_is_refused():
    tokenizer = UniformBins(Options(8, (-1.0,), (1.0,)))
    assert tokenizer.encode(np.array([[-np.inf], [np.inf]], np.float32)).tolist() == [0, 7]
    with pytest.raises(BadObservation, match="actions is NaN"):
        tokenizer.encode(np.array([[np.nan]], np.float32))


def test_a_wrong_number_of_degrees_of_freedom_is_refused():
    with pytest.raises(BadObservation, match=r"valid: \[H, 4\]"):
        UniformBins(Options()).encode(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "vocab_size"),
        ({"low": (0.0,)}, "one number per degree of freedom"),
        ({"low": (1.0,) * 4}, "below high"),
        ({"low": (float("nan"),) * 4}, "below high"),
        ({"unit": (1.0, 1.0)}, "unit needs 1 or 4"),
        ({"unit": (0.0,)}, "positive"),
    ],
)
def test_bad_options_say_what_is_valid(options, message):
    with pytest.raises(BadConfig, match=message):
        Options(**options)
