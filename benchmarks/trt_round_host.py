"""What our own Python costs in one round of the TensorRT engine: the driver's functions are replaced by empty ones.

    python benchmarks/trt_round_host.py [--calls 20000] [--out runs/trt-round-host]

Needs cuda-bindings and no GPU. This is a part of a round's host time, and says nothing about what CUDA, TensorRT or the
GPU take: `vla-spec gpu check` measures those. Written: results.json, and a table on stdout.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vla_spec.clock import MonotonicClock
from vla_spec.engines._trt.cache_state import DeviceState
from vla_spec.engines._trt.cuda import CudaBindings
from vla_spec.engines._trt.graph import Capture, TensorRTCall, _Handles
from vla_spec.engines._trt.lane import Lane
from vla_spec.engines._trt.memory import Piece
from vla_spec.gpu_check import time_calls
from vla_spec.profiling.planning import quiet
from vla_spec.results import environment
from vla_spec.trace import write_json


class EmptyRuntime:
    """cuda.bindings.runtime whose functions do nothing and succeed; types and constants are the real ones."""

    def __init__(self, real):
        self._real, self._answer = real, (real.cudaError_t.cudaSuccess, 4096)

    def __getattr__(self, name):
        found = getattr(self._real, name)
        if name.startswith("cuda") and callable(found) and not isinstance(found, type):

            def found(*arguments):
                return self._answer

        setattr(self, name, found)
        return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--calls", type=int, default=20_000)
    arguments.add_argument("--out", type=Path, default=Path("runs/trt-round-host"))
    asked = arguments.parse_args()
    cuda = CudaBindings()
    cuda._cuda = EmptyRuntime(cuda._cuda)
    lane = Lane(cuda, 0, 0, is_blocking=False)
    context = SimpleNamespace(execute_async_v3=lambda stream: True)
    pieces = [Piece(4096, 8192, 100)]

    def call(capture):
        handles = _Handles(context)
        if capture is not Capture.NEVER:
            handles.executable = 7
        return TensorRTCall("step", lane, handles, pieces, pieces, None, capture, str)

    state = DeviceState((28, 1, 6, 77, 32), 2, lane)
    path = np.array([20, 22, 24, 25], np.int32)
    measured = {
        "captured round: launch, record, wait": call(Capture.IF_POSSIBLE),
        "uncaptured round: copy, enqueue, copy, record, wait": call(Capture.NEVER),
    }
    measured["captured round: launch, record, wait"]._is_settled = True
    calls = {name: one.run for name, one in measured.items()}
    calls["commit of 4 rows of a tree: 2 copies"] = lambda: state.move(20, path)
    results = {}
    with quiet():
        for name, run in calls.items():
            results[name] = time_calls(run, asked.calls, 100, MonotonicClock().now_ns)._asdict()
            timing = results[name]
            print(f"{name}: p50 {timing['p50_us']:.2f} us, p99 {timing['p99_us']:.2f} us (n = {timing['n']})")
    asked.out.mkdir(parents=True, exist_ok=True)
    tree = {
        "command": shlex.join(["python", *sys.argv]),
        "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
        "machine": environment(1), "calls": results,
    }  # fmt: skip
    write_json(asked.out / "results.json", tree)
    print(asked.out / "results.json")


if __name__ == "__main__":
    main()
