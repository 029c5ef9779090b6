"""Everything about an engine that only a GPU can say, in one go: build, verify, time, capture, cache, streams, loop.

Each step stands alone: one that fails is written down with its reason, and the others go on. What was not run is not
claimed. `vla_spec/gpu_report.py` makes a page of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from vla_spec.clock import NowNs
from vla_spec.config import Config
from vla_spec.errors import BadConfig, BadModel, MissingDependency, VlaSpecError
from vla_spec.progress import Reporter
from vla_spec.types import EngineInputs, Int32

if TYPE_CHECKING:
    from vla_spec.engines._graph_engine import GraphEngine
    from vla_spec.engines.cache import BuiltEngine
    from vla_spec.engines.tensorrt import Machine, Options

FORMAT = 1
NS_PER_US, NS_PER_S = 1e3, 1e9
#: Steps, in the order in which they are run.
STEPS = ("build", "load", "verify", "tiers", "graphs", "cache", "streams", "loop", "profile")
#: Of what is built; more is a warning.
MOST_RELOAD_SHARE = 0.1
#: What every number of results.json means.
MEANING = {
    "outcome": "pass, warn (it works, and is not as it should be), fail, or skipped (not run; message says why)",
    "build_seconds": "parsing and building of all graphs; of an engine that was in the cache, when it was built",
    "reload_seconds": "from the cache: manifest, hashes, deserialising, contexts, golden inputs, captures of all sizes",
    "reload_share": "reload_seconds / build_seconds",
    "half_share": "share of floating-point tensors between kernels that are in the precision asked for; null = the "
    "engine does not tell",
    "p50_us, p99_us": "one call as the host sees it, from the call to its results, percentiles over n calls behind "
    "warm_up others [us]",
    "captured, uncaptured": "one launch of a captured CUDA graph, or every copy and kernel launched one by one",
    "device_us": "the captured round between two events in its stream, median: no host can make it shorter [us]",
    "nodes": "operations in the captured graph, copies among them",
    "changed_rows": "cache rows that a step over rows .. rows + tier - 1 has changed, read back from the device",
    "alone, beside_low, beside_same": "steps of the target with nothing else on the GPU; beside another engine that "
    "prefills all the time on a stream of low priority; on a stream of the target's own priority",
}


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """What to check.

    Attributes:
        model_dir: model folder.
        options: of the engine.
        configs: modes of the closed loop and of the profile, with engine `tensorrt`.
        skip: steps that are left out.
        calls, warm_up: timed calls of each kind, and calls before them.
        observations: that engine and reference are compared on.
        tasks, seeds, max_steps: of the closed loop.
        plans: of each mode in the profile.
        seed: for everything random.
    """

    model_dir: Path
    options: Options
    configs: tuple[Config, ...]
    skip: tuple[str, ...] = ()
    calls: int = 300
    warm_up: int = 30
    observations: int = 8
    tasks: tuple[str, ...] | None = None
    seeds: range = range(10_000, 10_001)
    max_steps: int = 200
    plans: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.skip) - set(STEPS))
        if unknown:
            raise BadConfig(f"--skip {', '.join(unknown)}: no such step; valid: {', '.join(STEPS)}")
        for name, least in (("calls", 2), ("warm_up", 1), ("observations", 1), ("plans", 1)):
            if getattr(self, name) < least:
                raise BadConfig(f"{name} is {getattr(self, name)}; valid: {least} or more")


class Outcome(NamedTuple):
    """How one step went. facts: plain values, see `MEANING`."""

    step: str
    outcome: str
    message: str
    seconds: float
    facts: dict[str, Any]


class Finding(NamedTuple):
    """What a step found out. concerns: what is not as it should be, though it works."""

    facts: dict[str, Any]
    concerns: tuple[str, ...] = ()


class Skipped(Exception):
    """A step that can't be run here; the text says why."""


class Timing(NamedTuple):
    """Durations of one kind of call as the host sees it."""

    p50_us: float
    p99_us: float
    min_us: float
    n: int
    warm_up: int


def time_calls(call: Callable[[], object], num_calls: int, num_warmup: int, now_ns: NowNs) -> Timing:
    """Call again and again and take the time of each."""
    for _ in range(num_warmup):
        call()
    taken = np.empty(num_calls, np.int64)
    for i in range(num_calls):
        start = now_ns()
        call()
        taken[i] = now_ns() - start
    p50, p99 = np.percentile(taken, (50, 99)) / NS_PER_US
    return Timing(
        round(float(p50), 2), round(float(p99), 2), round(float(taken.min()) / NS_PER_US, 2), num_calls, num_warmup
    )


@final
class GpuCheck:
    """One run of all steps. Engines live until `close`.

    Args:
        plan: what to check.
        machine: CUDA and TensorRT.
        folder: where the closed loop and the profile write to.
        now_ns: a clock.
        progress: told about each step.
    """

    def __init__(self, plan: CheckPlan, machine: Machine, folder: Path, now_ns: NowNs, progress: Reporter) -> None:
        self._plan, self._machine, self._folder = plan, machine, folder
        self._now_ns, self._progress = now_ns, progress
        self._built: BuiltEngine | None = None
        self._engine: GraphEngine | None = None

    def run(self, done: Callable[[Sequence[Outcome]], None] = lambda _: None) -> tuple[Outcome, ...]:
        """All steps, in order. ``done`` is told what there is after each."""
        outcomes: list[Outcome] = []
        for step in STEPS:
            outcomes.append(self._run(step))
            done(outcomes)
        return tuple(outcomes)

    def close(self) -> None:
        """Free the GPU."""
        if self._engine is not None:
            _close(self._engine)
            self._engine = None

    def _run(self, step: str) -> Outcome:
        start = self._now_ns()

        def outcome(kind: str, message: str, facts: dict[str, Any]) -> Outcome:
            return Outcome(step, kind, message, round((self._now_ns() - start) / NS_PER_S, 3), facts)

        if step in self._plan.skip:
            return outcome("skipped", "left out by --skip", {})
        self._progress.phase(step, 1)
        try:
            found: Finding = getattr(self, f"_{step}")()
        except (Skipped, MissingDependency) as error:
            return outcome("skipped", str(error), {})
        except VlaSpecError as error:
            return outcome("fail", str(error), {})
        except Exception as error:  # what a driver or a compiler throws must not hide the other steps
            return outcome("fail", f"{type(error).__name__}: {' '.join(str(error).split())}", {})
        finally:
            self._progress.step(step)
        return outcome("warn" if found.concerns else "pass", "; ".join(found.concerns), found.facts)

    # --- steps ---

    def _build(self) -> Finding:
        """The engine of this model for this GPU, from the cache or built now."""
        from vla_spec.engines._trt.builder import BuilderOptions
        from vla_spec.engines.build import BuildOptions, build_engine

        options, library = self._plan.options, self._machine.library
        device = self._machine.cuda.device(options.device)
        builder = BuilderOptions((device.sm,) if library.builds_ahead else ())
        built = build_engine(
            self._plan.model_dir, BuildOptions(library.backend, options.precision, options.tiers, builder),
            self._progress, Path(options.cache).expanduser() if options.cache else None,
            None if library.builds_ahead else device,
        )  # fmt: skip
        self._built = built
        graphs = {
            name: {"bytes": entry.size, "build_seconds": entry.build_seconds, "is_decomposed": entry.is_decomposed}
            for name, entry in built.graphs.items()
        }
        decomposed = [name for name, entry in built.graphs.items() if entry.is_decomposed]
        return Finding(
            {
                "key": built.key, "was_cached": built.was_cached, "tiers": list(built.tiers), "bytes": built.size,
                "build_seconds": round(built.build_seconds, 3), "graphs": graphs,
            },
            tuple(f"{name}: attention may be computed from its parts" for name in decomposed),
        )  # fmt: skip

    def _load(self) -> Finding:
        """Reload from the cache, with everything that a robot waits for; what precision the kernels have."""
        from vla_spec.engines import tensorrt

        start = self._now_ns()
        self._engine = tensorrt.load(self._plan.model_dir, self._plan.options, self._machine)
        seconds = (self._now_ns() - start) / NS_PER_S
        runtime, concerns = _runtime_of(self._engine), []
        shares = {graph.name: tensorrt.check_layers(graph, runtime.precision) for graph in runtime.graphs}
        facts: dict[str, Any] = {
            "provider": runtime.provider, "is_batch_invariant": runtime.is_batch_invariant,
            "reload_seconds": round(seconds, 3), "half_share": shares,
            "scratch_bytes": {graph.name: graph.scratch_bytes for graph in runtime.graphs},
            "free_bytes": self._machine.cuda.memory()[0],
        }  # fmt: skip
        if self._built is not None and self._built.build_seconds:
            facts["reload_share"] = share = round(seconds / self._built.build_seconds, 4)
            if share > MOST_RELOAD_SHARE:
                concerns.append(f"reloading takes {share:.0%} of building; at most {MOST_RELOAD_SHARE:.0%} is wanted")
        if None in shares.values():
            concerns.append("the engine does not tell its kernels' precision")
        return Finding(facts, tuple(concerns))

    def _verify(self) -> Finding:
        """Against ONNX Runtime on the CPU, with the gates of `vla-spec verify`."""
        from vla_spec.assemble import Assembler
        from vla_spec.engines import verify
        from vla_spec.engines._graph_engine import GraphEngine
        from vla_spec.engines._model_files import GOLDEN
        from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime

        engine, plan = self._need_engine(), self._plan
        adapter = Assembler().adapter(plan.configs[0])
        example = getattr(adapter, "example", None)
        if example is None:
            raise Skipped("this model's adapter has no example observation")
        rng = np.random.default_rng(plan.seed)
        seen = verify.seeded_observations(example(), plan.observations, rng)
        result = verify.verify(
            engine, GraphEngine(plan.model_dir, OnnxRuntimeRuntime(plan.configs[0].num_threads)),
            [adapter.encode(one) for one in seen], adapter.domain.num_tokens,
            verify.read_thresholds(verify.THRESHOLDS, engine.info.precision), plan.model_dir / GOLDEN, rng,
            self._progress,
        )  # fmt: skip
        failed = [name for name, outcome in result.outcomes.items() if outcome == "fail"]
        if failed:
            told = ", ".join(f"{name} is {result.metrics[name]:.4g}" for name in failed)
            raise BadModel(f"beside ONNX Runtime: {told}; see calib/verify_thresholds.json for what is accepted")
        poor = [name for name, outcome in result.outcomes.items() if outcome == "warn"]
        return Finding(result.to_json(), tuple(f"{name} is {result.metrics[name]:.4g}" for name in poor))

    def _tiers(self) -> Finding:
        """Prefill, and a step of every size that was built for: captured and uncaptured."""
        from vla_spec.engines import tensorrt

        engine, plan = self._need_engine(), self._plan
        plain = tensorrt.load(plan.model_dir, replace(plan.options, cuda_graphs="never"), self._machine)
        try:
            table = [self._compared("prefill", self._time_prefill, engine, plain)]
            for k in self._step_sizes():
                row = self._compared(f"step {k}", partial(self._time_step, k=k), engine, plain)
                table.append({**row, "device_us": self._time_on_device(k)})
        finally:
            _close(plain)
        slower = [row["call"] for row in table if row["captured"]["p50_us"] > row["uncaptured"]["p50_us"]]
        concern = (f"captured is slower than uncaptured for {', '.join(slower)}",) if slower else ()
        return Finding({"table": table}, concern)

    def _graphs(self) -> Finding:
        """Is every size that a robot uses captured, and in how many operations?"""
        runtime = _runtime_of(self._need_engine())
        calls = [
            {
                "call": call.name, "is_captured": call.is_captured, "nodes": call.num_nodes,
                "copies": list(call.copies), "slow_reason": call.slow_reason,
            }
            for graph in runtime.graphs
            for call in graph.calls
        ]  # fmt: skip
        slow = [str(call["call"]) for call in calls if not call["is_captured"]]
        concern = (f"not captured: {', '.join(slow)}",) if slow else ()
        return Finding({"calls": calls}, concern if self._plan.options.cuda_graphs != "never" else ())

    def _cache(self) -> Finding:
        """Does a step write its own rows and no others, and does a commit move rows? Read back from the device."""
        engine = self._need_engine()
        state: Any = engine._state  # to look at memory that nobody else reads
        state.clear()
        engine.prefill(self._inputs())
        start, k = engine.length, min(6, engine.max_step)
        tier = next(n for n in _runtime_of(engine).tiers or () if n >= k)
        before = state.read()
        parents = np.array([-1, 0, 0, 1, 2, 4][:k], np.int32)
        engine.step(np.arange(k, dtype=np.int32), parents)
        after = state.read()
        changed = np.flatnonzero((before != after).any((0, 1, 3))).tolist()
        allowed = range(start, start + tier)
        if not (set(range(start, start + k)) <= set(changed) <= set(allowed)):
            raise BadModel(
                f"a step over rows {start} to {start + k - 1} changed the rows {changed}; valid: these, up to "
                f"{allowed[-1]}: the cache is not written in place"
            )
        path = np.array([0, 2, 4, 5], np.int32)
        path = path[path < k]
        engine.commit(path)
        moved = state.read()
        kept = after.copy()
        kept[:, :, start : start + len(path)] = after[:, :, start + path]
        if not np.array_equal(moved[:, :, : start + len(path)], kept[:, :, : start + len(path)]):
            raise BadModel(f"committing the nodes {path.tolist()} of a tree did not move their rows to {start} and on")
        return Finding(
            {"rows": [start, start + k - 1], "tier": tier, "changed_rows": changed, "committed": path.tolist(),
             "cache_bytes": int(before.size)}
        )  # fmt: skip

    def _streams(self) -> Finding:
        """What another engine on the same GPU costs the target, on a stream of low priority and on one of its own."""
        from vla_spec.engines import tensorrt
        from vla_spec.engines._graph_engine import GraphEngine
        from vla_spec.engines._trt.runtime import TensorRTRuntime

        engine, plan, machine = self._need_engine(), self._plan, self._machine
        size = self._step_sizes()[-1]
        found: dict[str, Any] = {"alone": self._time_step(engine, size)._asdict()}
        loads = {}
        for name, priority in (("beside_low", "low"), ("beside_same", plan.options.priority)):
            runtime = TensorRTRuntime(
                plan.model_dir, tensorrt.plans_of(machine, plan.options), machine.library, machine.cuda,
                plan.options.running, priority,
            )  # fmt: skip
            try:
                other = GraphEngine(plan.model_dir, runtime)
                with _kept_busy(other, self._inputs()) as counter:
                    found[name] = self._time_step(engine, size)._asdict()
                loads[name] = counter[0]
            finally:
                runtime.close()
        found["step"], found["prefills_beside"] = size, loads
        if not all(loads.values()):
            raise BadModel(f"the other engine did not run meanwhile ({loads})")
        is_worse = found["beside_low"]["p50_us"] > 1.05 * found["beside_same"]["p50_us"]
        concern = ("a load of low priority costs the target more than one of its own",) if is_worse else ()
        return Finding(found, concern)

    def _loop(self) -> Finding:
        """The closed loop in the simulator."""
        from vla_spec.evaluation import Plan, evaluate
        from vla_spec.results import save

        plan = self._plan
        self._need_engine()
        results = evaluate(Plan(plan.configs, plan.tasks, plan.seeds, plan.max_steps, num_samples=20), self._progress)
        folder = self._folder / "loop"
        folder.mkdir(exist_ok=True)
        save(results, folder, "vla-spec gpu check")
        wanted = (
            "mode", "engine", "is_exact", "episodes", "success_rate", "chunks", "chunk_ms_p50", "chunk_ms_p99",
            "decode_ms_p50", "speedup_decode", "host_overhead_ratio", "token_agreement", "deadline_miss_rate",
        )  # fmt: skip
        rows = [{key: value for key, value in asdict(row).items() if key in wanted} for row in results.rows]
        return Finding({"rows": rows, "tasks": list(results.tasks), "results": "loop/results.json"})

    def _profile(self) -> Finding:
        """The profiler: cold start, and plans without other work."""
        from vla_spec.profiling import profile as profiles
        from vla_spec.profiling.planning import Amount
        from vla_spec.profiling.profiler import ProfilePlan, profile

        plan = self._plan
        self._need_engine()
        profiled = profile(
            ProfilePlan(
                plan.configs, plan.tasks, plan.seeds, Amount(plan.plans), num_observations=10, cold_plans=3,
                tracing_pairs=0, max_steps=plan.max_steps,
            ),
            self._progress,
        )  # fmt: skip
        folder = self._folder / "profile"
        folder.mkdir(exist_ok=True)
        made = profiles.stamped(profiled.profile, "vla-spec gpu check", "")
        profiles.save(made, folder / "profile.json")
        return Finding({"profile": "profile/profile.json", "latency": _latency(made)})

    # --- inside ---

    def _need_engine(self) -> GraphEngine:
        if self._engine is None:
            raise Skipped("needs the step load")
        return self._engine

    def _inputs(self) -> EngineInputs:
        """The golden inputs: they fit the model, whatever it is."""
        from vla_spec.engines.tensorrt import golden_inputs

        return golden_inputs(self._plan.model_dir)

    def _step_sizes(self) -> list[int]:
        engine = self._need_engine()
        return [n for n in _runtime_of(engine).tiers or () if n <= engine.max_step]

    def _compared(
        self, name: str, take: Callable[[GraphEngine], Timing], engine: GraphEngine, plain: GraphEngine
    ) -> dict[str, Any]:  # fmt: skip
        return {"call": name, "captured": take(engine)._asdict(), "uncaptured": take(plain)._asdict()}

    def _time_on_device(self, k: int) -> float:
        """Median of captured rounds over k tokens as the GPU measures them, right after such a step [us]."""
        engine: Any = self._need_engine()
        engine.step(np.zeros(k, np.int32), _chain(k))
        taken = engine._buffers[k].call.time_on_device(self._plan.calls)  # the same rows again: it leaves no trace
        return round(float(np.median(taken)), 2)

    def _time_prefill(self, engine: GraphEngine) -> Timing:
        inputs = self._inputs()
        return self._time(lambda: engine.prefill(inputs))

    def _time_step(self, engine: GraphEngine, k: int) -> Timing:
        """Steps over a chain of k tokens behind the prompt; nothing is committed."""
        engine.prefill(self._inputs())
        tokens, parents = np.zeros(k, np.int32), _chain(k)
        return self._time(lambda: engine.step(tokens, parents))

    def _time(self, call: Callable[[], object]) -> Timing:
        from vla_spec.profiling.planning import quiet

        with quiet():
            return time_calls(call, self._plan.calls, self._plan.warm_up, self._now_ns)


def _chain(k: int) -> Int32:
    return np.arange(-1, k - 1, dtype=np.int32)


def _runtime_of(engine: GraphEngine) -> Any:
    """The TensorRT runtime of an engine."""
    return engine.runtime


def _close(engine: GraphEngine) -> None:
    _runtime_of(engine).close()


def _latency(profile: Any) -> list[dict[str, Any]]:
    """The profile's table of plan durations, as plain rows."""
    from vla_spec.profiling.tables import latency_table

    table = latency_table(profile)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@contextmanager
def _kept_busy(engine: GraphEngine, inputs: EngineInputs) -> Iterator[list[int]]:
    """Another engine prefills all the time in a thread of its own; yields a list with the number of prefills so far."""
    stop, is_running, counter = threading.Event(), threading.Event(), [0]
    failures: list[Exception] = []

    def work() -> None:
        try:
            while not stop.is_set():
                engine.prefill(inputs)
                counter[0] += 1
                is_running.set()
        except Exception as error:  # it is raised in the thread that waits
            failures.append(error)
            is_running.set()

    thread = threading.Thread(target=work, name="load", daemon=True)
    thread.start()
    try:
        is_running.wait(60)
        yield counter
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
