"""What a calibration belongs to: this machine, its clocks and its libraries."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path

from vla_spec import doctor
from vla_spec.calib.cost_file import Device

_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_NVIDIA_SMI_TIMEOUT_S = 10


@functools.cache
def this_device() -> Device:
    """The machine as far as the system tells; asks once."""
    return Device(
        cpu=doctor.cpu_model(),
        cores=os.cpu_count(),  # of the machine: a process that is tied to some of them is on the same device
        gpu=doctor.gpu_name(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        memory=f"{doctor.memory_gib():.1f} GiB" if doctor.memory_gib() else None,
    )


def this_device_now() -> Device:
    """The same with governor and clocks as they are at this moment."""
    return this_device().model_copy(
        update={"governor": _governor(), "cpu_mhz": _cpu_mhz(), "gpu_clocks": _gpu_clocks()}
    )


def library_versions() -> dict[str, str]:
    """Python and the libraries that can have to do with speed: name -> version."""
    found = {name: version for name in doctor.LIBRARIES if (version := doctor.version_of(name))}
    return {"python": platform.python_version(), **found}


def _governor() -> str | None:
    try:
        return (_CPUFREQ / "scaling_governor").read_text().strip() or None
    except OSError:
        return None


def _cpu_mhz() -> float | None:
    try:
        return int((_CPUFREQ / "scaling_cur_freq").read_text()) / 1000
    except (OSError, ValueError):
        pass
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))
    except (OSError, ValueError, StopIteration):
        return None


def _gpu_clocks() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = "--query-gpu=clocks.sm,clocks.mem,power.limit"
    try:
        done = subprocess.run(
            [tool, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return " | ".join(done.stdout.split("\n")).strip(" |") or None
