"""Which engine for CPUs: latency by number of rows, distance from PyTorch, batch invariance, time of a whole chunk.

    python benchmarks/cpu_engines.py [--model models/metaworld] [--cycles 150] [--out runs/cpu-engines]

All engines are held in memory and take turns. In each cycle an engine runs a prefill and chains of 1, 2, 4, ... rows
behind it, each of them twice, and the second one is timed: as on a robot, where one engine runs again and again. Then
all of them score the same tokens and random trees of recorded observations, and decode chunks in three modes. int8
needs a quantised decoder in the model folder (`vla-spec quantize`) and is left out without it. Written: results.json
and table.md.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vla_spec.assemble import Assembler, Assembly
from vla_spec.comparison import Sample, compare, make_samples
from vla_spec.config import merge, read_mode, resolve
from vla_spec.engines.verify import greedy, random_tree, score
from vla_spec.errors import BadModel, MissingDependency, SlowPath
from vla_spec.evaluation import first_observation, record, task_names
from vla_spec.interfaces import Engine
from vla_spec.profiling.planning import quiet
from vla_spec.progress import Silent
from vla_spec.results import environment
from vla_spec.trace import write_json
from vla_spec.types import EngineInputs

#: Label -> engine as a configuration names it. The first one is the reference.
ENGINES: dict[str, dict[str, Any]] = {
    "PyTorch fp32": {"name": "pytorch"},
    "ONNX Runtime fp32": {"name": "onnxruntime"},
    "ONNX Runtime int8": {"name": "onnxruntime", "precision": "int8"},
    "OpenVINO fp32": {"name": "openvino"},
    "OpenVINO fp32, one graph": {"name": "openvino", "sizes": []},
    "OpenVINO bf16": {"name": "openvino", "precision": "bf16"},
    "OpenVINO int8": {"name": "openvino", "precision": "int8"},
}
REFERENCE, COMPARED_TO = "PyTorch fp32", "ONNX Runtime fp32"
ROWS = (1, 2, 4, 8, 16, 32)
MODES = ("autoregressive", "exact", "relaxed")
WARMUP_CYCLES = 10
TREE_ROWS = 12
MEANING = {
    "latency_ms": "prefill and chains of k rows behind it: p50 and p99 of n timed calls, each behind an untimed one",
    "per_row": "p50 of k rows over p50 of one row, by the same engine",
    "of_onnxruntime": f"p50 over that of {COMPARED_TO}",
    "difference_max": "largest difference of a logit from the reference's: prefill, a chunk one token at a time, the "
    "same in one call, and a random tree, on every observation; both engines are fed the reference's tokens",
    "difference_sd": "the same in standard deviations of the reference's logits",
    "token_agreement": "share of these rows whose largest logit is the reference's",
    "batch_difference_max": "largest difference between a chunk one token at a time and in one call, same engine",
    "batch_agreement": "share of these rows whose largest logit is the same",
    "free_agreement": "share of tokens that equal the reference's when both decode by themselves",
    "chunk_ms": "time of a plan, observation to actions, without a deadline: p50 and p99",
    "equals_own_autoregression": "share of tokens that equal autoregressive decoding on the same engine",
    "load_s": "opening the engine, golden inputs included",
    "resident_mib": "growth of the process's resident memory by that",
}


class Ready(NamedTuple):
    """An engine with its modes."""

    label: str
    engine: Engine
    assemblies: list[Assembly]
    load_s: float
    resident_mib: float


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=Path("models/metaworld"))
    arguments.add_argument("--cycles", type=int, default=150)
    arguments.add_argument("--observations", type=int, default=200)
    arguments.add_argument("--chunks", type=int, default=60)
    arguments.add_argument("--seed-start", type=int, default=20_000)
    arguments.add_argument("--out", type=Path, default=Path("runs/cpu-engines"))
    asked = arguments.parse_args()

    assembler, now_ns = Assembler(), _now_ns()
    base = {"model": str(asked.model), "runtime": {"clock": "lockstep"}}
    config = resolve(merge(read_mode("autoregressive")[1], base), "autoregressive")
    tasks = task_names(config.robot, None)
    first = first_observation(assembler, config.robot, tasks[0], asked.seed_start)
    ready, left_out = [], {}
    for label, engine in ENGINES.items():
        try:
            ready.append(build(assembler, {**base, "engine": engine}, label, first, now_ns))
        except (BadModel, MissingDependency, SlowPath) as error:
            left_out[label] = str(error)
    for label, why in left_out.items():
        print(f"left out: {label}: {why}")
    by_label = {one.label: one for one in ready}

    recorder = by_label[COMPARED_TO].assemblies[0]
    seeds = range(asked.seed_start, asked.seed_start + 50)
    recordings = record(assembler, recorder, tasks, seeds, 200, asked.observations, Silent())
    samples = make_samples(recorder, recordings, asked.observations)
    encoded = [recorder.adapter.encode(sample.observation) for sample in samples]
    num_tokens = recorder.domain.num_tokens

    with quiet():
        latency = measure_latency(ready, encoded[0], asked.cycles, now_ns)
    likeness = measure_likeness(ready, encoded, num_tokens)
    with quiet():
        chunks = measure_chunks(ready, samples[:: max(1, len(samples) // asked.chunks)][: asked.chunks])
    results = {
        one.label: {
            "engine": ENGINES[one.label],
            "provider": one.engine.info.provider,
            "is_batch_invariant": one.engine.info.is_batch_invariant,
            "load_s": one.load_s,
            "resident_mib": one.resident_mib,
            "latency_ms": latency[one.label],
            "per_row": {k: timing["p50"] / latency[one.label]["1"]["p50"] for k, timing in latency[one.label].items()},
            "of_onnxruntime": {
                k: timing["p50"] / latency[COMPARED_TO][k]["p50"] for k, timing in latency[one.label].items()
            },
            **likeness[one.label],
            "modes": chunks[one.label],
        }
        for one in ready
    }
    table = write_table(results)
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(
        asked.out / "results.json",
        {
            "what": "engines on the CPU",
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "machine": environment(config.num_threads),
            "model_hash": recorder.engine.info.model_hash,
            "num_threads": config.num_threads,
            "cycles": asked.cycles,
            "warmup_cycles": WARMUP_CYCLES,
            "observations": len(samples),
            "tasks": [task or config.robot.name for task in tasks],
            "meaning": MEANING,
            "left_out": left_out,
            "engines": results,
        },
    )
    (asked.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


def build(assembler: Assembler, base: dict[str, Any], label: str, first: Any, now_ns: Callable[[], int]) -> Ready:
    """One engine in all modes; they share it."""
    before, start = _resident_mib(), now_ns()
    assemblies = []
    load_s = resident = 0.0
    for mode in MODES:
        config = resolve(merge(read_mode(mode)[1], base), mode)
        if not assemblies:
            assembler.engine(config, _parts(assembler, config))
            load_s, resident = (now_ns() - start) / 1e9, _resident_mib() - before
        assemblies.append(assembler.assemble(config, first))
    return Ready(label, assemblies[0].engine, assemblies, load_s, resident)


def measure_latency(
    ready: list[Ready], inputs: EngineInputs, num_cycles: int, now_ns: Callable[[], int]
) -> dict[str, dict[str, dict[str, float]]]:
    """Label -> "prefill" or number of rows -> p50, p99, n [ms]."""
    tokens = np.random.default_rng(0).integers(0, 200, max(ROWS)).astype(np.int32)
    chain = np.arange(-1, max(ROWS) - 1, dtype=np.int32)
    taken: dict[str, dict[str, list[int]]] = {one.label: {"prefill": [], **{str(k): [] for k in ROWS}} for one in ready}
    for cycle in range(WARMUP_CYCLES + num_cycles):
        turn = cycle % len(ready)
        for one in (*ready[turn:], *ready[:turn]):
            engine = one.engine
            calls: dict[str, Callable[[], object]] = {"prefill": lambda e=engine: e.prefill(inputs)}  # type: ignore[misc]
            for k in ROWS:
                calls[str(k)] = lambda e=engine, k=k: e.step(tokens[:k], chain[:k])  # type: ignore[misc]
            for name, call in calls.items():
                call()
                start = now_ns()
                call()
                taken[one.label][name].append(now_ns() - start)
    out: dict[str, dict[str, dict[str, float]]] = {}
    for label, of_label in taken.items():
        out[label] = {}
        for name, ns in of_label.items():
            ms = np.array(ns[WARMUP_CYCLES:]) / 1e6
            out[label][name] = {"p50": float(np.median(ms)), "p99": float(np.quantile(ms, 0.99)), "n": len(ms)}
    return out


def measure_likeness(ready: list[Ready], encoded: list[EngineInputs], num_tokens: int) -> dict[str, dict[str, Any]]:
    """How near each engine is to the reference, and to itself with another number of rows."""
    reference = ready[0].engine
    assert ready[0].label == REFERENCE
    rows: dict[str, list[np.ndarray]] = {one.label: [] for one in ready}
    batch: dict[str, list[np.ndarray]] = {one.label: [] for one in ready}
    same_batch: dict[str, list[np.ndarray]] = {one.label: [] for one in ready}
    free: dict[str, list[np.ndarray]] = {one.label: [] for one in ready}
    for i, inputs in enumerate(encoded):
        rng = np.random.default_rng(i)
        tokens = greedy(reference, inputs, num_tokens)
        parents = random_tree(TREE_ROWS, rng)
        nodes = rng.integers(0, 256, TREE_ROWS).astype(np.int32)
        for one in ready:
            found = score(one.engine, inputs, tokens, nodes, parents)
            rows[one.label].append(np.concatenate([found.single, found.forced, found.tree]))
            batch[one.label].append(np.abs(found.single - found.forced).max(1))
            same_batch[one.label].append(found.single.argmax(1) == found.forced.argmax(1))
            free[one.label].append(greedy(one.engine, inputs, num_tokens) == tokens)
    wanted = np.concatenate(rows[REFERENCE])
    out = {}
    for label in rows:
        found = np.concatenate(rows[label])
        worst = float(np.abs(found - wanted).max())
        out[label] = {
            "rows_compared": len(found),
            "difference_max": worst,
            "difference_sd": worst / float(wanted.std()),
            "token_agreement": float(np.mean(found.argmax(1) == wanted.argmax(1))),
            "batch_difference_max": float(np.concatenate(batch[label]).max()),
            "batch_agreement": float(np.concatenate(same_batch[label]).mean()),
            "free_agreement": float(np.concatenate(free[label]).mean()),
        }
    return out


def measure_chunks(ready: list[Ready], samples: list[Sample]) -> dict[str, dict[str, dict[str, float]]]:
    """Label -> mode -> time of a plan, and how much of it is what the same engine says one token at a time."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for one in ready:
        compared = compare(one.assemblies, one.assemblies[0], samples, 2, Silent())
        out[one.label] = {}
        for mode, comparison in compared.items():
            ms = np.array([plan.plan_ns for plan in comparison.plans]) / 1e6
            out[one.label][mode] = {
                "p50": float(np.median(ms)),
                "p99": float(np.quantile(ms, 0.99)),
                "n": len(ms),
                "equals_own_autoregression": comparison.token_agreement,
            }
    return out


def write_table(results: dict[str, Any]) -> str:
    """Three tables in Markdown."""
    heads = ["prefill", *map(str, ROWS)]
    lines = [f"| ms, p50 (p99) | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label, one in results.items():
        cells = [f"{one['latency_ms'][head]['p50']:.2f} ({one['latency_ms'][head]['p99']:.1f})" for head in heads]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", f"| of {COMPARED_TO} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label, one in results.items():
        cells = [f"{one['of_onnxruntime'][head]:.2f}" for head in heads]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "| | 8 rows of 1 | from PyTorch | tokens | by itself | batch | tokens | load s | MiB |",
        "|---" * 9 + "|",
    ]
    for label, one in results.items():
        lines.append(
            f"| {label} | {one['per_row']['8']:.2f} | {one['difference_max']:.1e} | {one['token_agreement']:.4f} | "
            f"{one['free_agreement']:.4f} | {one['batch_difference_max']:.1e} | {one['batch_agreement']:.4f} | "
            f"{one['load_s']:.1f} | {one['resident_mib']:.0f} |"
        )
    lines += ["", f"| chunk ms, p50 (p99) | {' | '.join(MODES)} | exact equals |", "|---" * 5 + "|"]
    for label, one in results.items():
        cells = [f"{one['modes'][mode]['p50']:.1f} ({one['modes'][mode]['p99']:.0f})" for mode in MODES]
        exact = one["modes"]["exact"]["equals_own_autoregression"]
        lines.append(f"| {label} | {' | '.join(cells)} | {exact:.4f} |")
    return "\n".join(lines) + "\n"


def _parts(assembler: Assembler, config: Any) -> Any:
    from vla_spec.plugins import Parts

    adapter = assembler.adapter(config)
    return Parts(
        adapter.domain, adapter.tokenizer, assembler.model_dir(config), None, None, config.num_threads, config.seed
    )


def _now_ns() -> Callable[[], int]:
    from vla_spec.clock import MonotonicClock

    return MonotonicClock().now_ns


def _resident_mib() -> float:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
