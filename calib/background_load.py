"""Keep the machine busy in a known way while something is measured: child processes that end when they should.

Run as a module it is one such process: ``python -m vla_spec.calib.background_load KIND PARENT``. It watches its
parent, so that it also ends if the parent is killed and can't clean up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import final

import numpy as np

from vla_spec.errors import BadConfig, UnknownOption, VlaSpecError

#: Key -> what one process does.
KINDS = {
    "idle": "nothing of ours beside the measurement",
    "busy": "a process that runs an interpreter loop out of its caches, without memory traffic to speak of",
    "memory": "a process that copies 64 MiB to and fro, as fast as memory takes it",
}
_COPIED_BYTES = 64 << 20
#: Loop turns between two looks at the parent; some milliseconds.
_TURNS = 50_000
_READY_LINE = "ready"
_END_TIMEOUT_S = 5.0


class LoadFailed(VlaSpecError):
    """The load did not run as asked: what was measured meanwhile is worth nothing."""


@final
class BackgroundLoad:
    """Processes that load the machine while the block lasts.

    They are in a session of their own, so that Ctrl-C reaches only the parent, which ends them in an orderly way.

    Args:
        kind: one of `KINDS`.
        num_processes: how many; each keeps one core busy. ``idle`` has none.

    Raises:
        UnknownOption: no such kind.
        BadConfig: a load without processes.
    """

    def __init__(self, kind: str, num_processes: int) -> None:
        if kind not in KINDS:
            raise UnknownOption("load", kind, KINDS, "--load")
        if kind != "idle" and num_processes < 1:
            raise BadConfig(f"--load-processes is {num_processes}; valid: 1 or more for load {kind!r}")
        self.kind, self.num_processes = kind, 0 if kind == "idle" else num_processes
        self._processes: list[subprocess.Popen[str]] = []

    @property
    def description(self) -> str:
        """In words, with the number of processes."""
        return KINDS[self.kind] if self.kind == "idle" else f"{self.num_processes} x {KINDS[self.kind]}"

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that were started."""
        return tuple(process.pid for process in self._processes)

    def __enter__(self) -> BackgroundLoad:
        try:
            for _ in range(self.num_processes):
                self._processes.append(self._start())
            for process in self._processes:
                assert process.stdout is not None
                if process.stdout.readline().strip() != _READY_LINE:
                    raise LoadFailed(f"load {self.kind!r}: its process ended before it began to work")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        num_early = self._end()
        if num_early and kind is None:
            raise LoadFailed(f"load {self.kind!r}: {num_early} of its processes ended too early; measure again")

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "vla_spec.calib.background_load", self.kind, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _end(self) -> int:
        """End all of them. Returns how many had ended by themselves.

        These are told by how they ended: one that is dying, but still has threads, looks alive when it is asked.
        """
        num_early = 0
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                num_early += process.wait(_END_TIMEOUT_S) != -signal.SIGTERM
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._processes.clear()
        return num_early


def work(kind: str, parent: int) -> None:
    """Load one core until the parent is gone. Never returns before."""
    sys.stdout.write(f"{_READY_LINE}\n")
    sys.stdout.flush()
    source = np.zeros(_COPIED_BYTES // 8 if kind == "memory" else 1)
    target = np.ones_like(source)
    state = 1
    while os.getppid() == parent:
        if kind == "memory":
            np.copyto(target, source)
            np.copyto(source, target)
        else:
            for _ in range(_TURNS):
                state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
