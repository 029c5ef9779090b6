"""What every drafter promises, whatever prefix and plan it is given: a valid tree of valid tokens within the plan."""

import numpy as np
import pytest

from vla_spec.interfaces import ChunkHistory, Drafter, ScoreObserver
from vla_spec.types import Draft, Plan

PLANS = [Plan(1, 1), Plan(4, 4), Plan(8, 3), Plan(3, 8), Plan(31, 31), Plan(12, 4, 3), Plan(31, 4, 8)]


def feed(built, prefix, which=0):
    """Bring the target to where the decoder would have it: all but the last token committed."""
    target = built.target
    target.prefill(built.inputs[which])
    for token in prefix[:-1].tolist():
        target.step(np.array([token], np.int32), np.array([-1], np.int32))
        target.commit(np.zeros(1, np.int32))
    return target.features


def check(draft, plan, domain):
    assert isinstance(draft, Draft)
    k = len(draft.tokens)
    assert k == len(draft.parents) <= plan.gamma
    assert np.asarray(draft.tokens).dtype == np.int32
    assert np.asarray(draft.parents).dtype == np.int32
    depth, children = [], {}
    for node, parent in enumerate(draft.parents.tolist()):
        assert -1 <= parent < node
        depth.append(depth[parent] + 1 if parent >= 0 else 1)
        children[parent] = children.get(parent, 0) + 1
    assert max(depth, default=0) <= plan.depth
    assert max(children.values(), default=0) <= max(plan.top_k, 1)
    assert ((draft.tokens >= 0) & (draft.tokens < domain.vocab_size)).all()
    if draft.probs is not None and k:
        assert draft.probs.shape == (k, domain.vocab_size)
        np.testing.assert_allclose(draft.probs.sum(1), 1.0, atol=1e-4)
        assert (draft.probs[np.arange(k), draft.tokens] > 0).all()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def history(drafter, rng):
    domain = drafter.parts.domain
    tokens = rng.integers(0, domain.vocab_size, domain.num_tokens).astype(np.int32)
    return ChunkHistory(tokens, 2 * domain.tokens_per_step)


def test_has_the_interface(drafter):
    assert isinstance(drafter.thing, Drafter)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("has_history", [False, True])
def test_any_prefix_and_plan_give_a_valid_tree(drafter, history, rng, plan, has_history):
    domain = drafter.parts.domain
    drafter.thing.begin(drafter.inputs[0], history if has_history else None)
    for m in (1, 2, 3, domain.tokens_per_step, domain.num_tokens // 2, domain.num_tokens - 2, domain.num_tokens - 1):
        prefix = rng.integers(0, domain.vocab_size, m).astype(np.int32)
        check(drafter.thing.propose(prefix, plan, feed(drafter, prefix)), plan, domain)


def test_it_follows_any_jump_of_the_prefix(drafter, history, rng):
    """Longer, shorter and altogether different prefixes within one chunk: there is no state to get out of step."""
    domain, plan = drafter.parts.domain, Plan(6, 6)
    drafter.thing.begin(drafter.inputs[0], history)
    base = rng.integers(0, domain.vocab_size, domain.num_tokens).astype(np.int32)
    other = rng.integers(0, domain.vocab_size, domain.num_tokens).astype(np.int32)
    for prefix in (base[:3], base[:9], base[:4], other[:7], base[:7], other[:1], base[:1]):
        check(drafter.thing.propose(prefix, plan, feed(drafter, prefix)), plan, domain)


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("consumed", [0, 2, 1000])
def test_a_short_or_used_up_history_does_no_harm(drafter, rng, size, consumed):
    domain, plan = drafter.parts.domain, Plan(8, 8)
    history = ChunkHistory(rng.integers(0, domain.vocab_size, size).astype(np.int32), consumed)
    drafter.thing.begin(drafter.inputs[0], history)
    for m in (1, 2, 5):
        prefix = rng.integers(0, domain.vocab_size, m).astype(np.int32)
        check(drafter.thing.propose(prefix, plan, feed(drafter, prefix)), plan, domain)


def test_a_new_chunk_forgets_the_last_one(drafter, history, rng):
    domain, plan = drafter.parts.domain, Plan(8, 8)
    prefix = rng.integers(0, domain.vocab_size, 5).astype(np.int32)

    def fresh():
        drafter.thing.begin(drafter.inputs[0], None)
        return drafter.thing.propose(prefix, plan, feed(drafter, prefix))

    first = fresh()
    first = Draft(first.tokens.copy(), first.parents.copy())
    drafter.thing.begin(drafter.inputs[1], history)
    longer = rng.integers(0, domain.vocab_size, 12).astype(np.int32)
    drafter.thing.propose(longer, plan, feed(drafter, longer, which=1))
    again = fresh()
    if first.probs is None and again.probs is None:  # chosen, not drawn: nothing else may differ
        np.testing.assert_array_equal(again.tokens, first.tokens)
        np.testing.assert_array_equal(again.parents, first.parents)


def test_it_leaves_prefix_and_history_as_they_are(drafter, history, rng):
    domain = drafter.parts.domain
    prefix = rng.integers(0, domain.vocab_size, 6).astype(np.int32)
    copies = prefix.copy(), history.tokens.copy()
    drafter.thing.begin(drafter.inputs[0], history)
    features = feed(drafter, prefix)
    draft = drafter.thing.propose(prefix, Plan(8, 8), features)
    if isinstance(drafter.thing, ScoreObserver) and len(draft.tokens):
        tokens = np.concatenate((prefix[-1:], draft.tokens)).astype(np.int32)
        parents = np.concatenate(([-1], draft.parents + 1)).astype(np.int32)
        drafter.thing.observe(draft, drafter.target.step(tokens, parents))
    drafter.thing.propose(prefix[:3], Plan(8, 8), feed(drafter, prefix[:3]))
    np.testing.assert_array_equal(prefix, copies[0])
    np.testing.assert_array_equal(history.tokens, copies[1])
