"""What every engine promises: a step on a tree is each path alone, commits keep, everything else leaves no trace."""

import numpy as np
import pytest

from contract.fakes import random_tree
from vla_spec.interfaces import Engine

ATOL = 2e-3  # of fp32 logits summed in another order
#: Coarser arithmetic: largest difference, in standard deviations of the logits. On a wrong path through a tree, 95 % of
#: rows differ by more than 0.2 and half of them by more than 4 (small model, 385 rows).
COARSE = 0.15


def start(built, tokens=(), which=0):
    """Prefill and commit tokens one at a time: the reference way."""
    scores = built.thing.prefill(built.inputs[which])
    for token in tokens:
        scores = one(built.thing, token)
        built.thing.commit(np.zeros(1, np.int32))
    return scores.logits[-1].copy()


def one(engine, token):
    return engine.step(np.array([token], np.int32), np.array([-1], np.int32))


def chain(engine, tokens):
    return engine.step(np.array(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32))


def same(engine, found, expected):
    atol = ATOL if engine.thing.info.precision == "fp32" else COARSE * np.std(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.fixture
def tokens(engine):
    return np.random.default_rng(1).integers(0, engine.parts.domain.vocab_size, 12).tolist()


def test_has_the_interface(engine):
    assert isinstance(engine.thing, Engine)
    assert engine.thing.max_step >= 2
    assert all(isinstance(text, str) and text for text in engine.thing.info[:4])


def test_scores_are_float32_rows_over_the_domain(engine, tokens):
    num_bins = engine.parts.domain.vocab_size
    scores = engine.thing.prefill(engine.inputs[0])
    assert scores.logits.shape == (1, num_bins)
    assert scores.logits.dtype == np.float32
    scores = chain(engine.thing, tokens[:3])
    assert scores.logits.shape == (3, num_bins)
    assert scores.logits.dtype == np.float32
    assert np.isfinite(scores.logits).all()


def test_step_of_n_equals_n_steps_of_1(engine, tokens):
    if not engine.thing.info.is_batch_invariant:
        pytest.skip(f"{engine.thing.info.name} does not claim it")
    start(engine)
    together = chain(engine.thing, tokens[:7]).logits.copy()
    for n in range(7):
        same(engine, together[n], start(engine, tokens[: n + 1]))


def test_step_of_n_after_committed_tokens_equals_n_steps_of_1(engine, tokens):
    start(engine, tokens[:4])
    together = chain(engine.thing, tokens[4:9]).logits.copy()
    for n in range(5):
        same(engine, together[n], start(engine, tokens[: 5 + n]))


@pytest.mark.parametrize("seed", range(3))
def test_each_node_of_a_tree_is_its_path_alone(engine, tokens, seed):
    if not engine.thing.info.has_tree_mask:
        pytest.skip(f"{engine.thing.info.name} takes chains only")
    rng = np.random.default_rng(seed)
    k = min(10, engine.thing.max_step)
    parents = random_tree(rng, k)
    nodes = rng.integers(0, engine.parts.domain.vocab_size, k).astype(np.int32)
    start(engine, tokens[:2])
    together = engine.thing.step(nodes, parents).logits.copy()
    for node in range(k):
        path, at = [], node
        while at >= 0:
            path.insert(0, int(nodes[at]))
            at = int(parents[at])
        same(engine, together[node], start(engine, tokens[:2] + path))


def test_commit_then_step_equals_fresh(engine, tokens):
    start(engine, tokens[:1])
    chain(engine.thing, tokens[1:6])
    engine.thing.commit(np.array([0, 1], np.int32))
    same(engine, one(engine.thing, tokens[7]).logits[0], start(engine, [*tokens[:3], tokens[7]]))


def test_commit_of_a_path_with_gaps_equals_fresh(engine, tokens):
    if not engine.thing.info.has_tree_mask:
        pytest.skip(f"{engine.thing.info.name} takes chains only")
    start(engine)
    nodes = np.array(tokens[:6], np.int32)
    engine.thing.step(nodes, np.array([-1, 0, 0, 1, 2, 4], np.int32))
    engine.thing.commit(np.array([0, 2, 4], np.int32))
    found = one(engine.thing, tokens[8]).logits[0].copy()
    same(engine, found, start(engine, [tokens[0], tokens[2], tokens[4], tokens[8]]))


def test_uncommitted_step_leaves_no_trace(engine, tokens):
    start(engine, tokens[:3])
    length = engine.thing.length
    chain(engine.thing, tokens[5:11])
    one(engine.thing, tokens[4])
    assert engine.thing.length == length
    same(engine, one(engine.thing, tokens[3]).logits[0], start(engine, tokens[:4]))


def test_uncommitted_nodes_of_a_committed_step_leave_no_trace(engine, tokens):
    start(engine, tokens[:2])
    chain(engine.thing, tokens[2:8])
    engine.thing.commit(np.array([0], np.int32))
    chain(engine.thing, [tokens[9], tokens[10]])
    engine.thing.commit(np.array([0, 1], np.int32))
    same(
        engine, one(engine.thing, tokens[11]).logits[0], start(engine, [*tokens[:3], tokens[9], tokens[10], tokens[11]])
    )


def test_length_counts_committed_rows(engine, tokens):
    start(engine)
    prompt = engine.thing.length
    assert prompt >= 1
    chain(engine.thing, tokens[:5])
    assert engine.thing.length == prompt
    engine.thing.commit(np.array([0, 1, 2], np.int32))
    assert engine.thing.length == prompt + 3
    engine.thing.prefill(engine.inputs[0])
    assert engine.thing.length == prompt


def test_features_have_one_row_per_committed_token(engine, tokens):
    start(engine)
    if engine.thing.features is None:
        pytest.skip("no features")
    scores = chain(engine.thing, tokens[:4])
    rows = np.array(scores.features)
    assert len(rows) == 4
    engine.thing.commit(np.array([0, 1, 2], np.int32))
    features = np.asarray(engine.thing.features)
    assert features.dtype == np.float32
    assert len(features) == engine.thing.length
    same(engine, features[-3:], rows[:3])


def test_prefill_starts_over(engine, tokens):
    first = start(engine)
    start(engine, tokens[:5], which=1)
    same(engine, start(engine), first)


def test_scores_depend_on_inputs_and_on_every_token_before(engine, tokens):
    assert not np.allclose(start(engine), start(engine, which=1), rtol=0, atol=1e-6)
    expected = start(engine, tokens[:4])
    for changed in range(4):
        other = list(tokens[:4])
        other[changed] = (other[changed] + 1) % engine.parts.domain.vocab_size
        assert not np.allclose(start(engine, other), expected, rtol=0, atol=1e-6), f"{changed=}"


def test_takes_max_step_tokens_and_a_whole_chunk(engine):
    engine_, domain = engine.thing, engine.parts.domain
    start(engine)
    rng = np.random.default_rng(0)
    done = 0
    while done < domain.num_tokens - 1:
        n = min(engine_.max_step, domain.num_tokens - 1 - done)
        assert len(chain(engine_, rng.integers(0, domain.vocab_size, engine_.max_step)).logits) == engine_.max_step
        engine_.commit(np.arange(n, dtype=np.int32))
        done += n
    assert np.isfinite(one(engine_, 0).logits).all()
