"""Nodes as processes, for the demonstration and the tests: started with parameters, ended by SIGINT or killed.

No ROS in here: `launch` does this on a robot; it is not in every installation.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import final

from vla_spec.errors import BadConfig

#: How long a node may take to end after SIGINT before it is killed [s].
END_TIMEOUT_S = 10.0


@final
class NodeProcesses:
    """A group of nodes; leaving the block ends all of them.

    Args:
        log_dir: one file per node; made if it is not there.
        environment: on top of this process's own, such as ROS_DOMAIN_ID.
    """

    def __init__(self, log_dir: Path, environment: Mapping[str, str] | None = None) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        self._log_dir = log_dir
        # Where ROS comes from wheels, the environment of Python is the prefix in which its packages are found.
        prefix = {"AMENT_PREFIX_PATH": os.environ.get("AMENT_PREFIX_PATH") or sys.prefix}
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **prefix, **(environment or {})}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> NodeProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end_all()

    def start(
        self, node: str, params_file: Path | None = None, params: Mapping[str, str] | None = None, namespace: str = ""
    ) -> subprocess.Popen[bytes]:
        """Start ``vla_spec.nodes.<node>``.

        Args:
            node: module name, as ``policy_node``.
            params_file: YAML.
            params: single values on top of it, as YAML text.
            namespace: of the node, as ``/left``; empty = none.

        Raises:
            BadConfig: it is running already, or the file is missing.
        """
        if node in self.running and self.running[node].poll() is None:
            raise BadConfig(f"{node} is running already")
        if params_file is not None and not params_file.is_file():
            raise BadConfig(f"{params_file}: no such parameter file")
        command = [sys.executable, "-m", f"vla_spec.nodes.{node}", "--ros-args"]
        if params_file is not None:
            command += ["--params-file", str(params_file)]
        for name, value in (params or {}).items():
            command += ["-p", f"{node}:{name}:={value}"]  # for this node: stronger than the wildcards of a file
        if namespace:
            command += ["-r", f"__ns:={namespace}"]
        with (self._log_dir / f"{node}.log").open("ab") as log:
            # Its own process group: Ctrl-C reaches this process, which then ends the nodes in order.
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        self.running[node] = process
        return process

    def end(self, node: str, number: signal.Signals = signal.SIGINT) -> int:
        """Ask one to end and wait; killed after `END_TIMEOUT_S`. Returns its exit code."""
        process = self.running.pop(node)
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(END_TIMEOUT_S)
            process.kill()
        return process.wait()

    def end_all(self, order: Sequence[str] = ()) -> dict[str, int]:
        """End all, those in ``order`` first. Returns exit codes by node."""
        names = [*(n for n in order if n in self.running), *(n for n in self.running if n not in order)]
        return {name: self.end(name) for name in names}

    def log(self, node: str) -> str:
        """What a node wrote so far."""
        path = self._log_dir / f"{node}.log"
        return path.read_text(errors="replace") if path.exists() else ""
