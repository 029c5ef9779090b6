"""Write requirements/{run,train,test}.lock: exact versions of everything, resolved by pip for this interpreter.

Run it with the oldest Python that `make` supports: ``python3.11 requirements/lock.py``. The run lock is resolved
first and pins the others, so that one environment can hold all three. Local version labels such as ``+cpu`` are
left out: which build of PyTorch is taken depends on the machine's own pip configuration.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Lock -> extras of setup.py, each on top of the one before.
LOCKS = {
    "run": "run,report,profile,sim",
    "train": "run,report,profile,sim,train",
    "ros": "run,report,profile,sim,ros-wheels",
    "test": "run,report,profile,sim,train,ros-wheels,test",
}
#: Packages for CUDA that are asked for by name.
OWN_CUDA = {"cuda-bindings", "cuda-pathfinder"}
#: Builds the package itself without reaching for the network, see the Makefile.
BUILD = "setuptools>=70.1"


def resolve(extras: str, constraints: Path | None) -> dict[str, str]:
    """Name -> version of everything that ``pip install .[extras]`` would bring, the package itself left out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", report]
        command += ["-c", constraints] if constraints else []
        subprocess.run([*command, f"{ROOT}[{extras}]", BUILD], check=True)
        items = json.loads(report.read_text())["install"]
    found = {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in items}
    found.pop("vla-spec")
    # CUDA libraries belong to one build of PyTorch, which pulls in the right ones by itself; these two are our own.
    own = {
        name: version.split("+")[0]
        for name, version in found.items()
        if name in OWN_CUDA or not name.startswith(("nvidia-", "cuda-"))
    }
    return dict(sorted(own.items()))


def main() -> None:
    """Resolve and write all locks."""
    before: Path | None = None
    for name, extras in LOCKS.items():
        pins = resolve(extras, before if name != "ros" else Path(__file__).parent / "run.lock")
        path = Path(__file__).parent / f"{name}.lock"
        path.write_text("".join(f"{package}=={version}\n" for package, version in pins.items()))
        print(f"{path.relative_to(ROOT)}: {len(pins)} packages")
        if name != "ros":
            before = path


if __name__ == "__main__":
    main()
