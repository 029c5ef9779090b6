"""Time one draft of each drafter with a network, on any engine, over prefixes of real chunks.

    python benchmarks/drafter_networks.py [--model models/metaworld] [--engine onnxruntime] [--contexts 20] [--passes 3]

Disturbed copies of the folder's golden observation are decoded greedily; then each drafter is asked along a random walk
through each chunk, one to six tokens forward at a time and sometimes back. The first pass is warm-up. One thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vla_spec import plugins
from vla_spec.adapters import vla
from vla_spec.clock import MonotonicClock
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import Plan

PLANS = {
    "block_head": [Plan(4, 4), Plan(16, 16), Plan(31, 31), Plan(16, 16, 2), Plan(8, 8, 4)],
    "feature_head": [Plan(8, 8), Plan(31, 31), Plan(16, 16, 2), Plan(16, 6, 4), Plan(31, 4, 8), Plan(31, 31, 8)],
    "small_model": [Plan(4, 4), Plan(16, 16)],
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=Path("models/metaworld"))
    arguments.add_argument("--engine", default="onnxruntime")
    arguments.add_argument("--contexts", type=int, default=20)
    arguments.add_argument("--passes", type=int, default=3)
    asked = arguments.parse_args()

    adapter = vla.load(asked.model)
    first = Parts(adapter.domain, adapter.tokenizer, asked.model)
    plugin = plugins.load("engine", asked.engine)
    engine = plugin.build(plugin.options(), first)
    parts = Parts(adapter.domain, adapter.tokenizer, asked.model, engine)
    num_tokens, rng = adapter.domain.num_tokens, np.random.default_rng(0)
    with np.load(asked.model / "golden.npz", allow_pickle=False) as golden:
        base = {name: golden[name] for name in ("images", "words", "state")}
    contexts = []
    for _ in range(asked.contexts):
        noise = rng.integers(-25, 25, base["images"].shape)
        inputs = base | {
            "images": np.clip(base["images"].astype(int) + noise, 0, 255).astype(np.uint8),
            "state": base["state"] + rng.normal(0, 0.05, base["state"].shape).astype(np.float32),
        }
        tokens = [int(engine.prefill(inputs).logits[0].argmax())]
        while len(tokens) < num_tokens:
            last = np.array(tokens[-1:], np.int32)
            tokens.append(int(engine.step(last, np.array([-1], np.int32)).logits[0].argmax()))
            engine.commit(np.zeros(1, np.int32))
        contexts.append((inputs, np.array(tokens, np.int32), engine.features.copy()))
    prompt = len(contexts[0][2]) - (num_tokens - 1)

    now_ns = MonotonicClock().now_ns
    for name, plans in PLANS.items():
        plugin = plugins.load("drafter", name)
        for plan in plans:
            drafter, taken, nodes = plugin.build(plugin.options(), parts), [], []
            for round_ in range(asked.passes):
                for i, (inputs, tokens, features) in enumerate(contexts):
                    drafter.begin(inputs, ChunkHistory(contexts[i - 1][1], 16) if i % 3 else None)
                    m = 1
                    while m < num_tokens:
                        start = now_ns()
                        draft = drafter.propose(tokens[:m], plan, features[: prompt + m - 1])
                        if round_:
                            taken.append(now_ns() - start)
                            nodes.append(len(draft.tokens))
                        m += int(rng.integers(1, 7)) if rng.random() > 0.15 else -int(rng.integers(0, m))
            p10, p50, p99 = (np.quantile(taken, q) / 1e6 for q in (0.1, 0.5, 0.99))
            print(
                f"{asked.engine} {name} gamma {plan.gamma} depth {plan.depth} top_k {plan.top_k}: "
                f"{np.mean(nodes):.1f} nodes, p10 {p10:.3f} p50 {p50:.3f} p99 {p99:.3f} ms, n {len(taken)}"
            )


if __name__ == "__main__":
    main()
