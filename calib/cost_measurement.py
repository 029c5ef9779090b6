"""Measure the cost tables of decoding modes on this machine, idle and under load.

All calls of one engine take turns (an observation, a prefill, steps of every size over chains and trees, drafts of
every size with every drafter, the adapter), so that a slow moment of the machine falls on all of them. Steps and
drafts do so in another random order each time, and a draft follows a step, as it does when decoding: measured one
after the other, drafts find their weights in the cache and look a third cheaper. The first cycles are warm-up: they
are reported, and in no quantile.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
from pydantic import ValidationError

from vla_spec import __version__, plugins
from vla_spec.assemble import Assembler
from vla_spec.calib.background_load import BackgroundLoad
from vla_spec.calib.cost_file import (
    LEVELS,
    CostFile,
    Distribution,
    DrafterIdentity,
    DraftTable,
    EngineTable,
    Load,
    is_supported,
)
from vla_spec.calib.device import library_versions, this_device_now
from vla_spec.calib.identity import draft_shape, drafter_identity, engine_identity
from vla_spec.clock import NS_PER_S, MonotonicClock, NowNs
from vla_spec.config import Config, load_plugin
from vla_spec.costs import Call, chain_calls, draft_calls, time_calls, tree_calls
from vla_spec.errors import BadConfig, VlaSpecError
from vla_spec.evaluation import first_observation, task_names
from vla_spec.interfaces import Adapter, ChunkHistory, Drafter, Engine
from vla_spec.progress import Reporter
from vla_spec.types import EngineInputs, Int32, Observation

#: Children per node of the measured trees; what counts for the cost is that branches need a mask.
BRANCHING = 2
#: Other processes may use so many cores' worth of time without a note in the file.
MOST_OTHER_CORES = 0.1


class Disturbed(VlaSpecError):
    """What was measured contradicts itself."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How much to measure.

    Attributes:
        num_calls: of each kind behind the warm-up; p99.9 needs 1 000.
        num_warmup: cycles before these.
        loads: keys of `background_load.KINDS`.
        num_load_processes: of loads that are not idle.
    """

    num_calls: int = 1000
    num_warmup: int = 10
    loads: tuple[str, ...] = ("idle", "busy")
    num_load_processes: int = 1

    def __post_init__(self) -> None:
        if self.num_calls < 2 or self.num_warmup < 1:
            raise BadConfig(
                f"need at least 2 calls and 1 warm-up cycle, got {self.num_calls} and {self.num_warmup}; the first "
                f"calls load code and fill caches"
            )
        if not self.loads or len(set(self.loads)) < len(self.loads):
            raise BadConfig(f"--load {','.join(self.loads)}: valid: one or more loads, each once")
        for kind in self.loads:
            BackgroundLoad(kind, self.num_load_processes)  # refuses what does not exist


def calibrate_costs(
    configs: Sequence[Config], options: CalibrationOptions, seed: int, command: str, progress: Reporter
) -> CostFile:
    """Measure the tables of these modes on this machine.

    Args:
        configs: one per mode, all with the same robot.
        options: how much.
        seed: of the episode whose first observation is decoded.
        command: that was called, for the file.
        progress: told about every cycle.

    Raises:
        VlaSpecError: a part can't be built, a load could not be kept up, or the machine was too disturbed.
    """
    robot = configs[0].robot
    if any(config.robot != robot for config in configs):
        raise BadConfig("modes: all modes of one calibration need the same robot")
    assembler = Assembler()
    for config in configs:  # cheap checks of all modes before the first expensive step
        assembler.adapter(config)
    observation = first_observation(assembler, robot, task_names(robot, None)[0], seed)
    benches = prepare(assembler, configs)
    tables = calibrate(benches, observation, options, MonotonicClock().now_ns, progress)
    device = this_device_now()
    return CostFile(
        origin="measured",
        label=f"measured on {device}",
        device=device,
        created=datetime.datetime.now().astimezone().isoformat("T", "seconds"),
        command=command,
        libraries=library_versions(),
        vla_spec=__version__,
        notes=tuple(_disturbances(tables)),
        tables=tuple(tables),
    )


class Candidate(NamedTuple):
    """One drafter, and the modes that use it."""

    identity: DrafterIdentity
    drafter: Drafter
    configs: list[Config]


class Bench(NamedTuple):
    """One engine with the drafters that are measured with it, by their identity as text."""

    config: Config
    adapter: Adapter
    engine: Engine
    candidates: dict[str, Candidate]


def prepare(assembler: Assembler, configs: Sequence[Config]) -> list[Bench]:
    """Build what is to be measured: modes with the same engine share it, modes with the same drafter too.

    Raises:
        VlaSpecError: a part can't be built.
    """
    benches: dict[int, Bench] = {}
    for config in configs:
        adapter = assembler.adapter(config)
        model_dir = assembler.model_dir(config)
        parts = plugins.Parts(adapter.domain, adapter.tokenizer, model_dir, None, None, config.num_threads, config.seed)
        engine = assembler.engine(config, parts)
        bench = benches.setdefault(id(engine), Bench(config, adapter, engine, {}))
        identity = drafter_identity(config)
        key = identity.model_dump_json()
        if key in bench.candidates:
            bench.candidates[key].configs.append(config)
            continue
        parts = plugins.Parts(
            adapter.domain, adapter.tokenizer, model_dir, engine, None, config.num_threads, config.seed
        )
        drafter = load_plugin("drafter", config.drafter.name).build(config.drafter.options, parts)
        bench.candidates[key] = Candidate(identity, drafter, [config])
    return list(benches.values())


def calibrate(
    benches: Sequence[Bench],
    observation: Observation,
    options: CalibrationOptions,
    now_ns: NowNs,
    progress: Reporter,
) -> list[EngineTable]:
    """Measure every engine under every load.

    Args:
        benches: what `prepare` built.
        observation: a valid one, of the robot that will be driven.
        options: how much.
        now_ns: a clock that runs.
        progress: told about every cycle.

    Raises:
        VlaSpecError: a load could not be kept up.
    """
    tables = []
    for kind in options.loads:
        for bench in benches:
            progress.phase(f"{bench.engine.info.name}, {kind}", options.num_warmup + options.num_calls)
            with BackgroundLoad(kind, options.num_load_processes) as load:
                tables.append(_measure(bench, observation, options, load, now_ns, progress))
    return tables


def _measure(
    bench: Bench,
    observation: Observation,
    options: CalibrationOptions,
    load: BackgroundLoad,
    now_ns: NowNs,
    progress: Reporter,
) -> EngineTable:
    adapter, engine = bench.adapter, bench.engine
    num_tokens = adapter.domain.num_tokens
    start = now_ns()
    inputs = adapter.encode(observation)
    first_ns: dict[Hashable, int] = {"encode": now_ns() - start}
    chunk, first_ns["prefill"], first_ns["step", 1] = _first_chunk(engine, inputs, num_tokens, now_ns)
    calls: dict[Hashable, Call] = {
        "encode": Call(lambda: adapter.encode(observation)),
        "prefill": Call(lambda: engine.prefill(inputs)),
    }
    calls |= {("step", k): call for k, call in chain_calls(engine, num_tokens).items()}
    calls |= {("step_tree", k): call for k, call in tree_calls(engine, num_tokens, BRANCHING).items()}
    for name, (_, drafter, configs) in bench.candidates.items():
        consumed = configs[0].runtime.execute_horizon * adapter.domain.tokens_per_step
        history = ChunkHistory(chunk, min(consumed, num_tokens))
        drafts = draft_calls(drafter, engine, inputs, draft_shape(configs[0]), chunk[:1], history)
        calls |= {(name, gamma): _after_a_step(engine, call) for gamma, call in drafts.items()}
    calls["decode"] = Call(lambda: adapter.decode(chunk))

    in_random_order = [key for key in calls if isinstance(key, tuple)]
    rng = np.random.default_rng(0)

    def order() -> list[Hashable]:
        shuffled = [in_random_order[i] for i in rng.permutation(len(in_random_order))]
        return ["encode", "prefill", *shuffled, "decode"]

    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # as in real time
    try:
        usage = _CpuUsage(now_ns, load.pids)
        taken = time_calls(calls, now_ns, options.num_warmup + options.num_calls, order, progress.step)
        other_cores, stolen_cores = usage.stop()
    finally:
        if was_collecting:
            gc.enable()

    found = {key: distribution(ns, options.num_warmup, first_ns.get(key)) for key, ns in taken.items()}

    def by_size(what: Hashable) -> dict[int, Distribution]:
        return {key[1]: cost for key, cost in found.items() if isinstance(key, tuple) and key[0] == what}

    try:
        return EngineTable(
            load=Load(
                key=load.kind,
                description=load.description,
                num_processes=load.num_processes,
                other_cores=other_cores,
                stolen_cores=stolen_cores,
            ),
            engine=engine_identity(bench.config, engine),
            prefill=found["prefill"],
            step=by_size("step"),
            step_tree=by_size("step_tree"),
            encode=found["encode"],
            decode=found["decode"],
            drafters=tuple(
                DraftTable(modes=tuple(config.mode for config in configs), drafter=identity, draft=by_size(name))
                for name, (identity, _, configs) in bench.candidates.items()
            ),
        )
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise Disturbed(
            f"calibrate, load {load.kind}: {message}; the machine was too disturbed (other processes used "
            f"{other_cores} cores), or --calls {options.num_calls} is too few; measure again"
        ) from None


def _disturbances(tables: Sequence[EngineTable]) -> Iterator[str]:
    """What a reader of the table should know about the other processes of the machine."""
    for table in tables:
        load = table.load
        for cores, what in ((load.other_cores, "other processes used"), (load.stolen_cores, "the hypervisor took")):
            if cores is not None and cores > MOST_OTHER_CORES:
                yield f"while {table.engine.name} was measured under load {load.key!r}, {what} {cores:g} cores"


def distribution(taken_ns: Sequence[int], num_warmup: int, first_ns: int | None = None) -> Distribution:
    """Durations of one kind of call, in the order in which they were measured, to a distribution.

    Args:
        taken_ns: warm-up first.
        num_warmup: how many of them are warm-up.
        first_ns: an even earlier first call; None = the first of these is the first.
    """
    kept = np.asarray(taken_ns[num_warmup:], np.int64)
    levels = [level for level in LEVELS if is_supported(level, len(kept))]
    levels = levels if 0.5 in levels else [0.5]
    return Distribution(
        n=len(kept),
        warm_up=num_warmup + (first_ns is not None),
        first_call=float(taken_ns[0] if first_ns is None else first_ns),
        quantiles={level: round(float(ns), 1) for level, ns in zip(levels, np.quantile(kept, levels), strict=True)},
        max=float(kept.max()),
    )


def _after_a_step(engine: Engine, draft: Call) -> Call:
    """The same draft behind a single-token step that is not timed."""
    token, parent = np.zeros(1, np.int32), np.full(1, -1, np.int32)

    def before() -> None:
        if draft.before is not None:
            draft.before()
        engine.step(token, parent)

    return Call(draft.run, before)


def _first_chunk(engine: Engine, inputs: EngineInputs, num_tokens: int, now_ns: NowNs) -> tuple[Int32, int, int]:
    """A greedy chunk, int32 [T], for drafters to start from; and what its first prefill and first step took [ns]."""
    start = now_ns()
    logits = engine.prefill(inputs).logits
    prefill_ns, step_ns = now_ns() - start, 0
    root, alone = np.zeros(1, np.int32), np.full(1, -1, np.int32)
    chunk = np.zeros(num_tokens, np.int32)
    for i in range(num_tokens):
        chunk[i] = logits[0].argmax()
        if i == num_tokens - 1:
            break
        start = now_ns()
        logits = engine.step(chunk[i : i + 1], alone).logits
        step_ns = step_ns or now_ns() - start
        engine.commit(root)
    return chunk, prefill_ns, step_ns


@final
class _CpuUsage:
    """Cores' worth of time that others use while something is measured. Linux only; elsewhere unknown.

    Args:
        now_ns: a clock that runs.
        pids: processes that belong to the measurement beside this one.
    """

    def __init__(self, now_ns: NowNs, pids: Sequence[int]) -> None:
        self._now_ns, self._pids = now_ns, pids
        self._start_ns, self._start = now_ns(), self._read()

    def stop(self) -> tuple[float | None, float | None]:
        """Cores used by other processes, and cores that the hypervisor gave to other machines, since construction."""
        now, elapsed_s = self._read(), (self._now_ns() - self._start_ns) / NS_PER_S
        if self._start is None or now is None or elapsed_s <= 0:
            return None, None
        busy, own, stolen = (after - before for after, before in zip(now, self._start, strict=True))
        return round(max(0.0, (busy - own) / elapsed_s), 2), round(stolen / elapsed_s, 2)

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds of processor time so far: of all processes, of ours, and stolen."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
            ours = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in self._pids]
            tick_s = 1 / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        own = os.times()
        of_children = sum(int(used) for pair in ours for used in pair) * tick_s
        return (user + nice + system + irq + softirq) * tick_s, own.user + own.system + of_children, steal * tick_s
