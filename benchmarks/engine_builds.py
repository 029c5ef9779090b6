"""What building TensorRT engines costs, and what finding one in the cache costs instead. No GPU is needed.

    python benchmarks/engine_builds.py model [--model models/metaworld] [--sm 89] [--precision fp16] [--repeats 30]
    python benchmarks/engine_builds.py layer [--tiers 1,8,32,304] [--layers 1]

`model` builds a model folder into a fresh cache, then measures (a) a second `vla-spec build` of the same, which
prepares the graphs, makes the key, and reads and hashes every plan, and (b) what a runtime does when it loads: find by
manifest, hash the graphs, read and hash every plan. Deserialising and loading to the device come on top and need a GPU.

`layer` builds decoder layers of OpenVLA-7B's true size (Llama-2-7B: width 4096, 32 heads, feed-forward 11008) with
random weights, in a process of its own, and reports time, plan size and peak memory.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vla_spec.engines import cache
from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines._trt import builder, inspection
from vla_spec.engines._trt.builder import BuilderOptions
from vla_spec.engines._trt.library import open_library
from vla_spec.engines._trt.profiles import Size
from vla_spec.engines.build import BuildOptions, build_engine
from vla_spec.engines.graphs.decoder import decoder_model
from vla_spec.progress import Silent
from vla_spec.results import environment
from vla_spec.trace import write_json

#: Rows of OpenVLA's prompt (256 patches, about 40 words) and its action tokens, rounded up.
OPENVLA_CAPACITY = 320


def openvla_layers(num_layers: int) -> DecoderSpec:
    """Llama-2-7B's decoder, fewer layers."""
    return DecoderSpec(
        num_layers=num_layers, num_heads=32, num_kv_heads=32, head_width=128, hidden_width=4096, mlp_width=11008,
        vocab_size=256, capacity=OPENVLA_CAPACITY, norm="rms", norm_epsilon=1e-6, mlp="silu_gated", rope_theta=10000.0,
    )  # fmt: skip


def write_random_model(spec: DecoderSpec, folder: Path) -> Path:
    """target.safetensors with random weights, and decoder.onnx; returns the graph."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    width, heads = spec.hidden_width, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_width

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns), np.float32) * 0.02).astype(np.float16)

    tensors = {"final_norm.weight": np.ones(width, np.float16), "head.weight": matrix(spec.vocab_size, width)}
    for i in range(spec.num_layers):
        tensors |= {
            f"blocks.{i}.norm1.weight": np.ones(width, np.float16),
            f"blocks.{i}.norm2.weight": np.ones(width, np.float16),
            f"blocks.{i}.qkv.weight": matrix(heads, width),
            f"blocks.{i}.out.weight": matrix(width, spec.num_heads * spec.head_width),
            f"blocks.{i}.gate.weight": matrix(spec.mlp_width, width),
            f"blocks.{i}.up.weight": matrix(spec.mlp_width, width),
            f"blocks.{i}.down.weight": matrix(width, spec.mlp_width),
        }
    save_file(tensors, folder / "target.safetensors")
    graph = folder / "decoder.onnx"
    graph.write_bytes(decoder_model(spec, WeightsFile.open(folder / "target.safetensors")).SerializeToString())
    return graph


def build_layers(arguments: argparse.Namespace, answer: multiprocessing.Queue[dict[str, object]]) -> None:
    """In a process of its own: its peak memory is the build's."""
    library = open_library("tensorrt-rtx")
    tiers = [int(tier) for tier in arguments.tiers.split(",")]
    spec = openvla_layers(arguments.layers)
    graph_file = Path(arguments.folder) / "decoder.onnx"
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    prepared = builder.prepare(graph_file, arguments.precision)
    built = builder.build(library, prepared, [{"k": Size.exactly(t)} for t in tiers], BuilderOptions((arguments.sm,)))
    inspection.check_summary("decoder", built.summary, arguments.precision, 2 * spec.num_layers, spec.num_layers)
    answer.put(
        {
            "library": f"{library.backend} {library.version}", "sm": arguments.sm, "layers": spec.num_layers,
            "tiers": tiers, "precision": arguments.precision, "build_s": round(built.seconds, 2),
            "weights_mb": round((graph_file.parent / "target.safetensors").stat().st_size / 1e6, 1),
            "plan_mb": round(memoryview(built.plan).nbytes / 1e6, 1),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "memory_before_mb": round(before_mb), "is_decomposed": built.is_decomposed,
            "summary": built.summary.to_json(),
        }
    )  # fmt: skip


def layer(arguments: argparse.Namespace) -> dict[str, object]:
    """Write the weights here, build in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = folder
        write_random_model(openvla_layers(arguments.layers), Path(folder))
        context = multiprocessing.get_context("spawn")
        answer: multiprocessing.Queue[dict[str, object]] = context.Queue()
        process = context.Process(target=build_layers, args=(arguments, answer))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"the build ended with {process.exitcode}")
        return answer.get(timeout=10)


def model(arguments: argparse.Namespace) -> dict[str, object]:
    """Build once, then find it again."""
    folder, options = arguments.model, BuildOptions(
        precision=arguments.precision, builder=BuilderOptions((arguments.sm,))
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        start = time.perf_counter()
        engine = build_engine(folder, options, Silent(), where)
        build_s = time.perf_counter() - start
        version = engine.identity.library["version"]
        wanted = cache.Wanted("tensorrt-rtx", version, arguments.precision, arguments.sm)

        def load() -> None:
            found = cache.load(folder, wanted, where)
            for name in found.graphs:
                found.read_plan(name)

        def again() -> None:
            assert build_engine(folder, options, Silent(), where).was_cached

        timed = {"load": timings(load, arguments), "build_again": timings(again, arguments)}
    return {
        "library": f"tensorrt-rtx {version}", "sm": arguments.sm, "precision": arguments.precision,
        "model": str(folder), "tiers": list(engine.tiers), "build_s": round(build_s, 3),
        "plans_mb": round(engine.size / 1e6, 1),
        "graphs": {n: {"build_s": e.build_seconds, "mb": round(e.size / 1e6, 2)} for n, e in engine.graphs.items()},
        **timed,
        "share_of_build": {name: round(t["p50_ms"] / 1000 / build_s, 4) for name, t in timed.items()},
    }  # fmt: skip


def timings(call, arguments: argparse.Namespace) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Wall time of a call, warm-up left out."""
    took = []
    for i in range(arguments.warm_up + arguments.repeats):
        start = time.perf_counter()
        call()
        if i >= arguments.warm_up:
            took.append(1000 * (time.perf_counter() - start))
    quantiles = {f"p{q}_ms": round(float(np.percentile(took, q)), 2) for q in (50, 99)}
    return {**quantiles, "n": len(took), "warm_up": arguments.warm_up}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("model", "layer"))
    parser.add_argument("--model", type=Path, default=Path("models/metaworld"))
    parser.add_argument("--sm", type=int, default=89)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--tiers", default="1,8,32,304")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    found = {"model": model, "layer": layer}[arguments.what](arguments)
    found |= {
        "command": shlex.join(["python", *sys.argv]), "environment": environment(1),
        "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
    }  # fmt: skip
    out = arguments.out or Path("runs") / f"engine-builds-{arguments.what}"
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", found)
    for key, value in found.items():
        if key not in ("environment", "summary"):
            print(f"{key}: {value}")
    print(out / "results.json")


if __name__ == "__main__":
    main()
