"""The source tree as a packager gets it: what git knows or would add, without weights, tests and build leftovers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def copy_source(target):
    """Copy it to the folder ``target``, links as links; skips the test where this is no git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or name.startswith(("models/", "tests/")) or not (path.is_symlink() or path.is_file()):
            continue
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            copy.symlink_to(path.readlink())
        else:
            copy.write_bytes(path.read_bytes())
    return target
