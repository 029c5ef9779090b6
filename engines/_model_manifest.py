"""manifest.json of a model folder: which bytes an export wrote, so that a mixture of two exports is noticed.

Files that come later (a quantised graph, a fitted table) are not in it and not its business.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from vla_spec import __version__
from vla_spec.atomic import replacing
from vla_spec.engines._digest import sha256_of
from vla_spec.errors import BadModel

FORMAT = 1
MANIFEST = "manifest.json"
#: What an export writes; other files of a folder are somebody else's.
PATTERNS = ("*.onnx", "*.safetensors", "policy.json", "engine.json", "golden.npz", "tokenizer.json")


def write_manifest(folder: Path, command: str = "") -> Path:
    """Hash what was exported and write it down.

    Args:
        folder: the model folder.
        command: that made it.

    Returns:
        The file.
    """
    found = sorted(path for pattern in PATTERNS for path in folder.glob(pattern))
    files = [path for path in found if "." not in path.stem]  # decoder.int8.onnx comes later, with its own manifest
    values = {
        "format": FORMAT,
        "vla_spec": __version__,
        "command": command,
        "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
        "files": {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in files},
    }
    out = folder / MANIFEST
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return out


def check_manifest(folder: Path) -> None:
    """Compare the folder with its manifest; a folder without one is taken as it is.

    Raises:
        BadModel: a file is missing, cut off or changed, or the manifest can't be read; names it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        wanted = {str(name): (str(v["sha256"]), int(v["bytes"])) for name, v in values["files"].items()}
        if values["format"] != FORMAT or any(Path(name).name != name for name in wanted):
            raise ValueError(f"format {values['format']!r}; valid: {FORMAT}, names without folders")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadModel(f"{path}: not a manifest, or cut off ({error!r}); export the model again") from error
    for name, (sha256, size) in wanted.items():
        file = folder / name
        if not file.is_file():
            raise BadModel(f"{file}: missing, {MANIFEST} lists it; export the model again")
        if file.stat().st_size != size or sha256_of(file) != sha256:
            raise BadModel(f"{file}: not the file that {MANIFEST} lists (cut off, changed, or of another export)")
