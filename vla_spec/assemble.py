"""From a resolved configuration to a policy: adapter, engine, rule, drafter, costs, controller, in this order.

An `Assembler` is for one process: modes that name the same engine share it (one copy of the weights, one cache), so
their policies take turns and never run at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import numpy as np

from vla_spec import costs as cost_tables
from vla_spec import plugins
from vla_spec.action_space import ActionSpace
from vla_spec.calib.cost_file import Wanted, load_costs
from vla_spec.calib.device import this_device
from vla_spec.calib.identity import draft_shape, drafter_identity, engine_identity
from vla_spec.chunks import ChunkOptions, HandOver
from vla_spec.clock import Clock, MonotonicClock, VirtualClock
from vla_spec.config import Choice, Config, as_options, build_options, find_model, load_plugin
from vla_spec.costs import Costs
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.engines._model_files import adapter_of
from vla_spec.errors import BadModel
from vla_spec.interfaces import AcceptanceRule, Adapter, DeadlineController, Drafter, Engine
from vla_spec.policy import Policy
from vla_spec.runtime import EpisodicRobot, Mode, RuntimeOptions
from vla_spec.types import Observation, TokenDomain
from vla_spec.virtual_costs import ChargedAdapter, ChargedDrafter, ChargedEngine, CostTable

#: Engines that need no model folder.
WITHOUT_MODEL = {"toy"}
MODE_OF_CLOCK = {"real": Mode.REAL_TIME, "lockstep": Mode.LOCK_STEP, "virtual": Mode.VIRTUAL}
NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Assembly:
    """One decoding mode, ready to plan.

    Attributes:
        config: what it was built from.
        engine, rule, drafter, controller, adapter: its parts, as the plugins made them.
        policy: plans with them, on ``clock``.
        clock: real, or virtual and charged by ``costs``.
        costs: measured at start-up (or read from an earlier run), warm-up left out.
        runtime: options of an episode.
    """

    config: Config
    engine: Engine
    rule: AcceptanceRule
    drafter: Drafter
    controller: DeadlineController
    adapter: Adapter
    policy: Policy
    clock: Clock
    costs: Costs
    runtime: RuntimeOptions

    @property
    def domain(self) -> TokenDomain:
        """What its tokens mean."""
        return self.adapter.domain


@final
class Assembler:
    """Builds assemblies that share engines. Not thread-safe."""

    def __init__(self) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._engines: dict[str, Engine] = {}
        self._engine_costs: dict[str, Costs] = {}
        self._real = MonotonicClock()

    def robot(self, choice: Choice, task: str | None) -> EpisodicRobot:
        """Build a robot, for one of its tasks if it has any.

        Raises:
            BadConfig, UnknownOption, MissingDependency: as the robot says.
        """
        plugin = load_plugin("robot", choice.name)
        options = choice.options
        if task is not None:
            options = build_options(plugin.options, {**as_options(options), "task": task}, "robot")
        return cast(EpisodicRobot, plugin.build(options, cast(plugins.Parts, None)))

    def adapter(self, config: Config) -> Adapter:
        """The adapter of a configuration; its tokenizer comes with it."""
        choice = config.adapter or _default_adapter(config)
        model_dir = self.model_dir(config)
        key = f"{choice} {model_dir}"
        if key not in self._adapters:
            # The adapter is the first part: domain and tokenizer are its to say.
            nothing = plugins.Parts(cast(TokenDomain, None), cast(Any, None), model_dir)
            self._adapters[key] = load_plugin("adapter", choice.name).build(choice.options, nothing)
        return self._adapters[key]

    def model_dir(self, config: Config) -> Path | None:
        """The model folder, None for engines that need none.

        Raises:
            BadModel: no such folder.
        """
        if config.engine.name in WITHOUT_MODEL:
            return None
        path = find_model(config.model)
        if not path.is_dir():
            raise BadModel(
                f"model: no weights in {config.model} (no such folder); `vla-spec export` writes them, and --model DIR "
                f"names another folder"
            )
        return path

    def engine(self, config: Config, parts: plugins.Parts) -> Engine:
        """The engine of a configuration; built once per engine, model, threads and seed."""
        key = _engine_key(config)
        if key not in self._engines:
            self._engines[key] = load_plugin("engine", config.engine.name).build(config.engine.options, parts)
        return self._engines[key]

    def assemble(self, config: Config, observation: Observation, costs: Costs | None = None) -> Assembly:
        """Build one mode and measure its start-up costs.

        Args:
            config: resolved.
            observation: some valid one of the robot, for warm-up and measuring.
            costs: what calls are said to cost; None = read or measured, as the configuration says.

        Raises:
            VlaSpecError: whatever a part refuses, in one sentence.
        """
        adapter = self.adapter(config)
        domain = adapter.domain
        first = plugins.Parts(
            domain, adapter.tokenizer, self.model_dir(config), None, None, config.num_threads, config.seed
        )
        engine = self.engine(config, first)
        parts = plugins.Parts(domain, adapter.tokenizer, first.model_dir, engine, None, config.num_threads, config.seed)
        rule: AcceptanceRule = self._build("rule", config.rule, parts)
        drafter: Drafter = self._build("drafter", config.drafter, parts)
        costs = costs or self._costs(config, engine, drafter, adapter, observation)
        parts = plugins.Parts(
            domain, adapter.tokenizer, first.model_dir, engine, costs, config.num_threads, config.seed
        )
        controller: DeadlineController = self._build("controller", config.controller, parts)
        runtime = runtime_options(config)
        clock: Clock = VirtualClock() if runtime.mode is Mode.VIRTUAL else self._real
        rng = np.random.default_rng(config.seed)
        decoder = SpeculativeDecoder(engine, drafter, rule, controller, domain.num_tokens, clock.now_ns, rng)
        planned_by = adapter
        if isinstance(clock, VirtualClock):
            table = CostTable(costs.prefill, costs.step, costs.draft)
            latency_rng = np.random.default_rng([config.seed, 1])
            decoder.engine = ChargedEngine(engine, table, clock, latency_rng)
            decoder.drafter = ChargedDrafter(drafter, table, clock, latency_rng)
            planned_by = ChargedAdapter(adapter, costs.encode, costs.decode, clock, latency_rng)
        policy = Policy(planned_by, decoder, action_space(domain), clock.now_ns)
        return Assembly(config, engine, rule, drafter, controller, adapter, policy, clock, costs, runtime)

    def _build(self, kind: str, choice: Choice, parts: plugins.Parts) -> Any:
        return load_plugin(kind, choice.name).build(choice.options, parts)

    def _costs(
        self, config: Config, engine: Engine, drafter: Drafter, adapter: Adapter, observation: Observation
    ) -> Costs:
        num_tokens = adapter.domain.num_tokens
        if config.runtime.costs is not None:
            runtime = config.runtime
            wanted = Wanted(
                engine=engine_identity(config, engine),
                drafter=drafter_identity(config),
                load=runtime.costs_load,
                num_tokens=min(engine.max_step, num_tokens),
                is_other_device_allowed=runtime.allow_other_device or runtime.clock == "virtual",
                device=this_device,
            )
            return load_costs(config.runtime.costs, config.mode, wanted)
        inputs = adapter.encode(observation)
        key = _engine_key(config)
        if key not in self._engine_costs:
            of_engine = cost_tables.measure_engine(engine, inputs, num_tokens, self._real.now_ns)
            tokens = np.full(num_tokens, adapter.domain.vocab_size // 2, np.int32)
            self._engine_costs[key] = cost_tables.measure_adapter(
                of_engine, adapter, observation, tokens, self._real.now_ns
            )
        shape = draft_shape(config)
        return cost_tables.measure_drafter(self._engine_costs[key], drafter, engine, inputs, shape, self._real.now_ns)


def action_space(domain: TokenDomain) -> ActionSpace:
    """Increments in [-1, 1] for all degrees of freedom but the switches, which are the never-relaxed ones."""
    switches = np.flatnonzero(domain.never_relaxed[: domain.tokens_per_step]).tolist()
    low = np.full(domain.tokens_per_step, -1, np.float32)
    return ActionSpace.from_limits(low, -low, switches)


def _engine_key(config: Config) -> str:
    return f"{config.engine} {config.model} {config.num_threads} {config.seed}"


def _default_adapter(config: Config) -> Choice:
    name = "toy" if config.engine.name in WITHOUT_MODEL else adapter_of(find_model(config.model))
    return Choice(name, load_plugin("adapter", name).options())


def runtime_options(config: Config) -> RuntimeOptions:
    """Options of an episode, as the configuration says."""
    runtime = config.runtime
    mode = MODE_OF_CLOCK[runtime.clock]
    return RuntimeOptions(
        mode=mode,
        execute_horizon=runtime.execute_horizon,
        # In lock step nothing is late by itself: decode whole chunks and count those that would have been.
        budget_ns=None if mode is Mode.LOCK_STEP else round(runtime.deadline_ms * NS_PER_MS),
        time_scale=runtime.time_scale,
        is_observing_free=runtime.is_observing_free,
        chunks=ChunkOptions(hand_over=HandOver(runtime.hand_over), is_shifted_by_holds=runtime.is_shifted_by_holds),
        realtime=runtime.realtime,
    )
