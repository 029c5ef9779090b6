"""What every action tokenizer promises, at its default options."""

import numpy as np
import pytest

from vla_spec.interfaces import ActionTokenizer


@pytest.fixture
def actions(tokenizer):
    num_dofs = tokenizer.parts.domain.tokens_per_step
    return np.random.default_rng(0).uniform(-1, 1, (5, num_dofs)).astype(np.float32)


def test_has_the_interface(tokenizer):
    assert isinstance(tokenizer.thing, ActionTokenizer)


def test_tokens_are_int32_within_the_vocabulary(tokenizer, actions):
    tokens = tokenizer.thing.encode(actions * 3)
    assert tokens.dtype == np.int32
    assert ((tokens >= 0) & (tokens < tokenizer.thing.vocab_size)).all()


def test_encoding_what_was_decoded_gives_the_same_tokens(tokenizer, actions):
    tokens = tokenizer.thing.encode(actions * 3)
    decoded = tokenizer.thing.decode(tokens)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(tokenizer.thing.encode(decoded), tokens)


def test_a_prefix_decodes_to_whole_steps_of_the_same_actions(tokenizer, actions):
    tokens = tokenizer.thing.encode(actions)
    whole = tokenizer.thing.decode(tokens)
    for m in range(len(tokens) + 1):
        part = tokenizer.thing.decode(tokens[:m])
        assert part.shape == (m // actions.shape[1], actions.shape[1])
        np.testing.assert_array_equal(part, whole[: len(part)])


def test_distance_is_a_metric_that_broadcasts(tokenizer):
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, tokenizer.thing.vocab_size, (3, 50)).astype(np.int32)
    position = np.arange(50, dtype=np.int32)
    distance = tokenizer.thing.distance
    assert distance(a, b, position).dtype == np.float32
    assert not distance(a, a, position).any()
    assert (distance(a, b, position)[a != b] > 0).all()
    np.testing.assert_array_equal(distance(a, b, position), distance(b, a, position))
    assert (distance(a, c, position) <= distance(a, b, position) + distance(b, c, position) + 1e-6).all()
    assert distance(a[:, None], b[None, :], position[:, None]).shape == (50, 50)
