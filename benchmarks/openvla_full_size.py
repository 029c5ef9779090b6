"""Export a checkpoint of OpenVLA-7B's structure with random weights, and say what that takes.

The checkpoint is written tensor by tensor, exported by `vla-spec export openvla` in a process of its own, whose peak
memory is the operating system's figure for it, and removed again.

    python benchmarks/openvla_full_size.py --work data/full --out full_size.json             # 30 GB of disk
    python benchmarks/openvla_full_size.py --work data/one --layers 1 --build --out one.json  # and its engine
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from vla_spec.atomic import replacing
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.nets.openvla.miniature import FULL_SIZE, write_checkpoint


def timed(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vla_spec.cli", *arguments], check=True)
    return time.perf_counter() - start


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that is made, filled and removed")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--build", action="store_true", help="compile the folder with TensorRT-RTX for SM 8.9 as well")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and model folder there")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args()
    checkpoint, folder = options.work / "checkpoint", options.work / "model"
    start = time.perf_counter()
    write_checkpoint(checkpoint, replace(FULL_SIZE, layers=options.layers))
    made = time.perf_counter() - start
    export_s = timed(
        ["export", "openvla", "--checkpoint", str(checkpoint), "--out", str(folder), "--unnorm-key", "bridge_orig"]
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    weights = WeightsFile.open(folder / "target.safetensors")
    result = {
        "layers": options.layers, "checkpoint_bytes": size(checkpoint), "model_folder_bytes": size(folder),
        "parameters": sum(t.length // 2 for t in weights.tensors.values()),
        "write_checkpoint_s": made, "export_s": export_s, "export_peak_rss_bytes": peak,
        "cores": os.cpu_count(), "machine": platform.machine(),
    }  # fmt: skip
    if options.build:
        result["build_s"] = timed(
            ["build", str(folder), "--backend", "tensorrt-rtx", "--precision", "fp16", "--sm", "89",
             "--tiers", "1,8,64,327", "--cache", str(options.work / "cache")]
        )  # fmt: skip
        manifest = next((options.work / "cache").rglob("manifest.json"))
        result["manifest"] = json.loads(manifest.read_text())
    with replacing(options.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "manifest"}, indent=1))
    if not options.keep:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
