"""What every fault promises: it strikes by default, repeats from its seed, keeps no state and changes nothing given."""

import dataclasses
import json

import numpy as np
import pytest

from contract import fakes
from vla_spec import plugins
from vla_spec.config import as_options, build_options
from vla_spec.errors import BadConfig
from vla_spec.injection import Call, CallKind, Fault
from vla_spec.types import Draft, Observation, Scores

NAMES = plugins.names("fault")
NUM_PLANS = 1500
SENTENCES = ("go to the goal", "the goal to go", "to go the goal")


def build(name, seed=0, **values):
    plugin = plugins.load("fault", name)
    return plugin.build(plugin.options(**values), fakes.toy_parts(seed=seed))


def observation(plan):
    images = np.full((3, 16, 16, 3), plan % 251, np.uint8)
    return Observation(images, np.full(4, 0.1, np.float32), SENTENCES[0], 60_000_000 * plan, 5 * plan)


def text(value):
    """Something that two equal answers have in common, NaN included."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {value.tobytes().hex()[:400]}"
    if isinstance(value, tuple) or dataclasses.is_dataclass(value):
        fields = value if isinstance(value, tuple) else [getattr(value, f.name) for f in dataclasses.fields(value)]
        return "|".join(text(item) for item in fields)
    return repr(value)


def calls(plan):
    yield Call(plan, 0, CallKind.PREFILL, 0)
    for r in range(1, 6):
        yield Call(plan, r, CallKind.DRAFT, 8)
        yield Call(plan, r, CallKind.STEP, 9)
        yield Call(plan, r, CallKind.COMMIT, 0)


def answers(fault, plan, seen):
    """Everything that a fault does to one plan, hook by hook; None where it leaves things alone."""
    out = []
    factor = fault.slowdown(plan)
    out.append(None if factor == 1.0 else factor)
    given = fault.observe(plan, seen[plan], seen[max(0, plan - 8) : plan])
    out.append(None if given is seen[plan] else text(given))
    order = fault.instruction(plan, SENTENCES[0], SENTENCES)
    out.append(None if order == SENTENCES[0] else order)
    scores = Scores(np.zeros((9, 256), np.float32))
    draft = Draft.chain(np.arange(8, dtype=np.int32))
    for call in calls(plan):
        try:
            fault.before(call)
        except Exception as error:
            out.append(repr(error))
        if call.kind in (CallKind.PREFILL, CallKind.STEP):
            said = fault.scores(call, scores)
            out.append(None if said is scores else text(said.logits))
        if call.kind is CallKind.DRAFT:
            proposed = fault.draft(call, draft)
            out.append(None if proposed is draft else text(proposed))
        if call.kind is not CallKind.COMMIT:
            ns = fault.call_ns(call, 2e6)
            assert np.isfinite(ns)
            assert ns > 0
            out.append(None if ns == 2e6 else ns)
    return out


@pytest.fixture(scope="module")
def seen():
    return [observation(plan) for plan in range(NUM_PLANS)]


def struck(fault, seen):
    found = {plan: answers(fault, plan, seen) for plan in range(NUM_PLANS)}
    return {plan: of_plan for plan, of_plan in found.items() if any(x is not None for x in of_plan)}


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def by_plan(name, seen):
    return struck(build(name), seen)


def test_it_strikes_by_default_and_says_what_it_is(name, by_plan):
    assert by_plan
    fault = build(name)
    assert isinstance(fault, Fault)
    assert fault.fired == 0


def test_the_same_seed_repeats_it_in_any_order(name, by_plan, seen):
    again = build(name)
    for plan in list(by_plan)[:50][::-1]:
        assert answers(again, plan, seen) == by_plan[plan]
        assert answers(again, plan, seen) == by_plan[plan]


def test_another_seed_strikes_elsewhere(name, by_plan, seen):
    other = build(name, seed=1)
    if name == "constant_latency":
        pytest.skip("it strikes everywhere and draws nothing")
    assert any(answers(other, plan, seen) != by_plan.get(plan) for plan in range(200))


def test_what_is_handed_in_is_never_changed(name, by_plan, seen):
    plan = next(iter(by_plan))
    before = [text(o) for o in seen[max(0, plan - 8) : plan + 1]]
    answers(build(name), plan, seen)
    assert [text(o) for o in seen[max(0, plan - 8) : plan + 1]] == before


def test_options_are_plain_values_and_bad_ones_are_refused(name):
    plugin = plugins.load("fault", name)
    values = as_options(plugin.options())
    assert build_options(plugin.options, json.loads(json.dumps(values)), name) == plugin.options()
    for field in dataclasses.fields(plugin.options):
        with pytest.raises(BadConfig, match=field.name):
            plugin.options(**{field.name: -1})


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(plugins.load("fault", n).options(), "probability")])
def test_with_probability_zero_it_never_strikes(name, seen):
    fault = build(name, probability=0.0)
    assert all(x is None for plan in range(100) for x in answers(fault, plan, seen))


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(plugins.load("fault", n).options(), "most_rounds")])
def test_with_probability_one_it_strikes_every_plan_just_once(name, seen):
    fault = build(name, probability=1.0)
    for plan in range(50):
        assert sum(x is not None for x in answers(fault, plan, seen)) == 1
