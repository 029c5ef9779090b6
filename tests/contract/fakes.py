"""Small stand-ins for tests: an enumerable target, drafters of every shape, a broken engine, toy parts."""

from __future__ import annotations

import numpy as np

from vla_spec import plugins
from vla_spec.costs import Costs
from vla_spec.interfaces import EngineInfo
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, Plan, Scores, TokenDomain

UNIT = 0.01  # metres per action unit


def toy_domain(vocab_size=256, num_steps=8, num_dofs=4, unit_per_bin=None):
    """Translation in one group per step, the last degree of freedom a switch in a group of its own."""
    num_tokens = num_steps * num_dofs
    position = np.arange(num_tokens)
    is_switch = position % num_dofs == num_dofs - 1
    unit = 2 / vocab_size * UNIT if unit_per_bin is None else unit_per_bin
    return TokenDomain(
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        tokens_per_step=num_dofs,
        group=(position // num_dofs * 2 + is_switch).astype(np.int32),
        never_relaxed=is_switch,
        unit_per_bin=np.where(is_switch, 1.0, unit).astype(np.float32),
    )


def toy_parts(vocab_size=256, num_steps=8, num_dofs=4, seed=0, **more):
    domain = toy_domain(vocab_size, num_steps, num_dofs)
    plugin = plugins.load("tokenizer", "uniform_bins")
    options = plugin.options(vocab_size=vocab_size, low=(-1.0,) * num_dofs, high=(1.0,) * num_dofs, unit=(UNIT,))
    costs = Costs.constant(
        5e6, step={n: 1e6 + 5e4 * n for n in (1, 2, 4, 8, 16, 32)}, draft={0: 0.0, 1: 1e4, 16: 1.6e5}
    )
    return Parts(domain, plugin.build(options, None), costs=costs, seed=seed, **more)


def build(kind, name, parts, **options):
    plugin = plugins.load(kind, name)
    return plugin.build(plugin.options(**options), parts)


def toy_engine(parts, **options):
    return build("engine", "toy", parts, **options)


def toy_inputs(step=0, words=(1, 2), state=(0.1, 0.2)):
    return {
        "step": np.array([step]),
        "words": np.array([words], np.int64),
        "state": np.array([state], np.float32),
    }


def random_tree(rng, k, max_depth=None, max_children=None):
    """Parents of a random tree; siblings, depth and breadth as they fall."""
    parents, depth, children = [], [], {}
    for node in range(k):
        allowed = [
            p
            for p in range(-1, node)
            if (max_depth is None or (depth[p] if p >= 0 else 0) < max_depth)
            and (max_children is None or children.get(p, 0) < max_children)
        ]
        parent = int(rng.choice(allowed))
        children[parent] = children.get(parent, 0) + 1
        parents.append(parent)
        depth.append((depth[parent] if parent >= 0 else 0) + 1)
    return np.array(parents, np.int32)


class TableEngine:
    """A target over few tokens whose distribution after every prefix is a known, random table."""

    def __init__(self, vocab_size, seed, max_step=16, peak=1.0):
        self.vocab_size, self.max_step, self._seed, self._peak = vocab_size, max_step, seed, peak
        self._rows, self._prefix, self._paths = {}, (), []
        self.info = EngineInfo("table", "", "fp32", "numpy", True, True, True)
        self.features = None

    @property
    def length(self):
        return 1 + len(self._prefix)

    def row(self, prefix):
        if prefix not in self._rows:
            rng = np.random.default_rng([self._seed, len(prefix), *prefix])
            self._rows[prefix] = rng.normal(0.0, self._peak, self.vocab_size).astype(np.float32)
        return self._rows[prefix]

    def probs(self, prefix, temperature=1.0):
        logits = self.row(tuple(prefix)).astype(np.float64) / temperature
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def joint(self, num_tokens, temperature=1.0):
        """The exact law of the first tokens, float64 [V, ..., V]."""
        law = np.empty((self.vocab_size,) * num_tokens)
        for outcome in np.ndindex(law.shape):
            law[outcome] = np.prod([self.probs(outcome[:i], temperature)[outcome[i]] for i in range(num_tokens)])
        return law

    def prefill(self, inputs):
        self._prefix = ()
        return Scores(self.row(())[None])

    def step(self, tokens, parents):
        self._paths = []
        for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
            self._paths.append((self._prefix if parent < 0 else self._paths[parent]) + (token,))
        return Scores(np.array([self.row(path) for path in self._paths]))

    def commit(self, path):
        if len(path):
            self._prefix = self._paths[int(path[-1])]


class Scripted:
    """A drafter made of one function ``(prefix, plan, history) -> Draft``."""

    def __init__(self, make):
        self.make, self.history = make, None

    def begin(self, inputs, history):
        self.history = history

    def propose(self, prefix, plan, features):
        return self.make(prefix, plan, self.history)


def tree_drafter(rng, vocab_size, guess=None, error=0.3, spread=2):
    """Random trees around a guess ``prefix -> next token``: mostly right, sometimes off by a few bins or anywhere."""

    def make(prefix, plan, history):
        k = int(rng.integers(0, plan.gamma + 1))
        if not k or not plan.depth:
            return EMPTY_DRAFT
        parents = random_tree(rng, k, plan.depth)
        paths, tokens, used = [], [], {}
        for parent in parents.tolist():
            before = tuple(prefix.tolist()) if parent < 0 else paths[parent]
            token = int(rng.integers(vocab_size)) if guess is None else guess(before)
            if rng.random() < error:
                token = int(np.clip(token + rng.integers(-spread, spread + 1), 0, vocab_size - 1))
            taken = used.setdefault(parent, set())
            while token in taken and len(taken) < vocab_size:  # siblings differ
                token = (token + 1) % vocab_size
            taken.add(token)
            tokens.append(token)
            paths.append((*before, token))
        return Draft(np.array(tokens, np.int32), parents)

    return Scripted(make)


class Stopwatch:
    """A clock that only moves when told to."""

    def __init__(self):
        self.t_ns = 0

    def __call__(self):
        return self.t_ns

    def advance(self, ns):
        self.t_ns += ns


def greedy_path(engine, inputs, num_tokens):
    """Plain autoregressive greedy decoding with nothing of ours but the engine."""
    scores, tokens = engine.prefill(inputs), []
    for _ in range(num_tokens):
        tokens.append(int(scores.logits[-1].argmax()))
        scores = engine.step(np.array(tokens[-1:], np.int32), np.array([-1], np.int32))
        engine.commit(np.zeros(1, np.int32))
    return np.array(tokens, np.int32)


def free_plan(gamma=8, depth=8, top_k=1):
    return Plan(gamma, depth, top_k)
