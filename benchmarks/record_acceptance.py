"""Record how much of block-head drafts the shipped policy accepts, for `deadline_controllers.py` to play back.

    python benchmarks/record_acceptance.py [--seed-start 10000] [--chunks 360] [--out benchmarks/acceptance.json]

For every recorded observation the target decodes the chunk token by token; at every position the drafter is asked for
a draft to the chunk's end. Written per chunk: ``accepted[m]``, how many tokens of that draft are the target's own, and
``offered[c][m]``, how many the drafter would have offered with its ``min_confidence`` at c. Entry 0 is not used.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np

from vla_spec.assemble import Assembler
from vla_spec.config import merge, read_mode, resolve
from vla_spec.evaluation import first_observation, record, task_names
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts, load
from vla_spec.progress import Silent
from vla_spec.results import environment
from vla_spec.trace import write_json
from vla_spec.types import Plan

CONFIDENCES = (0.05, 0.15, 0.3)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed-start", type=int, default=10_000)
    arguments.add_argument("--chunks", type=int, default=360)
    arguments.add_argument("--out", type=Path, default=Path(__file__).with_name("acceptance.json"))
    asked = arguments.parse_args()

    config = resolve(merge(read_mode("exact")[1], {"runtime": {"clock": "lockstep"}}), "exact")
    tasks = task_names(config.robot, None)
    assembler = Assembler()
    first = first_observation(assembler, config.robot, tasks[0], asked.seed_start)
    assembly = assembler.assemble(config, first)
    recordings = record(
        assembler, assembly, tasks, range(asked.seed_start, asked.seed_start + 1), 200, asked.chunks, Silent()
    )
    engine, domain = assembly.engine, assembly.domain
    parts = Parts(domain, assembly.adapter.tokenizer, assembler.model_dir(config), engine)
    plugin = load("drafter", "block_head")
    drafters = [plugin.build(plugin.options(min_confidence=c), parts) for c in (0.0, *CONFIDENCES)]

    num_tokens, parents = domain.num_tokens, np.array([-1], np.int32)
    chunks = []
    for recording in recordings:
        before: tuple[int, np.ndarray] | None = None  # control step and tokens of the chunk before
        for observation in recording.observations[: -(-asked.chunks // len(recordings))]:
            inputs = assembly.adapter.encode(observation)
            history = None
            if before is not None:
                consumed = min((observation.step - before[0]) * domain.tokens_per_step, num_tokens)
                history = ChunkHistory(before[1], consumed)
            for drafter in drafters:
                drafter.begin(inputs, history)
            tokens = np.zeros(num_tokens, np.int32)
            tokens[0] = engine.prefill(inputs).logits[-1].argmax()
            drafts = [[np.zeros(0, np.int32)] for _ in drafters]
            for m in range(1, num_tokens):
                for drafter, made in zip(drafters, drafts, strict=True):
                    draft = drafter.propose(tokens[:m], Plan(num_tokens, num_tokens - m), engine.features)
                    made.append(draft.tokens.copy())
                tokens[m] = engine.step(tokens[m - 1 : m], parents).logits[-1].argmax()
                engine.commit(np.zeros(1, np.int32))
            accepted = [0]
            for m in range(1, num_tokens):
                draft = drafts[0][m]
                wrong = np.flatnonzero(draft != tokens[m : m + len(draft)])
                accepted.append(int(wrong[0]) if len(wrong) else len(draft))
            offered = {str(c): [len(draft) for draft in made] for c, made in zip(CONFIDENCES, drafts[1:], strict=True)}
            chunks.append({"task": recording.task, "accepted": accepted, "offered": offered})
            before = observation.step, tokens
    write_json(
        asked.out,
        {
            "what": "accepted tokens of block-head drafts per chunk position, greedy verification, one entry per chunk",
            "command": f"benchmarks/record_acceptance.py --seed-start {asked.seed_start} --chunks {asked.chunks}",
            "date": datetime.date.today().isoformat(),
            "model_hash": engine.info.model_hash,
            "machine": environment(config.num_threads),
            "num_tokens": num_tokens,
            "tokens_per_step": domain.tokens_per_step,
            "chunks": chunks,
        },
    )
    print(f"{len(chunks)} chunks in {asked.out}")


if __name__ == "__main__":
    main()
