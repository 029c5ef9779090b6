"""Is this engine the model? Its logits and its tokens beside a reference's, on golden inputs and on observations.

Both engines score the same tokens (the reference's own greedy choices, and a tree of random ones), so one early
disagreement does not spoil what follows; then the engine decodes freely, as it would on a robot. Gates are a file:
metric, what passes, what is still a warning. An engine that claims batch invariance has to show it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vla_spec.engines._model_files import read_golden
from vla_spec.errors import BadConfig
from vla_spec.interfaces import Engine
from vla_spec.progress import Reporter
from vla_spec.types import EngineInputs, Float32, Int32, Observation

FORMAT = 1
#: What passes with which precision, unless a file says otherwise.
THRESHOLDS = Path(__file__).resolve().parent.parent / "calib" / "verify_thresholds.json"
#: What every number of results.json means.
MEANING = {
    "cosine_min": "smallest cosine between a row of logits and the reference's, both less their mean: a softmax does "
    "not see a common offset, which would bring any two rows near 1",
    "cosine_mean": "mean of the same over all rows",
    "difference_max": "largest difference of a logit from the reference's, rows less their mean, in standard "
    "deviations of the reference's logits",
    "token_agreement": "share of rows whose largest logit is the reference's, both fed the reference's tokens",
    "margin_lost_max": "among rows that disagree, the reference's largest distance between its first and second "
    "choice, in standard deviations; null = all agree",
    "free_agreement": "share of equal tokens when the engine decodes the chunk by itself",
    "chunk_agreement": "share of chunks in which all tokens are equal then",
    "batch_agreement": "share of rows whose largest logit is the same whether the engine scores one token a call or "
    "many",
    "batch_difference_max": "largest difference between the two, in standard deviations of the reference's logits",
    "golden_difference_max": "difference_max on the inputs and logits that lie in the model folder",
    "outcome": "fail if any gate fails, else warn if any warns, else pass; an engine that is not batch-invariant and "
    "says so is not failed for it, and no exactness is claimed of it",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """What a metric has to be.

    Attributes:
        good: passes from here on.
        poor: a warning from here on; beyond it, a failure.
        is_at_most: small values are good.
    """

    good: float
    poor: float
    is_at_most: bool

    def judge(self, value: float | None) -> str:
        """Say "pass", "warn" or "fail"; what could not be measured fails."""
        if value is None or not np.isfinite(value):
            return "fail"
        for limit, outcome in ((self.good, "pass"), (self.poor, "warn")):
            if value <= limit if self.is_at_most else value >= limit:
                return outcome
        return "fail"


#: Metric -> small is good.
METRICS = {
    "cosine_min": False,
    "cosine_mean": False,
    "difference_max": True,
    "token_agreement": False,
    "free_agreement": False,
    "chunk_agreement": False,
    "batch_agreement": False,
    "batch_difference_max": True,
    "golden_difference_max": True,
}


def read_thresholds(file: Path, precision: str) -> dict[str, Gate]:
    """Gates of one precision.

    Args:
        file: JSON, precision -> metric -> [passes from, warns from].
        precision: as the engine says; one that the file does not have takes its "other".

    Raises:
        BadConfig: no such file, no such JSON, an unknown metric, or limits in the wrong order.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        chosen = table[precision] if precision in table else table["other"]
        gates = {name: Gate(float(good), float(poor), METRICS[name]) for name, (good, poor) in chosen.items()}
    except OSError as error:
        raise BadConfig(f"thresholds {file}: {error.strerror}; valid: a file like {THRESHOLDS.name}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadConfig(
            f"thresholds {file}: {error!r}; valid: precision (or other) -> metric -> [good, poor], metrics "
            f"{', '.join(METRICS)}"
        ) from error
    for name, gate in gates.items():
        if gate.good < gate.poor if not gate.is_at_most else gate.good > gate.poor:
            raise BadConfig(f"thresholds {file}: {precision} {name} is [{gate.good}, {gate.poor}]; valid: better first")
    if not gates:
        raise BadConfig(f"thresholds {file}: {precision} has no gate; valid: at least one")
    return gates


class Rows(NamedTuple):
    """What one engine says about the same tokens. Arrays are copies."""

    forced: Float32  # [T, V], about tokens 0 .. T - 1, many tokens a call
    single: Float32  # [T, V], the same, one token a call
    tree: Float32  # [n, V], nodes of a tree behind the last row; n = 0 without a tree mask


@dataclass(frozen=True, slots=True)
class Verification:
    """How one engine compares with its reference.

    Attributes:
        metrics: see `MEANING`; None = nothing to measure it on.
        gates: metric -> limits.
        outcomes: metric -> "pass", "warn", "fail".
        num_observations, num_rows: what it was measured on.
        is_batch_invariant: as the engine claims.
    """

    metrics: dict[str, float | None]
    gates: dict[str, Gate]
    outcomes: dict[str, str]
    num_observations: int
    num_rows: int
    is_batch_invariant: bool

    @property
    def outcome(self) -> str:
        """The worst of all."""
        return next((o for o in ("fail", "warn") if o in self.outcomes.values()), "pass")

    def to_json(self) -> dict[str, Any]:
        """Its part of results.json."""
        return {
            "outcome": self.outcome,
            "num_observations": self.num_observations,
            "num_rows": self.num_rows,
            "is_batch_invariant": self.is_batch_invariant,
            "metrics": self.metrics,
            "gates": {
                name: {"good": gate.good, "poor": gate.poor, "outcome": self.outcomes[name]}
                for name, gate in self.gates.items()
            },
        }


def verify(
    engine: Engine, reference: Engine, inputs: Sequence[EngineInputs], num_tokens: int, gates: Mapping[str, Gate],
    golden: Path | None, rng: np.random.Generator, progress: Reporter,
) -> Verification:  # fmt: skip
    """Compare.

    Args:
        engine: under test.
        reference: trusted.
        inputs: of observations, at least one.
        num_tokens: T, tokens of a chunk.
        gates: see `read_thresholds`.
        golden: golden.npz of the model folder, None = not looked at.
        rng: for the trees.
        progress: told about each observation.

    Raises:
        BadModel: golden.npz is missing or has other arrays.
    """
    progress.phase("verifying", len(inputs))
    pairs: list[tuple[Float32, Float32]] = []
    batches: list[tuple[Float32, Float32]] = []
    equal: list[npt.NDArray[np.bool_]] = []
    for one in inputs:
        tokens = greedy(reference, one, num_tokens)
        parents = random_tree(min(reference.max_step, engine.max_step, 12), rng)
        nodes = rng.integers(0, _vocabulary(reference, one), len(parents)).astype(np.int32)
        wanted, got = (score(e, one, tokens, nodes, parents) for e in (reference, engine))
        pairs += [(wanted.single, got.single), (wanted.single, got.forced), (wanted.tree, got.tree)]
        batches.append((got.single, got.forced))
        equal.append(greedy(engine, one, num_tokens) == tokens)
        progress.step()
    spread = float(np.mean([w.std() for w, _ in pairs if len(w)]))
    wanted_rows = np.concatenate([w for w, g in pairs if len(g)])
    rows = np.concatenate([g for _, g in pairs if len(g)])
    metrics: dict[str, float | None] = dict(compare_rows(wanted_rows, rows, spread))
    single, forced = (np.concatenate([b[i] for b in batches]) for i in range(2))
    metrics["free_agreement"] = float(np.mean(np.concatenate(equal)))
    metrics["chunk_agreement"] = float(np.mean([all_of.all() for all_of in equal]))
    metrics["batch_agreement"] = float(np.mean(single.argmax(1) == forced.argmax(1)))
    metrics["batch_difference_max"] = float(np.abs(_centred(single) - _centred(forced)).max()) / spread
    metrics["golden_difference_max"] = None if golden is None else check_golden(engine, golden)
    claims = engine.info.is_batch_invariant
    judged = {
        name: gate
        for name, gate in gates.items()
        if not (name == "golden_difference_max" and golden is None) and (claims or not name.startswith("batch_"))
    }
    outcomes = {name: gate.judge(metrics[name]) for name, gate in judged.items()}
    return Verification(metrics, judged, outcomes, len(inputs), len(rows), claims)


def compare_rows(wanted: Float32, got: Float32, spread: float) -> dict[str, float | None]:
    """Metrics of rows [n, V] against the reference's; not finite numbers give not finite metrics."""
    with np.errstate(invalid="ignore", over="ignore"):
        a, b = _centred(wanted), _centred(got)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = np.where(norms > 0, (a * b).sum(1) / np.maximum(norms, 1e-30), (a == b).all(1))
        differs = wanted.argmax(1) != got.argmax(1)
        two = np.partition(wanted, -2, axis=1)[:, -2:]
        return {
            "cosine_min": float(cosine.min()),
            "cosine_mean": float(cosine.mean()),
            "difference_max": float(np.abs(a - b).max()) / spread,
            "token_agreement": float(1 - differs.mean()),
            "margin_lost_max": float((two[:, 1] - two[:, 0])[differs].max()) / spread if differs.any() else None,
        }


def _centred(rows: Float32) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    return wide - wide.mean(1, keepdims=True)


def greedy(engine: Engine, inputs: EngineInputs, num_tokens: int) -> Int32:
    """The engine's own chunk, one token a call. int32 [num_tokens]."""
    root, start = np.full(1, -1, np.int32), np.zeros(1, np.int32)
    tokens = np.zeros(num_tokens, np.int32)
    tokens[0] = engine.prefill(inputs).logits[-1].argmax()
    for i in range(1, num_tokens):
        tokens[i] = engine.step(tokens[i - 1 : i], root).logits[0].argmax()
        engine.commit(start)
    return tokens


def score(engine: Engine, inputs: EngineInputs, tokens: Int32, nodes: Int32, parents: Int32) -> Rows:
    """Rows about given tokens, in calls of one and in calls as large as the engine takes, and about a tree."""
    singles = [engine.prefill(inputs).logits[-1:].copy()]
    for i in range(len(tokens) - 1):
        singles.append(engine.step(tokens[i : i + 1], np.full(1, -1, np.int32)).logits.copy())
        engine.commit(np.zeros(1, np.int32))
    forced = [engine.prefill(inputs).logits[-1:].copy()]
    size = engine.max_step
    for start in range(0, len(tokens) - 1, size):
        part = tokens[start : min(start + size, len(tokens) - 1)]
        chain = np.arange(-1, len(part) - 1, dtype=np.int32)
        forced.append(engine.step(part, chain).logits.copy())
        engine.commit(chain + 1)
    vocabulary = singles[0].shape[1]
    tree = np.zeros((0, vocabulary), np.float32)
    if engine.info.has_tree_mask and len(nodes):
        engine.prefill(inputs)  # behind the prompt, where a tree of any size has room
        tree = engine.step(nodes, parents).logits.copy()
    return Rows(np.concatenate(forced), np.concatenate(singles), tree)


def random_tree(num_nodes: int, rng: np.random.Generator) -> Int32:
    """Parents of a tree, each before its children; the first node is a root."""
    return np.array([rng.integers(-1, i) if i else -1 for i in range(num_nodes)], np.int32)


def _vocabulary(engine: Engine, inputs: EngineInputs) -> int:
    return int(engine.prefill(inputs).logits.shape[1])


def check_golden(engine: Engine, path: Path) -> float:
    """``difference_max`` on prefill, chain and tree of golden.npz, as far as the engine takes so long steps.

    Raises:
        BadModel: missing, or not such a file.
    """
    golden = read_golden(path)
    steps = [name for name in ("chain", "tree") if len(golden[f"{name}_tokens"]) <= engine.max_step]
    wanted = np.concatenate([golden[f"{name}_logits"] for name in ("prefill", *steps)])
    inputs = {k: v for k, v in golden.items() if not k.endswith(("_logits", "_tokens", "_parents"))}
    got = [engine.prefill(inputs).logits.copy()]
    got += [engine.step(golden[f"{name}_tokens"], golden[f"{name}_parents"]).logits.copy() for name in steps]
    value = compare_rows(wanted, np.concatenate(got), float(wanted.std()))["difference_max"]
    assert value is not None
    return value


def seeded_observations(example: Observation, count: int, rng: np.random.Generator) -> list[Observation]:
    """Variations of a valid observation: pictures of random blocks at several scales, and states around its own."""
    out = []
    for step in range(count):
        cameras, height, width, channels = example.images.shape
        picture = np.zeros(example.images.shape, np.float32)
        for size in (2, 8, 32):
            blocks = rng.normal(size=(cameras, -(-height // size), -(-width // size), channels)).astype(np.float32)
            picture += 40 * blocks.repeat(size, 1).repeat(size, 2)[:, :height, :width]
        images = np.clip(picture + 128, 0, 255).astype(np.uint8)
        state = (example.state + 0.1 * rng.normal(size=example.state.shape)).astype(np.float32)
        out.append(Observation(images, state, example.instruction, 0, step))
    return out


def recorded_observations(file: Path, count: int) -> list[Observation]:
    """Evenly spaced observations of a recording, as the robot `replay` reads it.

    Raises:
        BadConfig: no such recording.
    """
    from vla_spec.robots.replay import Options, ReplayRobot

    robot = ReplayRobot(Options(path=str(file)))
    last = robot.num_steps - 1
    out = []
    for step in np.unique(np.linspace(0, last, min(count, last + 1)).astype(int)).tolist():
        robot.step = step
        out.append(robot.observe(0))
    return out


def results_tree(
    verification: Verification, engine: Engine, reference: Engine, model_dir: Path, source: str, environment: Any
) -> dict[str, Any]:  # fmt: skip
    """results.json."""
    return {
        "format": FORMAT,
        "kind": "verify",
        "model": str(model_dir),
        "engine": engine.info._asdict(),
        "reference": reference.info._asdict(),
        "observations": source,
        **verification.to_json(),
        "environment": environment,
        "meaning": MEANING,
    }
