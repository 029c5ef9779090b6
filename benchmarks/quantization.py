"""What eight bits cost and give: ranges, number of observations, layers; then whole engines beside each other.

    python benchmarks/quantization.py quality --data data/demonstrations     how many observations, which layers
    python benchmarks/quantization.py engines [--engines onnxruntime:fp32,onnxruntime:int8,...]
    python benchmarks/quantization.py closed-loop [--engines ...] [--episodes 4]

``quality`` calibrates on demonstrations of some seeds and compares on others. ``engines`` times every engine's calls in
turn, then decodes the same recorded observations with every engine, autoregressively, exactly (a chain from the block
head, a tree from the feature head) and relaxed, and counts where exact speculation differs from the same engine's
autoregression. ``closed-loop`` plays whole episodes, engines in turn. An engine that can't be opened is left out and
named. Needs ``vla-spec quantize`` for engines in int8.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.assemble import Assembler, Assembly
from vla_spec.calib.observations import Observations, demonstrated_observations
from vla_spec.calib.quantize import Recipe, Study
from vla_spec.comparison import Sample, make_samples, plan_sample
from vla_spec.config import find_model, merge, read_mode, resolve
from vla_spec.errors import VlaSpecError
from vla_spec.evaluation import Plan, evaluate_assembled, first_observation, record, task_names
from vla_spec.interfaces import Engine
from vla_spec.progress import LiveProgress
from vla_spec.results import environment, percentiles, save
from vla_spec.trace import write_json
from vla_spec.types import EngineInputs

MODES = ("autoregressive", "exact", "eagle2", "relaxed")
EXACT = ("exact", "eagle2")
SIZES = (1, 2, 4, 8, 16, 32)
MM_PER_UNIT = 10.0  # an action of 1 is a centimetre
NUM_TRANSLATIONS = 3
COUNTS = (15, 30, 60, 120, 240)
#: Name -> patterns of weights that stay in floating point.
KEEPS = {
    "nothing": (), "qkv": ("*.qkv.*",), "out": ("*.out.*",), "up": ("*.up.*",), "down": ("*.down.*",),
    "head": ("head.*",), "first layer": ("blocks.0.*",), "last layer": ("blocks.13.*",),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "engines", "closed-loop"))
    parser.add_argument("--model", type=Path, default=Path("models/metaworld"))
    parser.add_argument("--data", type=Path, default=Path("data/demonstrations"))
    parser.add_argument("--engines", default="onnxruntime:fp32,onnxruntime:int8")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--observations", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=100, help="of each timed call")
    parser.add_argument("--episodes", type=int, default=4, help="per task, engine and mode")
    parser.add_argument("--seed-start", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("runs/quantization"))
    asked = parser.parse_args()
    about = {
        "kind": f"quantization_{asked.what}", "command": shlex.join(sys.argv), "environment": environment(1),
        "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
    }  # fmt: skip
    match asked.what:
        case "quality":
            write_json(asked.out / "quality.json", {**about, **quality(asked)})
        case "engines":
            write_json(asked.out / "engines.json", {**about, **engines(asked)})
        case _:
            closed_loop(asked)


def quality(asked: argparse.Namespace) -> dict:
    """Token agreement and divergence against number of observations, tasks, ranges, and layers that are kept."""
    from vla_spec.adapters.vla import load

    model_dir = find_model(asked.model)
    adapter = load(model_dir)
    study = Study(model_dir, adapter.domain.num_tokens)
    with LiveProgress() as progress:
        held = encoded(adapter, demonstrated_observations(asked.data, None, range(60, 90), 120))
        held_tokens = study.tokens_of(held, progress)
        wanted = study.wanted(held, held_tokens)
        rows = []

        def add(name: str, observed, recipe: Recipe) -> None:
            found = study.quality(study.engine(study.calibrate(observed, recipe)), held, held_tokens, wanted)
            rows.append({"case": name, "ranges": recipe.ranges, "keep": list(recipe.keep), **found._asdict()})
            progress.step(f"{name} {recipe.ranges}: {100 * found.token_agreement:.2f} %, {found.divergence:.2e}")

        def observe(seen: Observations):
            inputs = encoded(adapter, seen)
            return study.observe(inputs, study.tokens_of(inputs, progress), progress)

        sets = {str(n): demonstrated_observations(asked.data, None, range(60), n) for n in COUNTS}
        sets["60 of one task"] = demonstrated_observations(asked.data, ("door-open",), range(60), 60)
        for name, seen in sets.items():
            observed = observe(seen)
            progress.phase(f"calibrated on {name}", 4)
            for ranges in ("99.9", "99.99", "max", "mse"):
                add(name, observed, Recipe("int8", ranges))
        progress.phase("layers", len(KEEPS) + 6)
        observed = observe(sets["120"])
        for name, keep in KEEPS.items():
            add(f"kept: {name}", observed, Recipe("int8", "mse", keep=keep))
        for strength in (0.3, 0.5, 0.7):
            add(f"migration {strength}", observed, Recipe("int8", "max", migration=strength))
        for ranges in ("99.99", "max", "mse"):
            add("fp8", observed, Recipe("fp8", ranges))
    table = Table(box=SIMPLE_HEAD, title=f"{rows[0]['num_rows']} held-out tokens", title_justify="left")
    for name in ("case", "ranges", "same token", "divergence [nats]", "largest difference [sd]"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        table.add_row(
            row["case"], row["ranges"], f"{100 * row['token_agreement']:.2f} %", f"{row['divergence']:.2e}",
            f"{row['difference_max']:.3f}",
        )  # fmt: skip
    Console(width=120).print(table)
    return {"rows": rows, "held_out": 120}


def encoded(adapter, seen: Observations) -> list[EngineInputs]:
    """What engines read."""
    return [adapter.encode(one.observation) for one in seen.items]


def assemble(asked: argparse.Namespace, assembler: Assembler) -> tuple[dict[str, dict[str, Assembly]], list[str]]:
    """Engine -> mode -> assembly; engines that can't be opened are named."""
    built: dict[str, dict[str, Assembly]] = {}
    left_out, example = [], None
    for name in asked.engines.split(","):
        plugin, _, precision = name.partition(":")
        tree = {
            "model": str(asked.model),
            "engine": {"name": plugin, "precision": precision or "fp32"},
            "runtime": {"clock": "lockstep"},
        }
        try:
            for mode in asked.modes.split(","):
                config = resolve(merge(read_mode(mode)[1], tree), f"{mode} {name}")
                if example is None:
                    tasks = task_names(config.robot, None)
                    example = first_observation(assembler, config.robot, tasks[0], asked.seed_start)
                built.setdefault(name, {})[mode] = assembler.assemble(config, example)
        except VlaSpecError as error:
            built.pop(name, None)
            left_out.append(f"{name}: {error}")
            print(f"left out: {name}: {error}", file=sys.stderr)
    return built, left_out


def engines(asked: argparse.Namespace) -> dict:
    """Latency of calls, then chunks of recorded observations."""
    assembler = Assembler()
    built, left_out = assemble(asked, assembler)
    reference = next(iter(built.values()))["autoregressive"]
    tasks = task_names(reference.config.robot, None)
    seeds = range(asked.seed_start, asked.seed_start + 1)
    with LiveProgress() as progress:
        recorder = next(iter(built.values()))["exact"]
        recordings = record(assembler, recorder, tasks, seeds, 200, asked.observations, progress)
        samples = make_samples(reference, recordings, asked.observations)
        inputs = [reference.adapter.encode(sample.observation) for sample in samples]
        progress.phase("timing", asked.repeats)
        timed = time_calls({name: modes["exact"].policy.decoder.engine for name, modes in built.items()}, inputs, asked)
        chunks = decode_all(built, reference, samples, progress)
    rows = {name: {**timed[name], "modes": chunks[name]} for name in built}
    print_engines(rows)
    size = {p.name: p.stat().st_size for p in sorted(find_model(asked.model).glob("*.safetensors"))}
    return {"rows": rows, "num_observations": len(samples), "left_out": left_out, "bytes": size}


def time_calls(found: dict[str, Engine], inputs: list[EngineInputs], asked: argparse.Namespace) -> dict:
    """Prefill and steps of every size, engines in turn, the first tenth of the repeats not counted. [ms]"""
    from time import perf_counter_ns

    calls: dict[str, dict[str, list[float]]] = {name: {"prefill": [], **{str(k): [] for k in SIZES}} for name in found}
    names = list(found)
    for i in range(asked.repeats + asked.repeats // 10):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            engine, start = found[name], perf_counter_ns()
            engine.prefill(inputs[i % len(inputs)])
            measured = {"prefill": perf_counter_ns() - start}
            for k in SIZES:
                if k <= engine.max_step:
                    tokens, parents = np.full(k, 100, np.int32), np.arange(-1, k - 1, dtype=np.int32)
                    start = perf_counter_ns()
                    engine.step(tokens, parents)
                    measured[str(k)] = perf_counter_ns() - start
            if i >= asked.repeats // 10:
                for key, value in measured.items():
                    calls[name][key].append(value / 1e6)
    return {
        name: {
            "info": found[name].info._asdict(),
            "ms": {key: {"p50": quantile(v, 50), "p99": quantile(v, 99), "min": min(v)} for key, v in of.items() if v},
        }
        for name, of in calls.items()
    }


def decode_all(built: dict[str, dict[str, Assembly]], reference: Assembly, samples: list[Sample], progress) -> dict:
    """Every observation by every engine and mode, in turn."""
    cases = [(name, mode, assembly) for name, modes in built.items() for mode, assembly in modes.items()]
    found: dict[tuple[str, str], list[dict]] = {(name, mode): [] for name, mode, _ in cases}
    for _, _, assembly in cases:
        for sample in samples[:3]:
            plan_sample(assembly, sample)
    progress.phase("decoding", len(samples))
    for i, sample in enumerate(samples):
        truth = plan_sample(reference, sample)
        own: dict[str, np.ndarray] = {}
        chunks = {}
        first = i % len(cases)
        for name, mode, assembly in (*cases[first:], *cases[:first]):
            chunk = plan_sample(assembly, sample)
            chunks[name, mode] = chunk, assembly.policy.last_record
            if mode == "autoregressive":
                own[name] = chunk.tokens
        for (name, mode), (chunk, plan) in chunks.items():
            moved = np.abs(chunk.actions - truth.actions)[:, :NUM_TRANSLATIONS] * MM_PER_UNIT
            found[name, mode].append({
                "decode_ms": plan.decode_ns / 1e6, "forwards": len(plan.rounds), "tokens": plan.num_verified,
                "same": float((chunk.tokens == truth.tokens).mean()),
                "is_own": bool(np.array_equal(chunk.tokens, own[name])) if name in own else None,
                "moved_mm": moved.reshape(-1).tolist(),
            })  # fmt: skip
        progress.step()
    out: dict[str, dict] = {name: {} for name in built}
    for (name, mode), plans in found.items():
        out[name][mode] = {
            "chunks": len(plans),
            "decode_ms_p50": quantile([p["decode_ms"] for p in plans], 50),
            "decode_ms_p99": quantile([p["decode_ms"] for p in plans], 99),
            "tokens_per_forward": sum(p["tokens"] for p in plans) / sum(p["forwards"] for p in plans),
            "token_agreement_fp32": float(np.mean([p["same"] for p in plans])),
            "chunks_equal_to_own_autoregression": sum(bool(p["is_own"]) for p in plans),
            "action_difference_mm": {
                "mean": float(np.mean([p["moved_mm"] for p in plans])),
                "p99": quantile(np.concatenate([p["moved_mm"] for p in plans]), 99),
                "max": float(np.max([p["moved_mm"] for p in plans])),
            },
        }
    return out


def quantile(values, q: int) -> float:
    return float(percentiles(values)[q])


def print_engines(rows: dict) -> None:
    console = Console(width=150)
    table = Table(box=SIMPLE_HEAD, title="Calls [ms], p50 (p99)", title_justify="left")
    for name in ("engine", "prefill", *map(str, SIZES), "batch-invariant"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for name, row in rows.items():
        cells = [f"{row['ms'][k]['p50']:.2f} ({row['ms'][k]['p99']:.1f})" for k in ("prefill", *map(str, SIZES))]
        table.add_row(name, *cells, "yes" if row["info"]["is_batch_invariant"] else "no")
    console.print(table)
    table = Table(box=SIMPLE_HEAD, title="Chunks", title_justify="left")
    heads = (
        "engine",
        "mode",
        "decode p50 [ms]",
        "p99",
        "tokens/forward",
        "= fp32",
        "= own AR",
        "mean [mm]",
        "p99",
        "max",
    )
    for name in heads:
        table.add_column(name, justify="left" if name in ("engine", "mode") else "right")
    for name, row in rows.items():
        for mode, of in row["modes"].items():
            table.add_row(
                name, mode, f"{of['decode_ms_p50']:.1f}", f"{of['decode_ms_p99']:.1f}",
                f"{of['tokens_per_forward']:.2f}", f"{100 * of['token_agreement_fp32']:.2f} %",
                f"{of['chunks_equal_to_own_autoregression']}/{of['chunks']}",
                *(f"{of['action_difference_mm'][q]:.3g}" for q in ("mean", "p99", "max")),
            )  # fmt: skip
    console.print(table)


def closed_loop(asked: argparse.Namespace) -> None:
    """Whole episodes; results.json as `vla-spec run` writes it."""
    assembler = Assembler()
    built, _ = assemble(asked, assembler)
    assemblies = [assembly for modes in built.values() for assembly in modes.values()]
    seeds = range(asked.seed_start, asked.seed_start + asked.episodes)
    plan = Plan(tuple(a.config for a in assemblies), None, seeds, num_samples=0)
    with LiveProgress() as progress:
        results = evaluate_assembled(assembler, assemblies, plan, task_names(plan.configs[0].robot, None), progress)
    save(results, asked.out / "closed-loop", shlex.join(sys.argv))
    for row in results.rows:
        print(f"{row.mode}: {row.success_rate:.3f} of {row.episodes}, 95 % {row.success_ci95}")


if __name__ == "__main__":
    main()
