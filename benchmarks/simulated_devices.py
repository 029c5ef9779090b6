"""Predict chunk rate and miss rate of an OpenVLA-7B-shaped policy on devices that are not at hand. All of it simulated.

    python benchmarks/simulated_devices.py --out runs/simulated [--chunks 500] [--spread 0.05] [--seed 0]

For every cost table in ``calib/published``: autoregression, speculation with the published fixed depth, and
deadline-aware speculation decode the same chunks with the real decoder and the real controllers on a virtual clock.
Tokens come from the toy engine; the drafter is right about each token with a probability that gives the published
tokens per forward at the published depth. Written to DIR/simulated_devices.json.

What is assumed and not published: independent errors of the drafter, and a log-normal spread of every call's cost
(``--spread``, its standard deviation of the logarithm; 0 = none).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import math
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec import __version__
from vla_spec.calib import cost_file
from vla_spec.calib.cost_file import CostFile, read_cost_file
from vla_spec.clock import VirtualClock
from vla_spec.config import resolve_choice
from vla_spec.costs import Costs, Quantiles
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.drafters.none import Options as NoDraft
from vla_spec.engines.toy import Options as ToyOptions
from vla_spec.engines.toy import ToyEngine
from vla_spec.interfaces import ChunkHistory, Drafter
from vla_spec.plugins import Parts, load
from vla_spec.progress import LiveProgress
from vla_spec.tokenizers import uniform_bins
from vla_spec.trace import write_json
from vla_spec.types import Draft, EngineInputs, Int32, Plan, StopReason, TokenDomain
from vla_spec.virtual_costs import ChargedDrafter, ChargedEngine, CostDistribution, CostTable

PUBLISHED = Path(cost_file.__file__).parent / "published"
#: OpenVLA: x, y, z, three rotations, gripper; 256 bins each.
NUM_DOFS, NUM_BINS = 7, 256
#: Control steps per chunk, by table; one where nothing else is published.
STEPS = {"h100_openvla_7b": (1, 3)}
#: Depth of the published trees (Spec-VLA, KERV).
FIXED_DEPTH = 4
#: Published tokens per forward behind the prefill (RTX 4090, LIBERO Goal), at that depth and for 7 tokens.
LENGTHS = {"strict 1.63": 1.63, "relaxed 2.36": 2.36}
#: Deadlines, as multiples of autoregression's median; None = take your time.
DEADLINES = (None, 0.7, 0.9, 1.0, 1.2)
WARMUP_CHUNKS = 50
NO_DEADLINE_NS = 10**13
LEVELS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
MS = 1_000_000


@dataclass(frozen=True)
class Row:
    """One cell of the table of tables. A simulation.

    Attributes:
        table: file of the costs.
        device: that is simulated.
        num_tokens: of a chunk.
        mode: autoregression, fixed or deadline.
        acceptance: of the drafter, by name; "-" = nothing is drafted.
        deadline_ms: None = none was set.
        chunks: that were planned, warm-up left out.
        chunk_ms_p50, chunk_ms_p99: from the observation to the answer, whole or not.
        rate_hz: whole chunks that were in time, per second of planning back to back.
        miss_rate: share of chunks that were not whole at the deadline.
        late_rate: share of answers that came after the deadline, whole or not.
        tokens: verified tokens per chunk that were there at the deadline.
        tokens_per_forward: behind the prefill.
        draft_length: tokens drafted per round behind the prefill.
    """

    table: str
    device: str
    num_tokens: int
    mode: str
    acceptance: str
    deadline_ms: float | None
    chunks: int
    chunk_ms_p50: float
    chunk_ms_p99: float
    rate_hz: float
    miss_rate: float | None
    late_rate: float | None
    tokens: float
    tokens_per_forward: float | None
    draft_length: float | None


class StatedDrafter:
    """Drafts a chain whose every token is the target's own with a stated probability, otherwise another one.

    The target's tokens come from a second engine of the same make, which decodes the chunk beforehand; that costs
    nothing on the virtual clock.
    """

    def __init__(self, shadow: ToyEngine, num_tokens: int, probability: float, rng: np.random.Generator) -> None:
        self._shadow, self._num_tokens, self._probability, self._rng = shadow, num_tokens, probability, rng
        self._chunk = np.zeros(num_tokens, np.int32)

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        alone = np.full(1, -1, np.int32)
        logits = self._shadow.prefill(inputs).logits
        for i in range(self._num_tokens):
            self._chunk[i] = logits[0].argmax()
            logits = self._shadow.step(self._chunk[i : i + 1], alone).logits
            self._shadow.commit(np.zeros(1, np.int32))

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        tokens = self._chunk[len(prefix) : len(prefix) + min(plan.gamma, plan.depth)].copy()
        is_wrong = self._rng.random(len(tokens)) >= self._probability
        tokens[is_wrong] = (tokens[is_wrong] + 1) % NUM_BINS
        return Draft.chain(tokens)


def probability_of(length: float, depth: int, num_tokens: int) -> float:
    """The chance per token that gives so many tokens per forward behind the prefill on average.

    Exact for a chain of ``depth`` and independent errors: rounds(n) = 1 + sum over j of P(j accepted) rounds(n - 1 - j)
    for n tokens left, with a draft of min(depth, n - 1); solved by bisection for rounds = (num_tokens - 1) / length.
    """

    def rounds(p: float) -> float:
        needed = [0.0]
        for left in range(1, num_tokens):
            longest = min(depth, left - 1)
            chances = [p**j * (1 - p) for j in range(longest)] + [p**longest]
            needed.append(1 + sum(chance * needed[left - 1 - j] for j, chance in enumerate(chances)))
        return needed[num_tokens - 1]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rounds(middle) > (num_tokens - 1) / length else (low, middle)
    return (low + high) / 2


def with_spread(costs: Costs, sigma: float) -> Costs:
    """Log-normal costs with the same medians."""
    if sigma == 0:
        return costs

    def spread(cost: Quantiles) -> Quantiles:
        return {level: cost[0.5] * math.exp(sigma * NormalDist().inv_cdf(level)) for level in LEVELS} if cost else {}

    return Costs(
        spread(costs.prefill),
        {k: spread(cost) for k, cost in costs.step.items()},
        {k: spread(cost) for k, cost in costs.draft.items()},
        spread(costs.encode),
        spread(costs.decode),
    )


def domain_of(num_steps: int) -> TokenDomain:
    """OpenVLA's action tokens: the last of each step is the gripper."""
    num_tokens = num_steps * NUM_DOFS
    is_switch = np.arange(num_tokens) % NUM_DOFS == NUM_DOFS - 1
    group = np.repeat(np.arange(num_steps), NUM_DOFS) * 2 + is_switch
    unit = np.where(is_switch, 1.0, 2 / 255).astype(np.float32)
    return TokenDomain(NUM_BINS, num_tokens, NUM_DOFS, group.astype(np.int32), is_switch, unit)


@functools.cache
def engine_and_shadow(num_steps: int, seed: int) -> tuple[ToyEngine, ToyEngine]:
    """Two of the same make; a prefill starts them over, so all simulations share them."""
    options, domain = ToyOptions(seed=seed, max_step=32), domain_of(num_steps)
    return ToyEngine(options, domain), ToyEngine(options, domain)


class Simulation:
    """One device, shape and mode on a virtual clock."""

    def __init__(self, costs: Costs, num_steps: int, mode: str, probability: float, seed: int) -> None:
        domain = domain_of(num_steps)
        engine, shadow = engine_and_shadow(num_steps, seed)
        self.clock = VirtualClock()
        tokenizer = uniform_bins.build(uniform_bins.Options())
        parts = Parts(domain, tokenizer, None, engine, costs, 1, seed)
        drafter: Drafter
        if mode == "autoregression":
            drafter = load("drafter", "none").build(NoDraft(), parts)
        else:
            drafter = StatedDrafter(shadow, domain.num_tokens, probability, np.random.default_rng([seed, 1]))
        choice = resolve_choice(
            "controller",
            {
                "autoregression": {"name": "fixed", "gamma": 0},
                "fixed": {"name": "fixed", "gamma": FIXED_DEPTH},
                "deadline": {"name": "deadline"},
            }[mode],
        )
        controller = load("controller", choice.name).build(choice.options, parts)
        rule_choice = resolve_choice("rule", "greedy")
        rule = load("rule", "greedy").build(rule_choice.options, parts)
        self.latency = np.random.default_rng([seed, 2])
        table = CostTable(costs.prefill, costs.step, costs.draft)
        self.encode, self.decode = CostDistribution(costs.encode or 0), CostDistribution(costs.decode or 0)
        self.decoder = SpeculativeDecoder(
            ChargedEngine(engine, table, self.clock, self.latency),
            ChargedDrafter(drafter, table, self.clock, self.latency),
            rule, controller, domain.num_tokens, self.clock.now_ns, np.random.default_rng([seed, 3]),
        )  # fmt: skip
        self.num_tokens = domain.num_tokens

    def plan(self, step: int, budget_ns: int) -> tuple[int, bool, int, int, int]:
        """One chunk: time taken [ns], is it whole, verified tokens, rounds behind the prefill, tokens drafted."""
        start = self.clock.now_ns()
        deadline_ns = start + budget_ns
        self.clock.advance(self.encode.draw_ns(self.latency))
        inputs = {"words": np.zeros((1, 8), np.int64), "step": np.array([step], np.int64)}
        decoded = self.decoder.decode(inputs, deadline_ns)
        if len(decoded.tokens):
            self.clock.advance(self.decode.draw_ns(self.latency))
        rounds = decoded.rounds[1:]
        is_whole = decoded.stop is StopReason.COMPLETE
        drafted = sum(one.num_drafted for one in rounds)
        return self.clock.now_ns() - start, is_whole, len(decoded.tokens), len(rounds), drafted

    def run(self, chunks: int, deadline_ms: float | None) -> dict[str, float | None]:
        """All chunks; the numbers of a `Row`."""
        budget_ns = NO_DEADLINE_NS if deadline_ms is None else round(deadline_ms * MS)
        planned = [self.plan(step, budget_ns) for step in range(WARMUP_CHUNKS + chunks)][WARMUP_CHUNKS:]
        taken_ns = np.array([one[0] for one in planned])
        is_whole = np.array([one[1] for one in planned])
        tokens = np.array([one[2] for one in planned])
        rounds, drafted = sum(one[3] for one in planned), sum(one[4] for one in planned)
        is_late = taken_ns > budget_ns
        first = (tokens > 0).sum()
        return {
            "chunk_ms_p50": round(float(np.median(taken_ns)) / MS, 2),
            "chunk_ms_p99": round(float(np.quantile(taken_ns, 0.99)) / MS, 2),
            "rate_hz": round(float((is_whole & ~is_late).sum() / (taken_ns.sum() / 1e9)), 3),
            "miss_rate": None if deadline_ms is None else round(float((~is_whole | is_late).mean()), 4),
            "late_rate": None if deadline_ms is None else round(float(is_late.mean()), 4),
            "tokens": round(float(np.where(is_late, 0, tokens).mean()), 3),
            "tokens_per_forward": round(float((tokens.sum() - first) / rounds), 3) if rounds else None,
            "draft_length": round(drafted / rounds, 3) if rounds else None,
        }


def simulate(path: Path, file: CostFile, chunks: int, sigma: float, seed: int, progress: LiveProgress) -> list[Row]:
    """All rows of one cost table."""
    table = file.tables[0]
    costs = with_spread(table.costs(table.drafters[0]), sigma)
    name = path.name.removesuffix(cost_file.SUFFIX)
    modes = [("autoregression", "-", 0.0)]
    for acceptance, length in LENGTHS.items():
        probability = probability_of(length, FIXED_DEPTH, NUM_DOFS)
        modes += [("fixed", acceptance, probability), ("deadline", acceptance, probability)]
    rows: list[Row] = []
    shapes = STEPS.get(name, (1,))
    progress.phase(name, len(shapes) * len(DEADLINES) * len(modes))
    for num_steps in shapes:
        reference_ms = 0.0
        for factor in DEADLINES:
            for mode, acceptance, probability in modes:
                deadline_ms = None if factor is None else round(factor * reference_ms, 2)
                simulation = Simulation(costs, num_steps, mode, probability, seed)
                found = simulation.run(chunks, deadline_ms)
                row = Row(name, str(file.device), simulation.num_tokens, mode, acceptance, deadline_ms, chunks, **found)  # type: ignore[arg-type]
                rows.append(row)
                if factor is None and mode == "autoregression":
                    reference_ms = row.chunk_ms_p50
                progress.step(f"{mode} {acceptance}")
    return rows


def print_rows(rows: list[Row], files: dict[str, CostFile], console: Console) -> None:
    """One table per device and shape: rate without a deadline; then, at each, chunks not whole, and answers late."""
    for name, num_tokens in dict.fromkeys((row.table, row.num_tokens) for row in rows):
        own = [row for row in rows if (row.table, row.num_tokens) == (name, num_tokens)]
        deadlines = list(dict.fromkeys(row.deadline_ms for row in own))
        title = f"SIMULATION, {num_tokens} tokens per chunk: {files[name].label}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("mode")
        for heading in (
            "p50 ms",
            "rate/s",
            *(f"missed / late %\nat {deadline:.0f} ms" for deadline in deadlines if deadline),
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        for mode, acceptance in dict.fromkeys((row.mode, row.acceptance) for row in own):
            cells = {row.deadline_ms: row for row in own if (row.mode, row.acceptance) == (mode, acceptance)}
            free = cells[None]
            bound = [cells[d] for d in deadlines if d is not None]
            misses = [f"{100 * (row.miss_rate or 0):.1f} / {100 * (row.late_rate or 0):.1f}" for row in bound]
            label = mode if acceptance == "-" else f"{mode}, {acceptance}"
            table.add_row(label, f"{free.chunk_ms_p50:.1f}", f"{free.rate_hz:.2f}", *misses)
        console.print(table)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments.add_argument("--chunks", type=int, default=500, help="per cell, behind the warm-up")
    arguments.add_argument("--spread", type=float, default=0.05, help="of every call: sigma of its logarithm")
    arguments.add_argument("--seed", type=int, default=0)
    asked = arguments.parse_args()
    if asked.chunks < 1 or asked.spread < 0 or asked.seed < 0:
        arguments.error("--chunks must be 1 or more, --spread and --seed 0 or more")
    files = {
        path.name.removesuffix(cost_file.SUFFIX): read_cost_file(path) for path in sorted(PUBLISHED.glob("*.json"))
    }
    rows: list[Row] = []
    with LiveProgress() as progress:
        for name, file in files.items():
            path = PUBLISHED / f"{name}{cost_file.SUFFIX}"
            rows += simulate(path, file, asked.chunks, asked.spread, asked.seed, progress)
    probabilities = {name: round(probability_of(length, FIXED_DEPTH, NUM_DOFS), 4) for name, length in LENGTHS.items()}
    result = {
        "kind": "simulation",
        "what": (__doc__ or "").splitlines()[0],
        "vla_spec": __version__,
        "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
        "command": shlex.join(["python", "benchmarks/simulated_devices.py", *sys.argv[1:]]),
        "seed": asked.seed,
        "assumptions": {
            "spread": asked.spread,
            "drafter_is_right_with_probability": probabilities,
            "fixed_depth": FIXED_DEPTH,
            "warm_up_chunks": WARMUP_CHUNKS,
        },
        "tables": {name: file.label for name, file in files.items()},
        "rows": [asdict(row) for row in rows],
    }
    out = asked.out / "simulated_devices.json"
    write_json(out, result)
    print_rows(rows, files, Console())
    print(out)


if __name__ == "__main__":
    main()
